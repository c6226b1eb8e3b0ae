#include "bindings.h"

#include <nanobind/stl/string.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "mlx/version.h"
#include "pool.h"

#define FLASH_TEXT_(x) #x
#define FLASH_TEXT(x) FLASH_TEXT_(x)

namespace flash {
namespace {

// Bytes per second that `threads` threads read from a buffer of `bytes` for about `seconds`.
double memory_read_bandwidth(int64_t bytes, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  if (bytes < 1 || threads < 1) throw std::invalid_argument("Ask for one byte or more.");
  std::vector<uint8_t> buffer(bytes, 1);
  constexpr int64_t kPiece = 1 << 20;
  auto& pool = Pool::shared();
  int before = pool.threads();
  pool.set_threads(threads);
  std::atomic<uint64_t> sink{0};
  auto pass = [&](Team& team) {
    team.each(bytes, kPiece, [&](int64_t begin, int64_t end) {
      sink += isa().read_all(buffer.data() + begin, end - begin);
    });
  };
  pool.run(pass);  // wakes the threads
  double best = 0;
  auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    auto start = Clock::now();
    pool.run(pass);
    std::chrono::duration<double> took = Clock::now() - start;
    best = std::max(best, bytes / took.count());
  } while (Clock::now() < end);
  pool.set_threads(before);
  return best;
}

}  // namespace
}  // namespace flash

NB_MODULE(_native, m) {
  using namespace flash;
  using namespace nb::literals;
  m.attr("mlx_version") = FLASH_TEXT(MLX_VERSION_MAJOR) "." FLASH_TEXT(
      MLX_VERSION_MINOR) "." FLASH_TEXT(MLX_VERSION_PATCH);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("set_isa", [](const std::string& name) {
    auto* found = find_isa(name.c_str());
    if (!found) throw std::invalid_argument("This processor has no " + name + ".");
    set_isa(found);
  });
  m.def("threads", [] { return Pool::shared().threads(); });
  m.def("set_threads", [](int n) { Pool::shared().set_threads(n); });
  m.def("memory_read_bandwidth", &memory_read_bandwidth, "nbytes"_a, "threads"_a, "seconds"_a,
        nb::call_guard<nb::gil_scoped_release>());
  bind_linear(m);
  bind_mixers(m);
  bind_expert_pool(m);
  bind_experts(m);
  bind_blocks(m);
}
