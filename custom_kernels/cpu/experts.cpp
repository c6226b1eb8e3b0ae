#include "experts.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "isa.h"
#include "pool.h"

namespace flash {

namespace {

constexpr int64_t kPieceBytes = 128 << 10;  // of weights that a thread claims at a time, in decode
constexpr int64_t kPieceOutputs = 64;       // columns that a thread claims at a time, in prefill

int64_t piece_rows(const Matrix& w) {
  return std::max<int64_t>(8, kPieceBytes / std::max<int64_t>(1, w.row_bytes()) / 8 * 8);
}

int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

// Item i of a flattened two-level loop whose inner lengths are sums[j + 1] - sums[j].
int64_t outer(const std::vector<int64_t>& sums, int64_t i) {
  return std::upper_bound(sums.begin(), sums.end(), i) - sums.begin() - 1;
}

}  // namespace

void Prepared::add(const Format& format) {
  for (auto& layout : layouts_) {
    if (layout.format == format) return;
  }
  int64_t floats = isa().prepared_floats(format, in_);
  float* data = scratch_.take<float>(tokens_ * floats);
  for (int64_t t = 0; t < tokens_; t++) {
    isa().prepare(format, x_ + t * in_, in_, data + t * floats);
  }
  layouts_.push_back({format, floats, data});
}

const float* Prepared::of(const Format& format, int64_t token) const {
  for (auto& layout : layouts_) {
    if (layout.format == format) return layout.data + token * layout.floats;
  }
  return nullptr;
}

void equip(Scratch& scratch, Visit& visit) {
  const Experts& e = *visit.experts;
  visit.middle = scratch.take<float>(e.middle());
  visit.prepared = scratch.take<float>(isa().prepared_floats(e.down.format(), e.middle()));
}

void compute(Team& team, const std::vector<Visit>& visits, const Prepared& x) {
  std::vector<int64_t> ups{0}, downs{0};
  for (auto& v : visits) {
    Matrix up = v.experts->up.matrix(), down = v.experts->down.matrix();
    ups.push_back(ups.back() + pieces(up.out, piece_rows(up)));
    downs.push_back(downs.back() + pieces(down.out, piece_rows(down)));
  }
  team.each(ups.back(), 1, [&](int64_t i, int64_t) {
    int64_t j = outer(ups, i);
    const Visit& v = visits[j];
    const Experts& e = *v.experts;
    Matrix up = e.up.matrix().at(v.slot);
    int64_t rows = piece_rows(up), begin = (i - ups[j]) * rows;
    int64_t end = std::min(up.out, begin + rows);
    isa().matvec(up, x.of(up.format, v.token), begin, end, v.middle);
    e.up.add_bias(v.slot, begin, end, v.middle);
    thread_local std::vector<float> gates;
    gates.resize(std::max<size_t>(gates.size(), up.out));
    if (e.gate) {
      Matrix gate = e.gate->matrix().at(v.slot);
      isa().matvec(gate, x.of(gate.format, v.token), begin, end, gates.data());
      e.gate->add_bias(v.slot, begin, end, gates.data());
    }
    isa().ops.activate(e.activation, gates.data() + begin, v.middle + begin, end - begin, e.limit,
                       e.alpha, v.middle + begin);
  });
  team.each(visits.size(), 1, [&](int64_t i, int64_t) {
    const Experts& e = *visits[i].experts;
    isa().prepare(e.down.format(), visits[i].middle, e.middle(), visits[i].prepared);
  });
  team.each(downs.back(), 1, [&](int64_t i, int64_t) {
    int64_t j = outer(downs, i);
    const Visit& v = visits[j];
    Matrix down = v.experts->down.matrix().at(v.slot);
    int64_t rows = piece_rows(down), begin = (i - downs[j]) * rows;
    int64_t end = std::min(down.out, begin + rows);
    isa().matvec(down, v.prepared, begin, end, v.y);
    v.experts->down.add_bias(v.slot, begin, end, v.y);
  });
}

void weigh(const float* parts, const float* scores, int64_t top_k, int64_t width, int64_t begin,
           int64_t end, float* y) {
  std::fill(y + begin, y + end, 0.0f);
  for (int64_t j = 0; j < top_k; j++) {
    isa().ops.axpy(scores[j], parts + j * width + begin, end - begin, y + begin);
  }
}

Routing route(const uint32_t* indices, int64_t tokens, int64_t top_k) {
  std::vector<int32_t> order(tokens * top_k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return indices[a] < indices[b]; });
  std::vector<std::pair<int32_t, std::vector<int32_t>>> found;  // last pair, pairs
  for (int32_t pair : order) {
    if (found.empty() || indices[found.back().second[0]] != indices[pair]) found.push_back({});
    found.back().second.push_back(pair);
    found.back().first = pair / static_cast<int32_t>(top_k);
  }
  std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.first < b.first; });
  Routing routing;
  for (auto& [last, pairs] : found) {
    routing.experts.push_back(static_cast<int32_t>(indices[pairs[0]]));
    routing.pairs.push_back(std::move(pairs));
  }
  return routing;
}

