// Rotary embeddings and attention as primitives.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <variant>

#include "mixers.h"
#include "rope.h"
#include "rows.h"
#include "scratch.h"

namespace flash {

namespace {

constexpr int64_t kRows = 64;  // queries that a thread claims at a time

// x: [B, ..., T, D] -> the same with the first `dims` of D turned by the position of T
mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base,
               float scale, std::variant<int, mx::array> offset,
               const std::optional<mx::array>& freqs) {
  check(x.ndim() >= 3 && dims > 0 && dims % 2 == 0 && dims <= x.shape(-1),
        "rope takes x [B, ..., T, D] and an even number of dims of D.");
  check(base.has_value() != freqs.has_value(), "rope takes a base or freqs.");
  check(!freqs || freqs->shape() == mx::Shape{dims / 2}, "rope takes freqs [dims / 2].");
  float_type(x.dtype());
  int batch = x.shape(0), tokens = x.shape(-2);
  Arrays inputs{
      x, freqs ? mx::reciprocal(mx::astype(*freqs, mx::float32)) : rope_frequencies(*base, dims)};
  int start = 0;
  if (auto* many = std::get_if<mx::array>(&offset)) {
    check(many->size() == 1 || many->shape() == mx::Shape{batch},
          "rope takes one offset, or one per sequence.");
    inputs.push_back(mx::astype(*many, mx::int32));
  } else {
    start = std::get<int>(offset);
  }
  auto body = [=](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    Rows from(in[0]), to(out[0]);
    bool each = in.size() > 2 && in[2].size() > 1;
    int64_t sequences = each ? batch : 1;
    Scratch scratch;
    auto* turns = scratch.take<float>(sequences * tokens * dims);
    over(sequences * tokens, 16 * dims, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int first = in.size() > 2 ? in[2].data<int>()[i / tokens] : start;
        rope_turn(in[1].data<float>(), dims,
                  (static_cast<float>(i % tokens) + static_cast<float>(first)) * scale,
                  turns + i * dims);
      }
    });
    int64_t rows = count_rows(in[0].shape()), width = from.width();
    over(rows, width, [&](int64_t begin, int64_t end) {
      Scratch mine;
      auto* row = mine.take<float>(width);
      for (int64_t i = begin; i < end; i++) {
        int64_t sequence = each ? i / (rows / batch) : 0;
        from.read(i, row);
        isa().ops.rope(row, turns + (sequence * tokens + i % tokens) * dims, dims, traditional);
        to.write(i, row);
      }
    });
  };
  return on_cpu("Rope", std::move(body), std::move(inputs), {{x.shape(), x.dtype()}}, {0})[0];
}

// Keys or values of one head: as they are, or copied to float32 if their rows are in pieces.
struct Cached {
  const char* rows;
  int64_t stride;  // in elements
  Float type;
};

Cached cached(Scratch& scratch, const mx::array& array, int64_t head, bool copy) {
  Rows all(array);
  int64_t n = array.shape(2), width = all.width();
  if (!copy) return {all.address(head * n), array.strides()[2], all.type()};
  auto* to = scratch.take<float>(n * width);
  for (int64_t i = 0; i < n; i++) all.read(head * n + i, to + i * width);
  return {reinterpret_cast<char*>(to), width, Float::f32};
}

