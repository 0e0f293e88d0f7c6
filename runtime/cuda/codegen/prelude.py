"""The C++ that every generated kernel starts with.

`DEVICE` is what only a GPU has: conversions of half precision and approximations, as PTX or intrinsics. `PORTABLE` is
plain C++ over it. To run a kernel on a host one gives another text in place of `DEVICE` (tests/cuda_on_host.py).

Half precision is held in `bf16` and `fp16` and computed in float. Approximations (`fast::`) are for results that round
to half precision only: their relative error is below 2^-16.
"""

DEVICE = r"""
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
__device__ __forceinline__ float bits_float(unsigned x) { return __int_as_float((int)x); }
__device__ __forceinline__ double bits_double(unsigned long long x) { return __longlong_as_double((long long)x); }
__device__ __forceinline__ float wide(bf16 x) { return bits_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float wide(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ unsigned pack_fp16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    unsigned short a, b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
    return (unsigned)b << 16 | a;
#endif
}
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    unsigned y[2] = {(unsigned)__float_as_int(low), (unsigned)__float_as_int(high)};
    for (int i = 0; i < 2; ++i)
        y[i] = (y[i] & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (y[i] + 0x7fffu + (y[i] >> 16 & 1u)) >> 16;
    return y[1] << 16 | y[0];
#endif
}
namespace fast {
__device__ __forceinline__ float exp(float x) { return __expf(x); }
__device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }
}
"""

PORTABLE = r"""
typedef signed char int8; typedef unsigned char uint8; typedef short int16; typedef unsigned short uint16;
typedef unsigned int uint32; typedef long long int64; typedef unsigned long long uint64;
#define INLINE __device__ __forceinline__

template <typename T, int N> struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack { T v[N]; };
template <typename T, int N> INLINE Pack<T, N> get(const T* p) { return *reinterpret_cast<const Pack<T, N>*>(p); }

template <typename T> INLINE T wide(T x) { return x; }
INLINE bf16 narrow(float x, bf16) { return {(unsigned short)pack_bf16(x, 0.0f)}; }
INLINE fp16 narrow(float x, fp16) { return {(unsigned short)pack_fp16(x, 0.0f)}; }
template <typename W, typename T> INLINE T narrow(W x, T) { return T(x); }
template <typename T> INLINE float rounded(float x) { return wide(narrow(x, T())); }

template <typename T, int N, typename W> INLINE void put(T* p, const W (&x)[N]) {
    Pack<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y.v[i] = narrow((W)x[i], T());
    *reinterpret_cast<Pack<T, N>*>(p) = y;
}
template <int N> INLINE void put_words(void* p, const unsigned (&y)[N]) {
    Pack<unsigned, N> z;
#pragma unroll
    for (int i = 0; i < N; ++i) z.v[i] = y[i];
    *reinterpret_cast<Pack<unsigned, N>*>(p) = z;
}
template <int N> INLINE void put(bf16* p, const float (&x)[N]) {
    if constexpr (N == 1) {
        *p = narrow(x[0], bf16());
    } else {
        unsigned y[N / 2 ? N / 2 : 1];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) y[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        put_words(p, y);
    }
}
template <int N> INLINE void put(fp16* p, const float (&x)[N]) {
    if constexpr (N == 1) {
        *p = narrow(x[0], fp16());
    } else {
        unsigned y[N / 2 ? N / 2 : 1];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) y[i] = pack_fp16(x[2 * i], x[2 * i + 1]);
        put_words(p, y);
    }
}

struct Add { template <typename T> INLINE T operator()(T a, T b) const { return a + b; } };
struct Multiply { template <typename T> INLINE T operator()(T a, T b) const { return a * b; } };
struct Maximum { template <typename T> INLINE T operator()(T a, T b) const { return a > b || a != a ? a : b; } };
struct Minimum { template <typename T> INLINE T operator()(T a, T b) const { return a < b || a != a ? a : b; } };

// The reduction of one number of each of the T threads of a row, known to all of them. T is a power of two up to 32,
// or a multiple of 32 and the whole block; `parts` has room for T / 32 numbers.
template <int T, typename A, typename F> INLINE A all_reduce(A x, F f, A* parts) {
#pragma unroll
    for (int step = (T < 32 ? T : 32) / 2; step; step /= 2) x = f(x, A(__shfl_xor_sync(0xffffffffu, x, step)));
    if constexpr (T > 32) {
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        x = parts[0];
#pragma unroll
        for (int i = 1; i < T / 32; ++i) x = f(x, parts[i]);
    }
    return x;
}
"""

