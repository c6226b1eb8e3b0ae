#include "blocks.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "bindings.h"
#include "isa.h"
#include "pool.h"

namespace flash {

namespace {

constexpr int64_t kPieceBytes = 128 << 10;  // of weights that a thread claims at a time

std::vector<float> floats(mx::array array) {
  array = mx::contiguous(mx::astype(array, mx::float32));
  array.eval();
  return {array.data<float>(), array.data<float>() + array.size()};
}

// Several matrices that meet the same vectors, their rows one after another in y [tokens, rows].
class Stack {
 public:
  Stack(std::initializer_list<const Weights*> weights) {
    for (auto* w : weights) {
      parts_.push_back({w, rows_});
      rows_ += w->out();
    }
  }
  int64_t rows() const { return rows_; }
  void add_formats(Prepared& x) const {
    for (auto& part : parts_) x.add(part.weights->format());
  }

  // One phase of the region.
  void multiply(Team& team, const Prepared& x, int64_t tokens, float* y) const {
    std::vector<int64_t> first{0};
    for (auto& [w, row] : parts_) {
      first.push_back(first.back() + (w->out() + piece(*w) - 1) / piece(*w));
    }
    int64_t pieces = first.back();
    team.each(pieces * tokens, 1, [&](int64_t i, int64_t) {
      int64_t token = i / pieces, at = i % pieces;
      size_t j = std::upper_bound(first.begin(), first.end(), at) - first.begin() - 1;
      auto& [w, row] = parts_[j];
      int64_t begin = (at - first[j]) * piece(*w);
      int64_t end = std::min(w->out(), begin + piece(*w));
      float* target = y + token * rows_ + row;
      isa().matvec(w->matrix(), x.of(w->format(), token), begin, end, target);
      w->add_bias(0, begin, end, target);
    });
  }

 private:
  struct Part {
    const Weights* weights;
    int64_t row;
  };
  static int64_t piece(const Weights& w) {
    return std::max<int64_t>(8, kPieceBytes / std::max<int64_t>(1, w.matrix().row_bytes()) / 8 * 8);
  }
  std::vector<Part> parts_;
  int64_t rows_ = 0;
};

// The hidden states of a call in float32, and normalized.
struct Hidden {
  Hidden(Scratch& scratch, const mx::array& h, const Norm& norm)
      : type(float_type(h.dtype())), width(h.shape(-1)), tokens(h.size() / h.shape(-1)) {
    x = scratch.take<float>(tokens * width);
    normed = scratch.take<float>(tokens * width);
    isa().ops.to_float(h.data<char>(), type, tokens * width, x);
    for (int64_t t = 0; t < tokens; t++) {
      isa().ops.rms_norm(x + t * width, norm.weight.data(), norm.eps, width, normed + t * width);
    }
  }
  Float type;
  int64_t width, tokens;
  float* x;
  float* normed;
};

// x[t] += the projection of inner [tokens, in], written to `out` as the residual stream's type.
void project(Team& team, const Stack& stack, const Prepared& inner, const Hidden& h, float* y) {
  stack.multiply(team, inner, h.tokens, y);
  if (team.index() == 0) {
    for (int64_t i = 0; i < h.tokens * h.width; i++) y[i] += h.x[i];
  }
}

// What the next router would choose if it saw this hidden state.
class Guess {
 public:
  Guess(Scratch& scratch, const NextRouter& next, const Hidden& h)
      : next_(next),
        tokens_(h.tokens),
        router_{&next.router},
        x_(scratch, normed(scratch, next, h), h.tokens, h.width) {
    router_.add_formats(x_);
    logits_ = scratch.take<float>(tokens_ * router_.rows());
  }

  // One phase of the region.
  void multiply(Team& team) const { router_.multiply(team, x_, tokens_, logits_); }

  void tell() const {
    std::vector<uint32_t> chosen(tokens_ * next_.top_k);
    for (int64_t t = 0; t < tokens_; t++) {
      isa().ops.top_k(logits_ + t * router_.rows(), router_.rows(), next_.top_k,
                      chosen.data() + t * next_.top_k);
    }
    std::vector<int32_t> experts;  // distinct, by rank
    for (int64_t rank = 0; rank < next_.top_k; rank++) {
      for (int64_t t = 0; t < tokens_; t++) {
        auto expert = static_cast<int32_t>(chosen[t * next_.top_k + rank]);
        bool known = std::find(experts.begin(), experts.end(), expert) != experts.end();
        if (!known) experts.push_back(expert);
      }
    }
    next_.pool->look_ahead(experts);
  }

