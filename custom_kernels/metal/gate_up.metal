// The first half of routed experts: h[t,k,:] = f(G[slots[t,k]] x[t] + b, U[slots[t,k]] x[t] + c),
// or f(U x + c) where experts have no gate. f and its limit and alpha: activations.h.
//   x [T,D] -> h [T,K,I]; gate and up [S,I,D] quantized (dequantize.h), their linear bias [S,I].
//   A dense MLP, [I,D], is one expert in slot 0.
// Bytes: T K I rows of D weights, twice if gated, and little else. Of Qwen3.5-35B-A3B (D 2048,
// I 512, K 8, 4 bit, groups of 64) 9.4 MB a token; operations 4 a weight, half of them fma.
//
// Grid: (64 ceil(I / rows of a group), T K). A simdgroup takes ROWS rows for each of 32 / LANES
// teams of lanes, and gate and up of a row together: x is read once for both and f is applied in
// registers. LANES is what leaves the fewest lanes idle in D / 32 chunks. That model: 512 groups of
// two simdgroups, 16 simdgroups for each core of an Ultra, 128 for each of an M1, 4 KB of weights
// in flight for each. Expected, not measured: 80 % of the memory's bandwidth up to a Max (M1 0.17 ms
// a layer, M4 Pro 0.04), less on an Ultra, where the launch is too short to fill it.
constexpr int TEAMS = 32 / LANES;
constexpr int TILE = ROWS * TEAMS;

const int inner = x_shape[1];
const int rows = up_shape[up_ndim - 2];
const int chunks = inner / CHUNK;
const uint row_words = uint(chunks) * BITS;
const uint row_groups = uint(inner / GROUP);

const uint team = thread_index_in_simdgroup / LANES;
const uint lane = thread_index_in_simdgroup % LANES;
const uint pair = threadgroup_position_in_grid.y;
const int first = int(thread_position_in_grid.x / 32) * TILE + int(team);
if (first - int(team) >= rows) return;

const ulong base = ulong(slots[pair]) * uint(rows);
const device T* input = x + ulong(pair / uint(slots_shape[1])) * uint(inner);

// Rows past the last read its weights again, and are not written.
uint row[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) row[r] = uint(metal::min(first + r * TEAMS, rows - 1));

const device uint* up_words = up + base * row_words;
const auto up_s = up_scales + base * row_groups;
const auto up_z = up_zeros + base * row_groups;
const device uint* gate_words = gate + base * row_words;
const auto gate_s = gate_scales + base * row_groups;
const auto gate_z = gate_zeros + base * row_groups;

float up_sum[ROWS] = {0};
float gate_sum[ROWS] = {0};
for (int chunk = int(lane); chunk < chunks; chunk += LANES) {
  float values[CHUNK];
  const float sum = read_chunk(input + chunk * CHUNK, values);
  const uint word = uint(chunk) * BITS;
  const uint group = uint(chunk * CHUNK / GROUP);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    up_sum[r] += weighted_chunk<BITS, FP4>(
        up_words + row[r] * row_words + word, up_s, up_z, row[r] * row_groups + group, values, sum);
    if (GATED) {
      gate_sum[r] += weighted_chunk<BITS, FP4>(
          gate_words + row[r] * row_words + word,
          gate_s,
          gate_z,
          row[r] * row_groups + group,
          values,
          sum);
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  float u = sum_over<LANES>(up_sum[r]);
  float g = GATED ? sum_over<LANES>(gate_sum[r]) : 0.0f;
  if (BIASED) {
    u += float(up_bias[base + row[r]]);
    if (GATED) g += float(gate_bias[base + row[r]]);
  }
  if (lane == 0 && first + r * TEAMS < rows) {
    h[ulong(pair) * uint(rows) + row[r]] = T(activated<KIND>(g, u, limit, alpha));
  }
}
