// Metal's names in OpenCL C++, which has its address spaces: enough for clang to check the types
// of a kernel, with no bodies. A bfloat passes for a half.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef ulong size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef half bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(float)
VECTORS(half)
VECTORS(int)
VECTORS(uint)
VECTORS(short)
VECTORS(ushort)
VECTORS(char)
VECTORS(uchar)
VECTORS(long)
VECTORS(ulong)

template <typename To, typename From>
To as_type(From);
float log1p(float);

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <typename A, typename B>
constexpr constant bool is_same_v = false;
template <typename A>
constexpr constant bool is_same_v<A, A> = true;
template <bool B, typename A, typename C>
struct conditional {
  typedef A type;
};
template <typename A, typename C>
struct conditional<false, A, C> {
  typedef C type;
};
template <bool B, typename A, typename C>
using conditional_t = typename conditional<B, A, C>::type;

#define OF_FLOAT(name) float name(float);
#define OF_FLOATS(F)                                                                 \
  F(exp) F(exp2) F(log) F(log2) F(sin) F(cos) F(tan) F(tanh) F(sqrt) F(rsqrt) F(abs) \
  F(fabs) F(floor) F(ceil) F(round) F(rint) F(trunc) F(sign)
OF_FLOATS(OF_FLOAT)
namespace precise {
OF_FLOATS(OF_FLOAT)
}
namespace fast {
OF_FLOATS(OF_FLOAT)
}
int abs(int);
bool isnan(float);
bool isinf(float);
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
template <typename T>
T min(T, T);
template <typename T>
T max(T, T);
template <typename T>
T pow(T, T);
template <typename T>
T clamp(T, T, T);
template <typename T>
T fma(T, T, T);
template <typename T>
T select(T, T, bool);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <typename T>
T simd_sum(T);
template <typename T>
T simd_max(T);
template <typename T>
T simd_min(T);
template <typename T>
T simd_or(T);
template <typename T>
T simd_and(T);
template <typename T>
T simd_shuffle(T, ushort);
template <typename T>
T simd_shuffle_xor(T, ushort);
template <typename T>
T simd_shuffle_up(T, ushort);
template <typename T>
T simd_shuffle_down(T, ushort);
template <typename T>
T simd_broadcast(T, ushort);
template <typename T>
T simd_prefix_exclusive_sum(T);
template <typename T>
T simd_prefix_inclusive_sum(T);
bool simd_any(bool);
bool simd_all(bool);
}  // namespace metal
using namespace metal;