MATH = r"""
#define UNARY(name, f32, f64) \
    INLINE float name(float x) { return f32(x); } \
    INLINE double name(double x) { return f64(x); }
namespace m {
UNARY(exp, ::expf, ::exp) UNARY(log, ::logf, ::log) UNARY(sqrt, ::sqrtf, ::sqrt) UNARY(ceil, ::ceilf, ::ceil)
UNARY(floor, ::floorf, ::floor) UNARY(rint, ::rintf, ::rint) UNARY(sin, ::sinf, ::sin) UNARY(cos, ::cosf, ::cos)
UNARY(tan, ::tanf, ::tan) UNARY(asin, ::asinf, ::asin) UNARY(acos, ::acosf, ::acos) UNARY(atan, ::atanf, ::atan)
UNARY(sinh, ::sinhf, ::sinh) UNARY(cosh, ::coshf, ::cosh) UNARY(tanh, ::tanhf, ::tanh) UNARY(asinh, ::asinhf, ::asinh)
UNARY(acosh, ::acoshf, ::acosh) UNARY(atanh, ::atanhf, ::atanh) UNARY(erf, ::erff, ::erf)
UNARY(expm1, ::expm1f, ::expm1) UNARY(log1p, ::log1pf, ::log1p)
INLINE float pow(float x, float y) { return ::powf(x, y); }
INLINE double pow(double x, double y) { return ::pow(x, y); }
// Of integers, by squaring; it wraps. A negative exponent gives 1 / x^n, towards zero, and of zero 0.
template <typename T, typename E> INLINE T power(T x, E y) {
    if (y < E(0)) return x == T(1) ? T(1) : T(-1) < T(0) && x == T(-1) ? T(y % E(2) ? -1 : 1) : T(0);
    uint64 square = (uint64)x, result = 1;
    for (uint64 n = (uint64)y; n; n /= 2) {
        if (n % 2) result *= square;
        square *= square;
    }
    return (T)result;
}
template <typename T> INLINE T power(T x, double y) {
    return ::rint(y) == y && ::fabs(y) < 9e18 ? power(x, (int64)y) : (T)::pow((double)x, y);
}
INLINE float fmod(float x, float y) { return ::fmodf(x, y); }
INLINE double fmod(double x, double y) { return ::fmod(x, y); }
template <typename T> INLINE T absolute(T x) { return x < T(0) ? T(-x) : x; }
INLINE float absolute(float x) { return ::fabsf(x); }
INLINE double absolute(double x) { return ::fabs(x); }
template <typename T> INLINE T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : x == T(0) ? T(0) : x; }
template <typename T> INLINE T maximum(T x, T y) { return Maximum()(x, y); }
template <typename T> INLINE T minimum(T x, T y) { return Minimum()(x, y); }
template <typename T> INLINE T clip(T x, T low, T high) { return minimum(maximum(x, low), high); }
template <typename T> INLINE bool is_inf(T x, bool negative, bool positive) {
    return (positive && x > T(0) && x - x != T(0)) || (negative && x < T(0) && x - x != T(0));
}
// Towards zero; what C++ leaves undefined is 0 (by zero) or wraps (the least number by -1).
template <typename T> INLINE T divide(T x, T y) {
    if (y == T(0)) return T(0);
    return T(-1) < T(0) && y == T(-1) ? T(uint64(0) - uint64(x)) : T(x / y);
}
INLINE float divide(float x, float y) { return x / y; }
INLINE double divide(double x, double y) { return x / y; }
template <typename T> INLINE T c_remainder(T x, T y) {
    return y == T(0) || (T(-1) < T(0) && y == T(-1)) ? T(0) : T(x % y);
}
INLINE float c_remainder(float x, float y) { return fmod(x, y); }
INLINE double c_remainder(double x, double y) { return fmod(x, y); }
// With the sign of y.
template <typename T> INLINE T remainder(T x, T y) {
    const T r = c_remainder(x, y);
    return r != T(0) && (r < T(0)) != (y < T(0)) ? T(r + y) : r;
}
template <typename T> INLINE T left(T x, T y) { return y >= T(8 * sizeof(T)) ? T(0) : T(x << y); }
template <typename T> INLINE T right(T x, T y) { return y >= T(8 * sizeof(T)) ? (x < T(0) ? T(-1) : T(0)) : T(x >> y); }
template <typename T> INLINE T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }
template <typename T> INLINE T swish(T x, T alpha) { return x / (T(1) + exp(-alpha * x)); }
template <typename T> INLINE T gelu(T x) { return T(0.5) * x * (T(1) + erf(x * T(0.70710678118654752))); }
template <typename T> INLINE T gelu_tanh(T x) {
    return T(0.5) * x * (T(1) + tanh(T(0.79788456080286536) * (x + T(0.044715) * x * x * x)));
}
template <typename T> INLINE T softplus(T x) { return maximum(x, T(0)) + log1p(exp(-absolute(x))); }
template <typename T> INLINE T mish(T x) { return x * tanh(softplus(x)); }
template <typename T> INLINE T elu(T x, T alpha) { return x >= T(0) ? x : alpha * expm1(x); }
template <typename T> INLINE T celu(T x, T alpha) { return x >= T(0) ? x : alpha * expm1(x / alpha); }
template <typename T> INLINE T selu(T x, T alpha, T gamma) { return gamma * (x > T(0) ? x : alpha * expm1(x)); }
template <typename T> INLINE T shrink(T x, T threshold, T bias) {
    return x < -threshold ? x + bias : x > threshold ? x - bias : T(0);
}
}
namespace fast {
INLINE float sigmoid(float x) { return divide(1.0f, 1.0f + exp(-x)); }
INLINE float swish(float x, float alpha) { return divide(x, 1.0f + exp(-alpha * x)); }
// 1 + tanh(u) is 2 sigmoid(2u).
INLINE float gelu_tanh(float x) {
    return divide(x, 1.0f + exp(-2.0f * 0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
}
"""
