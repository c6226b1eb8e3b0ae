#include "expert_pool.h"

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <queue>
#include <set>
#include <stdexcept>
#include <utility>

#include "eviction.h"

namespace flash {

namespace {

// Slots of one call that are being filled or computed with. Where fewer are, even an expert worth
// keeping makes room: this many reads hide each other's latency and the caller's computing.
constexpr int kBusySlots = 16;

// Ranks of a guess are read if more often right than this, by a mean over some kMemory calls.
constexpr float kTrust = 0.5f;
constexpr float kMemory = 16;

enum class State : uint8_t { on_disk, reading, in_slot, released };

struct Member {
  int expert;
  int slot;
  bool hit;  // it was resident when the call began
  State state;
};

// Experts that are read before they are asked for, each into a slot that is bound to nothing yet.
struct Ahead {
  explicit Ahead(Files& files) : batch(files) {}
  Files::Batch batch;  // its tags count `experts`
  std::vector<int> experts;
  std::vector<int> slots;  // -1 once bound
};

// Throws unless these are experts of a layer of `most`, each named once.
void check_distinct(const int32_t* experts, int count, int most) {
  std::vector<uint8_t> seen(most);
  for (int i = 0; i < count; i++) {
    if (experts[i] < 0 || experts[i] >= most) {
      throw std::out_of_range("There is no expert " + std::to_string(experts[i]) + " among " +
                              std::to_string(most) + ".");
    }
    if (std::exchange(seen[experts[i]], 1)) {
      throw std::invalid_argument("Expert " + std::to_string(experts[i]) +
                                  " occurs twice in one call.");
    }
  }
}

}  // namespace

struct ExpertPool::Impl {
  void add_reads(int expert, int slot, int tag, std::vector<Read>& reads) const;
  int free_slot();
  void bind_ahead();
  void drop_ahead();
  void stop_ahead();
  bool is_ahead(int expert) const;

  std::shared_ptr<Files> files;
  std::vector<Parameter> parameters;
  int num_slots;
  std::unique_ptr<EvictionPolicy> policy;
  std::vector<uint8_t> pinned;  // by expert

  std::mutex mutex;  // guards `held`, and what follows where a Fetch and a reader of it meet
  std::condition_variable released;
  bool held = false;
  std::vector<uint8_t> stays;  // by expert: pinned, or of the present call
  std::vector<int> slot_of;    // by expert, -1 on disk
  std::vector<int> free;
  PoolStats stats;
  std::unique_ptr<Ahead> ahead;
  std::vector<int32_t> guess;  // the last one
  std::vector<float> trust;    // by rank
  std::vector<uint8_t> fresh;  // by expert: read ahead, and not asked for since
  bool records = false;
  std::vector<std::vector<int32_t>> trace;
};

ExpertPool::ExpertPool(std::shared_ptr<Files> files, std::vector<Parameter> parameters,
                       int num_slots, const std::string& policy, const std::vector<int>& pinned)
    : impl_(std::make_unique<Impl>()) {
  if (parameters.empty() || num_slots < 1) {
    throw std::invalid_argument("A pool needs at least one parameter and one slot.");
  }
  size_t count = parameters[0].experts.size();
  for (auto& parameter : parameters) {
    if (parameter.experts.size() != count) {
      throw std::invalid_argument("Every parameter needs as many spans as the others.");
    }
    for (auto& span : parameter.experts) {
      if (span.file < 0 || span.file >= files->count() || span.offset < 0 ||
          span.bytes != parameter.slot_bytes) {
        throw std::invalid_argument("A span of " + std::to_string(span.bytes) + " bytes in file " +
                                    std::to_string(span.file) + " does not fit a slot of " +
                                    std::to_string(parameter.slot_bytes) + " bytes.");
      }
      if (!span.is_valid()) {
        throw std::invalid_argument("Pieces of " + std::to_string(span.piece) + " bytes every " +
                                    std::to_string(span.stride) + " from byte " +
                                    std::to_string(span.offset) + " do not make up " +
                                    std::to_string(span.bytes) + " bytes of a file.");
      }
    }
  }
  impl_->pinned.resize(count);
  for (int expert : pinned) {
    if (expert < 0 || expert >= static_cast<int>(count)) {
      throw std::invalid_argument("There is no expert " + std::to_string(expert) + " to pin.");
    }
    impl_->pinned[expert] = 1;
  }
  impl_->files = std::move(files);
  impl_->parameters = std::move(parameters);
  impl_->num_slots = num_slots;
  impl_->policy = make_policy(policy, static_cast<int>(count));
  impl_->stays = impl_->pinned;
  impl_->slot_of.assign(count, -1);
  impl_->fresh.assign(count, 0);
  for (int slot = num_slots; slot-- > 0;) impl_->free.push_back(slot);
}

ExpertPool::~ExpertPool() = default;

int ExpertPool::num_slots() const { return impl_->num_slots; }

int ExpertPool::num_experts() const { return static_cast<int>(impl_->slot_of.size()); }

PoolStats ExpertPool::stats() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->stats;
}