using Ready = ExpertPool::Fetch::Ready;

void visit(const Experts& experts, const Routing& routing, int64_t top_k, const Prepared& x,
           float* parts, std::vector<Visit> always, const std::function<void()>& reading) {
  Scratch scratch;
  auto add = [&](std::vector<Visit>& visits, int which, int64_t slot) {
    for (int32_t pair : routing.pairs[which]) {
      visits.push_back(
          {&experts, slot, pair / top_k, nullptr, nullptr, parts + pair * experts.out()});
      equip(scratch, visits.back());
    }
  };
  auto go = [&](const std::vector<Visit>& visits) {
    if (!visits.empty()) Pool::shared().run([&](Team& team) { compute(team, visits, x); });
  };
  if (!experts.pool) {
    for (size_t i = 0; i < routing.experts.size(); i++) add(always, i, routing.experts[i]);
    if (reading) reading();
    return go(always);
  }
  ExpertPool::Fetch fetch(*experts.pool, routing.experts.data(),
                          static_cast<int>(routing.experts.size()));
  if (reading) reading();
  std::vector<Visit> visits = std::move(always);
  auto ready = fetch.take(false);
  for (size_t left = routing.experts.size();;) {
    for (auto& r : ready) add(visits, r.which, r.slot);
    go(visits);
    visits.clear();
    for (auto& r : ready) fetch.release(r.which);
    if (!(left -= ready.size())) break;
    ready = fetch.take(true);
  }
}

