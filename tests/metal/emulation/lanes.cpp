// Runs a Metal kernel on the CPU: every thread of a threadgroup is a fiber, and fibers meet at
// barriers and simdgroup operations as lanes of a GPU do. Threadgroups run one after another.
//
// With CHECKED, kernels are compiled with -fsanitize=thread but linked to the hooks below instead of
// ThreadSanitizer. Every access to memory is looked up: it has to lie in a buffer of the launch,
// in threadgroup memory, in a constant or on the lane's own stack; what is read has to have been
// written; and two lanes that touch the same byte, one of them writing, need a barrier between.

#include "lanes.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#include <ucontext.h>
#define FIBERS_BY_UCONTEXT 1
#endif

void enter_kernel(void* const* buffers, const Place& place);  // generated with the kernel

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif
constexpr int kMaxThreads = 1024;

enum class State { kReady, kAtSimd, kAtThreadgroup, kDone };

struct Lane {
  Place place;
  State state;
  const char* what;
  int line;
  uintptr_t path;  // by which calls it came there
  uint32_t memory;
  unsigned parity;
  uint16_t group_clock[2];  // barriers passed that ordered device and threadgroup memory
  uint16_t simd_clock[2];
#if FIBERS_BY_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  char* stack;
};

struct Simdgroup {
  alignas(16) char values[2][kSimd][kMaxValueBytes];
  uint32_t gave[2];
};

// One byte of memory that lanes share: who wrote it and who read it last, and when.
struct Cell {
  uint32_t writer;  // 0: nobody, kInitial: the host, kAtomic, else 1 + group * 1024 + lane
  uint32_t reader;  // 0: nobody, kMany, else as above
  uint16_t write_clock[2], read_clock[2];  // of the threadgroup, of the simdgroup
  uint32_t read_simdgroup, read_group;     // of all readers, kMany if of several
  uint32_t atomic_group;                   // of all atomic writers, kMany if of several
};
constexpr uint32_t kInitial = 0xffffffff, kAtomic = 0xfffffffe, kMany = 0xfffffffd;

struct Region {
  const char* name;
  char* begin;
  char* end;
  bool writable;
  bool is_threadgroup;
  std::vector<Cell> cells;  // of a region that can be written
};

struct Machine {
  Lane* lanes = nullptr;
  char* stacks = nullptr;
  std::vector<Simdgroup> simdgroups;
  int threads = 0;  // of this threadgroup
  uint32_t group = 0;
  int current = 0;
  bool in_lane = false;
  bool failed = false;
  char fault[512];
  std::vector<Region> regions;
  Region* last = nullptr;
  char* image_begin = nullptr;  // of this shared object: constants lie there
  char* image_end = nullptr;
  void* const* buffers = nullptr;
  int count = 0;
#if FIBERS_BY_UCONTEXT
  ucontext_t home;
#else
  void* home = nullptr;
#endif
};

Machine* machine;

#if FIBERS_BY_UCONTEXT
void to_lane(Lane& lane) {
  swapcontext(&machine->home, &lane.context);
}
void to_home(Lane& lane) {
  swapcontext(&lane.context, &machine->home);
}
#else
// Saves the registers that a callee must keep and its stack pointer, and takes up another's.
extern "C" void switch_stack(void** save, void* load);
asm(R"(
.text
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void to_lane(Lane& lane) {
  switch_stack(&machine->home, lane.stack_pointer);
}
void to_home(Lane& lane) {
  switch_stack(&lane.stack_pointer, machine->home);
}
#endif

void run_lane() {
  Lane& lane = machine->lanes[machine->current];
  enter_kernel(machine->buffers, lane.place);
  lane.state = State::kDone;
  to_home(lane);
  abort();  // nobody resumes a lane that has ended
}

void prepare(Lane& lane) {
#if FIBERS_BY_UCONTEXT
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack;
  lane.context.uc_stack.ss_size = kStack;
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, run_lane, 0);
#else
  void** top = reinterpret_cast<void**>(lane.stack + kStack);
  *--top = nullptr;  // run_lane's own return address: it has none
  *--top = reinterpret_cast<void*>(run_lane);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  lane.stack_pointer = top;
#endif
}

