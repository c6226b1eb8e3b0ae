#include "bandwidth.inc"
#include "isa.h"
#include "matmul_amx.inc"
#include "matvec_avx512.inc"
#include "ops.inc"

namespace flash {

extern const Isa kAmx = {"amx",
                         true,
                         prepared_floats,
                         prepare,
                         matvec,
                         tiles::packed_row_bytes,
                         tiles::pack_row,
                         tiles::matmul_scratch_bytes,
                         kMatmulGrain,
                         tiles::matmul,
                         read_all,
                         kOps,
                         tiles::kPanels * tiles::kTile};

}  // namespace flash
