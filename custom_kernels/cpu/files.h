// Bytes from disk into memory that already exists. Sees spans, never experts; no GIL, no MLX.
// The C++ twin of streaming/reader.py: same merging, same errors in the same words.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "shared.h"

namespace flash {

// Bytes that did not come. MLX carries an error from its stream thread to the caller as text only,
// so what() holds all three fields, and `find` gets them back.
class ReadError : public std::runtime_error {
 public:
  ReadError(int error, const std::string& path, const std::string& text);
  static std::optional<ReadError> find(const std::string& what);

  int error;  // errno
  std::string path;
  std::string text;
};

// Bytes of a file that follow one another in memory. On disk they lie together, or in pieces of
// one size, one every `stride` bytes, as where the rows of two matrices take turns.
struct FileSpan {
  int file;  // index into the paths that Files was given
  int64_t offset;
  int64_t bytes;       // that arrive in memory
  int64_t piece = 0;   // bytes that lie together; 0: all of them
  int64_t stride = 0;  // from the start of one piece to that of the next

  bool is_valid() const;  // whole pieces, none over another, all within what 63 bits can address
  bool is_strided() const { return piece != 0 && piece != bytes && piece != stride; }
  int64_t extent() const;  // from the first byte to the last
};

struct Read {
  FileSpan from;
  uint8_t* to;
  int tag;  // whose bytes: an index, counted from 0
};

// The files of a checkpoint, opened once, and the threads that read from them. Files stay open:
// deleting one does no harm, and one that changed since is noticed after every read and refused.
//
// With `direct`, reads bypass the page cache (O_DIRECT, F_NOCACHE): straight into place, but for
// the pages at the ends, where address and file offset lie equally in their pages; elsewhere
// through an aligned buffer of the thread's. Where the file system refuses that, reads go through
// the page cache after all.
//
// Strided spans that interleave are read once, with what lies between their pieces, through the
// buffer too.
class Files : public Shared<Files> {
 public:
  class Batch;

  // Throws ReadError if a file cannot be opened.
  Files(const std::vector<std::string>& paths, int threads, bool direct);
  ~Files();
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

  int count() const;
  bool direct() const;          // every file is read past the page cache, as things stand
  int64_t bytes_read() const;   // from files: of strided spans, what lies between pieces too
  double read_seconds() const;  // wall time with at least one read in flight

  // Waits for reads in flight, fails those that have not begun, gives back threads and files.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The reads of one call, in the order in which they are wanted. For one thread at a time.
class Files::Batch {
 public:
  explicit Batch(Files& files);
  ~Batch();  // stops
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Lower tags are read first. All reads of a tag come in one call. What is `urgent` is read
  // before all that is not.
  void submit(const std::vector<Read>& reads, bool urgent = true);

  // Tags whose bytes are all there and that were not returned before. With `wait`, blocks until
  // there is one, or none is on its way. Throws ReadError if a read failed: by then what had not
  // begun is dropped, and none is in flight.
  std::vector<int> arrived(bool wait);

  // Blocks until `arrived` has something to say, or nothing is on its way.
  void wait();

  // Drops what has not begun and waits for what has: nothing is written after.
  void stop() noexcept;

 private:
  friend class Files;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash
