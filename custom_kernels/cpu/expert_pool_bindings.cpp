// The expert pool as Python sees it, as a node of MLX's graph, and its errors as exceptions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <variant>

#include "bindings.h"
#include "expert_pool.h"
#include "primitive.h"

namespace flash {

namespace {

// file, offset, bytes; and of strided spans piece and stride
using Together = std::tuple<int, int64_t, int64_t>;
using Strided = std::tuple<int, int64_t, int64_t, int64_t, int64_t>;
using Spans = std::map<std::string, std::vector<std::variant<Together, Strided>>>;
using Slots = std::map<std::string, mx::array>;

std::shared_ptr<Files> open_files(const nb::iterable& paths, int threads, bool direct) {
  std::vector<std::string> names;
  for (nb::handle path : paths) {
    PyObject* encoded = nullptr;  // as the operating system spells it, which need not be UTF-8
    if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw nb::python_error();
    auto bytes = nb::steal<nb::bytes>(encoded);
    names.emplace_back(bytes.c_str(), bytes.size());
  }
  nb::gil_scoped_release nogil;
  return std::make_shared<Files>(names, threads, direct);
}

// (file, offset, where to): as many bytes as the buffer has.
using Jobs = std::vector<
    std::tuple<int, int64_t, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>>;

// As Reader.read_into of streaming/reader.py. Its callers keep the buffers alive meanwhile.
void read_into(const std::shared_ptr<Files>& files, const Jobs& jobs) {
  std::vector<Read> reads;
  for (auto& [file, offset, buffer] : jobs) {
    if (file < 0 || file >= files->count()) throw std::out_of_range("No file of that number.");
    reads.push_back({{file, offset, static_cast<int64_t>(buffer.size())}, buffer.data(), 0});
  }
  nb::gil_scoped_release nogil;
  Files::Batch batch(*files);
  batch.submit(reads);
  batch.arrived(true);
}

// The pool keeps its slots' memory alive, whoever keeps the pool.
std::shared_ptr<ExpertPool> make_pool(std::shared_ptr<Files> files, const Spans& spans, Slots slots,
                                      const std::string& policy, const std::vector<int>& pinned) {
  std::vector<Parameter> parameters;
  int num_slots = 0;
  for (auto& [name, array] : slots) {
    auto found = spans.find(name);
    if (found == spans.end() || spans.size() != slots.size()) {
      throw std::invalid_argument(name + ": every parameter needs both spans and slots.");
    }
    array.eval();
    if (array.ndim() < 1 || !array.flags().row_contiguous || array.nbytes() == 0) {
      throw std::invalid_argument(name + ": slots are a row contiguous array [slots, ...].");
    }
    if (!parameters.empty() && array.shape(0) != num_slots) {
      throw std::invalid_argument(name + ": " + std::to_string(array.shape(0)) + " slots, where " +
                                  "others have " + std::to_string(num_slots) + ".");
    }
    num_slots = array.shape(0);
    Parameter parameter{
        {}, array.data<uint8_t>(), static_cast<int64_t>(array.nbytes()) / num_slots};
    for (auto& span : found->second) {
      auto make = [](auto... fields) { return FileSpan{fields...}; };
      parameter.experts.push_back(
          std::visit([&](auto& fields) { return std::apply(make, fields); }, span));
    }
    parameters.push_back(std::move(parameter));
  }
  auto* pool = new ExpertPool(std::move(files), std::move(parameters), num_slots, policy, pinned);
  return {pool, [slots = std::move(slots)](ExpertPool* pool) { delete pool; }};
}

// A Fetch for Python: it holds the layer until it is closed or collected.
class OpenFetch {
 public:
  OpenFetch(std::shared_ptr<ExpertPool> pool, const std::vector<int32_t>& experts)
      : pool_(std::move(pool)),
        fetch_(std::make_unique<ExpertPool::Fetch>(*pool_, experts.data(),
                                                   static_cast<int>(experts.size()))) {}
  std::vector<std::pair<int, int>> take(bool wait) {
    std::vector<std::pair<int, int>> taken;
    for (auto [which, slot] : open().take(wait)) taken.emplace_back(which, slot);
    return taken;
  }
  void release(int which) { open().release(which); }
  void close() { fetch_.reset(); }

 private:
  ExpertPool::Fetch& open() {
    if (!fetch_) throw std::invalid_argument("This fetch is closed.");
    return *fetch_;
  }

