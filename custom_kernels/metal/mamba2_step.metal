// One token of a Mamba2 mixer (Nemotron-H), from its input projection to the norm by groups:
//
//   x, Bs, Cs = silu(conv([history, projected]) + bias)       causal, channel by channel
//   dt = clip(softplus(dt + dt_bias), low, high)
//   S  = exp(-exp(A_log) dt) S + dt x Bs^T                    per head, [Dh, Ds]
//   y  = (S Cs + D x) silu(gate)                              per head, [Dh]
//
// projected [B, inner + channels + H] holds gate, what the convolution takes (x, Bs and Cs of G
// groups) and dt; inner = H Dh, channels = inner + 2 G Ds. history [B, TAPS - 1, channels], weight
// [channels, TAPS], bias [channels] (read if BIASED), A_log, D, dt_bias [H], low and high numbers,
// state [B, H, Dh, Ds] -> y [B, inner] in float32, new_history, new_state. All between is float32.
// (mlx-lm rounds the convolution, silu, y and y silu(gate) to the activations' type.)
//
// One threadgroup per sequence and head. The norm that follows spans the H / G heads of a group:
// 8 in Nemotron 3 Nano, which has 8 groups, and 8 threadgroups would leave most cores of any GPU
// idle. So the norm is a launch of its own (gated_norm), and reads 16 KB. The heads of a group
// repeat the convolution of its Bs and Cs: 4 KB against 64 KB of state. Bytes: 8 Dh Ds a head for
// the state, the rest is 8 % of it; 5 Dh Ds floating-point operations: memory bounds it everywhere.
//
// Grid: 32 SIMDS threads (512 for 64 x 128) x H x B. Nemotron 3 Nano has 64 heads: 8 threadgroups
// for each core of an M1, 6 of an M2 to M5, 4 of a Pro, 2 of a Max, one of an Ultra. A lane asks
// for its whole share of the state (16 registers) before the convolution. Expected, not measured:
// 70 % of the memory's bandwidth, 4.5 MB a layer in 65 us on M2 or M3, 95 on M1, 16 on a Max.

constexpr int INNER = H * Dh;
constexpr int CHANNELS = INNER + 2 * G * Ds;
constexpr int ROW = INNER + CHANNELS + H;
constexpr int PAST = TAPS - 1;
constexpr int THREADS = 32 * SIMDS;
constexpr int PASSES = Dh / (4 * SIMDS);  // a simdgroup has four rows of the state in a pass
constexpr int N = Ds / 32;                 // float4s of a row in each of its eight lanes

threadgroup float4 shared_mixed[(2 * Ds + Dh) / 4];
threadgroup float shared_steps[2];

const int me = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int head = threadgroup_position_in_grid.y;
const int sequence = threadgroup_position_in_grid.z;
const int group = head / (H / G);

// Lane l of a row has float4s l, l + 8, ...: eight lanes read 128 bytes side by side.
const int in_row = lane % 8;
const int first_row = 4 * simdgroup_index_in_threadgroup + lane / 8;
const size_t tile = (size_t(sequence) * H + head) * Dh * N * 8;
const device float4* old_rows = reinterpret_cast<const device float4*>(state) + tile;
device float4* new_rows = reinterpret_cast<device float4*>(new_state) + tile;
float4 s[PASSES][N];
float gates[PASSES];
#pragma clang loop unroll(full)
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * SIMDS * p;
#pragma clang loop unroll(full)
  for (int n = 0; n < N; ++n) {
    s[p][n] = old_rows[row * 8 * N + 8 * n + in_row];
  }
  gates[p] = float(projected[sequence * ROW + head * Dh + row]);
}

threadgroup float* mixed = reinterpret_cast<threadgroup float*>(shared_mixed);
for (int i = me; i < 2 * Ds + Dh; i += THREADS) {
  const bool of_head = i >= 2 * Ds;
  const int channel = of_head  ? head * Dh + i - 2 * Ds
                      : i < Ds ? INNER + group * Ds + i
                               : INNER + (G + group) * Ds + i - Ds;
  // Of the heads that share Bs and Cs, the first writes their history.
  const bool writes = of_head || head % (H / G) == 0;
  const T token = projected[sequence * ROW + INNER + channel];
  float sum = float(token) * float(weight[channel * TAPS + PAST]);
  for (int t = 0; t < PAST; ++t) {
    const int at = (sequence * PAST + t) * CHANNELS + channel;
    const T past = history[at];
    sum += float(past) * float(weight[channel * TAPS + t]);
    if (writes && t > 0) {
      new_history[at - CHANNELS] = past;
    }
  }
  if (writes) {
    new_history[(sequence * PAST + PAST - 1) * CHANNELS + channel] = token;
  }
  mixed[i] = silu(BIASED ? sum + float(bias[channel]) : sum);
}
// The last thread has the fewest channels.
if (me == THREADS - 1) {
  const float raw = float(projected[sequence * ROW + INNER + CHANNELS + head]);
  const float dt = metal::clamp(softplus(raw + float(dt_bias[head])), low, high);
  shared_steps[0] = dt;
  shared_steps[1] = metal::precise::exp(-metal::precise::exp(float(A_log[head])) * dt);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const float dt = shared_steps[0];
const float decay = shared_steps[1];
#pragma clang loop unroll(full)
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * SIMDS * p;
  const float x = mixed[2 * Ds + row];
  const float along = x * dt;
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int n = 0; n < N; ++n) {
    const float4 next = s[p][n] * decay + shared_mixed[8 * n + in_row] * along;
    new_rows[row * 8 * N + 8 * n + in_row] = next;
    sum += metal::dot(next, shared_mixed[Ds / 4 + 8 * n + in_row]);
  }
  sum = sum8(sum);
  if (in_row == 0) {
    y[sequence * INNER + head * Dh + row] = (sum + float(D[head]) * x) * silu(gates[p]);
  }
}
