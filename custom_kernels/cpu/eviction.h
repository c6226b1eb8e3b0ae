// Which expert gives up its slot: the C++ twins of streaming/eviction.py, with the same victims.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace flash {

// Keeps the resident experts of one layer in the order they will be given up.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A token was routed to this resident expert.
  virtual void touch(int expert) = 0;
  // This expert became resident.
  virtual void insert(int expert) = 0;
  // Forgets one resident expert outside `stays` (by expert, nonzero is in) and returns it; -1 if
  // there is none.
  virtual int evict(const std::vector<uint8_t>& stays) = 0;
  // Forgets this resident expert.
  virtual void remove(int expert) = 0;
};

// name: "lru", "lfu" or "s3fifo". Throws std::invalid_argument for others.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, int experts);

}  // namespace flash
