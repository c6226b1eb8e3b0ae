// One token of a gated delta net in CUDA. UNRUN: no NVIDIA GPU has executed this; a CPU has, lane
// by lane. Formulas, shapes, layouts and types are those of metal/delta_step.metal.
//
// One block per sequence and value head, eight lanes to a row of the state, all of a lane's share
// asked for before the convolution. Bytes: 8 Dv Dk a head for the state, 4.3 MB a layer of
// Qwen3.5-35B-A3B, a microsecond of an H200's whole bandwidth. Expected, not measured: the launch
// is the cost, and stock mlx-lm makes about twenty of them for want of a kernel on CUDA.
//
// Grid: 32 WARPS threads (512 for 128 x 128) x Hv x B. 32 blocks leave SMs idle; a block on each
// of them would save less than the second launch that the norm would then need.

constexpr int REPEAT = Hv / Hk;
constexpr int CHANNELS = 2 * Hk * Dk + Hv * Dv;
constexpr int PAST = TAPS - 1;
constexpr int WARPS = SIMDS;
constexpr int THREADS = 32 * WARPS;
constexpr int PASSES = Dv / (4 * WARPS);  // a warp has four rows of the state in a pass
constexpr int N = Dk / 32;                // float4s of a row in each of its eight lanes
constexpr int WIDE = 2 * Dk + 2 * REPEAT * Dv;  // of a key head, if GROUPED
constexpr int QKV_ROW = GROUPED ? Hk * WIDE : CHANNELS;
constexpr int Z_ROW = GROUPED ? Hk * WIDE : Hv * Dv;
constexpr int GATE_ROW = GROUPED ? 2 * Hv : Hv;

__shared__ float4 shared_mixed[(2 * Dk + Dv) / 4];
__shared__ float shared_y[Dv];
__shared__ float shared_squares[WARPS];
__shared__ float shared_gates[2];

const int me = threadIdx.x;
const int lane = me % 32;
const int warp = me / 32;
const int head = blockIdx.y;
const int sequence = blockIdx.z;
const int key_head = head / REPEAT;
const int sub = head % REPEAT;

// Lane l of a row has float4s l, l + 8, ...: eight lanes read 128 bytes side by side.
const int in_row = lane % 8;
const int first_row = 4 * warp + lane / 8;
const size_t tile = (size_t(sequence) * Hv + head) * Dv * N * 8;
const float4* old_rows = reinterpret_cast<const float4*>(state) + tile;
float4* new_rows = reinterpret_cast<float4*>(new_state) + tile;
float4 s[PASSES][N];
#pragma unroll
for (int p = 0; p < PASSES; ++p) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    s[p][n] = old_rows[(first_row + 4 * WARPS * p) * 8 * N + 8 * n + in_row];
  }
}
float gate = 0.0f;
float scale = 0.0f;
if (me < Dv) {
  const int at = GROUPED ? key_head * WIDE + 2 * Dk + (REPEAT + sub) * Dv : head * Dv;
  gate = float(z[size_t(sequence) * Z_ROW + at + me]);
  scale = float(norm[me]);
}

float* mixed = reinterpret_cast<float*>(shared_mixed);
for (int i = me; i < 2 * Dk + Dv; i += THREADS) {
  const bool value = i >= 2 * Dk;
  const int in_key_head = value ? i + sub * Dv : i;
  const int channel = value  ? 2 * Hk * Dk + head * Dv + i - 2 * Dk
                    : i < Dk ? key_head * Dk + i
                             : (Hk + key_head) * Dk + i - Dk;
  // Of the heads that share q and k, the first writes their history.
  const bool writes = value || sub == 0;
  const int at = GROUPED ? key_head * WIDE + in_key_head : channel;
  const T token = qkv[size_t(sequence) * QKV_ROW + at];
  const size_t row = size_t(sequence) * PAST * CHANNELS + channel;
  float sum = float(token) * float(weight[channel * TAPS + PAST]);
  for (int t = 0; t < PAST; ++t) {
    const T past = history[row + t * CHANNELS];
    sum += float(past) * float(weight[channel * TAPS + t]);
    if (writes && t > 0) {
      new_history[row + (t - 1) * CHANNELS] = past;
    }
  }
  if (writes) {
    new_history[row + (PAST - 1) * CHANNELS] = token;
  }
  mixed[i] = silu(sum);
}
// The last thread has the fewest channels.
if (me == THREADS - 1) {
  const int of_b = GROUPED ? key_head * 2 * REPEAT + sub : head;
  const int of_a = GROUPED ? of_b + REPEAT : head;
  const float step = softplus(float(a[sequence * GATE_ROW + of_a]) + float(dt_bias[head]));
  shared_gates[0] = expf(-expf(float(A_log[head])) * step);
  shared_gates[1] = 1.0f / (1.0f + expf(-float(b[sequence * GATE_ROW + of_b])));
}
__syncthreads();

float4 q[N];
float4 k[N];
float qq = 0.0f;
float kk = 0.0f;
float kq = 0.0f;
#pragma unroll
for (int n = 0; n < N; ++n) {
  q[n] = shared_mixed[8 * n + in_row];
  k[n] = shared_mixed[Dk / 4 + 8 * n + in_row];
  qq += dot(q[n], q[n]);
  kk += dot(k[n], k[n]);
  kq += dot(k[n], q[n]);
}
const float q_scale = rsqrtf((sum_of_lanes(qq, 8) + 1e-6f) * Dk);
const float k_scale = rsqrtf(sum_of_lanes(kk, 8) + 1e-6f);
const float kq_scaled = sum_of_lanes(kq, 8) * k_scale * q_scale;
const float g = shared_gates[0];
const float beta = shared_gates[1];

float squares = 0.0f;
#pragma unroll
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * WARPS * p;
  float sk = 0.0f;
  float sq = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sk += dot(s[p][n], k[n]);
    sq += dot(s[p][n], q[n]);
  }
  sk = sum_of_lanes(sk, 8) * k_scale * g;
  sq = sum_of_lanes(sq, 8) * q_scale * g;
  const float delta = beta * (mixed[2 * Dk + row] - sk);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    new_rows[row * 8 * N + 8 * n + in_row] = blend(s[p][n], g, k[n], delta * k_scale);
  }
  if (in_row == 0) {
    const float read = sq + kq_scaled * delta;
    shared_y[row] = read;
    squares += read * read;
  }
}
squares = sum_of_lanes(squares, 32);
if (lane == 0) {
  shared_squares[warp] = squares;
}
__syncthreads();

if (me < Dv) {
  float total = 0.0f;
  for (int i = 0; i < WARPS; ++i) {
    total += shared_squares[i];
  }
  const float unit = rsqrtf(total / Dv + eps[0]);
  y[(size_t(sequence) * Hv + head) * Dv + me] = T(shared_y[me] * unit * scale * silu(gate));
}
