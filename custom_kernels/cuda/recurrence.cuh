// Activations of the recurrent layers in float32, and sums over the lanes that share a row.

__device__ inline float silu(float x) {
  return x / (1.0f + expf(-x));
}

// log(1 + exp(x)) for every x.
__device__ inline float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

// The sum over `lanes` neighbouring lanes (a power of two) of a whole warp, in each of them.
__device__ inline float sum_of_lanes(float x, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

__device__ inline float dot(float4 a, float4 b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// a scale + b along
__device__ inline float4 blend(float4 a, float scale, float4 b, float along) {
  return make_float4(
      a.x * scale + b.x * along,
      a.y * scale + b.y * along,
      a.z * scale + b.z * along,
      a.w * scale + b.w * along);
}