void record(const char* format, va_list arguments) {
  if (machine->failed) {
    return;
  }
  machine->failed = true;
  int used = vsnprintf(machine->fault, sizeof(machine->fault), format, arguments);
  if (machine->in_lane && used >= 0 && used < int(sizeof(machine->fault))) {
    const Place& at = machine->lanes[machine->current].place;
    snprintf(
        machine->fault + used,
        sizeof(machine->fault) - used,
        " (thread %u %u %u of threadgroup %u %u %u)",
        at.thread_position_in_threadgroup.x,
        at.thread_position_in_threadgroup.y,
        at.thread_position_in_threadgroup.z,
        at.threadgroup_position_in_grid.x,
        at.threadgroup_position_in_grid.y,
        at.threadgroup_position_in_grid.z);
  }
}

void fault_outside(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
}

bool released_simd(int simdgroup) {
  // Lets a simdgroup go on if all its lanes that still run stand at one operation.
  int begin = simdgroup * kSimd, end = std::min(begin + kSimd, machine->threads);
  const Lane* first = nullptr;
  for (int i = begin; i < end; ++i) {
    const Lane& lane = machine->lanes[i];
    if (lane.state == State::kDone) {
      continue;
    }
    if (lane.state == State::kAtThreadgroup || lane.state == State::kReady) {
      return false;
    }
    if (first == nullptr) {
      first = &lane;
    } else if (lane.line != first->line || strcmp(lane.what, first->what) != 0) {
      fault_outside(
          "divergent simdgroup: one lane is at %s of line %d, another at %s of line %d",
          first->what, first->line, lane.what, lane.line);
      return false;
    } else if (lane.path != first->path) {
      fault_outside(
          "divergent simdgroup: two lanes are at %s of line %d by different calls",
          lane.what, lane.line);
      return false;
    }
  }
  if (first == nullptr) {
    return false;
  }
  uint32_t memory = first->memory;
  machine->simdgroups[simdgroup].gave[first->parity ^ 1] = 0;
  for (int i = begin; i < end; ++i) {
    Lane& lane = machine->lanes[i];
    if (lane.state == State::kAtSimd) {
      lane.state = State::kReady;
      lane.simd_clock[0] += (memory & kMemDevice) != 0;
      lane.simd_clock[1] += (memory & kMemThreadgroup) != 0;
    }
  }
  return true;
}

bool released_threadgroup() {
  const Lane* first = nullptr;
  int done = 0;
  for (int i = 0; i < machine->threads; ++i) {
    const Lane& lane = machine->lanes[i];
    if (lane.state == State::kDone) {
      ++done;
    } else if (lane.state != State::kAtThreadgroup) {
      fault_outside(
          "divergent simdgroup: one lane waits at %s of line %d, others elsewhere",
          lane.what, lane.line);
      return false;
    } else if (first == nullptr) {
      first = &lane;
    } else if (lane.line != first->line) {
      fault_outside("divergent barrier: threads wait at lines %d and %d", first->line, lane.line);
      return false;
    }
  }
  if (first == nullptr) {
    return false;
  }
  if (done > 0) {
    fault_outside(
        "divergent barrier: %d of %d threads have ended before line %d",
        done, machine->threads, first->line);
    return false;
  }
  for (int i = 0; i < machine->threads; ++i) {
    Lane& lane = machine->lanes[i];
    lane.state = State::kReady;
    lane.group_clock[0] += (lane.memory & kMemDevice) != 0;
    lane.group_clock[1] += (lane.memory & kMemThreadgroup) != 0;
  }
  return true;
}

void run_threadgroup() {
  int simdgroups = (machine->threads + kSimd - 1) / kSimd;
  machine->simdgroups.assign(simdgroups, {});
  for (int i = 0; i < machine->threads; ++i) {
    prepare(machine->lanes[i]);
  }
  while (!machine->failed) {
    bool going_on = false;
    for (int s = 0; s < simdgroups && !machine->failed; ++s) {
      do {
        for (int i = s * kSimd; i < std::min((s + 1) * kSimd, machine->threads); ++i) {
          if (machine->lanes[i].state == State::kReady) {
            machine->current = i;
            machine->in_lane = true;
            to_lane(machine->lanes[i]);
            machine->in_lane = false;
            if (machine->failed) {
              return;
            }
          }
        }
      } while (released_simd(s));
    }
    if (machine->failed) {
      return;
    }
    for (int i = 0; i < machine->threads; ++i) {
      going_on |= machine->lanes[i].state != State::kDone;
    }
    if (!going_on || !released_threadgroup()) {
      return;
    }
  }
}

// The return addresses between here and the kernel, as one number: a function that two places call
// has two. Checked kernels keep their frame pointers for it.
uintptr_t path_here(const Lane& lane) {
  uintptr_t path = 0;
#ifdef CHECKED
  auto frame = static_cast<void**>(__builtin_frame_address(0));
  auto begin = reinterpret_cast<void**>(lane.stack);
  auto end = reinterpret_cast<void**>(lane.stack + kStack) - 1;
  while (frame >= begin && frame < end) {
    path = path * 31 + reinterpret_cast<uintptr_t>(frame[1]);
    begin = frame + 1;
    frame = static_cast<void**>(frame[0]);
  }
#endif
  return path;
}

void wait(State state, const char* what, int line, uint32_t memory) {
  Lane& lane = machine->lanes[machine->current];
  lane.path = path_here(lane);
  lane.state = state;
  lane.what = what;
  lane.line = line;
  lane.memory = memory;
  to_home(lane);
}

#ifdef CHECKED

uint32_t identity() {
  return 1 + machine->group * kMaxThreads + machine->current;
}

Region* region_of(const char* address) {
  if (machine->last && address >= machine->last->begin && address < machine->last->end) {
    return machine->last;
  }
  for (Region& region : machine->regions) {
    if (address >= region.begin && address < region.end) {
      return machine->last = &region;
    }
  }
  return nullptr;
}

// Whether what another lane did at those clocks comes before what this lane does now.
bool ordered(const Lane& lane, const Region& region, bool same_group, bool same_simd,
             const uint16_t* clock) {
  if (!same_group) {
    return false;
  }
  int kind = region.is_threadgroup;
  return clock[0] != lane.group_clock[kind] || (same_simd && clock[1] != lane.simd_clock[kind]);
}

const char* verb(bool writes) {
  return writes ? "write" : "read";
}

