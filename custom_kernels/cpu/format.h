// What a weight matrix looks like in memory. Knows nothing of MLX, nothing of threads.
#pragma once

#include <cstdint>

namespace flash {

// How a floating point number is stored. All arithmetic is in float32.
enum class Float : uint8_t { f32, f16, bf16 };

inline int64_t float_bytes(Float type) { return type == Float::f32 ? 4 : 2; }

// MLX's quantization modes; dense is none. A group of `group` weights of one row shares a scale:
//   affine  scale * q + bias, q unsigned of `bits` bits, scale and bias of type `scale`
//   mxfp4   e2m1 * 2^(scale - 127), group 32        mxfp8  e4m3 * 2^(scale - 127), group 32
//   nvfp4   e2m1 * e4m3(scale), group 16
// Weights of a row are packed from the lowest bit on, as one bit stream: 8 weights of 3 bits take
// 3 bytes, 4 weights of 6 bits 3, 8 weights of 5 bits 5; 2, 4 and 8 bits fill uint32 words.
enum class Mode : uint8_t { dense, affine, mxfp4, mxfp8, nvfp4 };

struct Format {
  Mode mode = Mode::dense;
  int bits = 32;             // of one weight
  int group = 0;             // weights that share a scale; 0 where dense
  Float scale = Float::f32;  // of affine scales and biases, or of dense weights

  bool operator==(const Format&) const = default;
  bool has_bias() const { return mode == Mode::affine; }
  int64_t scale_bytes() const {
    return mode == Mode::dense ? 0 : mode == Mode::affine ? float_bytes(scale) : 1;
  }
};

// y = W x with W [out, in], row major, rows contiguous. `in` is a multiple of 32, or of 16 for
// nvfp4 and anything at all for dense: what MLX itself accepts. No alignment is promised.
struct Matrix {
  const uint8_t* weight = nullptr;
  const uint8_t* scales = nullptr;  // [out, in / group]
  const uint8_t* biases = nullptr;  // the same, affine only
  int64_t out = 0;
  int64_t in = 0;
  Format format;

  int64_t row_bytes() const { return in * format.bits / 8; }
  int64_t groups() const { return format.group ? in / format.group : 0; }
  int64_t group_row_bytes() const { return groups() * format.scale_bytes(); }

  // Matrix `i` of a stack [n, out, in].
  Matrix at(int64_t i) const {
    Matrix m = *this;
    m.weight += i * out * row_bytes();
    if (scales) m.scales += i * out * group_row_bytes();
    if (biases) m.biases += i * out * group_row_bytes();
    return m;
  }
};

}  // namespace flash
