// Rows of quantized weights times a vector, without writing the weights out.
//
// 32 values of a row, a chunk, lie in BITS words, lowest bits first, whatever BITS is; a group of
// 32, 64 or 128 of them shares a scale s and, if affine, a zero point z (MLX: biases). One lane
// takes one chunk at a time:
//   affine: sum_j (s q_j + z) x_j = s sum_j (2^BITS + q_j) x_j + (z - 2^BITS s) sum_j x_j
//   FP4   : sum_j 2^(e - 127) v_j x_j, v_j an e2m1 float and e the group's byte (OCP MX 1.0)
// 2^BITS + q is a half with q in its top bits of mantissa: a shift, a mask and an or make two of
// them at once, where a conversion from int would be an instruction for each and, so it is
// expected, a slower one than fma, which takes a half operand as it is. The sums are float.

constant constexpr int CHUNK = 32;

// x[0..32) as float into out; their sum.
template <typename T>
inline float read_chunk(const device T* x, thread float* out) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 4) {
    const vec<T, 4> part = *(const device vec<T, 4>*)(x + i);
    out[i] = float(part.x);
    out[i + 1] = float(part.y);
    out[i + 2] = float(part.z);
    out[i + 3] = float(part.w);
    sum += (out[i] + out[i + 1]) + (out[i + 2] + out[i + 3]);
  }
  return sum;
}

// One chunk of packed values, in the widest loads that its start is aligned for.
template <int BITS>
inline void read_words(const device uint* w, thread uint* out) {
  if constexpr (BITS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 4) {
      const uint4 part = *(const device uint4*)(w + i);
      out[i] = part.x;
      out[i + 1] = part.y;
      out[i + 2] = part.z;
      out[i + 3] = part.w;
    }
  } else if constexpr (BITS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 2) {
      const uint2 part = *(const device uint2*)(w + i);
      out[i] = part.x;
      out[i + 1] = part.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS; i++) out[i] = w[i];
  }
}

template <int SHIFT>
inline uint shifted(uint v) {
  if constexpr (SHIFT >= 0) {
    return v << SHIFT;
  } else {
    return v >> -SHIFT;
  }
}

// Field J of both halves of each word; then the next field.
template <int BITS, bool FP4, int J>
inline float fields(const thread uint* w, const thread float* x, float sum) {
  constexpr int PER_HALF = 16 / BITS;
  if constexpr (J == PER_HALF) {
    return sum;
  } else {
    constexpr uint ONE = uint(15 + BITS) << 10;
    constexpr uint FIELD = (1u << 10) - (1u << (10 - BITS));
#pragma unroll
    for (int i = 0; i < BITS; i++) {
      half2 v;
      if constexpr (FP4) {
        // Sign, exponent and mantissa where a half has them: v 2^-14, some of them denormal.
        const uint t = shifted<12 - 4 * J>(w[i]);
        v = as_type<half2>((t & 0x80008000u) | ((t >> 3) & 0x0e000e00u));
      } else {
        const uint t = shifted<10 - BITS - BITS * J>(w[i]);
        v = as_type<half2>((t & FIELD * 0x10001u) | ONE * 0x10001u);
      }
      sum = fma(float(v.x), x[i * 2 * PER_HALF + J], sum);
      sum = fma(float(v.y), x[i * 2 * PER_HALF + PER_HALF + J], sum);
    }
    return fields<BITS, FP4, J + 1>(w, x, sum);
  }
}

// sum_j (2^BITS + q_j) x_j over a chunk, or of FP4 sum_j 2^-14 v_j x_j.
template <int BITS, bool FP4>
inline float chunk_product(const thread uint* w, const thread float* x) {
  float sum = 0;
  if constexpr (16 % BITS == 0) {
    sum = fields<BITS, FP4, 0>(w, x, sum);
  } else {
    constexpr uint ONE = uint(15 + BITS) << 10;
    constexpr uint FIELD = (1u << 10) - (1u << (10 - BITS));
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const int word = j * BITS / 32;
      const int bit = j * BITS % 32;
      uint q = w[word] >> bit;
      if (bit + BITS > 32) q |= w[word + 1] << (32 - bit);
      const half v = as_type<half>(ushort(((q << (10 - BITS)) & FIELD) | ONE));
      sum = fma(float(v), x[j], sum);
    }
  }
  return sum;
}

// A chunk of weights at w, of the group whose scale and zero point are at index group, times x.
template <int BITS, bool FP4, typename S, typename Z>
inline float weighted_chunk(
    const device uint* w,
    const device S* scales,
    const device Z* zeros,
    uint group,
    const thread float* x,
    float sum) {
  uint words[BITS];
  read_words<BITS>(w, words);
  const float product = chunk_product<BITS, FP4>(words, x);
  if constexpr (FP4) {
    return as_type<float>(uint(scales[group]) << 23) * 16384.0f * product;
  } else {
    const float s = float(scales[group]);
    const float z = float(zeros[group]) - float(1 << BITS) * s;
    return fma(s, product, z * sum);
  }
}

// The sum over the LANES neighbours that share rows, in each of them.
template <int LANES>
inline float sum_over(float v) {
  if constexpr (LANES == 32) {
    return simd_sum(v);
  } else {
#pragma unroll
    for (ushort apart = LANES / 2; apart > 0; apart /= 2) v += simd_shuffle_xor(v, apart);
    return v;
  }
}
