// Reading and writing MLX arrays a row (the last axis) at a time, in float32, on all threads.
#pragma once

#include <algorithm>

#include "isa.h"
#include "pool.h"
#include "primitive.h"

namespace flash {

// The rows of an array of any strides, counted through its other axes in row-major order.
class Rows {
 public:
  explicit Rows(const mx::array& array)
      : data_(array.data<char>()),
        type_(float_type(array.dtype())),
        item_(float_bytes(type_)),
        width_(array.shape().back()),
        step_(array.strides().back()) {
    for (size_t i = 0; i + 1 < array.ndim(); i++) {
      if (array.shape(i) == 1) continue;
      bool one = !axes_.empty() && axes_.back().stride == array.shape(i) * array.strides()[i];
      if (one) {
        axes_.back() = {axes_.back().size * array.shape(i), array.strides()[i]};
      } else {
        axes_.push_back({array.shape(i), array.strides()[i]});
      }
    }
  }

  Float type() const { return type_; }
  int64_t width() const { return width_; }
  bool together() const { return step_ == 1; }  // elements of a row follow one another

  char* address(int64_t row) const { return const_cast<char*>(data_) + offset(row) * item_; }

  // Elements [begin, end) of a row, into `to`.
  void read(int64_t row, int64_t begin, int64_t end, float* to) const {
    const char* from = address(row) + begin * step_ * item_;
    if (together()) return isa().ops.to_float(from, type_, end - begin, to);
    for (int64_t i = 0; i < end - begin; i++) {
      isa().ops.to_float(from + i * step_ * item_, type_, 1, to + i);
    }
  }
  void read(int64_t row, float* to) const { read(row, 0, width_, to); }

  // The same from `from`. Outputs are row contiguous.
  void write(int64_t row, int64_t begin, int64_t end, const float* from) const {
    isa().ops.from_float(from, type_, end - begin, address(row) + begin * item_);
  }
  void write(int64_t row, const float* from) const { write(row, 0, width_, from); }

 private:
  struct Axis {
    int64_t size, stride;
  };

  int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (size_t i = axes_.size(); i-- > 1; row /= axes_[i].size) {
      offset += row % axes_[i].size * axes_[i].stride;
    }
    return axes_.empty() ? offset : offset + row * axes_[0].stride;
  }

  const char* data_;
  Float type_;
  int64_t item_, width_, step_;
  std::vector<Axis> axes_;
};

// How many rows an array of that shape has.
inline int64_t count_rows(const mx::Shape& shape) {
  int64_t n = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) n *= shape[i];
  return n;
}

// Calls f(begin, end) over [0, n), on this thread if `each` floats per item make it a short job.
template <class F>
void over(int64_t n, int64_t each, F&& f) {
  constexpr int64_t kShort = 8 << 10;  // floats: about what waking another thread costs
  each = std::max<int64_t>(1, each);
  if (n == 0) return;
  if (n == 1 || n * each <= kShort) return f(int64_t{0}, n);
  int64_t share = (n + 4 * Pool::shared().threads() - 1) / (4 * Pool::shared().threads());
  int64_t grain = std::clamp<int64_t>(kShort / each, 1, std::max<int64_t>(1, share));
  Pool::shared().run([&](Team& team) { team.each(n, grain, f); });
}

}  // namespace flash