void check(const char* address, size_t bytes, bool reads, bool writes, bool atomic = false) {
  if (machine == nullptr || !machine->in_lane || bytes == 0) {
    return;
  }
  Lane& lane = machine->lanes[machine->current];
  if (address >= lane.stack && address + bytes <= lane.stack + kStack) {
    return;
  }
  const char* lanes = reinterpret_cast<const char*>(machine->lanes);
  if (!writes && address >= lanes && address < lanes + sizeof(Lane) * kMaxThreads) {
    return;  // enter_kernel reads the lane's place there
  }
  const char* buffers = reinterpret_cast<const char*>(machine->buffers);
  if (!writes && address >= buffers && address < buffers + machine->count * sizeof(void*)) {
    return;
  }
  Region* region = region_of(address);
  if (region == nullptr) {
    if (!writes && address >= machine->image_begin && address + bytes <= machine->image_end) {
      return;
    }
    for (const Region& near : machine->regions) {
      if (address + 65536 >= near.begin && address < near.end + 65536) {
        lanes_fault(
            "out of range: %s of %zu bytes at byte %td of %s, which has %td",
            verb(writes), bytes, address - near.begin, near.name, near.end - near.begin);
      }
    }
    lanes_fault("out of range: %s of %zu bytes in no buffer at all", verb(writes), bytes);
  }
  if (address + bytes > region->end) {
    lanes_fault(
        "out of range: %s of %zu bytes at byte %td of %s, which has %td",
        verb(writes), bytes, address - region->begin, region->name, region->end - region->begin);
  }
  if (writes && !region->writable) {
    lanes_fault("write to %s, an input", region->name);
  }
  if (!region->writable) {
    return;
  }
  int kind = region->is_threadgroup;
  uint32_t self = identity();
  uint32_t simdgroup = machine->group * kSimd + machine->current / kSimd;
  for (size_t i = 0; i < bytes; ++i) {
    std::ptrdiff_t at = address + i - region->begin;
    Cell& cell = region->cells[at];
    if (reads && cell.writer == 0) {
      lanes_fault("uninitialized: read of byte %td of %s, which nobody wrote", at, region->name);
    }
    bool by_other = cell.writer != 0 && cell.writer != kInitial && cell.writer != self;
    if (by_other && !(atomic && cell.writer == kAtomic)) {
      bool atomically = cell.writer == kAtomic;
      bool same_group = atomically ? cell.atomic_group == machine->group
                                   : (cell.writer - 1) / kMaxThreads == machine->group;
      bool same_simd = !atomically && (cell.writer - 1) / kSimd == (self - 1) / kSimd;
      if (!ordered(lane, *region, same_group, same_simd, cell.write_clock)) {
        lanes_fault(
            "race: %s of byte %td of %s that another thread wrote, with no barrier between",
            verb(writes), at, region->name);
      }
    }
    if (writes && !atomic && cell.reader != 0 && cell.reader != self) {
      bool same_group = cell.read_group == machine->group;
      bool same_simd = cell.read_simdgroup == simdgroup;
      if (!ordered(lane, *region, same_group, same_simd, cell.read_clock)) {
        lanes_fault(
            "race: write of byte %td of %s that another thread read, with no barrier between",
            at, region->name);
      }
    }
    if (writes) {
      bool elsewhere = cell.writer == kAtomic && cell.atomic_group != machine->group;
      cell.atomic_group = elsewhere ? kMany : machine->group;
      cell.writer = atomic ? kAtomic : self;
      cell.write_clock[0] = lane.group_clock[kind];
      cell.write_clock[1] = lane.simd_clock[kind];
    } else {
      bool elsewhere = cell.reader != 0 && cell.read_group != machine->group;
      bool same_time = cell.reader != 0 && cell.read_clock[0] == lane.group_clock[kind] &&
          (cell.read_simdgroup != simdgroup || cell.read_clock[1] == lane.simd_clock[kind]);
      bool many = elsewhere || (same_time && cell.reader != self);
      cell.read_simdgroup = many && cell.read_simdgroup != simdgroup ? kMany : simdgroup;
      cell.read_group = elsewhere ? kMany : machine->group;
      cell.reader = many ? kMany : self;
      cell.read_clock[0] = lane.group_clock[kind];
      cell.read_clock[1] = lane.simd_clock[kind];
    }
  }
}

extern "C" char __bss_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));

int find_image(dl_phdr_info* info, size_t, void*) {
  const char* here = &__bss_start;
  char *begin = nullptr, *end = nullptr;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) {
      continue;
    }
    char* from = reinterpret_cast<char*>(info->dlpi_addr + header.p_vaddr);
    char* to = from + header.p_memsz;
    ours |= here >= from && here <= to;
    begin = begin == nullptr || from < begin ? from : begin;
    end = end == nullptr || to > end ? to : end;
  }
  if (ours) {
    machine->image_begin = begin;
    machine->image_end = end;
  }
  return ours;
}

void forget_threadgroup_memory() {
  for (Region& region : machine->regions) {
    if (region.is_threadgroup) {
      region.cells.assign(region.end - region.begin, {});
    }
  }
}

#else
void forget_threadgroup_memory() {}
#endif

}  // namespace

extern "C" {

void lanes_fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(format, arguments);
  va_end(arguments);
  to_home(machine->lanes[machine->current]);
  abort();  // a lane with a fault is not resumed
}

unsigned lanes_index_in_simdgroup() {
  return machine->current % kSimd;
}

