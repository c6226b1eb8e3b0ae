// Whole blocks of a decoder layer, one token of each sequence at a time: one node of MLX's graph
// and a few barriers where the stock block has sixty nodes.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "experts.h"

namespace flash {

// The weight of a normalization, in float32.
struct Norm {
  std::vector<float> weight;
  float eps;
};

// The router that comes next, which guesses at its experts from the hidden state at hand: between
// the two lie one MoE's and one mixer's contribution, a small part of the residual stream.
struct NextRouter {
  Norm norm;
  Weights router;  // [experts, in]
  int top_k;
  std::shared_ptr<ExpertPool> pool;
};

// h + moe(norm(h)), as qwen3_next's sparse MoE block: softmax over all experts, the top_k of it,
// renormalized or not, plus a shared expert behind a sigmoid gate.
struct MoeBlock : Shared<MoeBlock> {
  Norm norm;
  Weights router;  // [experts, in]
  int top_k;
  bool renormalize;
  std::shared_ptr<Experts> experts;
  std::shared_ptr<Experts> shared;     // a stack of one, or none
  std::optional<Weights> shared_gate;  // [1, in]
  std::optional<NextRouter> next;
};

// h + gated_delta_net(norm(h)), as qwen3_5's. Keys and queries have `key_heads`, values
// `value_heads`, a multiple of it.
struct DeltaBlock : Shared<DeltaBlock> {
  Norm norm;
  Weights qkv, z, b, a, out;
  std::vector<float> conv;  // [channels, taps]
  int taps;
  std::vector<float> a_log, dt_bias;  // [value_heads]
  Norm gated_norm;                    // [value_dim]
  int key_heads, value_heads, key_dim, value_dim;
};

// h + attention(norm(h)), as qwen3_next's: query and output gate from one projection, norms on
// queries and keys, rotary embedding of the first `rope_dims`.
struct AttentionBlock : Shared<AttentionBlock> {
  Norm norm;
  Weights q, k, v, out;
  Norm q_norm, k_norm;
  int heads, kv_heads, head_dim;
  int rope_dims;
  float rope_base, rope_scale, scale;
};

}  // namespace flash
