// A linear layer's arrays, as the kernels see them.
#pragma once

#include <optional>
#include <string>

#include "primitive.h"

namespace flash {

// One matrix [out, in] or a stack of them [n, out, in], quantized or not. Evaluated arrays, held
// for as long as a graph may use them. Made once per layer, not once per call.
class Weights {
 public:
  // mode is MLX's name of it, or "dense". Throws std::invalid_argument for what no kernel takes.
  Weights(mx::array weight, std::optional<mx::array> scales, std::optional<mx::array> biases,
          std::optional<mx::array> bias, int group_size, int bits, const std::string& mode);

  int64_t out() const { return weight_.shape(-2); }
  int64_t in() const;
  int64_t count() const { return weight_.ndim() == 3 ? weight_.shape(0) : 1; }
  const Format& format() const { return format_; }

  // The first matrix of the stack. Valid while this object lives.
  Matrix matrix() const;

  bool has_bias() const { return bias_.has_value(); }
  // y[begin..end) += the bias of matrix i. `begin` counts rows of the matrix.
  void add_bias(int64_t i, int64_t begin, int64_t end, float* y) const;

 private:
  mx::array weight_;
  std::optional<mx::array> scales_, biases_, bias_;
  Format format_;
};

}  // namespace flash
