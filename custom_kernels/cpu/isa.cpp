#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flash {

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAvx512Bf16;
#if defined(__linux__)
extern const Isa kAmx;
#endif
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif

namespace {

#if defined(__x86_64__) && defined(__linux__)
// Whether there are tiles with products of bfloat16, and Linux lets this process use them.
bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool runs(const Isa* isa) {
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi");
  bool bf16 =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#if defined(__linux__)
  if (isa == &kAmx) return bf16 && has_tiles();
#endif
  if (isa == &kAvx512Bf16) return bf16;
  if (isa == &kAvx512) return avx512;
  if (isa == &kAvx2) return avx2;
#endif
  return isa != nullptr;
}

std::initializer_list<const Isa*> all() {
#if defined(__x86_64__) && defined(__linux__)
  static const auto list = {&kAmx, &kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};
#elif defined(__x86_64__)
  static const auto list = {&kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};
#elif defined(__aarch64__)
  static const auto list = {&kNeon, &kPortable};
#else
  static const auto list = {&kPortable};
#endif
  return list;
}

const Isa* best() {
  for (auto* isa : all()) {
    if (runs(isa)) return isa;
  }
  return &kPortable;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa* find_isa(const char* name) {
  for (auto* isa : all()) {
    if (!std::strcmp(isa->name, name)) return runs(isa) ? isa : nullptr;
  }
  return nullptr;
}

const Isa& isa() {
  auto* now = chosen.load(std::memory_order_acquire);
  if (!now) chosen.store(now = best(), std::memory_order_release);
  return *now;
}

void set_isa(const Isa* isa) { chosen.store(isa, std::memory_order_release); }

}  // namespace flash
