// Norms, activations and the router's choice: primitives whose rows know nothing of each other.
#include "mixers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <optional>

#include "rows.h"
#include "scratch.h"

namespace flash {

namespace {

using Optional = std::optional<mx::array>;

// A vector of parameters in float32, from input i if the call has it.
const float* parameters(Scratch& scratch, const Arrays& in, size_t i) {
  if (i >= in.size()) return nullptr;
  auto* to = scratch.take<float>(in[i].size());
  isa().ops.to_float(in[i].data<char>(), float_type(in[i].dtype()), in[i].size(), to);
  return to;
}

// y = f(rows of the first `rows` inputs), all of one shape, and the parameters that may follow.
// f(row of the first and of the second, parameters, width) overwrites the first.
template <class F>
mx::array by_rows(const char* name, Arrays inputs, int rows, mx::Dtype dtype, F f) {
  mx::array x = inputs[0];
  check(x.ndim() > 0, "A row needs an axis.");
  std::vector<int> strided;
  for (int i = 0; i < rows; i++) {
    float_type(inputs[i].dtype());
    check(inputs[i].shape() == x.shape(), "Inputs have the same shape.");
    strided.push_back(i);
  }
  auto body = [rows, f](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    Scratch scratch;
    const float* weight = parameters(scratch, in, rows);
    std::vector<Rows> from;
    for (int i = 0; i < rows; i++) from.emplace_back(in[i]);
    Rows to(out[0]);
    int64_t width = to.width();
    over(count_rows(out[0].shape()), width, [&](int64_t begin, int64_t end) {
      Scratch mine;
      auto* a = mine.take<float>(width);
      auto* b = mine.take<float>(width);
      for (int64_t row = begin; row < end; row++) {
        from[0].read(row, a);
        if (rows > 1) from[1].read(row, b);
        f(a, b, weight, width);
        to.write(row, a);
      }
    });
  };
  return on_cpu(name, std::move(body), std::move(inputs), {{x.shape(), dtype}},
                std::move(strided))[0];
}

// x: [..., width], weight: [width] or none -> [..., width]
mx::array rms_norm(const mx::array& x, const Optional& weight, float eps) {
  Arrays inputs{x};
  mx::Dtype dtype = x.dtype();
  if (weight) {
    check(x.ndim() > 0 && weight->shape() == mx::Shape{x.shape().back()},
          "rms_norm takes x [..., width] and weight [width].");
    float_type(weight->dtype());
    inputs.push_back(*weight);
    dtype = mx::promote_types(dtype, weight->dtype());
  }
  return by_rows(
      "RmsNorm", std::move(inputs), 1, dtype,
      [eps](float* a, float*, const float* w, int64_t n) { isa().ops.rms_norm(a, w, eps, n, a); });
}

// rms_norm(x) * silu(gate)
mx::array rms_norm_gated(const mx::array& x, const mx::array& gate, const mx::array& weight,
                         float eps) {
  check(x.ndim() > 0 && weight.shape() == mx::Shape{x.shape().back()},
        "rms_norm_gated takes x [..., width] and weight [width].");
  float_type(weight.dtype());
  return by_rows("RmsNormGated", {x, gate, weight}, 2, x.dtype(),
                 [eps](float* a, float* b, const float* w, int64_t n) {
                   isa().ops.rms_norm(a, w, eps, n, a);
                   isa().ops.activate(Activation::swiglu, b, a, n, 0, 0, a);
                 });
}

// rms_norm(silu(gate) * x), over groups of `group` of the last axis
mx::array gated_rms_norm(const mx::array& x, const mx::array& gate, const mx::array& weight,
                         float eps, int group) {
  check(x.ndim() > 0 && weight.shape() == mx::Shape{x.shape().back()} && group > 0 &&
            x.shape().back() % group == 0,
        "gated_rms_norm takes x [..., width], weight [width] and a group that divides width.");
  float_type(weight.dtype());
  return by_rows("GatedRmsNorm", {x, gate, weight}, 2, mx::promote_types(x.dtype(), weight.dtype()),
                 [eps, group](float* a, float* b, const float* w, int64_t n) {
                   isa().ops.activate(Activation::swiglu, b, a, n, 0, 0, a);
                   for (int64_t i = 0; i < n; i += group) {
                     isa().ops.rms_norm(a + i, w + i, eps, group, a + i);
                   }
                 });
}

// silu(gate) * up
mx::array swiglu(const mx::array& gate, const mx::array& up) {
  return by_rows("Swiglu", {gate, up}, 2, gate.dtype(),
                 [](float* a, float* b, const float*, int64_t n) {
                   isa().ops.activate(Activation::swiglu, a, b, n, 0, 0, a);
                 });
}

// x * sigmoid(gate)
mx::array sigmoid_gate(const mx::array& x, const mx::array& gate) {
  return by_rows("SigmoidGate", {x, gate}, 2, x.dtype(),
                 [](float* a, float* b, const float*, int64_t n) {
                   isa().ops.sigmoid(b, n, b);
                   isa().ops.mul(a, b, n, a);
                 });
}

// logits: [..., experts] -> indices [..., k], the largest first and the lower index first among
// equals, and their softmax over all experts, or over the k if `norm`.
std::pair<mx::array, mx::array> softmax_topk(const mx::array& logits, int k, bool norm) {
  check(logits.ndim() > 0 && k >= 0 && k <= logits.shape().back(),
        "softmax_topk takes logits [..., experts] and k of at most as many.");
  float_type(logits.dtype());
  mx::Shape shape = logits.shape();
  shape.back() = k;
  auto body = [k, norm](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    const Ops& ops = isa().ops;
    Rows logits(in[0]), scores(out[1]);
    int64_t n = logits.width();
    over(count_rows(in[0].shape()), n, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      auto* x = scratch.take<float>(n);
      auto* best = scratch.take<float>(k);
      for (int64_t row = begin; row < end; row++) {
        uint32_t* indices = out[0].data<uint32_t>() + row * k;
        logits.read(row, x);
        ops.top_k(x, n, k, indices);
        ops.softmax(x, n);
        float total = 0;
        for (int i = 0; i < k; i++) total += best[i] = x[indices[i]];
        if (norm) {
          for (int i = 0; i < k; i++) best[i] /= total;
        }
        scores.write(row, best);
      }
    });
  };
  auto made = on_cpu("SoftmaxTopK", std::move(body), {logits},
                     {{shape, mx::uint32}, {shape, logits.dtype()}}, {0});
  return {made[0], made[1]};
}

}  // namespace

void bind_mixers(nb::module_& m) {
  using namespace nb::literals;
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
  m.def("rms_norm_gated", &rms_norm_gated, "x"_a, "gate"_a, "weight"_a, "eps"_a);
  m.def("gated_rms_norm", &gated_rms_norm, "x"_a, "gate"_a, "weight"_a, "eps"_a, "group"_a);
  m.def("swiglu", &swiglu, "gate"_a, "up"_a);
  m.def("sigmoid_gate", &sigmoid_gate, "x"_a, "gate"_a);
  m.def("softmax_topk", &softmax_topk, "logits"_a, "k"_a, "norm"_a);
  bind_recurrences(m);
  bind_attention(m);
}

}  // namespace flash
