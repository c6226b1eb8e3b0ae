// One token of a Mamba2 mixer in CUDA. UNRUN: no NVIDIA GPU has executed this; a CPU has, lane by
// lane. Formulas, shapes, layouts and types are those of metal/mamba2_step.metal.
//
// One block per sequence and head, eight lanes to a row of the state. Bytes: 8 Dh Ds a head for the
// state, 4.5 MB a layer of Nemotron 3 Nano, a microsecond of an H200's whole bandwidth. Expected,
// not measured: the launch is the cost, and stock mlx-lm makes about forty of them for want of a
// kernel on CUDA.
//
// Grid: 32 WARPS threads (512 for 64 x 128) x H x B.

constexpr int INNER = H * Dh;
constexpr int CHANNELS = INNER + 2 * G * Ds;
constexpr int ROW = INNER + CHANNELS + H;
constexpr int PAST = TAPS - 1;
constexpr int WARPS = SIMDS;
constexpr int THREADS = 32 * WARPS;
constexpr int PASSES = Dh / (4 * WARPS);  // a warp has four rows of the state in a pass
constexpr int N = Ds / 32;                // float4s of a row in each of its eight lanes

__shared__ float4 shared_mixed[(2 * Ds + Dh) / 4];
__shared__ float shared_steps[2];

const int me = threadIdx.x;
const int lane = me % 32;
const int head = blockIdx.y;
const int sequence = blockIdx.z;
const int group = head / (H / G);
const T* tokens = projected + size_t(sequence) * ROW;

// Lane l of a row has float4s l, l + 8, ...: eight lanes read 128 bytes side by side.
const int in_row = lane % 8;
const int first_row = 4 * (me / 32) + lane / 8;
const size_t tile = (size_t(sequence) * H + head) * Dh * N * 8;
const float4* old_rows = reinterpret_cast<const float4*>(state) + tile;
float4* new_rows = reinterpret_cast<float4*>(new_state) + tile;
float4 s[PASSES][N];
float gates[PASSES];
#pragma unroll
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * WARPS * p;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    s[p][n] = old_rows[row * 8 * N + 8 * n + in_row];
  }
  gates[p] = float(tokens[head * Dh + row]);
}

float* mixed = reinterpret_cast<float*>(shared_mixed);
for (int i = me; i < 2 * Ds + Dh; i += THREADS) {
  const bool of_head = i >= 2 * Ds;
  const int channel = of_head  ? head * Dh + i - 2 * Ds
                      : i < Ds ? INNER + group * Ds + i
                               : INNER + (G + group) * Ds + i - Ds;
  // Of the heads that share Bs and Cs, the first writes their history.
  const bool writes = of_head || head % (H / G) == 0;
  const T token = tokens[INNER + channel];
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
  mixed[i] = silu(BIASED ? sum + float(bias[channel]) : sum);
}
// The last thread has the fewest channels.
if (me == THREADS - 1) {
  const float raw = float(tokens[INNER + CHANNELS + head]);
  const float dt = fminf(fmaxf(softplus(raw + float(dt_bias[head])), low[0]), high[0]);
  shared_steps[0] = dt;
  shared_steps[1] = expf(-expf(float(A_log[head])) * dt);
}
__syncthreads();

const float dt = shared_steps[0];
const float decay = shared_steps[1];
#pragma unroll
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + 4 * WARPS * p;
  const float x = mixed[2 * Ds + row];
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float4 next = blend(s[p][n], decay, shared_mixed[8 * n + in_row], x * dt);
    new_rows[row * 8 * N + 8 * n + in_row] = next;
    sum += dot(next, shared_mixed[Ds / 4 + 8 * n + in_row]);
  }
  sum = sum_of_lanes(sum, 8);
  if (in_row == 0) {
    y[size_t(sequence) * INNER + head * Dh + row] = (sum + float(D[head]) * x) * silu(gates[p]);
  }
}
