#include "weights.h"

#include <stdexcept>

#include "isa.h"

namespace flash {

namespace {

Format format_of(const mx::array& weight, const std::optional<mx::array>& scales, int group_size,
                 int bits, const std::string& mode) {
  if (mode == "dense") {
    Float type = float_type(weight.dtype());
    return {Mode::dense, static_cast<int>(8 * float_bytes(type)), 0, type};
  }
  if (!scales) throw std::invalid_argument("Quantized weights need scales.");
  if (mode == "affine") return {Mode::affine, bits, group_size, float_type(scales->dtype())};
  if (mode == "mxfp4" && bits == 4 && group_size == 32) return {Mode::mxfp4, 4, 32, Float::f32};
  if (mode == "mxfp8" && bits == 8 && group_size == 32) return {Mode::mxfp8, 8, 32, Float::f32};
  if (mode == "nvfp4" && bits == 4 && group_size == 16) return {Mode::nvfp4, 4, 16, Float::f32};
  throw std::invalid_argument("No native kernel for " + std::to_string(bits) + " bits of " + mode +
                              " in groups of " + std::to_string(group_size) + ".");
}

}  // namespace

Weights::Weights(mx::array weight, std::optional<mx::array> scales, std::optional<mx::array> biases,
                 std::optional<mx::array> bias, int group_size, int bits, const std::string& mode)
    : weight_(std::move(weight)),
      scales_(std::move(scales)),
      biases_(std::move(biases)),
      bias_(std::move(bias)),
      format_(format_of(weight_, scales_, group_size, bits, mode)) {
  if (weight_.ndim() != 2 && weight_.ndim() != 3) {
    throw std::invalid_argument("Weights are [out, in] or [n, out, in].");
  }
  if (format_.has_bias() != biases_.has_value()) {
    throw std::invalid_argument("Affine weights have biases, others have none.");
  }
  for (auto* array : {&weight_, scales_ ? &*scales_ : nullptr, biases_ ? &*biases_ : nullptr,
                      bias_ ? &*bias_ : nullptr}) {
    if (!array) continue;
    array->eval();
    if (!array->flags().row_contiguous) *array = mx::contiguous(*array), array->eval();
  }
}

int64_t Weights::in() const {
  int64_t words = weight_.shape(-1);
  return format_.mode == Mode::dense ? words : words * 32 / format_.bits;
}

Matrix Weights::matrix() const {
  Matrix m;
  m.weight = weight_.data<uint8_t>();
  m.scales = scales_ ? scales_->data<uint8_t>() : nullptr;
  m.biases = biases_ ? biases_->data<uint8_t>() : nullptr;
  m.out = out();
  m.in = in();
  m.format = format_;
  return m;
}

void Weights::add_bias(int64_t i, int64_t begin, int64_t end, float* y) const {
  if (!bias_) return;
  Float type = float_type(bias_->dtype());
  float piece[64];
  for (int64_t r = begin; r < end; r += 64) {
    int64_t n = end - r < 64 ? end - r : 64;
    isa().ops.to_float(bias_->data<uint8_t>() + (i * out() + r) * float_bytes(type), type, n,
                       piece);
    for (int64_t j = 0; j < n; j++) y[r + j] += piece[j];
  }
}

}  // namespace flash