uint32_t lanes_exchange(const void* value, unsigned bytes, void* all, const char* what, int line) {
  Lane& lane = machine->lanes[machine->current];
  Simdgroup& simdgroup = machine->simdgroups[machine->current / kSimd];
  unsigned parity = lane.parity;
  int index = machine->current % kSimd;
  memcpy(simdgroup.values[parity][index], value, bytes);
  simdgroup.gave[parity] |= 1u << index;
  wait(State::kAtSimd, what, line, kMemNone);
  lane.parity ^= 1;
  for (int i = 0; i < kSimd; ++i) {
    memcpy(static_cast<char*>(all) + i * bytes, simdgroup.values[parity][i], bytes);
  }
  return simdgroup.gave[parity];
}

void lanes_simdgroup_barrier(uint32_t memory, int line) {
  wait(State::kAtSimd, "simdgroup_barrier", line, memory);
}

void lanes_threadgroup_barrier(uint32_t memory, int line) {
  wait(State::kAtThreadgroup, "threadgroup_barrier", line, memory);
}

void lanes_atomic(const void* address, unsigned bytes, bool reads) {
#ifdef CHECKED
  check(static_cast<const char*>(address), bytes, reads, true, true);
#else
  (void)address, (void)bytes, (void)reads;
#endif
}

void lanes_copy(void* to, const void* from, unsigned bytes) {
  memcpy(to, from, bytes);
}

// One buffer of a launch.
struct Buffer {
  const char* name;
  void* data;
  uint64_t bytes;
  int32_t writable;
  int32_t initialized;
};

// Runs a launch. Returns the fault as text, or null; `untouched` receives the number of bytes that
// nobody wrote in outputs that were not initialized.
__attribute__((visibility("default"))) const char* lanes_launch(
    const Buffer* buffers, int count, const uint32_t* grid, const uint32_t* group,
    uint64_t* untouched) {
  static char message[600] = {1};
  delete machine;
  machine = new Machine;
  std::vector<void*> pointers;
  for (int i = 0; i < count; ++i) {
    pointers.push_back(buffers[i].data);
    char* begin = static_cast<char*>(buffers[i].data);
    machine->regions.push_back(
        {buffers[i].name, begin, begin + buffers[i].bytes, buffers[i].writable != 0, false, {}});
#ifdef CHECKED
    if (buffers[i].writable) {
      Cell cell{};
      cell.writer = buffers[i].initialized ? kInitial : 0;
      machine->regions.back().cells.assign(buffers[i].bytes, cell);
    }
#endif
  }
#ifdef CHECKED
  if (&_end > &__bss_start) {
    machine->regions.push_back(
        {"threadgroup memory", &__bss_start, &_end, true, true, {}});
  }
  dl_iterate_phdr(find_image, nullptr);
#endif
  machine->buffers = pointers.data();
  machine->count = count;
  machine->lanes = new Lane[kMaxThreads];
  size_t stacks = kStack * kMaxThreads;
  machine->stacks = static_cast<char*>(
      mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
           -1, 0));
  Three threads{grid[0], grid[1], grid[2]}, per{group[0], group[1], group[2]};
  Three groups{};
  uint64_t all = uint64_t(per.x) * per.y * per.z;
  if (all == 0 || all > kMaxThreads) {
    fault_outside("a threadgroup of %u x %u x %u threads; 1 to 1024 are possible", per.x, per.y,
                  per.z);
  } else {
    groups = {
        (threads.x + per.x - 1) / per.x, (threads.y + per.y - 1) / per.y,
        (threads.z + per.z - 1) / per.z};
  }
  for (uint32_t gz = 0; gz < groups.z; ++gz) {
    for (uint32_t gy = 0; gy < groups.y; ++gy) {
      for (uint32_t gx = 0; gx < groups.x && !machine->failed; ++gx) {
        Three size{
            std::min(per.x, threads.x - gx * per.x), std::min(per.y, threads.y - gy * per.y),
            std::min(per.z, threads.z - gz * per.z)};
        machine->group = (gz * groups.y + gy) * groups.x + gx;
        machine->threads = size.x * size.y * size.z;
        uint32_t index = 0;
        for (uint32_t z = 0; z < size.z; ++z) {
          for (uint32_t y = 0; y < size.y; ++y) {
            for (uint32_t x = 0; x < size.x; ++x, ++index) {
              Lane& lane = machine->lanes[index];
              lane = {};
              lane.stack = machine->stacks + index * kStack;
              Place& at = lane.place;
              at.thread_position_in_grid = {gx * per.x + x, gy * per.y + y, gz * per.z + z};
              at.threads_per_grid = threads;
              at.thread_position_in_threadgroup = {x, y, z};
              at.threads_per_threadgroup = size;
              at.dispatch_threads_per_threadgroup = per;
              at.threadgroup_position_in_grid = {gx, gy, gz};
              at.threadgroups_per_grid = groups;
              at.thread_index_in_threadgroup = index;
              at.thread_index_in_simdgroup = index % kSimd;
              at.simdgroup_index_in_threadgroup = index / kSimd;
              at.simdgroups_per_threadgroup = (machine->threads + kSimd - 1) / kSimd;
              at.thread_index_in_quadgroup = index % 4;
              at.quadgroup_index_in_threadgroup = index / 4;
            }
          }
        }
        forget_threadgroup_memory();
        run_threadgroup();
      }
    }
  }
  *untouched = 0;
  for (const Region& region : machine->regions) {
    for (const Cell& cell : region.cells) {
      *untouched += !region.is_threadgroup && cell.writer == 0;
    }
  }
  munmap(machine->stacks, stacks);
  delete[] machine->lanes;
  bool failed = machine->failed;
  snprintf(message, sizeof(message), "%s", failed ? machine->fault : "");
  delete machine;
  machine = nullptr;
  return failed ? message : nullptr;
}

