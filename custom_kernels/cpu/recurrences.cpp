// Primitives that walk over tokens in order: causal convolution, gated delta rule, Mamba2.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <cmath>
#include <optional>

#include "mixers.h"
#include "rows.h"
#include "scratch.h"

namespace flash {

namespace {

using Pair = std::pair<mx::array, mx::array>;

constexpr int64_t kTokens = 32;     // that are in float32 scratch at a time
constexpr int64_t kChannels = 512;  // the same of a convolution

std::vector<float> floats(const mx::array& a) {
  std::vector<float> to(a.size());
  isa().ops.to_float(a.data<char>(), float_type(a.dtype()), to.size(), to.data());
  return to;
}

// history: [B, taps - 1, channels], x: [B, S, channels], weight: [channels, taps, 1],
// bias: [channels] or none -> y [B, S, channels], the next history
Pair conv1d(const mx::array& history, const mx::array& x, const mx::array& weight,
            const std::optional<mx::array>& bias, bool silu) {
  check(x.ndim() == 3 && history.ndim() == 3 && weight.ndim() == 3, "conv1d takes 3 axes.");
  int batch = x.shape(0), tokens = x.shape(1), channels = x.shape(2), taps = weight.shape(1);
  check(weight.shape() == mx::Shape{channels, taps, 1} && taps >= 1 && taps <= kMaxTaps,
        "conv1d takes weight [channels, taps, 1] of at most 16 taps.");
  check(history.shape() == mx::Shape{batch, taps - 1, channels} && history.dtype() == x.dtype(),
        "conv1d takes history [B, taps - 1, channels] like x.");
  check(!bias || bias->shape() == mx::Shape{channels}, "conv1d takes bias [channels].");
  Arrays inputs{history, x, weight};
  if (bias) inputs.push_back(*bias);
  for (auto& input : inputs) float_type(input.dtype());
  auto body = [=](const Arrays& in, Arrays& out) {
    const Ops& ops = isa().ops;
    Rows history(in[0]), x(in[1]), y(out[0]), next(out[1]);
    int64_t past = taps - 1;
    // Row `row` of the sequence that begins with the history.
    auto read = [&](int64_t b, int64_t row, int64_t c0, int64_t c1, float* to) {
      if (row < past) return history.read(b * past + row, c0, c1, to);
      x.read(b * tokens + row - past, c0, c1, to);
    };
    int64_t spans = (tokens + kTokens - 1) / kTokens;
    int64_t pieces = (channels + kChannels - 1) / kChannels;
    over(batch * pieces * spans, kChannels * std::min<int64_t>(kTokens, tokens),
         [&](int64_t begin, int64_t end) {
           Scratch scratch;
           auto* seen = scratch.take<float>((kTokens + past) * kChannels);
           auto* made = scratch.take<float>(kTokens * kChannels);
           auto* w = scratch.take<float>(kChannels * taps);
           auto* shift = scratch.take<float>(kChannels);
           for (int64_t i = begin; i < end; i++) {
             int64_t t0 = i % spans * kTokens, t1 = std::min<int64_t>(tokens, t0 + kTokens);
             int64_t c0 = i / spans % pieces * kChannels, b = i / spans / pieces;
             int64_t c1 = std::min<int64_t>(channels, c0 + kChannels), n = c1 - c0;
             for (int64_t row = t0; row < t1 + past; row++) {
               read(b, row, c0, c1, seen + (row - t0) * n);
             }
             Float type = float_type(in[2].dtype());
             ops.to_float(in[2].data<char>() + c0 * taps * float_bytes(type), type, n * taps, w);
             if (in.size() > 3) Rows(in[3]).read(0, c0, c1, shift);
             ops.conv1d(seen, n, w, in.size() > 3 ? shift : nullptr, taps, t1 - t0, 0, n, silu,
                        made, n);
             for (int64_t t = t0; t < t1; t++) {
               y.write(b * tokens + t, c0, c1, made + (t - t0) * n);
             }
           }
         });
    if (channels == 0) return;
    Scratch scratch;
    auto* row = scratch.take<float>(channels);
    for (int64_t i = 0; i < batch * past; i++) {
      read(i / past, tokens + i % past, 0, channels, row);
      next.write(i, row);
    }
  };
  auto made = on_cpu("Conv1d", std::move(body), std::move(inputs),
                     {{x.shape(), x.dtype()}, {history.shape(), x.dtype()}}, {0, 1});
  return {made[0], made[1]};
}

// a, b: [B, S, heads], A_log, dt_bias: [heads] -> g, beta: [B, S, heads] float32
Pair gated_delta_gates(const mx::array& a, const mx::array& b, const mx::array& A_log,
                       const mx::array& dt_bias) {
  check(a.ndim() > 0 && a.shape() == b.shape(), "gated_delta_gates takes a and b alike.");
  mx::Shape heads{a.shape().back()};
  check(A_log.shape() == heads && dt_bias.shape() == heads,
        "gated_delta_gates takes A_log and dt_bias [heads].");
  for (auto* input : {&a, &b, &A_log, &dt_bias}) float_type(input->dtype());
  auto body = [](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    Rows a(in[0]), b(in[1]);
    int64_t n = a.width();
    auto A_log = floats(in[2]), dt_bias = floats(in[3]);
    over(count_rows(in[0].shape()), n, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      auto *x = scratch.take<float>(n), *y = scratch.take<float>(n);
      for (int64_t row = begin; row < end; row++) {
        a.read(row, x);
        b.read(row, y);
        isa().ops.gated_delta_gates(x, y, A_log.data(), dt_bias.data(), n,
                                    out[0].data<float>() + row * n, out[1].data<float>() + row * n);
      }
    });
  };
  auto made = on_cpu("GatedDeltaGates", std::move(body), {a, b, A_log, dt_bias},
                     {{a.shape(), mx::float32}, {a.shape(), mx::float32}}, {0, 1});
  return {made[0], made[1]};
}

// q, k: [B, S, Hk, Dk], v: [B, S, Hv, Dv], g, beta: [B, S, Hv], state: [B, Hv, Dv, Dk] float32
// -> y [B, S, Hv, Dv], the next state. `normalize` gives q length Dk^-1/2 and k length 1 first.
Pair gated_delta(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& g,
                 const mx::array& beta, const mx::array& state, bool normalize) {
  check(q.ndim() == 4 && v.ndim() == 4 && q.shape() == k.shape() && q.shape(0) == v.shape(0) &&
            q.shape(1) == v.shape(1),
        "gated_delta takes q, k [B, S, Hk, Dk] and v [B, S, Hv, Dv].");
  int batch = v.shape(0), tokens = v.shape(1), heads = v.shape(2), dv = v.shape(3);
  int key_heads = q.shape(2), dk = q.shape(3);
  check(key_heads > 0 && heads % key_heads == 0, "Value heads are a multiple of key heads.");
  check(g.shape() == mx::Shape{batch, tokens, heads} && beta.shape() == g.shape(),
        "gated_delta takes g, beta [B, S, Hv].");
  check(state.shape() == mx::Shape{batch, heads, dv, dk} && state.dtype() == mx::float32,
        "gated_delta takes state [B, Hv, Dv, Dk] of float32.");
  Arrays inputs{q, k, v, mx::astype(g, mx::float32), mx::astype(beta, mx::float32), state};
  for (auto& input : inputs) float_type(input.dtype());
  auto body = [=](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    const Ops& ops = isa().ops;
    Rows q(in[0]), k(in[1]), v(in[2]), y(out[0]);
    float root = 1 / std::sqrt(static_cast<float>(dk));
    int64_t span = std::min<int64_t>(kTokens, tokens);
    over(batch * heads, static_cast<int64_t>(tokens) * dk * dv, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      auto *qs = scratch.take<float>(span * dk), *ks = scratch.take<float>(span * dk);
      auto *vs = scratch.take<float>(span * dv), *ys = scratch.take<float>(span * dv);
      for (int64_t i = begin; i < end; i++) {
        int64_t b = i / heads, head = i % heads, key_head = head / (heads / key_heads);
        float* state = out[1].data<float>() + i * dv * dk;
        for (int64_t t0 = 0; t0 < tokens; t0 += span) {
          int64_t count = std::min<int64_t>(span, tokens - t0);
          for (int64_t t = 0; t < count; t++) {
            int64_t token = b * tokens + t0 + t;
            q.read(token * key_heads + key_head, qs + t * dk);
            k.read(token * key_heads + key_head, ks + t * dk);
            v.read(token * heads + head, vs + t * dv);
            if (!normalize) continue;
            ops.l2_norm(qs + t * dk, 1e-6f, root, dk, qs + t * dk);
            ops.l2_norm(ks + t * dk, 1e-6f, 1, dk, ks + t * dk);
          }
          int64_t gate = (b * tokens + t0) * heads + head;
          ops.gated_delta(count, qs, dk, ks, dk, vs, dv, in[3].data<float>() + gate, heads,
                          in[4].data<float>() + gate, heads, dk, 0, dv, state, ys, dv);
          for (int64_t t = 0; t < count; t++) {
            y.write((b * tokens + t0 + t) * heads + head, ys + t * dv);
          }
        }
      }
    });
  };
  auto made = on_cpu("GatedDelta", std::move(body), std::move(inputs),
                     {{v.shape(), v.dtype()}, {state.shape(), mx::float32, 5}}, {0, 1, 2});
  return {made[0], made[1]};
}

