// One MLX primitive for every kernel: a body of C++ that runs when the CPU stream reaches it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "format.h"
#include "mlx/mlx.h"

namespace flash {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// Runs on MLX's stream thread, without the GIL. Inputs are row contiguous unless the call said
// otherwise. May throw: MLX rethrows the message in the thread that evaluates.
using Body = std::function<void(const Arrays& inputs, Arrays& outputs)>;

struct Output {
  mx::Shape shape;
  mx::Dtype dtype;
  int reuses = -1;  // input whose buffer this output takes over if nobody else needs it
};

// A lazy node of the graph. `strided` inputs are passed as they are, others made row contiguous.
// With `reuses`, the body finds in the output what was in that input, in place or copied.
Arrays on_cpu(const char* name, Body body, Arrays inputs, std::vector<Output> outputs,
              std::vector<int> strided = {});

// The Float that an MLX dtype is.
// Throws std::invalid_argument for others.
Float float_type(mx::Dtype dtype);

}  // namespace flash