namespace {

// Calls f(ready) for batches of the call's experts as their bytes are there, until all were.
template <class F>
void over_ready(const Experts& experts, const Routing& routing, F&& f) {
  if (!experts.pool) {
    std::vector<Ready> all;
    for (size_t i = 0; i < routing.experts.size(); i++) {
      all.push_back({static_cast<int>(i), routing.experts[i]});
    }
    f(all);
    return;
  }
  ExpertPool::Fetch fetch(*experts.pool, routing.experts.data(),
                          static_cast<int>(routing.experts.size()));
  for (size_t left = routing.experts.size(); left;) {
    auto ready = fetch.take(true);
    f(ready);
    for (auto& r : ready) fetch.release(r.which);
    left -= ready.size();
  }
}

void check_indices(const Experts& experts, const uint32_t* indices, int64_t n) {
  if (experts.pool) return;  // the pool checks
  for (int64_t i = 0; i < n; i++) {
    if (indices[i] >= experts.up.count()) throw std::out_of_range("No such expert.");
  }
}

// Decode: a token at a time through each of its experts. parts: [tokens, top_k, out]
void decode(const Experts& experts, const float* x, const uint32_t* indices, int64_t tokens,
            int64_t top_k, float* parts) {
  Scratch scratch;
  Prepared prepared(scratch, x, tokens, experts.in());
  prepared.add(experts.up.format());
  if (experts.gate) prepared.add(experts.gate->format());
  visit(experts, route(indices, tokens, top_k), top_k, prepared, parts, {});
}

// Prefill: an expert at a time over all of its tokens. parts: [tokens, top_k, out]
void prefill(const Experts& experts, const float* x, const uint32_t* indices, int64_t tokens,
             int64_t top_k, bool half, float* parts) {
  const Isa& k = isa();
  Scratch scratch;
  int64_t in = experts.in(), middle = experts.middle(), out = experts.out();
  Format up = experts.up.format(), down = experts.down.format();
  Format gate = experts.gate ? experts.gate->format() : up;
  bool both = experts.gate && gate != up;
  int64_t up_bytes = k.packed_row_bytes(up, in, half);
  int64_t gate_bytes = k.packed_row_bytes(gate, in, half);
  int64_t down_bytes = k.packed_row_bytes(down, middle, half);
  auto* up_rows = scratch.take<uint8_t>(tokens * up_bytes);
  auto* gate_rows = both ? scratch.take<uint8_t>(tokens * gate_bytes) : up_rows;
  Pool::shared().run([&](Team& team) {
    team.each(tokens, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        k.pack_row(up, x + t * in, in, half, up_rows + t * up_bytes);
        if (both) k.pack_row(gate, x + t * in, in, half, gate_rows + t * gate_bytes);
      }
    });
  });
  int64_t matmul_scratch =
      std::max({k.matmul_scratch_bytes(up, in, half), k.matmul_scratch_bytes(gate, in, half),
                k.matmul_scratch_bytes(down, middle, half)});
  int threads = Pool::shared().threads();
  int64_t most = 0;
  Routing routing = route(indices, tokens, top_k);
  for (auto& pairs : routing.pairs) most = std::max<int64_t>(most, pairs.size());
  int64_t piece = (kPieceOutputs + k.matmul_grain - 1) / k.matmul_grain * k.matmul_grain;
  auto* spaces = scratch.take<uint8_t>(threads * matmul_scratch);
  auto* tiles = scratch.take<float>(threads * 2 * most * piece);
  over_ready(experts, routing, [&](const std::vector<Ready>& ready) {
    Scratch mine;
    std::vector<int64_t> first{0};  // row of each group in the batch's own order
    for (auto& r : ready) {
      first.push_back(first.back() + static_cast<int64_t>(routing.pairs[r.which].size()));
    }
    int64_t rows = first.back(), groups = static_cast<int64_t>(ready.size());
    auto* middles = mine.take<float>(rows * middle);
    auto* packed = mine.take<uint8_t>(rows * down_bytes);
    auto** ups = mine.take<const uint8_t*>(rows);
    auto** gates = mine.take<const uint8_t*>(rows);
    auto** downs = mine.take<const uint8_t*>(rows);
    auto* pair_of = mine.take<int32_t>(rows);
    for (int64_t g = 0, row = 0; g < groups; g++) {
      for (int32_t pair : routing.pairs[ready[g].which]) {
        ups[row] = up_rows + pair / top_k * up_bytes;
        gates[row] = gate_rows + pair / top_k * gate_bytes;
        downs[row] = packed + row * down_bytes;
        pair_of[row++] = pair;
      }
    }
    int64_t up_pieces = pieces(middle, piece), down_pieces = pieces(out, piece);
    Pool::shared().run([&](Team& team) {
      // The pool may have grown since the buffers were cut: extra threads leave the work to others.
      bool spare = team.index() >= threads;
      auto* space = spaces + team.index() * matmul_scratch;
      auto* tile = tiles + team.index() * 2 * most * piece;
      team.each(spare ? 0 : groups * up_pieces, 1, [&](int64_t i, int64_t) {
        int64_t g = i / up_pieces, begin = i % up_pieces * piece;
        int64_t end = std::min(middle, begin + piece), n = first[g + 1] - first[g];
        int64_t slot = ready[g].slot;
        float *u = tile - begin, *v = tile + most * piece - begin;  // [n, piece] from `begin` on
        k.matmul(experts.up.matrix().at(slot), half, ups + first[g], n, begin, end, u, piece,
                 space);
        if (experts.gate) {
          k.matmul(experts.gate->matrix().at(slot), half, gates + first[g], n, begin, end, v, piece,
                   space);
        }
        for (int64_t m = 0; m < n; m++) {
          experts.up.add_bias(slot, begin, end, u + m * piece);
          if (experts.gate) experts.gate->add_bias(slot, begin, end, v + m * piece);
          k.ops.activate(experts.activation, v + m * piece + begin, u + m * piece + begin,
                         end - begin, experts.limit, experts.alpha,
                         middles + (first[g] + m) * middle + begin);
        }
      });
      team.each(rows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          k.pack_row(down, middles + row * middle, middle, half, packed + row * down_bytes);
        }
      });
      team.each(spare ? 0 : groups * down_pieces, 1, [&](int64_t i, int64_t) {
        int64_t g = i / down_pieces, begin = i % down_pieces * piece;
        int64_t end = std::min(out, begin + piece), n = first[g + 1] - first[g];
        int64_t slot = ready[g].slot;
        k.matmul(experts.down.matrix().at(slot), half, downs + first[g], n, begin, end,
                 tile - begin, piece, space);
        for (int64_t m = 0; m < n; m++) {
          float* y = parts + pair_of[first[g] + m] * out;
          std::copy(tile + m * piece, tile + m * piece + (end - begin), y + begin);
          experts.down.add_bias(slot, begin, end, y);
        }
      });
    });
  });
}

