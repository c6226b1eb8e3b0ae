#include "pool.h"

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flash {

namespace {

// Waits are over in microseconds within a block and in milliseconds between tokens. So: a short
// bounded look, then sleep. A longer look would take the core from whoever we wait for.
constexpr auto kLook = std::chrono::microseconds(20);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class T>
void wait_while(std::atomic<T>& value, T old) {
  auto end = std::chrono::steady_clock::now() + kLook;
  do {
    for (int i = 0; i < 32; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

int cores() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

}  // namespace

void Team::barrier() {
  if (size_ == 1) {
    pool_.claimed_.store(0, std::memory_order_relaxed);
    return;
  }
  uint32_t generation = pool_.generation_.load(std::memory_order_relaxed);
  if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    pool_.arrived_.store(0, std::memory_order_relaxed);
    pool_.claimed_.store(0, std::memory_order_relaxed);
    pool_.generation_.store(generation + 1, std::memory_order_release);
    pool_.generation_.notify_all();
  } else {
    wait_while(pool_.generation_, generation);
  }
}

int64_t Team::claim(int64_t grain) {
  return pool_.claimed_.fetch_add(grain, std::memory_order_relaxed);
}

Pool& Pool::shared() {
  static Pool* pool = new Pool;
  return *pool;
}

Pool::Pool() : threads_(cores()) {}

void Pool::set_threads(int n) {
  std::lock_guard lock(turn_);
  threads_ = std::clamp(n, 1, cores());
}

void Pool::run(const std::function<void(Team&)>& body) {
  std::lock_guard lock(turn_);
  size_ = threads();
  for (; started_ < size_; started_++) {
    std::thread([this, i = started_, seen = region_.load()]() mutable {
      for (;;) {
        wait_while(region_, seen);
        seen = region_.load(std::memory_order_acquire);
        work(i);
      }
    }).detach();
  }
  body_ = &body;
  claimed_.store(0, std::memory_order_relaxed);
  if (size_ > 1) {
    inside_.store(started_ - 1, std::memory_order_relaxed);
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
  }
  Team team(*this, 0, size_);
  body(team);
  for (int left; size_ > 1 && (left = inside_.load(std::memory_order_acquire)) > 0;) {
    wait_while(inside_, left);
  }
}

void Pool::work(int index) {
  if (index < size_) {
    Team team(*this, index, size_);
    (*body_)(team);
  }
  if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) inside_.notify_all();
}

}  // namespace flash
