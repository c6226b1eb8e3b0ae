// RMS norms of the recurrent layers over SIZE elements at a time, with a gate:
//
//   MODE 0    y = weight x / rms(x)
//   MODE 1    y = weight x / rms(x) silu(z)           gated delta nets
//   MODE 2    u = x silu(z), y = weight u / rms(u)    Mamba2
//
// with rms(x) = sqrt(mean(x^2) + eps). x, z, y [rows, PARTS, SIZE], each part with a mean of its
// own; weight [PARTS, SIZE]. MODE 0 does not read z. All between is float32.
//
// SPLIT simdgroups take a part, so that a lane has at most 8 elements of up to 8192, four side by
// side: 256 bytes per load of a simdgroup in bfloat16. Parts of up to 256 (128 in Qwen3.5) need no
// barrier and lie eight to a threadgroup; longer ones (512 in Nemotron 3 Nano) have one each.
// Bytes: x, z and y once, 6 an element in bfloat16; about 12 floating-point operations.
//
// Grid: 32 SPLIT threads per part. A prompt of 512 tokens in Qwen3.5-35B-A3B is 16384 parts, 2048
// threadgroups: memory bounds it, 12.6 MB, and 80 % of the bandwidth is expected, not measured. The
// token of a decode step is 8 parts of 512 in Nemotron 3 Nano, 24 KB: nothing but the launch.

constexpr int THREADS = 32 * SPLIT;
constexpr int CHUNKS = (SIZE + 4 * THREADS - 1) / (4 * THREADS);
constexpr bool WHOLE = SIZE % (4 * THREADS) == 0;  // no lane is beyond the end

threadgroup float shared_squares[SPLIT];

const int part = SPLIT == 1 ? thread_position_in_grid.x / 32 : threadgroup_position_in_grid.x;
const int me = thread_position_in_threadgroup.x % THREADS;
const size_t base = size_t(part) * SIZE;
const int of_weight = (part % PARTS) * SIZE;

float u[4 * CHUNKS];
float gates[4 * CHUNKS];
float squares = 0.0f;
#pragma clang loop unroll(full)
for (int i = 0; i < 4 * CHUNKS; ++i) {
  const int at = 4 * me + (i / 4) * 4 * THREADS + i % 4;
  const bool in_part = WHOLE || at < SIZE;
  u[i] = in_part ? float(x[base + at]) : 0.0f;
  gates[i] = MODE != 0 && in_part ? silu(float(z[base + at])) : 1.0f;
  if (MODE == 2) {
    u[i] *= gates[i];
  }
  squares += u[i] * u[i];
}
squares = simd_sum(squares);
if (SPLIT > 1) {
  if (thread_index_in_simdgroup == 0) {
    shared_squares[simdgroup_index_in_threadgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = 0.0f;
  for (int i = 0; i < SPLIT; ++i) {
    squares += shared_squares[i];
  }
}
const float unit = metal::precise::rsqrt(squares / SIZE + eps);
#pragma clang loop unroll(full)
for (int i = 0; i < 4 * CHUNKS; ++i) {
  const int at = 4 * me + (i / 4) * 4 * THREADS + i % 4;
  if (WHOLE || at < SIZE) {
    const float normed = u[i] * unit * float(weight[of_weight + at]);
    y[base + at] = T(MODE == 1 ? normed * gates[i] : normed);
  }
}