// x: [B, S, H, dim], B, C: [B, S, G, n], dt: [B, S, H], A_log, D, dt_bias: [H],
// state: [B, H, dim, n] float32 -> y [B, S, H, dim], the next state
Pair ssm(const mx::array& x, const mx::array& A_log, const mx::array& B, const mx::array& C,
         const mx::array& D, const mx::array& dt, const mx::array& dt_bias, const mx::array& state,
         std::pair<float, float> limit) {
  check(x.ndim() == 4 && B.ndim() == 4 && B.shape() == C.shape() && x.shape(0) == B.shape(0) &&
            x.shape(1) == B.shape(1),
        "ssm takes x [B, S, H, dim] and B, C [B, S, G, n].");
  int batch = x.shape(0), tokens = x.shape(1), heads = x.shape(2), dim = x.shape(3);
  int groups = B.shape(2), n = B.shape(3);
  check(groups > 0 && heads % groups == 0, "Heads are a multiple of groups.");
  check(dt.shape() == mx::Shape{batch, tokens, heads}, "ssm takes dt [B, S, H].");
  for (auto* input : {&A_log, &D, &dt_bias}) {
    check(input->shape() == mx::Shape{heads}, "ssm takes A_log, D and dt_bias [H].");
  }
  check(state.shape() == mx::Shape{batch, heads, dim, n} && state.dtype() == mx::float32,
        "ssm takes state [B, H, dim, n] of float32.");
  Arrays inputs{x, B, C, dt, A_log, D, dt_bias, state};
  for (auto& input : inputs) float_type(input.dtype());
  auto body = [=](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    const Ops& ops = isa().ops;
    Rows x(in[0]), B(in[1]), C(in[2]), dt(in[3]), y(out[0]);
    auto A_log = floats(in[4]), D = floats(in[5]), dt_bias = floats(in[6]);
    Scratch whole;
    auto* steps = whole.take<float>(static_cast<int64_t>(batch) * tokens * heads);
    over(static_cast<int64_t>(batch) * tokens, heads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        dt.read(row, steps + row * heads);
        ops.ssm_steps(steps + row * heads, dt_bias.data(), limit.first, limit.second, heads,
                      steps + row * heads);
      }
    });
    int64_t span = std::min<int64_t>(kTokens, tokens);
    over(batch * heads, static_cast<int64_t>(tokens) * dim * n, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      auto *xs = scratch.take<float>(span * dim), *ys = scratch.take<float>(span * dim);
      auto *bs = scratch.take<float>(span * n), *cs = scratch.take<float>(span * n);
      for (int64_t i = begin; i < end; i++) {
        int64_t b = i / heads, head = i % heads, group = head / (heads / groups);
        float* state = out[1].data<float>() + i * dim * n;
        for (int64_t t0 = 0; t0 < tokens; t0 += span) {
          int64_t count = std::min<int64_t>(span, tokens - t0), token = b * tokens + t0;
          for (int64_t t = 0; t < count; t++) {
            x.read((token + t) * heads + head, xs + t * dim);
            B.read((token + t) * groups + group, bs + t * n);
            C.read((token + t) * groups + group, cs + t * n);
          }
          ops.ssm(count, xs, dim, bs, n, cs, n, steps + token * heads + head, heads,
                  -std::exp(A_log[head]), D[head], n, 0, dim, state, ys, dim);
          for (int64_t t = 0; t < count; t++) y.write((token + t) * heads + head, ys + t * dim);
        }
      }
    });
  };
  auto made = on_cpu("Ssm", std::move(body), std::move(inputs),
                     {{x.shape(), x.dtype()}, {state.shape(), mx::float32, 7}}, {0, 1, 2, 3});
  return {made[0], made[1]};
}

}  // namespace

void bind_recurrences(nb::module_& m) {
  using namespace nb::literals;
  m.def("conv1d", &conv1d, "history"_a, "x"_a, "weight"_a, "bias"_a.none(), "silu"_a);
  m.def("gated_delta_gates", &gated_delta_gates, "a"_a, "b"_a, "A_log"_a, "dt_bias"_a);
  m.def("gated_delta", &gated_delta, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "state"_a,
        "normalize"_a = false);
  m.def("ssm", &ssm, "x"_a, "A_log"_a, "B"_a, "C"_a, "D"_a, "dt"_a, "dt_bias"_a, "state"_a,
        "time_step_limit"_a);
}

}  // namespace flash
