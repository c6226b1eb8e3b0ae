// MLX's complex_t overloads its members by address space, which a C++ compiler cannot. Nothing
// that is run here computes with it.
#pragma once
template <typename T>
struct complex_t {
  T real, imag;
  complex_t() = default;
  constexpr complex_t(T a, T b) : real(a), imag(b) {}
  constexpr complex_t(T a) : real(a), imag(0) {}
};
using complex64_t = complex_t<float>;
