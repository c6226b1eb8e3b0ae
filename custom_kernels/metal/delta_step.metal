// One token of a gated delta net, from its input projections to its output projection:
//
//   mixed = silu(conv([history, qkv]))                             causal, channel by channel
//   q, k  = q / |q| / sqrt(Dk), k / |k|                            |x| = sqrt(sum x^2 + 1e-6)
//   g     = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b)
//   S     = g S + (beta (v - g S k)) k^T                           per value head, [Dv, Dk]
//   y     = rms_norm(S q) norm silu(z)                             per value head, [Dv]
//
// qkv [B, 2 Hk Dk + Hv Dv], z [B, Hv Dv], a, b [B, Hv], history [B, TAPS - 1, channels],
// weight [channels, TAPS], A_log, dt_bias [Hv], norm [Dv], eps of the norm, state [B, Hv, Dv, Dk]
// -> y [B, Hv Dv], new_history, new_state. GROUPED (Qwen3-Next): qkv and z are one array, for each
// key head its q, k, v and z, and so are b and a.
//
// Everything between is float32. (mlx-lm rounds the convolution, silu, q, k, beta and S q to the
// activations' type; here y alone is rounded.) S q is taken from the old state, as
// g (S q) + (k q) delta, so that both sums over a row are reduced at once and a row is read once.
//
// One threadgroup per sequence and value head. The norm needs all of a head's rows, so splitting a
// head over threadgroups would cost a launch, and its q, k and gates would be computed again. The
// Hv / Hk heads of one key head do repeat its 2 Dk convolutions: for 128 x 128 and 4 taps in
// bfloat16 that is 4 KB against 128 KB of state. Bytes: 8 Dv Dk a head for the state, the rest is
// 4 % of it; 7 Dv Dk floating-point operations, less than one a byte: memory bounds it everywhere.
//
// Grid: 32 SIMDS threads (512 for 128 x 128) x Hv x B. Qwen3.5-35B-A3B has 32 value heads: 4
// threadgroups for each core of an M1, 3 of an M2 to M5, 2 of a Pro, one of a Max (M4 Max: 32 of 40
// cores busy), and half an Ultra's cores without one. A lane asks for its whole share of the state
// (32 registers) before the convolution, so that 64 KB are in flight from each core meanwhile.
// Expected, not measured: 70 % of the memory's bandwidth, 4.3 MB a layer in 60 us on M2 or M3, 90
// on M1, 15 on a Max; on an Ultra the launch costs more than the bytes.

constexpr int REPEAT = Hv / Hk;
constexpr int CHANNELS = 2 * Hk * Dk + Hv * Dv;
constexpr int PAST = TAPS - 1;
constexpr int THREADS = 32 * SIMDS;
constexpr int PASSES = Dv / (4 * SIMDS);  // a simdgroup has four rows of the state in a pass
constexpr int N = Dk / 32;                 // float4s of a row in each of its eight lanes
constexpr int WIDE = 2 * Dk + 2 * REPEAT * Dv;  // of a key head, if GROUPED
constexpr int QKV_ROW = GROUPED ? Hk * WIDE : CHANNELS;
constexpr int Z_ROW = GROUPED ? Hk * WIDE : Hv * Dv;
constexpr int GATE_ROW = GROUPED ? 2 * Hv : Hv;

threadgroup float4 shared_mixed[(2 * Dk + Dv) / 4];
threadgroup float shared_y[Dv];
threadgroup float shared_squares[SIMDS];
threadgroup float shared_gates[2];

const int me = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int head = threadgroup_position_in_grid.y;
const int sequence = threadgroup_position_in_grid.z;
const int key_head = head / REPEAT;
const int sub = head % REPEAT;