// q: [B, H, L, D], k: [B, Hk, N, D], v: [B, Hk, N, Dv], sinks: [H] or none -> [B, H, L, Dv],
// which lies in memory as [B, L, H, Dv]. causal: query l sees the first N - L + l + 1 keys.
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::optional<std::string>& mask, const std::optional<mx::array>& sinks) {
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "attention takes 4 axes.");
  check(!mask || *mask == "causal", "attention takes no mask, or \"causal\".");
  int batch = q.shape(0), heads = q.shape(1), tokens = q.shape(2), dim = q.shape(3);
  int kv = k.shape(1), length = k.shape(2), vdim = v.shape(3);
  check(kv > 0 && heads % kv == 0, "Query heads are a multiple of key heads.");
  check(k.shape() == mx::Shape{batch, kv, length, dim} &&
            v.shape() == mx::Shape{batch, kv, length, vdim},
        "attention takes q [B, H, L, D], k [B, Hk, N, D] and v [B, Hk, N, Dv].");
  check(k.dtype() == v.dtype(), "Keys and values have the same dtype.");
  check(!sinks || sinks->shape() == mx::Shape{heads}, "attention takes sinks [H].");
  Arrays inputs{q, k, v};
  if (sinks) inputs.push_back(*sinks);
  for (auto& input : inputs) float_type(input.dtype());
  bool causal = mask.has_value();
  auto body = [=](const Arrays& in, Arrays& out) {
    if (out[0].size() == 0) return;
    const Ops& ops = isa().ops;
    Rows q(in[0]), y(out[0]);
    Scratch whole;
    auto* sinks = whole.take<float>(heads);
    if (in.size() > 3) Rows(in[3]).read(0, sinks);
    // Rows of a key head are its queries: token after token, and head after head in a token.
    int64_t group = heads / kv, rows = group * tokens;
    int64_t share = (batch * kv * rows + Pool::shared().threads() - 1) / Pool::shared().threads();
    int64_t piece = std::clamp<int64_t>(share, 1, std::min(kRows, rows));
    int64_t pieces = (rows + piece - 1) / piece;
    over(batch * kv * pieces, piece * length * (dim + vdim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Scratch scratch;
        auto* qs = scratch.take<float>(piece * dim);
        auto* ys = scratch.take<float>(piece * vdim);
        auto *first = scratch.take<int64_t>(piece), *last = scratch.take<int64_t>(piece);
        auto* sink = scratch.take<float>(piece);
        int64_t head = i / pieces, b = head / kv;
        int64_t r0 = i % pieces * piece, count = std::min(piece, rows - r0);
        auto at = [&](int64_t r) { return std::pair{head % kv * group + r % group, r / group}; };
        for (int64_t r = 0; r < count; r++) {
          auto [h, l] = at(r0 + r);
          q.read((b * heads + h) * tokens + l, qs + r * dim);
          first[r] = 0;
          last[r] = causal ? std::max<int64_t>(0, length - tokens + l + 1) : length;
          sink[r] = sinks[h];
        }
        bool copy = !Rows(in[1]).together() || !Rows(in[2]).together();
        Cached keys = cached(scratch, in[1], head, copy);
        Cached values = cached(scratch, in[2], head, copy);
        ops.attention(qs, dim, count, keys.rows, keys.stride, values.rows, values.stride, keys.type,
                      first, last, dim, vdim, scale, in.size() > 3 ? sink : nullptr, ys, vdim);
        for (int64_t r = 0; r < count; r++) {
          auto [h, l] = at(r0 + r);
          y.write((b * tokens + l) * heads + h, ys + r * vdim);
        }
      }
    });
  };
  auto y = on_cpu("Attention", std::move(body), std::move(inputs),
                  {{{batch, tokens, heads, vdim}, q.dtype()}}, {0, 1, 2})[0];
  return mx::transpose(y, {0, 2, 1, 3});
}

}  // namespace

mx::array rope_frequencies(float base, int dims) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<float, int>, mx::array>;
  std::lock_guard lock(mutex);
  auto found = known.find({base, dims});
  if (found != known.end()) return found->second;
  int half = dims / 2;
  float step = std::log(base) / half;
  auto made = mx::exp(mx::multiply(mx::arange(0, -half, -1, mx::float32, mx::Device::cpu),
                                   mx::array(step, mx::float32), mx::Device::cpu),
                      mx::Device::cpu);
  made.eval();
  known.emplace(std::pair{base, dims}, made);
  return made;
}

void rope_turn(const float* frequencies, int dims, float position, float* cos_sin) {
  for (int i = 0; i < dims / 2; i++) {
    float theta = position * frequencies[i];
    cos_sin[i] = std::cos(theta);
    cos_sin[dims / 2 + i] = std::sin(theta);
  }
}

void bind_attention(nb::module_& m) {
  using namespace nb::literals;
  m.def("rope", &rope, "x"_a, "dims"_a, "traditional"_a, "base"_a.none(), "scale"_a, "offset"_a,
        "freqs"_a.none() = nb::none());
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "scale"_a, "mask"_a.none() = nb::none(),
        "sinks"_a.none() = nb::none());
}

}  // namespace flash
