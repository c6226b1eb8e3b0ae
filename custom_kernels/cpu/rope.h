// Angles of rotary embeddings, the same for whoever turns a vector at some position.
#pragma once

#include "primitive.h"

namespace flash {

// base^(-2 i / dims) for i < dims / 2, in float32 as MLX computes them. Evaluated, made once.
mx::array rope_frequencies(float base, int dims);

// dims / 2 cosines of position * frequency, then as many sines: what Ops::rope takes.
void rope_turn(const float* frequencies, int dims, float position, float* cos_sin);

}  // namespace flash
