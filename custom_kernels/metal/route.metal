// A router's choice of experts, from its logits to their scores.
//   logits [T,E] -> ids [T,K], the best first and the smaller id first among equals; scores [T,K].
// Own score p: softmax over all experts or sigmoid, in float32. What experts are chosen by: p +
// correction if there is one, p if there are groups, else the logit. Groups: the E / GROUPS experts
// of all but the TOP_GROUPS groups with the best maximum, or sum of their two best, are chosen by 0
// (DeepSeek-V3, arXiv 2412.19437, and mlx-lm's group_expert_select). Scores: p of the chosen, or
// softmax over their logits; divided by their sum + eps if NORMALIZE; times scale.
// A NaN is worse than any number.
//
// Bytes: 2 or 4 T E; operations: K (3 E / 32 + 3 reductions) for each lane. Grid: 32 T, a simdgroup a
// token, E / 32 experts in the registers of a lane. In decode one core works, for some 2 us by
// expectation, not measurement: the launch is what it costs, where MLX has about six.
constexpr int SOFTMAX = 0;
constexpr int SOFTMAX_TOP_K = 2;
constexpr bool BY_LOGIT = !CORRECTED && GROUPS == 1;

const uint lane = thread_index_in_simdgroup;
const uint token = thread_position_in_grid.x / 32;
const uint experts = uint(logits_shape[1]);

float own[HELD];
float top = -INFINITY;
#pragma unroll
for (int i = 0; i < HELD; i++) {
  const uint e = lane + 32 * i;
  own[i] = e < experts ? float(logits[token * experts + e]) : -INFINITY;
  top = metal::max(top, own[i]);
}

float choice[HELD];
#pragma unroll
for (int i = 0; i < HELD; i++) choice[i] = own[i];
if (SCORE == SOFTMAX) {
  top = simd_max(top);
  float total = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    own[i] = lane + 32 * i < experts ? metal::precise::exp(own[i] - top) : 0.0f;
    total += own[i];
  }
  total = simd_sum(total);
#pragma unroll
  for (int i = 0; i < HELD; i++) own[i] /= total;
} else if (SCORE != SOFTMAX_TOP_K) {
#pragma unroll
  for (int i = 0; i < HELD; i++) own[i] = 1.0f / (1.0f + metal::precise::exp(-own[i]));
}
if (!BY_LOGIT) {
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const uint e = lane + 32 * i;
    choice[i] = own[i];
    if (CORRECTED && e < experts) choice[i] += float(correction[e]);
  }
}

if (GROUPS > 1) {
  const uint size = experts / GROUPS;
  uint group[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) group[i] = (lane + 32 * i) / size;
  uint rank = 0;  // lane g: of group g
  for (uint g = 0; g < GROUPS; g++) {
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      if (group[i] == g) best = metal::max(best, choice[i]);
    }
    best = simd_max(best);
    if (TOP_TWO) {
      uint at = ~0u;
#pragma unroll
      for (int i = HELD - 1; i >= 0; i--) {
        if (group[i] == g && choice[i] == best) at = lane + 32 * i;
      }
      at = simd_min(at);
      float second = -INFINITY;
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        if (group[i] == g && lane + 32 * i != at) second = metal::max(second, choice[i]);
      }
      best += simd_max(second);
    }
    if (lane == g) rank = ordered(best);
  }
  uint kept = 0;
  for (int i = 0; i < TOP_GROUPS; i++) {
    const uint best = simd_max(rank);
    const uint g = simd_min(rank == best ? lane : 31u);
    kept |= 1u << g;
    if (lane == g) rank = 0;
  }
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (group[i] < GROUPS && !(kept >> group[i] & 1)) choice[i] = 0;
  }
}

uint keys[HELD];
#pragma unroll
for (int i = 0; i < HELD; i++) keys[i] = lane + 32 * i < experts ? ordered(choice[i]) : 0;

uint id = 0;  // lane k: of the k-th
float score = 0;
for (uint k = 0; k < TOP_K; k++) {
  uint best = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++) best = metal::max(best, keys[i]);
  best = simd_max(best);
  uint winner = ~0u;
#pragma unroll
  for (int i = HELD - 1; i >= 0; i--) {
    if (keys[i] == best) winner = lane + 32 * i;
  }
  winner = simd_min(winner);
  float p = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (lane + 32 * i == winner) {
      p = own[i];
      keys[i] = 0;
    }
  }
  p = simd_broadcast(p, ushort(winner % 32));
  if (lane == k) {
    id = winner;
    score = p;
  }
}

if (SCORE == SOFTMAX_TOP_K) {
  const float first = simd_broadcast(score, ushort(0));
  score = lane < TOP_K ? metal::precise::exp(score - first) : 0.0f;
  score /= simd_sum(score);
} else if (NORMALIZE) {
  score /= simd_sum(score) + eps;
}
if (lane < TOP_K) {
  ids[token * TOP_K + lane] = id;
  scores[token * TOP_K + lane] = score * scale;
}