std::vector<int> ExpertPool::resident() const {
  std::lock_guard lock(impl_->mutex);
  std::vector<int> experts;
  for (int e = 0; e < num_experts(); e++) {
    if (impl_->slot_of[e] >= 0) experts.push_back(e);
  }
  return experts;
}

void ExpertPool::record() {
  std::lock_guard lock(impl_->mutex);
  impl_->records = true;
}

std::vector<std::vector<int32_t>> ExpertPool::trace() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->trace;
}

std::vector<int> ExpertPool::place(const std::vector<int32_t>& experts) {
  size_t distinct = std::set(experts.begin(), experts.end()).size();
  if (distinct < experts.size() || static_cast<int>(distinct) > num_slots()) {
    throw std::invalid_argument(std::to_string(experts.size()) + " experts in one call, " +
                                std::to_string(distinct) + " distinct, for " +
                                std::to_string(num_slots()) +
                                " slots: name each once, and no more than there are slots");
  }
  std::vector<int> slots(experts.size());
  Fetch fetch(*this, experts.data(), static_cast<int>(experts.size()));
  for (size_t placed = 0; placed < slots.size();) {
    auto ready = fetch.take(true);
    for (auto [which, slot] : ready) slots[which] = slot;
    placed += ready.size();
  }
  return slots;
}

void ExpertPool::Impl::add_reads(int expert, int slot, int tag, std::vector<Read>& reads) const {
  for (auto& parameter : parameters) {
    reads.push_back(
        {parameter.experts[expert], parameter.slots + slot * parameter.slot_bytes, tag});
  }
}

// An empty slot, or that of the expert that is worth least; -1 if all stay.
int ExpertPool::Impl::free_slot() {
  if (!free.empty()) {
    int slot = free.back();
    free.pop_back();
    return slot;
  }
  int victim = policy->evict(stays);
  if (victim < 0) return -1;
  stats.evictions++;
  fresh[victim] = 0;
  return std::exchange(slot_of[victim], -1);
}

// Makes residents of what was read ahead and has arrived. Forgets it all if a read failed.
void ExpertPool::Impl::bind_ahead() {
  if (!ahead) return;
  try {
    for (int tag : ahead->batch.arrived(false)) {
      int expert = ahead->experts[tag];
      slot_of[expert] = std::exchange(ahead->slots[tag], -1);
      policy->insert(expert);
      fresh[expert] = 1;
    }
  } catch (const ReadError&) {  // whoever needs those bytes will ask for them, and be told
    return drop_ahead();
  }
  if (std::all_of(ahead->slots.begin(), ahead->slots.end(), [](int slot) { return slot < 0; })) {
    ahead = nullptr;
  }
}

// Gives back the slots of what is not bound. None of it may be on its way.
void ExpertPool::Impl::drop_ahead() {
  for (int slot : ahead->slots) {
    if (slot >= 0) free.push_back(slot);
  }
  ahead = nullptr;
}

void ExpertPool::Impl::stop_ahead() {
  ahead->batch.stop();
  bind_ahead();
  if (ahead) drop_ahead();
}

bool ExpertPool::Impl::is_ahead(int expert) const {
  if (!ahead) return false;
  auto at = std::find(ahead->experts.begin(), ahead->experts.end(), expert);
  return at != ahead->experts.end() && ahead->slots[at - ahead->experts.begin()] >= 0;
}

