// The routed experts of a layer: gate, up, activation, down, weighted sum, in one pass, while
// missing experts are read.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "expert_pool.h"
#include "ops.h"
#include "primitive.h"
#include "scratch.h"
#include "shared.h"
#include "weights.h"

namespace flash {

class Team;

// The weights of one layer's experts and what is done with them. Without a pool matrix e of a
// stack is expert e; with one it is slot e, and the pool says which expert that is.
struct Experts : Shared<Experts> {
  std::optional<Weights> gate;  // none for experts of two matrices
  Weights up;
  Weights down;
  Activation activation;
  float limit;  // of the activation, as `alpha`
  float alpha;
  std::shared_ptr<ExpertPool> pool;

  int64_t in() const { return up.in(); }
  int64_t middle() const { return up.out(); }
  int64_t out() const { return down.out(); }
};

// Activation vectors laid out for the matrices they will meet, once per format. [tokens, in]
class Prepared {
 public:
  Prepared(Scratch& scratch, const float* x, int64_t tokens, int64_t in)
      : scratch_(scratch), x_(x), tokens_(tokens), in_(in) {}
  void add(const Format& format);
  // Only formats that were added.
  const float* of(const Format& format, int64_t token) const;

 private:
  struct Layout {
    Format format;
    int64_t floats;
    float* data;
  };
  Scratch& scratch_;
  const float* x_;
  int64_t tokens_, in_;
  std::vector<Layout> layouts_;
};

// One token at one expert, in decode.
struct Visit {
  const Experts* experts;
  int64_t slot;
  int64_t token;
  float* middle;    // [middle]
  float* prepared;  // the same, laid out for `down`
  float* y;         // [out]
};

// Memory for a visit's parts. `y` is the caller's.
void equip(Scratch& scratch, Visit& visit);

// Computes the visits on the team, each with its own token's vector. All in one region.
void compute(Team& team, const std::vector<Visit>& visits, const Prepared& x);

// y[t] = sum over j of scores[t, j] * parts[t, j], in the order of j, for columns [begin, end).
void weigh(const float* parts, const float* scores, int64_t top_k, int64_t width, int64_t begin,
           int64_t end, float* y);

// The distinct experts of a call, the most recently routed last, and which pairs went to each.
struct Routing {
  std::vector<int32_t> experts;
  std::vector<std::vector<int32_t>> pairs;  // indices into [tokens, top_k], ascending
};
Routing route(const uint32_t* indices, int64_t tokens, int64_t top_k);

// Every token through each of its experts, hits first, together with the visits that wait for
// nothing (a shared expert), the others as their bytes come. parts: [tokens, top_k, out]
// `reading` is called once, when the reads have begun.
void visit(const Experts& experts, const Routing& routing, int64_t top_k, const Prepared& x,
           float* parts, std::vector<Visit> always, const std::function<void()>& reading = {});

}  // namespace flash