  std::shared_ptr<ExpertPool> pool_;
  std::unique_ptr<ExpertPool::Fetch> fetch_;
};

// Router indices to slot ids, when the CPU stream gets there. `after` only has to come first.
mx::array place_in_graph(std::shared_ptr<ExpertPool> pool, mx::array indices,
                         std::optional<mx::array> after) {
  if (indices.dtype() != mx::int32 && indices.dtype() != mx::uint32) {
    indices = mx::astype(indices, mx::int32, mx::default_stream(mx::Device::cpu));
  }
  auto place = [pool = std::move(pool)](const Arrays& inputs, Arrays& outputs) {
    const auto* routed = inputs[0].data<int32_t>();
    size_t count = inputs[0].size();
    auto* out = outputs[0].data<uint32_t>();
    // If this fails, what follows in the graph runs all the same, on slots that must exist.
    std::fill_n(out, count, 0);
    std::vector<int32_t> experts(routed, routed + count);
    std::sort(experts.begin(), experts.end());
    experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
    std::vector<int> slots = pool->place(experts);
    for (size_t i = 0; i < count; i++) {
      out[i] = slots[std::lower_bound(experts.begin(), experts.end(), routed[i]) - experts.begin()];
    }
  };
  auto shape = indices.shape();
  Arrays inputs{std::move(indices)};
  if (after) inputs.push_back(std::move(*after));
  return on_cpu("place", std::move(place), std::move(inputs), {{shape, mx::uint32}}, {1})[0];
}

// Huge pages: a disk fills one in one piece where it would need 512 (on a virtual disk that is
// twice the speed), and a kernel that streams weights misses the TLB less often.
void prefer_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  // Whole pages around the range, so that neighbours in memory can share a huge one.
  constexpr uintptr_t page = 4096;
  auto first = reinterpret_cast<uintptr_t>(begin) / page * page;
  auto last = (reinterpret_cast<uintptr_t>(begin) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish
#endif
}

// Memory that begins `phase` bytes after a multiple of `alignment`, which kernels and disks do not
// mind: a direct read goes straight into place where memory and file lie equally in their pages.
mx::array empty_slots(const std::vector<int>& shape, mx::Dtype dtype, size_t alignment,
                      size_t phase) {
  size_t item = size_of(dtype), size = 1;
  for (int n : shape) {
    if (n < 0) throw std::invalid_argument("A shape has no negative sizes.");
    size *= n;
  }
  if (!std::has_single_bit(alignment) || alignment % item || phase >= alignment) {
    throw std::invalid_argument(
        "The alignment is a power of two, at least the item's size, and more than the phase.");
  }
  mx::array array(mx::Shape(shape.begin(), shape.end()), dtype, nullptr, {});
  // Not of two parts: an offset within one allocation, which MLX frees as a whole.
  auto data = mx::allocator::malloc(size * item + 2 * alignment);
  auto base = reinterpret_cast<uintptr_t>(data.buffer().raw_ptr());
  int64_t offset = (-base & (alignment - 1)) + phase;
  prefer_huge_pages(reinterpret_cast<void*>(base + offset), size * item);
  auto strides = array.strides();
  auto flags = array.flags();
  array.set_data(std::move(data), size, std::move(strides), flags, offset);
  array.set_status(mx::array::Status::available);
  return array;
}

// MLX rethrows what a primitive throws as text. Ours says what it was.
void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::runtime_error& caught) {
    auto error = ReadError::find(caught.what());
    if (!error) throw;
    try {
      auto path =
          nb::steal(PyUnicode_DecodeFSDefaultAndSize(error->path.data(), error->path.size()));
      auto text = nb::steal(PyUnicode_DecodeLocale(error->text.c_str(), "surrogateescape"));
      nb::object type = nb::module_::import_("mlx_flash.errors").attr("ReadError");
      nb::object named = nb::module_::import_("pathlib").attr("Path")(path);
      PyErr_SetObject(type.ptr(), type(error->error, text, named).ptr());
    } catch (nb::python_error& failure) {
      failure.restore();
    }
  }
}

}  // namespace

void bind_expert_pool(nb::module_& m) {
  using namespace nb::literals;
  using NoGil = nb::call_guard<nb::gil_scoped_release>;
  nb::register_exception_translator(translate);

  nb::class_<Files>(m, "Files")
      .def(nb::new_(&open_files), "paths"_a, "threads"_a, "direct"_a)
      .def_prop_ro("direct", &Files::direct)
      .def_prop_ro("bytes_read", &Files::bytes_read)
      .def_prop_ro("read_s", &Files::read_seconds)
      .def("read_into", &read_into, "jobs"_a)
      .def("close", &Files::close, NoGil());

  nb::class_<OpenFetch>(m, "Fetch")
      .def(nb::init<std::shared_ptr<ExpertPool>, const std::vector<int32_t>&>(), "pool"_a,
           "experts"_a, NoGil())
      .def("take", &OpenFetch::take, "wait"_a, NoGil())
      .def("release", &OpenFetch::release, "which"_a, NoGil())
      .def("close", &OpenFetch::close, NoGil());

  nb::class_<ExpertPool>(m, "ExpertPool")
      .def(nb::new_(&make_pool), "files"_a, "spans"_a, "slots"_a, "policy"_a,
           "pinned"_a = std::vector<int>())
      .def_prop_ro("num_slots", &ExpertPool::num_slots)
      .def("stats",
           [](const ExpertPool& pool) {
             auto stats = pool.stats();
             return std::tuple(stats.hits, stats.misses, stats.evictions);
           })
      .def("resident", &ExpertPool::resident)
      .def("record", &ExpertPool::record)
      .def("trace", &ExpertPool::trace)
      .def_prop_ro("read_ahead", [](const ExpertPool& pool) { return pool.stats().ahead; })
      .def("look_ahead", &ExpertPool::look_ahead, "guess"_a, NoGil())
      .def("place", &ExpertPool::place, "experts"_a, NoGil())
      .def("place_in_graph", &place_in_graph, "indices"_a, "after"_a = nb::none());

  m.def("empty_slots", &empty_slots, "shape"_a, "dtype"_a, "alignment"_a = 4096, "phase"_a = 0);
}

}  // namespace flash
