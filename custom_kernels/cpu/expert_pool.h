// One layer's experts: some in RAM slots, all on disk. The C++ twin of streaming/store.py: no GIL,
// no MLX, reads in flight while the caller computes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "shared.h"

namespace flash {

struct PoolStats {
  // An expert that was read ahead for the call that wanted it is a miss of that call.
  int64_t hits = 0, misses = 0, evictions = 0;
  int64_t ahead = 0;  // experts whose reading began before they were asked for
};

// One parameter of a layer's experts: where each lies on disk, where slot 0 lies in RAM.
struct Parameter {
  std::vector<FileSpan> experts;
  uint8_t* slots;  // slot s at slots + s * slot_bytes
  int64_t slot_bytes;
};

class ExpertPool : public Shared<ExpertPool> {
 public:
  // policy: "lru", "lfu", "s3fifo". pinned: experts that never lose their slot once resident.
  // Throws std::invalid_argument if these do not fit one another.
  ExpertPool(std::shared_ptr<Files> files, std::vector<Parameter> parameters, int num_slots,
             const std::string& policy, const std::vector<int>& pinned = {});
  ~ExpertPool();

  int num_slots() const;
  int num_experts() const;
  PoolStats stats() const;
  std::vector<int> resident() const;  // sorted

  // From now on, keeps the experts of every call.
  void record();
  std::vector<std::vector<int32_t>> trace() const;

  // Makes these distinct experts resident and returns their slots, which hold until the next call.
  // Throws std::invalid_argument if there are more of them than slots, or one occurs twice.
  std::vector<int> place(const std::vector<int32_t>& experts);

  // A guess at the experts of the next call, the likeliest first: reads of missing ones may begin.
  // Each rank of a guess is held to what came true of it before: a rank that is wrong too often is
  // not read. Never waits, reads nothing while a call holds the layer, and what cannot be read is
  // the next call's to find out. Throws if an expert does not exist or is named twice.
  void look_ahead(const std::vector<int32_t>& guess);

  // The experts of one call, distinct, in the order of their worth: the last is the one to keep.
  // Holds the layer until destroyed, so a thread must not make a second one; the destructor waits
  // for reads in flight, so no byte of this call is written after it. For one thread at a time.
  class Fetch {
   public:
    // Reads begin here for what is missing, as many as there are slots for.
    Fetch(ExpertPool& pool, const int32_t* experts, int count);
    ~Fetch();
    Fetch(const Fetch&) = delete;
    Fetch& operator=(const Fetch&) = delete;

    struct Ready {
      int which;  // index into `experts`
      int slot;
    };
    // Experts whose bytes are in their slots and that were not given before: hits first. With
    // `wait`, blocks until there is one. Empty when all have been given (or, without `wait`, when
    // none is ready yet). Throws ReadError if bytes did not come: the missing experts of this call
    // stay on disk, no slot is bound to partial bytes, and the pool goes on working.
    // Throws std::logic_error if it would wait for a slot that nobody is going to release.
    std::vector<Ready> take(bool wait);

    // The caller has computed with this expert, which it was given: its slot may go to one still
    // missing. The least worthy go first; those worth keeping only to have enough reads in flight.
    void release(int which);

   private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash
