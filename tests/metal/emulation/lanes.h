// What the emulated Metal library asks of the machine that runs its lanes (lanes.cpp).

#pragma once

#include <cstdint>

struct Three {
  uint32_t x, y, z;
};

// Where a lane is. Every field but `lane` and `simdgroup` is a Metal thread attribute.
struct Place {
  Three thread_position_in_grid;
  Three threads_per_grid;
  Three thread_position_in_threadgroup;
  Three threads_per_threadgroup;  // of this group: the last of a row may be smaller
  Three dispatch_threads_per_threadgroup;
  Three threadgroup_position_in_grid;
  Three threadgroups_per_grid;
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t thread_index_in_quadgroup;
  uint32_t quadgroup_index_in_threadgroup;
};

constexpr int kSimd = 32;
constexpr unsigned kMaxValueBytes = 32;

enum : uint32_t { kMemNone = 0, kMemDevice = 1, kMemThreadgroup = 2 };

extern "C" {
// Every lane of the simdgroup gives `bytes` bytes; `all` receives kSimd rows of them. Returns the
// mask of lanes that gave: those that still run. Faults unless they all stand at the same line.
uint32_t lanes_exchange(const void* value, unsigned bytes, void* all, const char* what, int line);
void lanes_simdgroup_barrier(uint32_t memory, int line);
void lanes_threadgroup_barrier(uint32_t memory, int line);
// An atomic access that the caller is about to make; checks bounds and what is there.
void lanes_atomic(const void* address, unsigned bytes, bool reads);
void lanes_copy(void* to, const void* from, unsigned bytes);  // unseen by the checks
[[noreturn]] void lanes_fault(const char* format, ...);
unsigned lanes_index_in_simdgroup();
}
