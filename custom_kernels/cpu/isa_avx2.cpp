#include "bandwidth.inc"
#include "isa.h"
#include "matmul_generic.inc"
#include "matvec_generic.inc"
#include "ops.inc"

namespace flash {

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2",           false,    prepared_floats,      prepare,      matvec,
                   packed_row_bytes, pack_row, matmul_scratch_bytes, kMatmulGrain, matmul,
                   read_all,         kOps};

}  // namespace flash
