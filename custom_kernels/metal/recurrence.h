// Activations of the recurrent layers in float32, and sums over the lanes that share a row.

inline float silu(float x) {
  return x / (1.0f + metal::precise::exp(-x));
}

// log(1 + exp(x)) for every x; log1p is MLX's.
inline float softplus(float x) {
  return metal::max(x, 0.0f) + log1p(metal::precise::exp(-metal::abs(x)));
}

// The sum over 8 neighbouring lanes, in each of them.
inline float sum8(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  x += simd_shuffle_xor(x, ushort(2));
  return x + simd_shuffle_xor(x, ushort(4));
}
