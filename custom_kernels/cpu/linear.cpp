// Products with weight matrices, plain and gathered over a stack of them.
#include "linear.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "bindings.h"
#include "isa.h"
#include "pool.h"
#include "scratch.h"

namespace flash {

namespace {

using OptionalArray = std::optional<mx::array>;

constexpr int64_t kTinyBytes = 96 << 10;    // of weights; about 8 us of one thread
constexpr int64_t kPieceBytes = 256 << 10;  // at most
constexpr int64_t kMinPieceBytes = 16 << 10;
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kPieceFlops = 4 << 20;  // at least, about 40 us
constexpr int64_t kRowBlock = 512;        // activation rows per pass over a piece of weights

template <class... T>
[[noreturn]] void refuse(const T&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

void check(bool fine, const auto&... parts) {
  if (!fine) refuse(parts...);
}

bool is_float(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

const mx::array* pointer(const OptionalArray& array) { return array ? &*array : nullptr; }

mx::Shape leading(const mx::array& array, int drop) {
  return mx::Shape(array.shape().begin(), array.shape().end() - drop);
}

}  // namespace

Format format_of(const mx::array& w, const mx::array* scales, const mx::array* biases, int group,
                 int bits, const std::string& mode) {
  check(w.ndim() >= 2, "Weights are [..., out, in], not ", w.shape(), ".");
  if (!scales) {
    check(is_float(w.dtype()), "Dense weights are float32, float16 or bfloat16, not ", w.dtype(),
          ".");
    Float type = float_type(w.dtype());
    return {Mode::dense, static_cast<int>(8 * float_bytes(type)), 0, type};
  }
  Format format;
  format.bits = bits;
  format.group = group;
  bool known = false;
  if (mode == "affine") {
    format.mode = Mode::affine;
    known = (bits >= 2 && bits <= 8 && bits != 7) && (group == 32 || group == 64 || group == 128);
  } else if (mode == "mxfp4") {
    format.mode = Mode::mxfp4;
    known = bits == 4 && group == 32;
  } else if (mode == "mxfp8") {
    format.mode = Mode::mxfp8;
    known = bits == 8 && group == 32;
  } else if (mode == "nvfp4") {
    format.mode = Mode::nvfp4;
    known = bits == 4 && group == 16;
  }
  check(known, "No native kernel for mode ", mode, " with ", bits, " bits and groups of ", group,
        ".");
  check(w.dtype() == mx::uint32, "Quantized weights are uint32, not ", w.dtype(), ".");
  int64_t in = static_cast<int64_t>(w.shape(-1)) * 32 / bits;
  check(static_cast<int64_t>(w.shape(-1)) * 32 % bits == 0 && in % group == 0, "Weights ",
        w.shape(), " do not hold whole groups of ", group, " weights of ", bits, " bits.");
  auto shape = w.shape();
  shape.back() = static_cast<int>(in / group);
  check(scales->shape() == shape, "Weights ", w.shape(), " of ", bits, " bits need scales ", shape,
        ", not ", scales->shape(), ".");
  if (!format.has_bias()) {
    check(scales->dtype() == mx::uint8, "Scales of mode ", mode, " are uint8, not ",
          scales->dtype(), ".");
    check(!biases, "Mode ", mode, " has no biases.");
    return format;
  }
  check(is_float(scales->dtype()), "Affine scales are float32, float16 or bfloat16, not ",
        scales->dtype(), ".");
  format.scale = float_type(scales->dtype());
  check(biases != nullptr, "Mode affine needs biases.");
  check(biases->shape() == shape && biases->dtype() == scales->dtype(),
        "Biases have the shape and dtype of the scales: ", shape, " ", scales->dtype(), ", not ",
        biases->shape(), " ", biases->dtype(), ".");
  return format;
}

int64_t inputs_of(const mx::array& w, const Format& format) {
  int64_t words = w.shape(-1);
  return format.mode == Mode::dense ? words : words * 32 / format.bits;
}

Matrix matrix_of(const mx::array& w, const mx::array* scales, const mx::array* biases,
                 const Format& format) {
  Matrix m;
  m.format = format;
  m.out = w.shape(-2);
  m.in = inputs_of(w, format);
  m.weight = w.data<uint8_t>();
  if (scales) m.scales = scales->data<uint8_t>();
  if (biases) m.biases = biases->data<uint8_t>();
  return m;
}

namespace {

// Outputs per piece: large enough to be worth claiming, small enough to share out.
int64_t decode_grain(const Matrix& w, int64_t rows, int64_t matrices) {
  // Several rows share a piece of weights while it is in the L2 cache.
  int64_t row_bytes = std::max<int64_t>(1, w.row_bytes() + 2 * w.group_row_bytes());
  int64_t pieces = kPiecesPerThread * Pool::shared().threads();
  int64_t bytes = std::clamp(matrices * w.out * row_bytes / pieces, kMinPieceBytes, kPieceBytes);
  return round_up(std::max<int64_t>(1, bytes / row_bytes / std::clamp<int64_t>(rows, 1, 8)), 16);
}

int64_t prefill_grain(const Matrix& w, int64_t rows, int64_t matrices) {
  int64_t unit = isa().matmul_grain;
  // Unpacking a weight costs about as much as four rows' use of it.
  int64_t unit_flops = std::max<int64_t>(1, 2 * unit * w.in * (rows + 4));
  int64_t share = round_up(w.out, unit) / unit * matrices / (4 * Pool::shared().threads());
  int64_t units = std::max(kPieceFlops / unit_flops, isa().matmul_width / unit);
  return unit * std::clamp<int64_t>(units, 1, std::max<int64_t>(1, share));
}

// Whether a product of so many rows in all is over before another thread would have woken up.
bool is_tiny(const Matrix& w, int64_t rows) { return w.out * w.row_bytes() * rows <= kTinyBytes; }

// Some activation rows against one matrix: `pairs` [begin, end) of the product.
struct Job {
  Matrix w;
  const uint8_t* bias;  // [out] or null
  int64_t begin, end;
};

struct Pair {
  int64_t x, y;  // row of the activations, row of the result
};

class Product {
 public:
  Product(const mx::array& x, mx::array& y, int64_t in, int64_t out, bool prefill, Float bias_type)
      : x_(x.data<uint8_t>()),
        y_(y.data<uint8_t>()),
        type_(float_type(x.dtype())),
        bias_type_(bias_type),
        x_rows_(static_cast<int64_t>(x.size()) / std::max<int64_t>(1, in)),
        in_(in),
        out_(out),
        prefill_(prefill) {}

  std::vector<Job> jobs;
  std::vector<Pair> pairs;
  void run();

 private:
  void prepare(int64_t begin, int64_t end);
  void multiply(const Job& job, int64_t begin, int64_t end);
  void store(float* sums, const float* bias, int64_t row, int64_t begin, int64_t end);

  const Isa& isa_ = isa();
  const uint8_t* x_;
  uint8_t* y_;
  Float type_;  // of x and y
  Float bias_type_;
  int64_t x_rows_, in_, out_;
  bool prefill_;
  bool half_ = false;
  int64_t row_bytes_ = 0;  // of a prepared or packed activation row
  uint8_t* rows_ = nullptr;
};

// Lays activation rows out as the kernel wants them.
void Product::prepare(int64_t begin, int64_t end) {
  const Format& format = jobs[0].w.format;
  Scratch scratch;
  float* row = scratch.take<float>(in_);
  for (int64_t r = begin; r < end; r++) {
    isa_.ops.to_float(x_ + r * in_ * float_bytes(type_), type_, in_, row);
    uint8_t* to = rows_ + r * row_bytes_;
    if (prefill_) {
      isa_.pack_row(format, row, in_, half_, to);
    } else {
      isa_.prepare(format, row, in_, reinterpret_cast<float*>(to));
    }
  }
}

// One row's outputs [begin, end).
void Product::store(float* sums, const float* bias, int64_t row, int64_t begin, int64_t end) {
  if (bias) {
    for (int64_t i = 0; i < end - begin; i++) sums[i] += bias[i];
  }
  uint8_t* to = y_ + (row * out_ + begin) * float_bytes(type_);
  isa_.ops.from_float(sums, type_, end - begin, to);
}

// Outputs [begin, end) of all rows of one job.
void Product::multiply(const Job& job, int64_t begin, int64_t end) {
  int64_t width = end - begin, count = job.end - job.begin;
  int64_t block = prefill_ ? std::min(count, kRowBlock) : 1;
  Scratch scratch;
  auto* space =
      scratch.take<uint8_t>(prefill_ ? isa_.matmul_scratch_bytes(job.w.format, in_, half_) : 0);
  auto** rows = scratch.take<const uint8_t*>(block);
  auto* sums = scratch.take<float>(block * width);
  float* bias = nullptr;
  if (job.bias) {
    bias = scratch.take<float>(width);
    isa_.ops.to_float(job.bias + begin * float_bytes(bias_type_), bias_type_, width, bias);
  }
  for (int64_t p = job.begin; p < job.end; p += block) {
    int64_t n = std::min(block, job.end - p);
    for (int64_t i = 0; i < n; i++) rows[i] = rows_ + pairs[p + i].x * row_bytes_;
    // The kernels write from column `begin` of their result on.
    if (prefill_) {
      isa_.matmul(job.w, half_, rows, n, begin, end, sums - begin, width, space);
    } else {
      isa_.matvec(job.w, reinterpret_cast<const float*>(rows[0]), begin, end, sums - begin);
    }
    for (int64_t i = 0; i < n; i++) store(sums + i * width, bias, pairs[p + i].y, begin, end);
  }
}

void Product::run() {
  if (jobs.empty() || !out_) return;
  const Format& format = jobs[0].w.format;
  half_ = prefill_ && type_ == Float::bf16 && isa_.half_matmul;
  row_bytes_ = round_up(
      prefill_ ? isa_.packed_row_bytes(format, in_, half_) : 4 * isa_.prepared_floats(format, in_),
      64);
  Scratch scratch;
  rows_ = scratch.take<uint8_t>(x_rows_ * row_bytes_);
  if (is_tiny(jobs[0].w, static_cast<int64_t>(pairs.size()))) {
    prepare(0, x_rows_);
    for (auto& job : jobs) multiply(job, 0, out_);
    return;
  }
  int64_t matrices = static_cast<int64_t>(jobs.size());
  int64_t per_matrix = std::max<int64_t>(1, static_cast<int64_t>(pairs.size()) / matrices);
  int64_t grain = prefill_ ? prefill_grain(jobs[0].w, per_matrix, matrices)
                           : decode_grain(jobs[0].w, per_matrix, matrices);
  int64_t pieces = (out_ + grain - 1) / grain;
  constexpr int64_t kRowsPerPiece = 8;  // some microseconds
  bool alone = x_rows_ <= kRowsPerPiece;
  if (alone) prepare(0, x_rows_);
  Pool::shared().run([&](Team& team) {
    if (!alone) {
      team.each(x_rows_, kRowsPerPiece, [&](int64_t begin, int64_t end) { prepare(begin, end); });
    }
    team.each(matrices * pieces, 1, [&](int64_t piece, int64_t) {
      int64_t begin = piece % pieces * grain;
      multiply(jobs[piece / pieces], begin, std::min(out_, begin + grain));
    });
  });
}

// One operation of the graph: what it does with its inputs, of which the first is x.
struct Call {
  Format format;
  int weight = -1, scales = -1, biases = -1, bias = -1, indices = -1;
  int64_t in, out;
  bool prefill;

  void operator()(const Arrays& inputs, Arrays& outputs) const;
};

void Call::operator()(const Arrays& inputs, Arrays& outputs) const {
  const mx::array& x = inputs[0];
  mx::array& y = outputs[0];
  if (y.size() == 0) return;
  auto input = [&](int i) { return i < 0 ? nullptr : &inputs[i]; };
  Matrix w = matrix_of(inputs[weight], input(scales), input(biases), format);
  const uint8_t* bias_data = bias < 0 ? nullptr : inputs[bias].data<uint8_t>();
  Float bias_type = bias < 0 ? Float::f32 : float_type(inputs[bias].dtype());
  Product product(x, y, in, out, prefill, bias_type);

  if (indices < 0) {
    int64_t rows = static_cast<int64_t>(y.size()) / out;
    for (int64_t r = 0; r < rows; r++) product.pairs.push_back({r, r});
    product.jobs.push_back({w, bias_data, 0, rows});
    product.run();
    return;
  }

  // x is [batch..., M, in] and the indices [batch...], with axes of one broadcast either way.
  int64_t experts = inputs[weight].shape(0);
  const mx::array& chosen = inputs[indices];
  int64_t m = x.ndim() > 1 ? x.shape(-2) : 1;
  auto batch = leading(y, 2);
  int64_t n = y.size() / (m * out);
  std::vector<int64_t> expert_of(n), x_of(n), starts(experts + 1, 0);
  auto offset = [&](const mx::array& array, int drop, int64_t i) {
    int64_t at = 0, step = 1;
    for (int d = static_cast<int>(batch.size()) - 1; d >= 0; d--) {
      int64_t coordinate = i % batch[d];
      i /= batch[d];
      int axis = d - (static_cast<int>(batch.size()) - (static_cast<int>(array.ndim()) - drop));
      if (axis < 0) continue;
      if (array.shape(axis) > 1) at += coordinate * step;
      step *= array.shape(axis);
    }
    return at;
  };
  for (int64_t i = 0; i < n; i++) {
    int64_t at = offset(chosen, 0, i);
    int64_t e =
        chosen.dtype() == mx::uint32 ? chosen.data<uint32_t>()[at] : chosen.data<int32_t>()[at];
    check(e >= 0 && e < experts, "Index ", e, " into ", experts, " matrices.");
    expert_of[i] = e;
    x_of[i] = offset(x, 2, i);
    starts[e + 1]++;
  }
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  product.pairs.resize(n * m);
  auto next = starts;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = next[expert_of[i]]++;
    for (int64_t r = 0; r < m; r++) product.pairs[at * m + r] = {x_of[i] * m + r, i * m + r};
  }
  for (int64_t e = 0; e < experts; e++) {
    if (starts[e] == starts[e + 1]) continue;
    const uint8_t* expert_bias = bias_data ? bias_data + e * out * float_bytes(bias_type) : nullptr;
    product.jobs.push_back({w.at(e), expert_bias, starts[e] * m, starts[e + 1] * m});
  }
  product.run();
}

// One row per sequence is decode: row by row, whatever else is in the batch.
bool is_prefill(const mx::array& x, std::optional<bool> prefill) {
  return prefill.value_or(x.ndim() > 1 && x.shape(-2) > 1);
}

mx::array product(const char* name, const mx::array& x, const mx::array& w,
                  const OptionalArray& scales, const OptionalArray& biases,
                  const OptionalArray& indices, int group, int bits, const std::string& mode,
                  const OptionalArray& bias, std::optional<bool> prefill) {
  bool gathered = indices.has_value();
  check(x.ndim() >= (gathered ? 2u : 1u), "Activations are [..., in], gathered [..., rows, in], ",
        "not ", x.shape(), ".");
  check(is_float(x.dtype()), "Activations are float32, float16 or bfloat16, not ", x.dtype(), ".");
  size_t dims = gathered ? 3 : 2;
  check(w.ndim() == dims, "Weights are ", gathered ? "[matrices, out, in]" : "[out, in]", ", not ",
        w.shape(), ".");
  Call call;
  call.format = format_of(w, pointer(scales), pointer(biases), group, bits, mode);
  call.out = w.shape(-2);
  call.in = inputs_of(w, call.format);
  check(x.shape(-1) == call.in, "Activations ", x.shape(), " do not fit weights of ", call.in,
        " inputs.");
  Arrays inputs{x};
  auto add = [&](const OptionalArray& array) {
    if (!array) return -1;
    inputs.push_back(*array);
    return static_cast<int>(inputs.size()) - 1;
  };
  call.weight = add(w);
  call.scales = add(scales);
  call.biases = add(biases);
  if (bias) {
    auto shape = leading(w, 1);
    check(bias->shape() == shape && is_float(bias->dtype()), "The bias is ", shape,
          " of float32, float16 or bfloat16, not ", bias->shape(), " ", bias->dtype(), ".");
  }
  call.bias = add(bias);
  auto shape = leading(x, 1);
  if (gathered) {
    check(mx::issubdtype(indices->dtype(), mx::integer), "Indices are integers, not ",
          indices->dtype(), ".");
    bool taken = indices->dtype() == mx::uint32 || indices->dtype() == mx::int32;
    call.indices = add(taken ? *indices : mx::astype(*indices, mx::int32, mx::Device::cpu));
    shape = mx::broadcast_shapes(leading(x, 2), indices->shape());
    shape.push_back(x.shape(-2));
  }
  call.prefill = is_prefill(x, prefill);
  shape.push_back(static_cast<int>(call.out));
  return on_cpu(name, call, std::move(inputs), {{std::move(shape), x.dtype()}})[0];
}

}  // namespace

void bind_linear(nb::module_& m) {
  using namespace nb::literals;
  using Prefill = std::optional<bool>;
  m.def(
      "quantized_matmul",
      [](const mx::array& x, const mx::array& w, const mx::array& scales,
         const OptionalArray& biases, int group_size, int bits, const std::string& mode,
         const OptionalArray& bias, Prefill prefill) {
        return product("QuantizedMatmul", x, w, scales, biases, {}, group_size, bits, mode, bias,
                       prefill);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "group_size"_a, "bits"_a, "mode"_a = "affine",
      "bias"_a.none() = nb::none(), "prefill"_a.none() = nb::none(),
      "x [..., in] times w [out, packed in] transposed, plus bias [out]: [..., out] as x's dtype.");
  m.def(
      "dense_matmul",
      [](const mx::array& x, const mx::array& w, const OptionalArray& bias, Prefill prefill) {
        return product("DenseMatmul", x, w, {}, {}, {}, 0, 0, "", bias, prefill);
      },
      "x"_a, "w"_a, "bias"_a.none() = nb::none(), "prefill"_a.none() = nb::none(),
      "x [..., in] times w [out, in] transposed, plus bias [out]: [..., out] as x's dtype.");
  m.def(
      "gather_qmm",
      [](const mx::array& x, const mx::array& w, const mx::array& scales,
         const OptionalArray& biases, const mx::array& indices, int group_size, int bits,
         const std::string& mode, const OptionalArray& bias, Prefill prefill) {
        return product("GatherQMM", x, w, scales, biases, indices, group_size, bits, mode, bias,
                       prefill);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "indices"_a, "group_size"_a, "bits"_a,
      "mode"_a = "affine", "bias"_a.none() = nb::none(), "prefill"_a.none() = nb::none(),
      "x [..., rows, in] times w[indices] transposed, plus bias[indices], w a stack of matrices.");
  m.def(
      "gather_mm",
      [](const mx::array& x, const mx::array& w, const mx::array& indices,
         const OptionalArray& bias, Prefill prefill) {
        return product("GatherMM", x, w, {}, {}, indices, 0, 0, "", bias, prefill);
      },
      "x"_a, "w"_a, "indices"_a, "bias"_a.none() = nb::none(), "prefill"_a.none() = nb::none(),
      "x [..., rows, in] times w[indices] transposed, plus bias[indices], w [matrices, out, in].");
}

}  // namespace flash