void ExpertPool::look_ahead(const std::vector<int32_t>& guess) {
  Impl& pool = *impl_;
  check_distinct(guess.data(), static_cast<int>(guess.size()), num_experts());
  std::lock_guard lock(pool.mutex);
  if (pool.held) return;
  pool.bind_ahead();
  if (pool.ahead) return;  // the last guess is still being read
  pool.guess = guess;
  if (pool.trust.size() < guess.size()) pool.trust.resize(guess.size(), 1.0f);
  for (int expert : guess) pool.stays[expert] = 1;  // no guess at the cost of another
  std::vector<Read> reads;
  auto ahead = std::make_unique<Ahead>(*pool.files);
  for (size_t rank = 0; rank < guess.size(); rank++) {
    int expert = guess[rank];
    if (pool.slot_of[expert] >= 0 || pool.trust[rank] < kTrust) continue;
    int slot = pool.free_slot();
    if (slot < 0) break;
    int tag = static_cast<int>(ahead->experts.size());
    ahead->experts.push_back(expert);
    ahead->slots.push_back(slot);
    pool.add_reads(expert, slot, tag, reads);
  }
  for (int expert : guess) pool.stays[expert] = pool.pinned[expert];
  if (reads.empty()) return;
  pool.stats.ahead += ahead->experts.size();
  ahead->batch.submit(reads, false);
  pool.ahead = std::move(ahead);
}

struct ExpertPool::Fetch::Impl {
  explicit Impl(ExpertPool::Impl& pool);
  ~Impl();

  void begin(const int32_t* experts, int count);
  void learn(const int32_t* experts, int count);
  void collect_ahead();
  void read_missing();
  int find_slot();
  int reuse_slot();
  void collect(bool wait);
  void settle(bool keep);

  ExpertPool::Impl& pool;
  Files::Batch batch;
  std::vector<Member> members;
  std::vector<int> coming;   // which of them are being read ahead
  std::vector<int> missing;  // which of them, in the order they are read
  size_t next = 0;           // the first of those that has no slot yet
  std::vector<Ready> ready;
  size_t given = 0;
  std::priority_queue<int, std::vector<int>, std::greater<int>> released;
  int busy = 0;
  bool stale = true;  // residents outside this call may be left
  bool settled = false;
};

ExpertPool::Fetch::Impl::Impl(ExpertPool::Impl& pool) : pool(pool), batch(*pool.files) {
  std::unique_lock lock(pool.mutex);
  pool.released.wait(lock, [&] { return !pool.held; });
  pool.held = true;
}

ExpertPool::Fetch::Impl::~Impl() {
  batch.stop();
  coming.clear();
  try {
    collect(false);
    settle(true);
  } catch (const ReadError&) {  // nobody asked
  }
  {
    std::lock_guard lock(pool.mutex);
    pool.held = false;
  }
  pool.released.notify_one();
}

void ExpertPool::Fetch::Impl::begin(const int32_t* experts, int count) {
  members.reserve(count);
  std::lock_guard lock(pool.mutex);
  if (pool.records) pool.trace.emplace_back(experts, experts + count);
  learn(experts, count);
  pool.bind_ahead();
  if (pool.ahead && count + static_cast<int>(pool.ahead->slots.size()) > pool.num_slots) {
    pool.stop_ahead();
  }
  for (int which = 0; which < count; which++) {
    int expert = experts[which], slot = pool.slot_of[expert];
    bool fresh = std::exchange(pool.fresh[expert], 0), hit = slot >= 0;
    members.push_back({expert, slot, hit, hit ? State::in_slot : State::on_disk});
    pool.stays[expert] = 1;
    if (hit) {
      if (!fresh) pool.policy->touch(expert);
      ready.push_back({which, slot});
    } else if (pool.is_ahead(expert)) {
      members.back().state = State::reading;
      coming.push_back(which);
    } else {
      missing.push_back(which);
    }
    pool.stats.hits += hit && !fresh;
    pool.stats.misses += !hit || fresh;
  }
  busy = static_cast<int>(ready.size() + coming.size());
}

// How right the last guess was, rank by rank.
void ExpertPool::Fetch::Impl::learn(const int32_t* experts, int count) {
  for (size_t rank = 0; rank < pool.guess.size(); rank++) {
    bool right = std::find(experts, experts + count, pool.guess[rank]) != experts + count;
    pool.trust[rank] += ((right ? 1.0f : 0.0f) - pool.trust[rank]) / kMemory;
  }
  pool.guess.clear();
}

