// A thread pool that sleeps: as many threads as asked for, the caller being one of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>

namespace flash {

// One thread's view of a parallel region. Every thread of a region runs the same body and so
// meets the same `each` and `barrier` calls in the same order.
class Team {
 public:
  Team(class Pool& pool, int index, int size) : pool_(pool), index_(index), size_(size) {}
  int index() const { return index_; }
  int size() const { return size_; }

  // Waits for every thread of the region. What they wrote before is visible after.
  void barrier();

  // Calls f(begin, end) over [0, n) in pieces of `grain`, each claimed by whichever thread is
  // free: no result may depend on who does what. Ends in a barrier.
  template <class F>
  void each(int64_t n, int64_t grain, F&& f) {
    for (int64_t i; (i = claim(grain)) < n;) f(i, i + grain < n ? i + grain : n);
    barrier();
  }

 private:
  int64_t claim(int64_t grain);

  class Pool& pool_;
  int index_;
  int size_;
};

class Pool {
 public:
  // The process's pool. It is never destroyed: MLX's stream threads may outlive `main`.
  static Pool& shared();

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // From now on regions run on `n` threads, the caller included. At most one per core.
  void set_threads(int n);

  // Runs body(team) on all threads and returns when all have. Callers take turns. The body must
  // not throw and must not call run.
  void run(const std::function<void(Team&)>& body);

 private:
  friend class Team;
  Pool();
  void work(int index);

  std::mutex turn_;
  std::atomic<int> threads_;
  int started_ = 1;  // threads that exist, the caller counted
  const std::function<void(Team&)>* body_ = nullptr;
  int size_ = 1;                         // threads of the present region
  std::atomic<uint32_t> region_{0};      // counts regions; workers sleep on it
  std::atomic<uint32_t> generation_{0};  // counts barriers; sleepers wait on it
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> claimed_{0};
  alignas(64) std::atomic<int> inside_{0};  // workers that have not left the region
};

}  // namespace flash
