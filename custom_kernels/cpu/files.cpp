#include "files.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>

namespace flash {

namespace {

constexpr std::string_view kPrefix = "mlx-flash read error ";

// One request. Larger ones read little faster, and what follows them arrives later.
constexpr int64_t kRunBytes = 2 << 20;
constexpr size_t kRunPieces = 512;
constexpr size_t kMaxBuffers = 1024;       // of one system call, by the usual IOV_MAX
constexpr int64_t kBounceBytes = 1 << 20;  // per thread
constexpr int64_t kHotBytes = 256 << 10;   // of those, what a core's cache keeps until it is copied
constexpr int64_t kLongPiece = 512;  // shorter ones are copied twice faster than told to the system
constexpr int64_t kCombPiece = 64 << 10;  // longer pieces of a strided span are reads of their own,
constexpr int64_t kCombGap = 64 << 10;    // and so are those that lie further apart
constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;

using Clock = std::chrono::steady_clock;

std::string error_text(int error) { return std::generic_category().message(error); }

struct Stamp {
  int64_t bytes;
  int64_t modified_ns;
  bool operator==(const Stamp&) const = default;
};

Stamp stamp(int fd) {
  struct stat status;
  if (fstat(fd, &status) != 0) return {-1, -1};
#ifdef __APPLE__
  auto& time = status.st_mtimespec;
#else
  auto& time = status.st_mtim;
#endif
  return {status.st_size, time.tv_sec * 1'000'000'000LL + time.tv_nsec};
}

struct File {
  std::string path;
  int fd = -1;
  int direct_fd = -1;
  int64_t offset_align = kPage;
  int64_t memory_align = kPage;
  Stamp opened{};
  std::atomic<bool> direct = false;
};

void open_direct(File& file) {
#ifdef __APPLE__
  file.direct_fd = open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
  file.direct = file.direct_fd >= 0 && fcntl(file.direct_fd, F_NOCACHE, 1) == 0;
#elif defined(O_DIRECT)
  // Not by its path: that may name another file by now.
  std::string same = "/proc/self/fd/" + std::to_string(file.fd);
  file.direct_fd = open(same.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  file.direct = file.direct_fd >= 0;
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (file.direct && statx(file.direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN)) {
    file.direct = status.stx_dio_offset_align != 0;
    file.offset_align = std::max<int64_t>(status.stx_dio_offset_align, 1);
    file.memory_align = std::max<int64_t>(status.stx_dio_mem_align, 1);
  }
#endif
#endif
}

// One request: spans that follow one another in a file or, if `strided`, that interleave.
struct Run {
  Files::Batch* batch;
  int file;
  int64_t offset;
  bool strided;
  int64_t bytes = 0;
  std::vector<Read> reads;
  bool urgent = true;

  int64_t end() const { return offset + bytes; }
  void add(const Read& read) {
    reads.push_back(read);
    bytes = std::max(bytes, read.from.offset + read.from.extent() - offset);
  }
};

ReadError ends_early(const File& file, int64_t at, const Run& run) {
  return {ENODATA, file.path,
          "ends at byte " + std::to_string(at) + ", " + std::to_string(run.end() - at) +
              " bytes short; download it again"};
}

ReadError failed(const File& file, int error, int64_t at) {
  return {error, file.path,
          error_text(error) + " at byte " + std::to_string(at) + "; check the disk"};
}

ReadError closed(const File& file) {
  return {EBADF, file.path, "was closed with its model; load the model again"};
}

// `preadv` that an interrupting signal does not end.
ssize_t read_some(int fd, const iovec* to, size_t count, int64_t offset) {
  ssize_t n;
  do {
    n = preadv(fd, to, static_cast<int>(std::min(count, kMaxBuffers)), offset);
  } while (n < 0 && errno == EINTR);
  return n;
}

// What is left to fill once the first `done` bytes are in.
void skip(std::vector<iovec>& to, size_t& first, int64_t done) {
  for (; done > 0; first++) {
    auto& [base, bytes] = to[first];
    if (done < static_cast<int64_t>(bytes)) {
      base = static_cast<uint8_t*>(base) + done;
      bytes -= done;
      return;
    }
    done -= bytes;
  }
}

// All of a run's bytes, in the order of the file.
void read_cached(const File& file, const Run& run, std::vector<iovec> to) {
  int64_t at = run.offset;
  for (size_t first = 0; at < run.end();) {
    ssize_t n = read_some(file.fd, &to[first], to.size() - first, at);
    if (n < 0) throw failed(file, errno, at);
    if (n == 0) throw ends_early(file, at, run);
    at += n;
    skip(to, first, n);
  }
}

std::vector<iovec> buffers(const Run& run) {
  std::vector<iovec> to;
  for (auto& read : run.reads) to.push_back({read.to, static_cast<size_t>(read.from.bytes)});
  return to;
}

// The pieces of a strided run in the order of the file, and `gap` for what lies between them.
// None if two want the same byte, or if copying twice is faster than so many buffers.
std::vector<iovec> pieces(const Run& run, uint8_t* gap) {
  struct Head {
    int64_t at, left;
    uint8_t* to;
    const FileSpan* from;
  };
  std::vector<Head> heads;
  for (auto& [from, to, tag] : run.reads) {
    if (from.piece < kLongPiece) return {};
    heads.push_back({from.offset, from.bytes, to, &from});
  }
  std::vector<iovec> all;
  for (int64_t at = run.offset; at < run.end();) {
    auto next = std::min_element(heads.begin(), heads.end(),
                                 [](const Head& a, const Head& b) { return a.at < b.at; });
    int64_t piece = next->from->piece;
    if (next->at < at) return {};
    if (next->at > at) all.push_back({gap, static_cast<size_t>(next->at - at)});
    all.push_back({next->to, static_cast<size_t>(piece)});
    at = next->at + piece;
    next->to += piece;
    next->left -= piece;
    next->at = next->left ? next->at + next->from->stride : std::numeric_limits<int64_t>::max();
  }
  return all;
}

// Whether every span lies in its pages of memory as it does in those of the file.
bool is_congruent(const Run& run) {
  for (auto& [from, to, tag] : run.reads) {
    if ((reinterpret_cast<uintptr_t>(to) - from.offset) % kPage) return false;
  }
  return true;
}

// Whole pages of a file: those that lie within a span go where they belong, others to `bounce`.
class Pages {
 public:
  Pages(const Run& run, uint8_t* bounce) : first_(run.offset / kPage * kPage), bounce_(bounce) {
    for (auto& [from, to, tag] : run.reads) {
      int64_t start = from.offset, end = start + from.bytes, page = start / kPage * kPage;
      while (page < end) {
        if (page < start || page + kPage > end) {
          share(page, start, end, to);
          page += kPage;
        } else {
          int64_t bytes = (end - page) / kPage * kPage;
          to_.push_back({to + (page - start), static_cast<size_t>(bytes)});
          page += bytes;
        }
      }
    }
  }

  int64_t first() const { return first_; }
  bool fits() const { return to_.size() <= kMaxBuffers && used_ <= kBounceBytes; }

  const std::vector<iovec>& to() const { return to_; }

  void copy_shared() const {
    for (auto& part : parts_) std::memcpy(part.to, part.from, part.bytes);
  }

 private:
  struct Part {
    const uint8_t* from;
    uint8_t* to;
    size_t bytes;
  };

  void share(int64_t page, int64_t start, int64_t end, uint8_t* to) {
    if (page != last_) {
      last_ = page;
      if (used_ < kBounceBytes) to_.push_back({bounce_ + used_, kPage});
      used_ += kPage;
    }
    int64_t begin = std::max(page, start), stop = std::min(page + kPage, end);
    const uint8_t* from = bounce_ + used_ - kPage;
    parts_.push_back(
        {from + (begin - page), to + (begin - start), static_cast<size_t>(stop - begin)});
  }

  int64_t first_;
  uint8_t* bounce_;
  int64_t used_ = 0;
  int64_t last_ = -1;
  std::vector<iovec> to_;
  std::vector<Part> parts_;
};

// Straight into place. False if the file system refuses.
bool read_in_place(const File& file, const Run& run, const Pages& pages) {
  int64_t wanted = run.end() - pages.first();
  std::vector<iovec> to = pages.to();
  size_t first = 0;
  for (int64_t done = 0; done < wanted;) {
    int64_t at = pages.first() + done;
    ssize_t n = read_some(file.direct_fd, &to[first], to.size() - first, at);
    if (n < 0 && errno == EINVAL) return false;
    if (n < 0) throw failed(file, errno, std::max(at, run.offset));
    done += n;
    // A direct read ends within a block only where the file does.
    if (done < wanted && (n == 0 || n % file.offset_align)) {
      throw ends_early(file, std::max(at + n, run.offset), run);
    }
    skip(to, first, n);
  }
  pages.copy_shared();
  return true;
}

// Copies what a run wants of the bytes [at, at + n) of its file.
void scatter(const Run& run, const uint8_t* from, int64_t at, int64_t n) {
  for (auto& [span, to, tag] : run.reads) {
    int64_t piece = span.is_strided() ? span.piece : span.bytes;
    int64_t stride = span.is_strided() ? span.stride : span.bytes;
    int64_t first = std::max<int64_t>(0, (at - span.offset) / stride);
    uint8_t* next = to + first * piece;
    int64_t start = span.offset + first * stride;
    for (; start < at + n && next < to + span.bytes; start += stride, next += piece) {
      int64_t begin = std::max(start, at), end = std::min(start + piece, at + n);
      if (begin < end) std::memcpy(next + (begin - start), from + (begin - at), end - begin);
    }
  }
}

// Into `bounce`, and from there into place.
void read_scattered(const File& file, const Run& run, uint8_t* bounce) {
  for (int64_t at = run.offset; at < run.end();) {
    iovec to{bounce, static_cast<size_t>(std::min(run.end() - at, kHotBytes))};
    ssize_t n = read_some(file.fd, &to, 1, at);
    if (n < 0) throw failed(file, errno, at);
    if (n == 0) throw ends_early(file, at, run);
    scatter(run, bounce, at, n);
    at += n;
  }
}

// Whole blocks into `bounce`, and from there into place. False if the file system refuses.
bool read_bounced(const File& file, const Run& run, uint8_t* bounce) {
  int64_t block = std::max(kPage, file.offset_align);
  int64_t end = (run.end() + block - 1) / block * block;
  for (int64_t at = run.offset / block * block; at < run.end();) {
    iovec to{bounce, static_cast<size_t>(std::min(end - at, kBounceBytes))};
    ssize_t n = read_some(file.direct_fd, &to, 1, at);
    if (n < 0 && errno == EINVAL) return false;
    if (n < 0) throw failed(file, errno, std::max(at, run.offset));
    scatter(run, bounce, at, n);
    int64_t whole = n / block * block;
    if (whole == 0 && at + n < run.end()) {
      throw ends_early(file, std::max(at + n, run.offset), run);
    }
    at += whole ? whole : n;
  }
  return true;
}

// A span in lengths that one request can hold, each of whole pieces if it is strided.
void cut(Read read, std::vector<Read>& to) {
  FileSpan& from = read.from;
  int64_t most = kRunBytes, step = kRunBytes;  // in memory and in the file
  if (from.is_strided()) {
    bool apart = from.piece > kCombPiece || from.stride - from.piece > kCombGap;
    int64_t count = apart ? 1 : std::max<int64_t>(1, kRunBytes / from.stride);
    most = count * from.piece;
    step = count * from.stride;
  } else {
    from.piece = from.stride = 0;
  }
  for (int64_t left = from.bytes; left > 0; left -= most, read.to += most, from.offset += step) {
    from.bytes = std::min(left, most);
    if (from.is_strided() || from.bytes <= kRunBytes) {
      to.push_back(read);
    } else {
      cut(read, to);  // a piece of its own
    }
  }
}

// Requests for these reads, adjacent or interleaved ones merged, in the order of their lowest tag,
// large first.
std::vector<Run> merge(Files::Batch* batch, const std::vector<Read>& reads) {
  std::vector<Read> sorted;
  for (auto& read : reads) cut(read, sorted);
  auto place = [](const Read& read) {
    return std::tuple(read.from.file, read.from.is_strided(), read.from.offset);
  };
  std::sort(sorted.begin(), sorted.end(),
            [&](const Read& a, const Read& b) { return place(a) < place(b); });
  std::vector<Run> runs;
  for (auto& read : sorted) {
    auto& from = read.from;
    auto fits = [&](const Run& run) {
      if (run.file != from.file || run.strided != from.is_strided()) return false;
      if (run.reads.size() >= kRunPieces) return false;
      if (from.offset + from.extent() - run.offset > kRunBytes) return false;
      return run.strided ? from.offset < run.end() : from.offset == run.end();
    };
    if (runs.empty() || !fits(runs.back())) {
      runs.push_back({batch, from.file, from.offset, from.is_strided(), 0, {}, true});
    }
    runs.back().add(read);
  }
  auto urgency = [](const Run& run) {
    int tag = run.reads[0].tag;
    for (auto& read : run.reads) tag = std::min(tag, read.tag);
    return std::pair(tag, -run.bytes);
  };
  std::stable_sort(runs.begin(), runs.end(),
                   [&](const Run& a, const Run& b) { return urgency(a) < urgency(b); });
  return runs;
}

// Memory of whole pages, huge ones where the system has them: a disk fills those in far fewer
// pieces. Touched, and so paid for, by the first read only.
class Bounces {
 public:
  explicit Bounces(int threads) {
    bytes_ = (threads * kBounceBytes + 2 * kHugePage - 1) / kHugePage * kHugePage;
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(base_, bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Bounces() { munmap(base_, bytes_); }
  Bounces(const Bounces&) = delete;
  Bounces& operator=(const Bounces&) = delete;

  uint8_t* of(int thread) const {
    auto aligned = (reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage;
    return reinterpret_cast<uint8_t*>(aligned) + thread * kBounceBytes;
  }

 private:
  void* base_;
  size_t bytes_;
};

// A signal is for the threads that expect one: none of ours.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

bool FileSpan::is_valid() const {
  if (offset < 0 || bytes < 0 || piece < 0 || stride < 0) return false;
  if (piece == 0 ? stride != 0 : bytes % piece != 0 || stride < piece) return false;
  int64_t gaps, end;
  int64_t after_first = piece && bytes ? bytes / piece - 1 : 0;
  return !__builtin_mul_overflow(after_first, stride, &gaps) &&
         !__builtin_add_overflow(gaps, piece ? piece : bytes, &gaps) &&
         !__builtin_add_overflow(gaps, offset, &end);
}

int64_t FileSpan::extent() const {
  return is_strided() && bytes ? (bytes / piece - 1) * stride + piece : bytes;
}

ReadError::ReadError(int error, const std::string& path, const std::string& text)
    : std::runtime_error(std::string(kPrefix) + std::to_string(error) + " " +
                         std::to_string(path.size()) + " " + path + ": " + text),
      error(error),
      path(path),
      text(text) {}

std::optional<ReadError> ReadError::find(const std::string& what) {
  size_t at = what.find(kPrefix);
  if (at == std::string::npos) return {};
  const char* end = what.data() + what.size();
  int error = 0;
  size_t length = 0;
  auto first = std::from_chars(what.data() + at + kPrefix.size(), end, error);
  if (first.ec != std::errc() || first.ptr == end) return {};
  auto second = std::from_chars(first.ptr + 1, end, length);
  if (second.ec != std::errc() || static_cast<size_t>(end - second.ptr) < length + 3) return {};
  const char* path = second.ptr + 1;
  return ReadError(error, std::string(path, length), std::string(path + length + 2, end));
}

struct Files::Impl {
  Impl(int count, int threads) : files(count), bounces(threads) {}

  void work(int thread);
  void read(const Run& run, uint8_t* bounce);
  void check_unchanged(const Run& run);
  void fail(Batch& batch, const ReadError& error);

  std::vector<File> files;
  Bounces bounces;
  std::vector<std::thread> threads;
  std::once_flag joined;

  mutable std::mutex mutex;  // guards what follows, and all batches
  std::condition_variable wake;
  std::deque<Run> queue;
  bool closing = false;
  int reading = 0;
  Clock::time_point busy_since;
  Clock::duration busy{};
  int64_t bytes_read = 0;
};

struct Files::Batch::Impl {
  explicit Impl(Files::Impl& files) : files(files) {}

  void finish(const Run& run);
  bool idle() const { return reading == 0 && queued == 0; }

  Files::Impl& files;
  std::condition_variable changed;
  std::vector<int> missing;  // reads by tag
  std::vector<int> arrived;
  std::vector<int64_t> ends;  // by file, the furthest byte that was asked for
  std::optional<ReadError> error;
  int queued = 0;
  int reading = 0;
};

Files::Files(const std::vector<std::string>& paths, int threads, bool direct) {
  threads = std::max(threads, 1);
  impl_ = std::make_unique<Impl>(static_cast<int>(paths.size()), threads);
  try {
    for (size_t i = 0; i < paths.size(); i++) {
      File& file = impl_->files[i];
      file.path = paths[i];
      file.fd = open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
      if (file.fd < 0) {
        int error = errno;
        throw ReadError(error, file.path, "cannot be opened: " + error_text(error));
      }
      file.opened = stamp(file.fd);
      if (direct) open_direct(file);
    }
    SignalsBlocked in_threads_made_here;
    for (int i = 0; i < threads; i++) {
      impl_->threads.emplace_back([impl = impl_.get(), i] { impl->work(i); });
    }
  } catch (...) {
    close();
    throw;
  }
}

Files::~Files() { close(); }

int Files::count() const { return static_cast<int>(impl_->files.size()); }

bool Files::direct() const {
  return std::all_of(impl_->files.begin(), impl_->files.end(),
                     [](const File& file) { return file.direct.load(); });
}

int64_t Files::bytes_read() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->bytes_read;
}

double Files::read_seconds() const {
  std::lock_guard lock(impl_->mutex);
  auto now = impl_->reading ? Clock::now() - impl_->busy_since : Clock::duration{};
  return std::chrono::duration<double>(impl_->busy + now).count();
}

void Files::close() {
  {
    std::lock_guard lock(impl_->mutex);
    impl_->closing = true;
    while (!impl_->queue.empty()) {
      Run& run = impl_->queue.front();
      impl_->fail(*run.batch, closed(impl_->files[run.file]));
    }
  }
  impl_->wake.notify_all();
  std::call_once(impl_->joined, [this] {
    for (auto& thread : impl_->threads) thread.join();
    for (auto& file : impl_->files) {
      if (file.fd >= 0) ::close(file.fd);
      if (file.direct_fd >= 0) ::close(file.direct_fd);
    }
  });
}

void Files::Impl::work(int thread) {
  uint8_t* bounce = bounces.of(thread);
  std::unique_lock lock(mutex);
  for (;;) {
    wake.wait(lock, [this] { return closing || !queue.empty(); });
    if (queue.empty()) return;
    Run run = std::move(queue.front());
    queue.pop_front();
    auto& batch = *run.batch->impl_;
    batch.queued--;
    batch.reading++;
    if (reading++ == 0) busy_since = Clock::now();
    lock.unlock();
    std::optional<ReadError> error;
    try {
      read(run, bounce);
      check_unchanged(run);
    } catch (const ReadError& caught) {
      error = caught;
    } catch (const std::bad_alloc&) {
      error = failed(files[run.file], ENOMEM, run.offset);
    }
    lock.lock();
    if (--reading == 0) busy += Clock::now() - busy_since;
    batch.reading--;
    if (error) {
      fail(*run.batch, *error);
    } else {
      bytes_read += run.bytes;
      batch.finish(run);
    }
    if (!batch.arrived.empty() || batch.idle()) batch.changed.notify_all();
  }
}

void Files::Impl::read(const Run& run, uint8_t* bounce) {
  File& file = files[run.file];
  if (file.direct) {
    bool in_place = false;
    bool by_pages = kPage % file.offset_align == 0 && kPage % file.memory_align == 0;
    if (by_pages && !run.strided && is_congruent(run)) {
      Pages pages(run, bounce);
      in_place = pages.fits();
      if (in_place && read_in_place(file, run, pages)) return;
    }
    if (!in_place && read_bounced(file, run, bounce)) return;
    file.direct = false;
  }
  std::vector<iovec> to = run.strided ? pieces(run, bounce) : buffers(run);
  if (to.empty()) return read_scattered(file, run, bounce);
  read_cached(file, run, std::move(to));
}

void Files::Impl::check_unchanged(const Run& run) {
  File& file = files[run.file];
  Stamp now = stamp(file.fd);
  if (now == file.opened) return;
  // Several reads may notice a file that was cut short. They should all say that.
  std::lock_guard lock(mutex);
  int64_t end = run.batch->impl_->ends[run.file];
  if (now.bytes >= 0 && now.bytes < end) {
    Run wanted{run.batch, run.file, now.bytes, false, end - now.bytes, {}, true};
    throw ends_early(file, now.bytes, wanted);
  }
  throw ReadError(ESTALE, file.path, "changed on disk since it was loaded; load the model again");
}

// Keeps the first error, and drops what the batch has not begun.
void Files::Impl::fail(Batch& batch, const ReadError& error) {
  auto& failed = *batch.impl_;
  if (!failed.error) failed.error = error;
  std::erase_if(queue, [&](const Run& run) { return run.batch == &batch; });
  failed.queued = 0;
  failed.changed.notify_all();
}

Files::Batch::Batch(Files& files) : impl_(std::make_unique<Impl>(*files.impl_)) {
  impl_->ends.resize(files.impl_->files.size());
}

Files::Batch::~Batch() { stop(); }

void Files::Batch::submit(const std::vector<Read>& reads, bool urgent) {
  std::vector<Run> runs = merge(this, reads);
  auto& files = impl_->files;
  size_t count = runs.size();
  {
    std::lock_guard lock(files.mutex);
    if (impl_->error || reads.empty()) return;
    if (files.closing) {
      impl_->error = closed(files.files[reads[0].from.file]);
      return;
    }
    int tags = 0;
    for (auto& read : reads) tags = std::max(tags, read.tag + 1);
    if (static_cast<int>(impl_->missing.size()) < tags) impl_->missing.resize(tags);
    for (auto& run : runs) {
      for (auto& read : run.reads) impl_->missing[read.tag]++;
      impl_->ends[run.file] = std::max(impl_->ends[run.file], run.end());
    }
    for (size_t i = 0; i < reads.size(); i++) {  // a tag of empty reads is there already
      bool first = i == 0 || reads[i].tag != reads[i - 1].tag;
      if (first && impl_->missing[reads[i].tag] == 0) impl_->arrived.push_back(reads[i].tag);
    }
    impl_->queued += static_cast<int>(count);
    for (auto& run : runs) run.urgent = urgent;
    auto place = files.queue.end();
    if (urgent) {
      place = std::find_if(files.queue.begin(), place, [](const Run& run) { return !run.urgent; });
    }
    files.queue.insert(place, std::make_move_iterator(runs.begin()),
                       std::make_move_iterator(runs.end()));
  }
  for (size_t i = 0; i < std::min(count, files.threads.size()); i++) files.wake.notify_one();
}

void Files::Batch::wait() {
  std::unique_lock lock(impl_->files.mutex);
  impl_->changed.wait(
      lock, [this] { return impl_->idle() || (!impl_->error && !impl_->arrived.empty()); });
}

std::vector<int> Files::Batch::arrived(bool wait) {
  if (wait) this->wait();
  std::unique_lock lock(impl_->files.mutex);
  if (impl_->error) {
    impl_->changed.wait(lock, [this] { return impl_->idle(); });
    throw *impl_->error;
  }
  return std::exchange(impl_->arrived, {});
}

void Files::Batch::stop() noexcept {
  std::unique_lock lock(impl_->files.mutex);
  std::erase_if(impl_->files.queue, [this](const Run& run) { return run.batch == this; });
  impl_->queued = 0;
  impl_->changed.wait(lock, [this] { return impl_->idle(); });
}

void Files::Batch::Impl::finish(const Run& run) {
  for (auto& read : run.reads) {
    if (--missing[read.tag] == 0) arrived.push_back(read.tag);
  }
}

}  // namespace flash
