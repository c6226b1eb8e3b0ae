// Floats as integers that sort as they do: every number above 1, NaN at 1, and 0 for what is taken.
// Zeros of either sign are equal.
inline uint ordered(float v) {
  const uint bits = as_type<uint>(v + 0.0f);
  return metal::isnan(v) ? 1u : (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}
