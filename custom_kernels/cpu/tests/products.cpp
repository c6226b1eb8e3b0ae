// Matrix products of one instruction set's table against sums in double, in every format. Stands
// alone, so that it also runs where only an emulator does. Compile with -DTABLE=kNeon or another.
//
// Weights, scales and biases end where a page that may not be read begins.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../decode.inc"
#include "../isa.h"

namespace flash {
extern const Isa TABLE;
}

namespace {

using namespace flash;

std::mt19937 random_bits(7);

uint32_t below(uint32_t n) { return static_cast<uint32_t>(random_bits()) % n; }

class Fenced {
 public:
  explicit Fenced(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE);
    size_ = (bytes + page - 1) / page * page;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;
    void* at = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (at == MAP_FAILED) std::abort();
    start_ = static_cast<uint8_t*>(at);
    mprotect(start_ + size_, page, PROT_NONE);
    data = start_ + size_ - bytes;
  }
  ~Fenced() { munmap(start_, size_ + sysconf(_SC_PAGESIZE)); }
  Fenced(const Fenced&) = delete;
  uint8_t* data;

 private:
  uint8_t* start_;
  int64_t size_;
};

// A number of about 0.1 in the format of a scale.
void put_scale(const Format& format, uint8_t* to) {
  float value = 0.05f + 0.1f * static_cast<float>(below(1000)) / 1000;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (below(2) && format.scale != Float::f16) bits |= 1u << 31;
  if (format.mode == Mode::nvfp4) {
    *to = static_cast<uint8_t>(below(127));
  } else if (format.mode != Mode::affine) {
    *to = static_cast<uint8_t>(107 + below(12));
  } else if (format.scale == Float::f32) {
    std::memcpy(to, &bits, 4);
  } else {
    uint16_t half = static_cast<uint16_t>(
        format.scale == Float::bf16 ? bits >> 16 : ((bits >> 13) - (112 << 10)) & 0x7fff);
    std::memcpy(to, &half, 2);
  }
}

struct Case {
  Format format;
  int64_t out, in;
  Matrix w;
  Fenced weight, scales, biases;

  Case(const Format& f, int64_t out, int64_t in)
      : format(f),
        out(out),
        in(in),
        w(shape(f, out, in)),
        weight(out * w.row_bytes()),
        scales(out * w.group_row_bytes()),
        biases(out * w.group_row_bytes()) {
    w.weight = weight.data;
    w.scales = scales.data;
    w.biases = f.has_bias() ? biases.data : nullptr;
    for (int64_t i = 0; i < out * w.row_bytes(); i++) {
      uint8_t byte = static_cast<uint8_t>(below(256));
      bool nan = f.mode == Mode::mxfp8 && byte % 128 == 127;
      weight.data[i] = nan ? 0 : byte;
    }
    for (int64_t i = 0; i < out * w.groups(); i++) {
      put_scale(f, scales.data + i * f.scale_bytes());
      if (f.has_bias()) put_scale(f, biases.data + i * f.scale_bytes());
    }
    for (int64_t i = 0; f.mode == Mode::dense && i < out * in; i++) {
      Format scale = f;
      scale.mode = Mode::affine;
      put_scale(scale, weight.data + i * float_bytes(f.scale));
    }
  }

  static Matrix shape(const Format& f, int64_t out, int64_t in) {
    Matrix m;
    m.format = f;
    m.out = out;
    m.in = in;
    return m;
  }

  // Whether y [out] is W x: every product and every sum is rounded once.
  bool right(const float* x, const float* y) const {
    for (int64_t row = 0; row < out; row++) {
      double exact = 0, size = 0;
      for (int64_t i = 0; i < in; i++) {
        int64_t g = format.group ? i / format.group : 0;
        double scaled = double(unscaled(w, row, i)) * group_scale(w, row, g);
        double bias = group_bias(w, row, g);
        exact += (scaled + bias) * x[i];
        size += (std::fabs(scaled) + std::fabs(bias)) * std::fabs(x[i]);
      }
      double bound = static_cast<double>(in + 8) * 0x1p-24 * size + 0x1p-126;
      if (!(std::fabs(y[row] - exact) <= bound)) return false;
    }
    return true;
  }
};

std::vector<float> activations(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random_bits);
  return x;
}

const char* decode(const Case& c) {
  const Isa& isa = TABLE;
  std::vector<float> x = activations(c.in), prepared(isa.prepared_floats(c.format, c.in));
  isa.prepare(c.format, x.data(), c.in, prepared.data());
  std::vector<float> y(c.out), parts(c.out);
  isa.matvec(c.w, prepared.data(), 0, c.out, y.data());
  if (!c.right(x.data(), y.data())) return "decode is wrong";
  for (int64_t row = 0; row < c.out; row++) {
    isa.matvec(c.w, prepared.data(), row, row + 1, parts.data());
  }
  return std::memcmp(y.data(), parts.data(), 4 * c.out) ? "decode depends on the split" : nullptr;
}

const char* prefill(const Case& c, int64_t count) {
  const Isa& isa = TABLE;
  std::vector<float> x = activations(count * c.in), y(count * c.out);
  int64_t bytes = isa.packed_row_bytes(c.format, c.in, false);
  std::vector<uint8_t> packed(count * bytes);
  std::vector<uint8_t> scratch(isa.matmul_scratch_bytes(c.format, c.in, false));
  std::vector<const uint8_t*> rows;
  for (int64_t m = 0; m < count; m++) {
    isa.pack_row(c.format, x.data() + m * c.in, c.in, false, packed.data() + m * bytes);
    rows.push_back(packed.data() + m * bytes);
  }
  isa.matmul(c.w, false, rows.data(), count, 0, c.out, y.data(), c.out, scratch.data());
  for (int64_t m = 0; m < count; m++) {
    if (!c.right(x.data() + m * c.in, y.data() + m * c.out)) return "prefill is wrong";
  }
  return nullptr;
}

std::vector<Format> formats() {
  std::vector<Format> all = {{Mode::mxfp4, 4, 32}, {Mode::mxfp8, 8, 32}, {Mode::nvfp4, 4, 16}};
  for (Float type : {Float::f32, Float::f16, Float::bf16}) {
    all.push_back({Mode::dense, type == Float::f32 ? 32 : 16, 0, type});
    for (int bits : {2, 3, 4, 5, 6, 8}) {
      for (int group : {32, 64, 128}) all.push_back({Mode::affine, bits, group, type});
    }
  }
  return all;
}

}  // namespace

int main() {
  constexpr const char* kModes[] = {"dense", "affine", "mxfp4", "mxfp8", "nvfp4"};
  constexpr const char* kTypes[] = {"f32", "f16", "bf16"};
  int checked = 0, failed = 0;
  for (const Format& f : formats()) {
    int64_t step = f.group ? f.group < 32 ? 32 : f.group : 1;
    for (int64_t steps : {1, 2, 3, 7, 8, 9, 21}) {
      Case c(f, 19, step * steps);
      for (const char* wrong : {decode(c), prefill(c, 1), prefill(c, 8)}) {
        checked++;
        if (!wrong) continue;
        failed++;
        std::printf("%s, %d bits in groups of %d, %s, %d wide: %s\n", kModes[int(f.mode)], f.bits,
                    f.group, kTypes[int(f.scale)], int(c.in), wrong);
      }
    }
  }
  std::printf("%s: %d products, %d wrong\n", TABLE.name, checked, failed);
  return failed != 0;
}