#ifdef CHECKED
// What -fsanitize=thread calls.
#define HOOK(n)                                                                              \
  void __tsan_read##n(void* p) { check(static_cast<char*>(p), n, true, false); }            \
  void __tsan_write##n(void* p) { check(static_cast<char*>(p), n, false, true); }            \
  void __tsan_unaligned_read##n(void* p) { check(static_cast<char*>(p), n, true, false); }  \
  void __tsan_unaligned_write##n(void* p) { check(static_cast<char*>(p), n, false, true); }  \
  void __tsan_volatile_read##n(void* p) { check(static_cast<char*>(p), n, true, false); }   \
  void __tsan_volatile_write##n(void* p) { check(static_cast<char*>(p), n, false, true); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_read_range(void* p, size_t n) { check(static_cast<char*>(p), n, true, false); }
void __tsan_write_range(void* p, size_t n) { check(static_cast<char*>(p), n, false, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
#endif

}  // extern "C"

#ifdef STANDALONE
// kernel LAUNCH: runs what the file says, writes the buffers back into it. Exit 3: a fault.
int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "r+b");
  uint32_t head[7];
  if (!file || fread(head, sizeof(head), 1, file) != 1) {
    return 2;
  }
  std::vector<Buffer> buffers(head[0]);
  std::vector<long> places;
  for (Buffer& buffer : buffers) {
    uint64_t about[2];
    if (fread(about, sizeof(about), 1, file) != 1) {
      return 2;
    }
    places.push_back(ftell(file));
    buffer = {"a buffer", malloc(about[0]), about[0], int32_t(about[1] & 1), int32_t(about[1] >> 1)};
    if (about[0] && fread(buffer.data, about[0], 1, file) != 1) {
      return 2;
    }
  }
  uint64_t untouched = 0;
  if (const char* fault = lanes_launch(buffers.data(), buffers.size(), head + 1, head + 4, &untouched)) {
    fprintf(stderr, "%s\n", fault);
    return 3;
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    fseek(file, places[i], SEEK_SET);
    if (buffers[i].bytes && fwrite(buffers[i].data, buffers[i].bytes, 1, file) != 1) {
      return 2;
    }
    free(buffers[i].data);
  }
  return fclose(file) == 0 ? 0 : 2;
}
#endif
