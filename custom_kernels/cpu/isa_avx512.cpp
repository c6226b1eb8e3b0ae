#include "bandwidth.inc"
#include "isa.h"
#include "matmul_avx512.inc"
#include "matvec_avx512.inc"
#include "ops.inc"

namespace flash {

extern const Isa kAvx512;
const Isa kAvx512 = {"avx512",         false,    prepared_floats,      prepare,      matvec,
                     packed_row_bytes, pack_row, matmul_scratch_bytes, kMatmulGrain, matmul,
                     read_all,         kOps};

}  // namespace flash
