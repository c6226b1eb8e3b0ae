// The compute kernels, one table of functions per instruction set, chosen once at run time.
//
// Files of an instruction set (isa_*.cpp) are compiled with its flags. Everything in them lives in
// an anonymous namespace and they include no templates of the standard library or MLX: an inline
// function compiled with AVX-512 must never be the copy that another file links to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "ops.h"

namespace flash {

struct Isa {
  const char* name;  // "amx", "avx512", "avx2", "neon", "portable"
  bool half_matmul;  // whether matmul has a faster form for bfloat16 activations

  // Decode: y = W x, one activation vector, float32 arithmetic throughout. `prepare` lays x out as
  // the kernel of this format wants it, once for all matrices of that format and width.
  int64_t (*prepared_floats)(const Format& format, int64_t in);
  void (*prepare)(const Format& format, const float* x, int64_t in, float* prepared);
  // Writes y[begin..end). Each output depends on its own row alone: any split gives the same bits.
  void (*matvec)(const Matrix& w, const float* prepared, int64_t begin, int64_t end, float* y);

  // Prefill: Y = X W^T for many activation rows. `pack_row` lays one row out; `half` rounds
  // it to bfloat16 first (the caller passes it only for bfloat16 activations, which lose nothing).
  int64_t (*packed_row_bytes)(const Format& format, int64_t in, bool half);
  void (*pack_row)(const Format& format, const float* x, int64_t in, bool half, uint8_t* packed);
  int64_t (*matmul_scratch_bytes)(const Format& format, int64_t in, bool half);
  // y[m * y_stride + n] for m in [0, count) and n in [begin, end). `rows[m]` is a packed row.
  // An output depends on its own two rows alone: no bits change with count, order or the split.
  // `begin` is a multiple of matmul_grain; scratch is this thread's own.
  int64_t matmul_grain;
  void (*matmul)(const Matrix& w, bool half, const uint8_t* const* rows, int64_t count,
                 int64_t begin, int64_t end, float* y, int64_t y_stride, uint8_t* scratch);

  // Reads all of it and returns something that depends on it: what memory can do at most.
  uint64_t (*read_all)(const uint8_t* p, int64_t bytes);

  Ops ops;

  // Outputs for which matmul reads many activation rows once; 0 where it does so for any number.
  int64_t matmul_width = 0;
};

// The best table this processor runs, or the one named. nullptr if it cannot run that one.
const Isa* find_isa(const char* name);
const Isa& isa();
void set_isa(const Isa* isa);

}  // namespace flash