void ExpertPool::Fetch::Impl::read_missing() {
  if (settled || next == missing.size()) return;
  std::vector<Read> reads;
  {
    std::lock_guard lock(pool.mutex);
    for (int slot; next < missing.size() && (slot = find_slot()) >= 0; next++, busy++) {
      int which = missing[next];
      Member& member = members[which];
      member.slot = slot;
      member.state = State::reading;
      pool.add_reads(member.expert, slot, which, reads);
    }
  }
  batch.submit(reads);
}

int ExpertPool::Fetch::Impl::find_slot() {
  if (stale || !pool.free.empty()) {
    int slot = pool.free_slot();
    stale = slot >= 0;
    if (stale) return slot;
  }
  return reuse_slot();
}

// The slot of the least worthy expert of this call that has been computed with.
int ExpertPool::Fetch::Impl::reuse_slot() {
  if (released.empty()) return -1;
  int which = released.top();
  bool worth_keeping = which >= static_cast<int>(members.size()) - pool.num_slots;
  if (worth_keeping && busy >= kBusySlots) return -1;
  released.pop();
  Member& member = members[which];
  if (!member.hit) pool.policy->insert(member.expert);  // it was used, and policies remember
  pool.policy->remove(member.expert);
  pool.slot_of[member.expert] = -1;
  pool.stats.evictions++;
  return std::exchange(member.slot, -1);
}

// Moves what was read ahead and has arrived to `ready`, and what failed to `missing`.
void ExpertPool::Fetch::Impl::collect_ahead() {
  {
    std::lock_guard lock(pool.mutex);
    pool.bind_ahead();
    std::erase_if(coming, [this](int which) {
      Member& member = members[which];
      member.slot = pool.slot_of[member.expert];
      if (member.slot >= 0) {
        member.state = State::in_slot;
        member.hit = true;  // bound, and known to the policy
        pool.fresh[member.expert] = 0;
        ready.push_back({which, member.slot});
      } else if (!pool.ahead) {
        member.state = State::on_disk;
        missing.push_back(which);
        busy--;
      }
      return member.state != State::reading;
    });
  }
  read_missing();
}

// Moves what has arrived to `ready`.
void ExpertPool::Fetch::Impl::collect(bool wait) {
  if (!coming.empty()) collect_ahead();
  while (wait && ready.empty() && !coming.empty()) {
    pool.ahead->batch.wait();
    collect_ahead();
  }
  try {
    wait = wait && ready.empty();
    for (int which : batch.arrived(wait)) {
      members[which].state = State::in_slot;
      ready.push_back({which, members[which].slot});
    }
  } catch (const ReadError&) {
    settle(false);
    throw;
  }
}

// Binds what was read, or takes all of its slots back.
void ExpertPool::Fetch::Impl::settle(bool keep) {
  if (std::exchange(settled, true)) return;
  std::lock_guard lock(pool.mutex);
  for (int which : missing) {
    auto [expert, slot, hit, state] = members[which];
    if (slot < 0) continue;
    if (keep && state >= State::in_slot) {
      pool.slot_of[expert] = slot;
      pool.policy->insert(expert);
    } else {
      pool.free.push_back(slot);
    }
  }
  for (auto& member : members) pool.stays[member.expert] = pool.pinned[member.expert];
}

ExpertPool::Fetch::Fetch(ExpertPool& pool, const int32_t* experts, int count) {
  check_distinct(experts, count, pool.num_experts());
  impl_ = std::make_unique<Impl>(*pool.impl_);
  impl_->begin(experts, count);
  impl_->read_missing();
}

ExpertPool::Fetch::~Fetch() = default;

std::vector<ExpertPool::Fetch::Ready> ExpertPool::Fetch::take(bool wait) {
  wait = wait && impl_->ready.empty() && impl_->given < impl_->members.size();
  impl_->collect(wait);
  if (wait && impl_->ready.empty()) {
    throw std::logic_error("No slot is left for " +
                           std::to_string(impl_->missing.size() - impl_->next) +
                           " experts of this call: release some, or pin fewer.");
  }
  impl_->given += impl_->ready.size();
  return std::exchange(impl_->ready, {});
}

void ExpertPool::Fetch::release(int which) {
  Member& member = impl_->members.at(which);
  if (member.state != State::in_slot) {
    throw std::logic_error("Only an expert that was given, and once, can be released.");
  }
  member.state = State::released;
  if (impl_->settled) return;
  impl_->busy--;
  if (!impl_->pool.pinned[member.expert]) impl_->released.push(which);
  impl_->read_missing();
}

}  // namespace flash
