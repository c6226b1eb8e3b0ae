#include "eviction.h"

#include <algorithm>
#include <stdexcept>

namespace flash {

namespace {

// Expert ids, oldest first; each at most once. Everything in constant time.
class Queue {
 public:
  explicit Queue(int experts) : links_(experts + 1), end_(experts) { links_[end_] = {end_, end_}; }
  int size() const { return size_; }
  bool contains(int expert) const { return links_[expert].next >= 0; }
  int front() const { return links_[end_].next; }
  int next(int expert) const { return links_[expert].next; }
  int end() const { return end_; }

  void push(int expert) {
    int last = links_[end_].previous;
    links_[expert] = {last, end_};
    links_[last].next = links_[end_].previous = expert;
    size_++;
  }
  void remove(int expert) {
    auto [previous, next] = links_[expert];
    links_[previous].next = next;
    links_[next].previous = previous;
    links_[expert] = {};
    size_--;
  }

 private:
  struct Link {
    int previous = -1, next = -1;
  };
  std::vector<Link> links_;
  int end_;  // the ring's one link that is no expert
  int size_ = 0;
};

// Least recently used.
class LRU : public EvictionPolicy {
 public:
  explicit LRU(int experts) : order_(experts) {}
  void touch(int expert) override {
    order_.remove(expert);
    order_.push(expert);
  }
  void insert(int expert) override { order_.push(expert); }
  int evict(const std::vector<uint8_t>& stays) override {
    for (int e = order_.front(); e != order_.end(); e = order_.next(e)) {
      if (stays[e]) continue;
      order_.remove(e);
      return e;
    }
    return -1;
  }
  void remove(int expert) override { order_.remove(expert); }

 private:
  Queue order_;
};

// Least frequently used, the older one among equals. Counts survive eviction.
class LFU : public EvictionPolicy {
 public:
  explicit LFU(int experts) : order_(experts), uses_(experts) {}
  void touch(int expert) override {
    uses_[expert]++;
    order_.remove(expert);
    order_.push(expert);
  }
  void insert(int expert) override {
    uses_[expert]++;
    order_.push(expert);
  }
  int evict(const std::vector<uint8_t>& stays) override {
    int victim = -1;
    for (int e = order_.front(); e != order_.end(); e = order_.next(e)) {
      if (!stays[e] && (victim < 0 || uses_[e] < uses_[victim])) victim = e;
    }
    if (victim >= 0) order_.remove(victim);
    return victim;
  }
  void remove(int expert) override { order_.remove(expert); }

 private:
  Queue order_;
  std::vector<int64_t> uses_;
};

// S3-FIFO (Yang et al., SOSP 2023). What comes enters a small queue of a tenth of the slots; used
// more than once there, it moves to the main queue, otherwise it goes and leaves its name in the
// ghost queue. Who comes back while named there enters the main queue, a FIFO that lets whom a
// token used since go round again.
class S3FIFO : public EvictionPolicy {
 public:
  explicit S3FIFO(int experts) : small_(experts), main_(experts), ghost_(experts), uses_(experts) {}
  void touch(int expert) override { uses_[expert] = std::min(uses_[expert] + 1, 3); }
  void insert(int expert) override {
    bool back = ghost_.contains(expert);
    if (back) ghost_.remove(expert);
    (back ? main_ : small_).push(expert);
    uses_[expert] = 0;
    slots_ = std::max(slots_, small_.size() + main_.size());
  }
  int evict(const std::vector<uint8_t>& stays) override {
    bool small_first = 10 * small_.size() >= slots_;
    int victim = small_first ? from_small(stays) : from_main(stays);
    if (victim < 0) victim = small_first ? from_main(stays) : from_small(stays);
    return victim;
  }
  void remove(int expert) override { (small_.contains(expert) ? small_ : main_).remove(expert); }

 private:
  int from_small(const std::vector<uint8_t>& stays) {
    for (int e = small_.front(), next; e != small_.end(); e = next) {
      next = small_.next(e);
      if (stays[e]) continue;
      small_.remove(e);
      if (uses_[e] <= 1) {
        ghost_.push(e);
        if (ghost_.size() > std::max(slots_ * 9 / 10, 1)) ghost_.remove(ghost_.front());
        return e;
      }
      uses_[e] = 0;
      main_.push(e);
    }
    return -1;
  }
  int from_main(const std::vector<uint8_t>& stays) {
    bool any = true;
    while (any) {  // at most four times round: uses are at most three
      any = false;
      int last = main_.size();
      for (int e = main_.front(), next; last-- > 0; e = next) {
        next = main_.next(e);
        if (stays[e]) continue;
        any = true;
        main_.remove(e);
        if (uses_[e] == 0) return e;
        uses_[e]--;
        main_.push(e);
      }
    }
    return -1;
  }

  Queue small_, main_, ghost_;
  std::vector<int> uses_;  // since it entered its queue, at most three
  int slots_ = 0;          // the most that were ever resident
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, int experts) {
  if (name == "lru") return std::make_unique<LRU>(experts);
  if (name == "lfu") return std::make_unique<LFU>(experts);
  if (name == "s3fifo") return std::make_unique<S3FIFO>(experts);
  throw std::invalid_argument("There is no eviction policy " + name + ": lru, lfu or s3fifo.");
}

}  // namespace flash
