// C++ objects that both Python and MLX's graph hold.
#pragma once

#include <memory>

namespace flash {

// nanobind makes a shared_ptr of an object it owns by holding the Python object, and takes the GIL
// to let it go. On MLX's stream thread that is a deadlock: whoever waits for the graph may hold the
// GIL. An object that was made in a shared_ptr, and knows it, is passed on as that one instead.
// So: derive from this, and bind constructors with nb::new_ of a function that makes shared ones.
template <class T>
struct Shared : std::enable_shared_from_this<T> {
  Shared() = default;
};

}  // namespace flash
