// What each file of kernels adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace flash {

namespace nb = nanobind;

void bind_linear(nb::module_& m);
void bind_mixers(nb::module_& m);
void bind_expert_pool(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_blocks(nb::module_& m);

}  // namespace flash
