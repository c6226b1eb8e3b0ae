// What stands between the two products of an expert. l and a are limit and alpha; the numbers are
// those of ACTIVATIONS in mlx_flash/kernels/metal/experts.py. gelu is the approximation by tanh
// (Hendrycks and Gimpel 2016, arXiv 1606.08415).

constant constexpr int SWIGLU = 0;   // silu(gate) * up
constant constexpr int CLAMPED = 1;  // min(gate, l) * sigmoid(a min(gate, l)) * (clip(up, l) + 1)
constant constexpr int LIMITED = 2;  // silu(min(gate, l)) * clip(up, l)
constant constexpr int CAPPED = 3;   // min(silu(gate), l) * clip(up, l)
constant constexpr int SITU = 4;     // l tanh(gate / l) sigmoid(gate) * a tanh(up / a), or * up
constant constexpr int GEGLU = 5;    // gelu(gate) * up
constant constexpr int RELU2 = 6;    // max(up, 0)^2
constant constexpr int SILU = 7;     // silu(up)
constant constexpr int GELU = 8;     // gelu(up)

inline float sigmoid(float v) {
  return 1.0f / (1.0f + metal::exp(-v));
}

inline float gelu(float v) {
  const float inner = 0.7978845608028654f * fma(0.044715f * v * v, v, v);
  return 0.5f * v * (1.0f + metal::precise::tanh(inner));
}

template <int KIND>
inline float activated(float gate, float up, float limit, float alpha) {
  if constexpr (KIND == SWIGLU) {
    return gate * sigmoid(gate) * up;
  } else if constexpr (KIND == CLAMPED) {
    const float g = metal::min(gate, limit);
    return g * sigmoid(alpha * g) * (metal::clamp(up, -limit, limit) + 1.0f);
  } else if constexpr (KIND == LIMITED) {
    const float g = metal::min(gate, limit);
    return g * sigmoid(g) * metal::clamp(up, -limit, limit);
  } else if constexpr (KIND == CAPPED) {
    return metal::min(gate * sigmoid(gate), limit) * metal::clamp(up, -limit, limit);
  } else if constexpr (KIND == SITU) {
    const float g = limit * metal::precise::tanh(gate / limit) * sigmoid(gate);
    return g * (alpha != 0 ? alpha * metal::precise::tanh(up / alpha) : up);
  } else if constexpr (KIND == GEGLU) {
    return gelu(gate) * up;
  } else if constexpr (KIND == RELU2) {
    const float positive = metal::max(up, 0.0f);
    return positive * positive;
  } else if constexpr (KIND == SILU) {
    return up * sigmoid(up);
  } else {
    return gelu(up);
  }
}
