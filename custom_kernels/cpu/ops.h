// Everything of a token that is not a weight matrix: norms, activations, convolution, recurrences,
// attention. Plain float32 arrays in, plain float32 arrays out; one thread; no allocation.
// Results never depend on how a caller splits heads, rows or tokens over calls.
// Element-wise functions may write over their input. Nothing needs alignment.
#pragma once

#include <cstdint>

#include "format.h"

namespace flash {

// l and a are `limit` and `alpha`; gelu is the approximation by tanh (Hendrycks and Gimpel 2016,
// arXiv 1606.08415). Experts of three matrices have the first six, of two the others.
enum class Activation : uint8_t {
  swiglu,   // silu(gate) * up
  clamped,  // gpt-oss: min(gate, l) * sigmoid(a * min(gate, l)) * (clip(up, -l, l) + 1)
  limited,  // deepseek-v4.1: silu(min(gate, l)) * clip(up, -l, l)
  capped,   // step-3.5: min(silu(gate), l) * clip(up, -l, l)
  situ,     // kimi-k3: l tanh(gate / l) sigmoid(gate) * a tanh(up / a), or * up where a is 0
  geglu,    // gelu(gate) * up
  relu2,    // max(up, 0)^2
  silu,     // silu(up)
  gelu,     // gelu(up)
};

constexpr bool is_gated(Activation a) { return a < Activation::relu2; }

constexpr int64_t kMaxTaps = 16;  // of conv1d

struct Ops {
  // Conversions of n elements. Rounding is to nearest even.
  void (*to_float)(const void* x, Float type, int64_t n, float* y);
  void (*from_float)(const float* x, Float type, int64_t n, void* y);

  // y = x / sqrt(mean(x^2) + eps) * weight; weight may be null (ones).
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);

  // y = scale x / sqrt(sum(x^2) + eps). Queries and keys of a gated delta rule are this with
  // eps 1e-6 and scales dk^-1/2 and 1.
  void (*l2_norm)(const float* x, float eps, float scale, int64_t n, float* y);

  // y[i] = activation(gate[i], up[i]). gate is unused by those that are not gated.
  void (*activate)(Activation a, const float* gate, const float* up, int64_t n, float limit,
                   float alpha, float* y);
  void (*sigmoid)(const float* x, int64_t n, float* y);
  void (*softplus)(const float* x, int64_t n, float* y);

  void (*add)(const float* a, const float* b, int64_t n, float* y);
  void (*mul)(const float* a, const float* b, int64_t n, float* y);
  void (*scale)(float s, const float* x, int64_t n, float* y);
  void (*axpy)(float s, const float* x, int64_t n, float* y);  // y += s x
  float (*dot)(const float* a, const float* b, int64_t n);

  // In place softmax over n.
  void (*softmax)(float* x, int64_t n);

  // The k <= n largest of x, largest first, the lower index first among equals.
  void (*top_k)(const float* x, int64_t n, int64_t k, uint32_t* indices);

  // Causal depthwise convolution then silu (or not), over channels [c0, c1).
  // x: [taps - 1 + tokens, channels] (history first, row stride x_stride); weight [channels, taps],
  // at most kMaxTaps of them; bias [channels] or null; y: [tokens, channels], row stride y_stride.
  void (*conv1d)(const float* x, int64_t x_stride, const float* weight, const float* bias,
                 int64_t taps, int64_t tokens, int64_t c0, int64_t c1, bool silu, float* y,
                 int64_t y_stride);

  // What a gated delta rule forgets and learns of one token, for `heads` heads:
  //   g = exp(-exp(A_log) softplus(a + dt_bias));  beta = sigmoid(b)
  void (*gated_delta_gates)(const float* a, const float* b, const float* A_log,
                            const float* dt_bias, int64_t heads, float* g, float* beta);

  // Gated delta rule for one value head over `tokens` tokens, rows [v0, v1) of the state:
  //   S = g_t S;  d = beta_t (v_t - S k_t);  S = S + d k_t^T;  y_t = S q_t
  // q, k: [tokens, dk] with row strides; v, y: [tokens, dv] with row strides; g, beta: one per
  // token with a stride; state [dv, dk], updated in place. (Yang et al. 2024, arXiv 2412.06464)
  void (*gated_delta)(int64_t tokens, const float* q, int64_t q_stride, const float* k,
                      int64_t k_stride, const float* v, int64_t v_stride, const float* g,
                      int64_t g_stride, const float* beta, int64_t beta_stride, int64_t dk,
                      int64_t v0, int64_t v1, float* state, float* y, int64_t y_stride);

  // The time steps of one token of Mamba2, for `heads` heads: clip(softplus(dt + bias), low, high).
  void (*ssm_steps)(const float* dt, const float* bias, float low, float high, int64_t heads,
                    float* y);

  // Mamba2 for one head over `tokens` tokens, rows [d0, d1) of the state (head_dim rows of n):
  //   S = exp(a dt_t) S + dt_t x_t B_t^T;  y_t = S C_t + skip x_t     with a = -exp(A_log)
  // x, y: [tokens, head_dim]; b, c: [tokens, n]; dt one per token, already softplus'ed and clipped.
  void (*ssm)(int64_t tokens, const float* x, int64_t x_stride, const float* b, int64_t b_stride,
              const float* c, int64_t c_stride, const float* dt, int64_t dt_stride, float a,
              float skip, int64_t n, int64_t d0, int64_t d1, float* state, float* y,
              int64_t y_stride);

  // Rotary embedding of one head vector at one position, the first `dims` of it, in place.
  // cos_sin: dims / 2 cosines, then dims / 2 sines. traditional pairs (2i, 2i + 1), otherwise
  // (i, i + dims / 2).
  void (*rope)(float* x, const float* cos_sin, int64_t dims, bool traditional);

  // Attention of `queries` rows of q over keys [length, dim] and values [length, vdim] of `type`,
  // row strides in elements. Row i sees keys [first[i], last[i]) of [0, length); nothing seen gives
  // zeros. sinks: for each row a logit that takes part in the softmax without a value, or null.
  // Rows may be of several heads that share keys and values, which are then read once for all.
  // y: [queries, vdim].
  void (*attention)(const float* q, int64_t q_stride, int64_t queries, const void* keys,
                    int64_t key_stride, const void* values, int64_t value_stride, Float type,
                    const int64_t* first, const int64_t* last, int64_t dim, int64_t vdim,
                    float scale, const float* sinks, float* y, int64_t y_stride);
};

}  // namespace flash
