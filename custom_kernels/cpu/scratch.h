// Working memory of one call: taken piece by piece, given back all at once.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace flash {

// Small pieces come from a block that stays with its thread, since a fresh one would fault in page
// by page on every call. Large ones (prompts) are mapped, and unmapped at the end of the call: from
// malloc they would stay with the process, beyond the RAM it was promised to take.
class Scratch {
 public:
  Scratch() : base_(block().used) {}
  ~Scratch() {
    block().used = base_;
    for (auto& [memory, bytes] : large_) munmap(memory, bytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // n objects of a plain type, not initialized, aligned to a cache line.
  // Throws std::bad_alloc.
  template <class T>
  T* take(int64_t n) {
    size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    Block& b = block();
    if (b.used + bytes <= kBlock) {
      b.used += bytes;
      return reinterpret_cast<T*>(b.memory + b.used - bytes);
    }
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    large_.emplace_back(p, bytes);
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(p, bytes, MADV_HUGEPAGE);  // a wish: fewer faults
#endif
    return static_cast<T*>(p);
  }

 private:
  static constexpr size_t kBlock = 4 << 20;
  static constexpr size_t kHuge = 8 << 20;
  struct Block {
    uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(64, kBlock));
    size_t used = 0;
    ~Block() { std::free(memory); }
  };
  static Block& block() {
    static thread_local Block b;
    return b;
  }

  size_t base_;
  std::vector<std::pair<void*, size_t>> large_;
};

}  // namespace flash