// Lane l of a row has float4s l, l + 8, ...: eight lanes read 128 bytes side by side.
const int in_row = lane % 8;
const int first_row = 4 * simdgroup + lane / 8;
const size_t tile = (size_t(sequence) * Hv + head) * Dv * N * 8;
const device float4* old_rows = reinterpret_cast<const device float4*>(state) + tile;
device float4* new_rows = reinterpret_cast<device float4*>(new_state) + tile;
float4 s[PASSES][N];
#pragma clang loop unroll(full)
for (int p = 0; p < PASSES; ++p) {
#pragma clang loop unroll(full)
  for (int n = 0; n < N; ++n) {
    s[p][n] = old_rows[(first_row + 4 * SIMDS * p) * 8 * N + 8 * n + in_row];
  }
}
float gate = 0.0f;
float scale = 0.0f;
if (me < Dv) {
  const int at = GROUPED ? key_head * WIDE + 2 * Dk + (REPEAT + sub) * Dv : head * Dv;
  gate = float(z[sequence * Z_ROW + at + me]);
  scale = float(norm[me]);
}

threadgroup float* mixed = reinterpret_cast<threadgroup float*>(shared_mixed);
for (int i = me; i < 2 * Dk + Dv; i += THREADS) {
  const bool value = i >= 2 * Dk;
  const int in_key_head = value ? i + sub * Dv : i;
  const int channel = value  ? 2 * Hk * Dk + head * Dv + i - 2 * Dk
                    : i < Dk ? key_head * Dk + i
                             : (Hk + key_head) * Dk + i - Dk;
  // Of the heads that share q and k, the first writes their history.
  const bool writes = value || sub == 0;
  const T token = qkv[sequence * QKV_ROW + (GROUPED ? key_head * WIDE + in_key_head : channel)];
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
  mixed[i] = silu(sum);
}
// The last thread has the fewest channels.
if (me == THREADS - 1) {
  const int of_b = GROUPED ? key_head * 2 * REPEAT + sub : head;
  const int of_a = GROUPED ? of_b + REPEAT : head;
  const float step = softplus(float(a[sequence * GATE_ROW + of_a]) + float(dt_bias[head]));
  shared_gates[0] = metal::precise::exp(-metal::precise::exp(float(A_log[head])) * step);
  shared_gates[1] = 1.0f / (1.0f + metal::precise::exp(-float(b[sequence * GATE_ROW + of_b])));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float4 q[N];
float4 k[N];
float qq = 0.0f;
float kk = 0.0f;
float kq = 0.0f;
#pragma clang loop unroll(full)
for (int n = 0; n < N; ++n) {
  q[n] = shared_mixed[8 * n + in_row];
  k[n] = shared_mixed[Dk / 4 + 8 * n + in_row];
  qq += metal::dot(q[n], q[n]);
  kk += metal::dot(k[n], k[n]);
  kq += metal::dot(k[n], q[n]);
}
const float q_scale = metal::precise::rsqrt((sum8(qq) + 1e-6f) * Dk);
const float k_scale = metal::precise::rsqrt(sum8(kk) + 1e-6f);
const float kq_scaled = sum8(kq) * k_scale * q_scale;
const float g = shared_gates[0];
const float beta = shared_gates[1];

float squares = 0.0f;
#pragma clang loop unroll(full)
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * SIMDS * p;
  float sk = 0.0f;
  float sq = 0.0f;
#pragma clang loop unroll(full)
  for (int n = 0; n < N; ++n) {
    sk += metal::dot(s[p][n], k[n]);
    sq += metal::dot(s[p][n], q[n]);
  }
  sk = sum8(sk) * k_scale * g;
  sq = sum8(sq) * q_scale * g;
  const float delta = beta * (mixed[2 * Dk + row] - sk);
  const float along = delta * k_scale;
#pragma clang loop unroll(full)
  for (int n = 0; n < N; ++n) {
    new_rows[row * 8 * N + 8 * n + in_row] = s[p][n] * g + k[n] * along;
  }
  if (in_row == 0) {
    const float read = sq + kq_scaled * delta;
    shared_y[row] = read;
    squares += read * read;
  }
}
squares = simd_sum(squares);
if (lane == 0) {
  shared_squares[simdgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (me < Dv) {
  float total = 0.0f;
  for (int i = 0; i < SIMDS; ++i) {
    total += shared_squares[i];
  }
  const float unit = metal::precise::rsqrt(total / Dv + eps);
  y[(sequence * Hv + head) * Dv + me] = T(shared_y[me] * unit * scale * silu(gate));
}
