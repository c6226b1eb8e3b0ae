// What CUDA has and Metal calls otherwise: kernels written for it, on the Metal emulator.

#include <cmath>

#define inf INFINITY  // MLX's, in front of every kernel
#define __device__
#define __nv_bfloat16 bfloat
#define __half half
#define __syncthreads() metal::threadgroup_barrier( \
    metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device)

// CUDA's has no operators.
struct alignas(16) CudaFloat4 {
  float x, y, z, w;
};
#define float4 CudaFloat4

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline float rsqrtf(float x) {
  return float(1 / std::sqrt(double(x)));
}
inline float __shfl_xor_sync(uint32_t lanes, float x, int distance, int line = __builtin_LINE()) {
  if (lanes != 0xffffffffu) {
    lanes_fault("a shuffle of some lanes: the emulator has those of all only");
  }
  return metal::simd_shuffle_xor(x, ushort(distance), line);
}
