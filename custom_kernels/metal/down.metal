// The second half of routed experts and their sum, in float32, in the order of k:
//   y[t] = sum_k scores[t,k] (W[slots[t,k]] h[t,k] + bias) (+ sigmoid(shared_gate[t]) shared[t]).
//   h [T,K,I], weights [S,D,I] quantized (dequantize.h) -> y [T,D]; shared [T,D], shared_gate [T].
// Bytes: T K D rows of I weights. Of Qwen3.5-35B-A3B (D 2048, I 512, K 8, 4 bit, groups of 64)
// 4.7 MB a token; operations 4 a weight, half of them fma.
//
// Grid: (32 ceil(D / rows of a group), SIMDS, T). All simdgroups of a group share its ROWS rows for
// each of 32 / LANES teams and take turns on the experts; one barrier, then a lane a row adds what
// they left, so that the sum does not depend on who was first. That model: 256 groups of 8
// simdgroups, 32 simdgroups for each core of an Ultra, 256 for each of an M1. Expected, not
// measured: 70 to 80 % of the memory's bandwidth up to a Max (M1 0.09 ms a layer, M4 Pro 0.02).
constexpr int TEAMS = 32 / LANES;
constexpr int TILE = ROWS * TEAMS;
threadgroup float partial[SIMDS * TILE];

const int experts = slots_shape[1];
const int inner = h_shape[2];
const int rows = weight_shape[1];
const int chunks = inner / CHUNK;
const uint row_words = uint(chunks) * BITS;
const uint row_groups = uint(inner / GROUP);

const uint team = thread_index_in_simdgroup / LANES;
const uint lane = thread_index_in_simdgroup % LANES;
const uint simd = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.z;
const int tile = int(threadgroup_position_in_grid.x) * TILE;

// Rows past the last read its weights again, and are not written.
uint row[ROWS];
float total[ROWS] = {0};
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  row[r] = uint(metal::min(tile + int(team) + r * TEAMS, rows - 1));
}

for (int k = int(simd); k < experts; k += SIMDS) {
  const uint pair = token * uint(experts) + uint(k);
  const float score = float(scores[pair]);
  const ulong base = ulong(slots[pair]) * uint(rows);
  const device T* input = h + ulong(pair) * uint(inner);
  const device uint* words = weight + base * row_words;
  const auto s = scales + base * row_groups;
  const auto z = zeros + base * row_groups;
  for (int chunk = int(lane); chunk < chunks; chunk += LANES) {
    float values[CHUNK];
    const float sum = read_chunk(input + chunk * CHUNK, values);
    const uint word = uint(chunk) * BITS;
    const uint group = uint(chunk * CHUNK / GROUP);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float part = weighted_chunk<BITS, FP4>(
          words + row[r] * row_words + word, s, z, row[r] * row_groups + group, values, sum);
      total[r] = fma(score, part, total[r]);
    }
  }
  if (BIASED && lane == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      total[r] = fma(score, float(bias[base + row[r]]), total[r]);
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float v = sum_over<LANES>(total[r]);
  if (lane == 0) partial[simd * TILE + uint(r * TEAMS) + team] = v;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint mine = thread_index_in_simdgroup;
if (simd == 0 && mine < TILE && tile + int(mine) < rows) {
  float v = 0;
  for (int i = 0; i < SIMDS; i++) v += partial[i * TILE + int(mine)];
  const ulong at = ulong(token) * uint(rows) + uint(tile) + mine;
  if (SHARED) {
    const float part = float(shared[at]);
    v += SHARED_GATED ? sigmoid(float(shared_gate[token])) * part : part;
  }
  y[at] = T(v);
}
