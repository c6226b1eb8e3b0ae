// Weight matrices as MLX arrays hold them: what goes together, and what does not.
#pragma once

#include <string>

#include "primitive.h"

namespace flash {

// The format of weights [..., out, words] and what belongs to them, the leading axes being a stack.
// Without scales they are dense, [..., out, in]. Throws std::invalid_argument, in words for whoever
// called from Python, where shapes, dtypes, mode, bits and group do not go together.
Format format_of(const mx::array& w, const mx::array* scales, const mx::array* biases, int group,
                 int bits, const std::string& mode);

// Activations that one weight matrix takes.
int64_t inputs_of(const mx::array& w, const Format& format);

// The matrix that evaluated, row contiguous arrays hold; matrix 0 where they hold a stack.
// `scales` and `biases` may be null.
Matrix matrix_of(const mx::array& w, const mx::array* scales, const mx::array* biases,
                 const Format& format);

}  // namespace flash