 private:
  static const float* normed(Scratch& scratch, const NextRouter& next, const Hidden& h) {
    auto* x = scratch.take<float>(h.tokens * h.width);
    for (int64_t t = 0; t < h.tokens; t++) {
      isa().ops.rms_norm(h.x + t * h.width, next.norm.weight.data(), next.norm.eps, h.width,
                         x + t * h.width);
    }
    return x;
  }

  const NextRouter& next_;
  int64_t tokens_;
  Stack router_;
  Prepared x_;
  float* logits_;
};

void check_one_token(const mx::array& h, int64_t width) {
  if (h.ndim() != 3 || h.shape(1) != 1 || h.shape(2) != width) {
    throw std::invalid_argument("A decode block takes one token of each sequence: [B, 1, D].");
  }
}

void run(const MoeBlock& block, const mx::array& input, mx::array& output) {
  Scratch scratch;
  const Ops& ops = isa().ops;
  Hidden h(scratch, input, block.norm);
  int64_t experts = block.router.out(), k = block.top_k, width = h.width;
  Stack first =
      block.shared_gate ? Stack{&block.router, &*block.shared_gate} : Stack{&block.router};
  Prepared x(scratch, h.normed, h.tokens, width);
  first.add_formats(x);
  for (auto* e : {block.experts.get(), block.shared.get()}) {
    if (!e) continue;
    x.add(e->up.format());
    if (e->gate) x.add(e->gate->format());
  }
  auto* logits = scratch.take<float>(h.tokens * first.rows());
  std::optional<Guess> guess;
  if (block.next) guess.emplace(scratch, *block.next, h);
  Pool::shared().run([&](Team& team) {
    first.multiply(team, x, h.tokens, logits);
    if (guess) guess->multiply(team);
  });

  auto* indices = scratch.take<uint32_t>(h.tokens * k);
  auto* scores = scratch.take<float>(h.tokens * k);
  for (int64_t t = 0; t < h.tokens; t++) {
    float* gates = logits + t * first.rows();
    ops.softmax(gates, experts);
    ops.top_k(gates, experts, k, indices + t * k);
    float sum = 0;
    for (int64_t j = 0; j < k; j++) sum += scores[t * k + j] = gates[indices[t * k + j]];
    for (int64_t j = 0; block.renormalize && j < k; j++) scores[t * k + j] /= sum;
  }
  auto* parts = scratch.take<float>(h.tokens * k * width);
  auto* shared = scratch.take<float>(h.tokens * width);
  Routing routing = route(indices, h.tokens, k);
  std::vector<Visit> always;
  for (int64_t t = 0; block.shared && t < h.tokens; t++) {
    always.push_back({block.shared.get(), 0, t, nullptr, nullptr, shared + t * width});
    equip(scratch, always.back());
  }
  visit(*block.experts, routing, k, x, parts, always, [&] {
    if (guess) guess->tell();
  });

  auto* y = scratch.take<float>(width);
  for (int64_t t = 0; t < h.tokens; t++) {
    weigh(parts + t * k * width, scores + t * k, k, width, 0, width, y);
    if (block.shared) {
      float gate = 1;
      if (block.shared_gate) ops.sigmoid(logits + t * first.rows() + experts, 1, &gate);
      ops.axpy(gate, shared + t * width, width, y);
    }
    ops.axpy(1, h.x + t * width, width, y);
    ops.from_float(y, h.type, width, output.data<char>() + t * width * float_bytes(h.type));
  }
}

void run(const DeltaBlock& block, const Arrays& in, Arrays& outs) {
  Scratch scratch;
  const Ops& ops = isa().ops;
  Hidden h(scratch, in[0], block.norm);
  int64_t keys = block.key_heads * block.key_dim, values = block.value_heads * block.value_dim;
  int64_t channels = 2 * keys + values, taps = block.taps;
  Float type = float_type(in[1].dtype());
  Stack first{&block.qkv, &block.z, &block.b, &block.a}, last{&block.out};
  Prepared x(scratch, h.normed, h.tokens, h.width);
  first.add_formats(x);
  auto* y = scratch.take<float>(h.tokens * first.rows());
  auto* window = scratch.take<float>(h.tokens * taps * channels);
  auto* inner = scratch.take<float>(h.tokens * values);
  auto* result = scratch.take<float>(h.tokens * h.width);
  Prepared gated(scratch, inner, h.tokens, values);
  float root = 1 / std::sqrt(static_cast<float>(block.key_dim));

  // One key head with the value heads that share it: convolution, norms, recurrence, gated norm.
  auto head = [&](int64_t t, int64_t head) {
    float* row = y + t * first.rows();
    float *z = row + channels, *b = z + values, *a = b + block.value_heads;
    float* seen = window + t * taps * channels;
    float* state = outs[2].data<float>() + t * values * block.key_dim;
    char* history = outs[1].data<char>() + t * (taps - 1) * channels * float_bytes(type);
    int64_t each = block.value_heads / block.key_heads, dk = block.key_dim, dv = block.value_dim;
    auto convolve = [&](int64_t c0, int64_t c1) {
      int64_t n = c1 - c0;
      for (int64_t i = 0; i < taps - 1; i++) {
        ops.to_float(history + (i * channels + c0) * float_bytes(type), type, n,
                     seen + i * channels + c0);
      }
      std::copy(row + c0, row + c1, seen + (taps - 1) * channels + c0);
      ops.conv1d(seen, channels, block.conv.data(), nullptr, taps, 1, c0, c1, true, row, channels);
      for (int64_t i = 0; i < taps - 1; i++) {
        ops.from_float(seen + (i + 1) * channels + c0, type, n,
                       history + (i * channels + c0) * float_bytes(type));
      }
    };
    convolve(head * dk, (head + 1) * dk);
    convolve(keys + head * dk, keys + (head + 1) * dk);
    convolve(2 * keys + head * each * dv, 2 * keys + (head + 1) * each * dv);
    float *q = row + head * dk, *k = row + keys + head * dk;
    ops.l2_norm(q, 1e-6f, root, dk, q);
    ops.l2_norm(k, 1e-6f, 1, dk, k);
    for (int64_t v = head * each; v < (head + 1) * each; v++) {
      float g, beta;
      ops.gated_delta_gates(a + v, b + v, &block.a_log[v], &block.dt_bias[v], 1, &g, &beta);
      float* o = inner + t * values + v * dv;
      ops.gated_delta(1, q, 0, k, 0, row + 2 * keys + v * dv, 0, &g, 0, &beta, 0, dk, 0, dv,
                      state + v * dv * dk, o, 0);
      ops.rms_norm(o, block.gated_norm.weight.data(), block.gated_norm.eps, dv, o);
      ops.activate(Activation::swiglu, z + v * dv, o, dv, 0, 0, o);
    }
  };
  Pool::shared().run([&](Team& team) {
    first.multiply(team, x, h.tokens, y);
    team.each(h.tokens * block.key_heads, 1,
              [&](int64_t i, int64_t) { head(i / block.key_heads, i % block.key_heads); });
    if (team.index() == 0) last.add_formats(gated);
    team.barrier();
    project(team, last, gated, h, result);
  });
  ops.from_float(result, h.type, h.tokens * h.width, outs[0].data<char>());
}

void run(const AttentionBlock& block, int64_t offset, const Arrays& in, Arrays& outs) {
  Scratch scratch;
  const Ops& ops = isa().ops;
  Hidden h(scratch, in[0], block.norm);
  int64_t dim = block.head_dim, heads = block.heads, kv = block.kv_heads, group = heads / kv;
  int64_t room = in[1].shape(2), length = offset + 1, half = block.rope_dims / 2;
  Float type = float_type(in[1].dtype());
  Stack first{&block.q, &block.k, &block.v}, last{&block.out};
  Prepared x(scratch, h.normed, h.tokens, h.width);
  first.add_formats(x);
  auto* y = scratch.take<float>(h.tokens * first.rows());
  auto* inner = scratch.take<float>(h.tokens * heads * dim);
  auto* result = scratch.take<float>(h.tokens * h.width);
  Prepared gated(scratch, inner, h.tokens, heads * dim);
  auto* turn = scratch.take<float>(block.rope_dims);
  for (int64_t i = 0; i < half; i++) {
    float theta = static_cast<float>(offset) * block.rope_scale *
                  std::exp(-static_cast<float>(i) / half * std::log(block.rope_base));
    turn[i] = std::cos(theta), turn[half + i] = std::sin(theta);
  }
  auto place = [&](mx::array& cache, int64_t t, int64_t head) {
    return cache.data<char>() + (t * kv + head) * room * dim * float_bytes(type);
  };
  Pool::shared().run([&](Team& team) {
    first.multiply(team, x, h.tokens, y);
    team.each(h.tokens * kv, 1, [&](int64_t i, int64_t) {
      int64_t t = i / kv, head = i % kv;
      float *k = y + t * first.rows() + 2 * heads * dim + head * dim, *v = k + kv * dim;
      ops.rms_norm(k, block.k_norm.weight.data(), block.k_norm.eps, dim, k);
      ops.rope(k, turn, block.rope_dims, false);
      ops.from_float(k, type, dim, place(outs[1], t, head) + offset * dim * float_bytes(type));
      ops.from_float(v, type, dim, place(outs[2], t, head) + offset * dim * float_bytes(type));
    });
    team.each(h.tokens * heads, 1, [&](int64_t i, int64_t) {
      int64_t t = i / heads, head = i % heads, none = 0;
      float *q = y + t * first.rows() + 2 * head * dim, *gate = q + dim;
      float* o = inner + i * dim;
      ops.rms_norm(q, block.q_norm.weight.data(), block.q_norm.eps, dim, q);
      ops.rope(q, turn, block.rope_dims, false);
      ops.attention(q, dim, 1, place(outs[1], t, head / group), dim,
                    place(outs[2], t, head / group), dim, type, &none, &length, dim, dim,
                    block.scale, nullptr, o, dim);
      ops.sigmoid(gate, dim, gate);
      ops.mul(o, gate, dim, o);
    });
    if (team.index() == 0) last.add_formats(gated);
    team.barrier();
    project(team, last, gated, h, result);
  });
  ops.from_float(result, h.type, h.tokens * h.width, outs[0].data<char>());
}

Norm norm_of(const mx::array& weight, float eps) { return {floats(weight), eps}; }

mx::array call(std::shared_ptr<MoeBlock> block, const mx::array& h) {
  check_one_token(h, block->experts->in());
  auto body = [block](const Arrays& in, Arrays& outs) { run(*block, in[0], outs[0]); };
  return on_cpu("MoeBlock", std::move(body), {h}, {{h.shape(), h.dtype()}})[0];
}

std::tuple<mx::array, mx::array, mx::array> call(std::shared_ptr<DeltaBlock> block,
                                                 const mx::array& h, const mx::array& conv_state,
                                                 const mx::array& state) {
  check_one_token(h, block->qkv.in());
  int batch = h.shape(0), channels = static_cast<int>(block->qkv.out());
  if (conv_state.shape() != mx::Shape{batch, block->taps - 1, channels} ||
      state.shape() != mx::Shape{batch, block->value_heads, block->value_dim, block->key_dim} ||
      state.dtype() != mx::float32) {
    throw std::invalid_argument("The recurrent state is not this layer's.");
  }
  auto body = [block](const Arrays& in, Arrays& outs) { run(*block, in, outs); };
  auto outs = on_cpu("DeltaBlock", std::move(body), {h, conv_state, state},
                     {{h.shape(), h.dtype()},
                      {conv_state.shape(), conv_state.dtype(), 1},
                      {state.shape(), state.dtype(), 2}});
  return {outs[0], outs[1], outs[2]};
}

std::tuple<mx::array, mx::array, mx::array> call(std::shared_ptr<AttentionBlock> block,
                                                 const mx::array& h, const mx::array& keys,
                                                 const mx::array& values, int offset) {
  check_one_token(h, block->q.in());
  int batch = h.shape(0);
  if (keys.ndim() != 4 || keys.shape(0) != batch || keys.shape(1) != block->kv_heads ||
      keys.shape(2) <= offset || offset < 0 || keys.shape(3) != block->head_dim ||
      values.shape() != keys.shape() || values.dtype() != keys.dtype()) {
    throw std::invalid_argument("The key-value cache is not this layer's or is full.");
  }
  auto body = [block, offset](const Arrays& in, Arrays& outs) { run(*block, offset, in, outs); };
  auto outs = on_cpu("AttentionBlock", std::move(body), {h, keys, values},
                     {{h.shape(), h.dtype()},
                      {keys.shape(), keys.dtype(), 1},
                      {values.shape(), values.dtype(), 2}});
  return {outs[0], outs[1], outs[2]};
}

}  // namespace

void bind_blocks(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<MoeBlock>(m, "MoeBlock")
      .def(nb::new_([](const mx::array& norm, float eps, Weights router, int top_k,
                       bool renormalize, std::shared_ptr<Experts> experts,
                       std::shared_ptr<Experts> shared, std::optional<Weights> shared_gate) {
             if (top_k < 1 || top_k > router.out()) {
               throw std::invalid_argument("top_k is between 1 and the number of experts.");
             }
             return std::make_shared<MoeBlock>(MoeBlock{{},
                                                        norm_of(norm, eps),
                                                        std::move(router),
                                                        top_k,
                                                        renormalize,
                                                        std::move(experts),
                                                        std::move(shared),
                                                        std::move(shared_gate),
                                                        {}});
           }),
           "norm"_a, "eps"_a, "router"_a, "top_k"_a, "renormalize"_a, "experts"_a,
           "shared"_a.none(), "shared_gate"_a.none())
      .def(
          "look_ahead",
          [](MoeBlock& b, const mx::array& norm, float eps, Weights router, int top_k,
             std::shared_ptr<ExpertPool> pool) {
            if (top_k < 1 || top_k > router.out() || router.out() != pool->num_experts() ||
                router.in() != b.router.in()) {
              throw std::invalid_argument("That router does not choose among that pool's experts.");
            }
            b.next = NextRouter{norm_of(norm, eps), std::move(router), top_k, std::move(pool)};
          },
          "norm"_a, "eps"_a, "router"_a, "top_k"_a, "pool"_a)
      .def("__call__",
           [](std::shared_ptr<MoeBlock> b, const mx::array& h) { return call(std::move(b), h); });
  nb::class_<DeltaBlock>(m, "DeltaBlock")
      .def(nb::new_([](const mx::array& norm, float eps, Weights qkv, Weights z, Weights b,
                       Weights a, Weights out, const mx::array& conv, const mx::array& a_log,
                       const mx::array& dt_bias, const mx::array& gated_norm, float gated_eps,
                       int key_heads, int value_heads, int key_dim, int value_dim) {
             int taps = conv.shape(1);
             return std::make_shared<DeltaBlock>(DeltaBlock{{},
                                                            norm_of(norm, eps),
                                                            std::move(qkv),
                                                            std::move(z),
                                                            std::move(b),
                                                            std::move(a),
                                                            std::move(out),
                                                            floats(conv),
                                                            taps,
                                                            floats(a_log),
                                                            floats(dt_bias),
                                                            norm_of(gated_norm, gated_eps),
                                                            key_heads,
                                                            value_heads,
                                                            key_dim,
                                                            value_dim});
           }),
           "norm"_a, "eps"_a, "qkv"_a, "z"_a, "b"_a, "a"_a, "out"_a, "conv"_a, "a_log"_a,
           "dt_bias"_a, "gated_norm"_a, "gated_eps"_a, "key_heads"_a, "value_heads"_a, "key_dim"_a,
           "value_dim"_a)
      .def("__call__",
           [](std::shared_ptr<DeltaBlock> b, const mx::array& h, const mx::array& conv_state,
              const mx::array& state) { return call(std::move(b), h, conv_state, state); });
  nb::class_<AttentionBlock>(m, "AttentionBlock")
      .def(nb::new_([](const mx::array& norm, float eps, Weights q, Weights k, Weights v,
                       Weights out, const mx::array& q_norm, const mx::array& k_norm, float qk_eps,
                       int heads, int kv_heads, int head_dim, int rope_dims, float rope_base,
                       float rope_scale, float scale) {
             return std::make_shared<AttentionBlock>(AttentionBlock{{},
                                                                    norm_of(norm, eps),
                                                                    std::move(q),
                                                                    std::move(k),
                                                                    std::move(v),
                                                                    std::move(out),
                                                                    norm_of(q_norm, qk_eps),
                                                                    norm_of(k_norm, qk_eps),
                                                                    heads,
                                                                    kv_heads,
                                                                    head_dim,
                                                                    rope_dims,
                                                                    rope_base,
                                                                    rope_scale,
                                                                    scale});
           }),
           "norm"_a, "eps"_a, "q"_a, "k"_a, "v"_a, "out"_a, "q_norm"_a, "k_norm"_a, "qk_eps"_a,
           "heads"_a, "kv_heads"_a, "head_dim"_a, "rope_dims"_a, "rope_base"_a, "rope_scale"_a,
           "scale"_a)
      .def("__call__", [](std::shared_ptr<AttentionBlock> b, const mx::array& h,
                          const mx::array& keys, const mx::array& values,
                          int offset) { return call(std::move(b), h, keys, values, offset); });
}

}  // namespace flash