// x: [..., in], indices: [..., top_k] -> [..., top_k, out], or with scores their sum [..., out]
mx::array call(std::shared_ptr<Experts> experts, const mx::array& x, const mx::array& indices,
               const std::optional<mx::array>& scores) {
  bool fits = x.ndim() >= 1 && indices.ndim() == x.ndim() && x.shape(-1) == experts->in() &&
              std::equal(x.shape().begin(), x.shape().end() - 1, indices.shape().begin());
  if (!fits || (scores && scores->shape() != indices.shape())) {
    throw std::invalid_argument("experts take x [..., in] and indices [..., top_k].");
  }
  Float type = float_type(x.dtype());
  int64_t top_k = indices.shape(-1);
  int64_t tokens = x.size() / std::max<int64_t>(1, experts->in());
  bool one_each = x.ndim() >= 3 ? x.shape(-2) == 1 : tokens == 1;
  mx::Shape shape = indices.shape();
  if (scores) {
    shape.back() = static_cast<int>(experts->out());
  } else {
    shape.push_back(static_cast<int>(experts->out()));
  }
  Arrays inputs{x, mx::astype(indices, mx::uint32)};
  if (scores) inputs.push_back(mx::astype(*scores, mx::float32));
  auto body = [experts, type, top_k, tokens, one_each](const Arrays& in, Arrays& outs) {
    if (tokens == 0) return;
    const Ops& ops = isa().ops;
    Scratch scratch;
    int64_t out = experts->out();
    auto* x = scratch.take<float>(tokens * experts->in());
    auto* parts = scratch.take<float>(tokens * top_k * out);
    auto* indices = in[1].data<uint32_t>();
    ops.to_float(in[0].data<char>(), type, tokens * experts->in(), x);
    check_indices(*experts, indices, tokens * top_k);
    if (one_each) {
      decode(*experts, x, indices, tokens, top_k, parts);
    } else {
      prefill(*experts, x, indices, tokens, top_k, type == Float::bf16 && isa().half_matmul, parts);
    }
    char* result = outs[0].data<char>();
    if (in.size() == 2) {
      ops.from_float(parts, type, tokens * top_k * out, result);
      return;
    }
    auto* scores = in[2].data<float>();
    Pool::shared().run([&](Team& team) {
      team.each(tokens, 1, [&](int64_t t, int64_t) {
        float* y = parts + t * top_k * out;  // in place of its first part
        for (int64_t c = 0; c < out; c += 256) {
          int64_t n = std::min<int64_t>(256, out - c);
          float sum[256];
          weigh(y + c, scores + t * top_k, top_k, out, 0, n, sum);
          std::copy(sum, sum + n, y + c);
        }
        ops.from_float(y, type, out, result + t * out * float_bytes(type));
      });
    });
  };
  return on_cpu("Experts", std::move(body), std::move(inputs), {{shape, x.dtype()}})[0];
}

Activation activation_of(const std::string& name) {
  constexpr std::pair<const char*, Activation> kNames[] = {
      {"swiglu", Activation::swiglu},   {"clamped", Activation::clamped},
      {"limited", Activation::limited}, {"capped", Activation::capped},
      {"situ", Activation::situ},       {"geglu", Activation::geglu},
      {"relu2", Activation::relu2},     {"silu", Activation::silu},
      {"gelu", Activation::gelu},
  };
  for (auto [known, activation] : kNames) {
    if (name == known) return activation;
  }
  throw std::invalid_argument("No native activation " + name + ".");
}

}  // namespace

void bind_experts(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Weights>(m, "Weights")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>,
                    std::optional<mx::array>, int, int, const std::string&>(),
           "weight"_a, "scales"_a.none(), "biases"_a.none(), "bias"_a.none(), "group_size"_a,
           "bits"_a, "mode"_a);
  nb::class_<Experts>(m, "Experts")
      .def(nb::new_([](std::optional<Weights> gate, Weights up, Weights down,
                       const std::string& activation, float limit, float alpha,
                       std::shared_ptr<ExpertPool> pool) {
             if (down.in() != up.out() || (gate && gate->out() != up.out())) {
               throw std::invalid_argument("The projections of an expert do not fit together.");
             }
             Activation kind = activation_of(activation);
             if (is_gated(kind) != gate.has_value()) {
               throw std::invalid_argument("A gated activation needs a gate, others have none.");
             }
             return std::make_shared<Experts>(Experts{{},
                                                      std::move(gate),
                                                      std::move(up),
                                                      std::move(down),
                                                      kind,
                                                      limit,
                                                      alpha,
                                                      std::move(pool)});
           }),
           "gate"_a.none(), "up"_a, "down"_a, "activation"_a, "limit"_a = 0.0f, "alpha"_a = 0.0f,
           "pool"_a.none() = nb::none())
      .def("__call__", &call, "x"_a, "indices"_a, "scores"_a.none() = nb::none());
}

}  // namespace flash
