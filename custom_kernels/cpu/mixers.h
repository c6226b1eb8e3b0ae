// The primitives of what is not a weight matrix, file by file.
#pragma once

#include <stdexcept>

#include "bindings.h"

namespace flash {

inline void check(bool fine, const char* message) {
  if (!fine) throw std::invalid_argument(message);
}

void bind_recurrences(nb::module_& m);
void bind_attention(nb::module_& m);

}  // namespace flash
