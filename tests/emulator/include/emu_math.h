// Arithmetic of CUDA C++: the C library's functions under their CUDA names, bit casts, integer intrinsics, atomics.
// Fast intrinsics (`__expf`) are the exact functions here: a kernel that needs their error has no place in a test.
#pragma once

extern "C" {
#define EMU_UNARY(name)                                                                                           \
    double name(double) noexcept;                                                                                 \
    float name##f(float) noexcept;
EMU_UNARY(exp) EMU_UNARY(exp2) EMU_UNARY(expm1) EMU_UNARY(log) EMU_UNARY(log2) EMU_UNARY(log10) EMU_UNARY(log1p)
EMU_UNARY(sqrt) EMU_UNARY(cbrt) EMU_UNARY(sin) EMU_UNARY(cos) EMU_UNARY(tan) EMU_UNARY(asin) EMU_UNARY(acos)
EMU_UNARY(atan) EMU_UNARY(sinh) EMU_UNARY(cosh) EMU_UNARY(tanh) EMU_UNARY(erf) EMU_UNARY(erfc) EMU_UNARY(lgamma)
EMU_UNARY(floor) EMU_UNARY(ceil) EMU_UNARY(trunc) EMU_UNARY(round) EMU_UNARY(rint) EMU_UNARY(nearbyint)
EMU_UNARY(fabs)
#undef EMU_UNARY
#define EMU_BINARY(name)                                                                                          \
    double name(double, double) noexcept;                                                                         \
    float name##f(float, float) noexcept;
EMU_BINARY(pow) EMU_BINARY(atan2) EMU_BINARY(fmod) EMU_BINARY(hypot) EMU_BINARY(copysign) EMU_BINARY(fmax)
EMU_BINARY(fmin)
#undef EMU_BINARY
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
int abs(int) noexcept;
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
}

#define EMU_FLOAT(name) inline float name(float x) { return name##f(x); }
EMU_FLOAT(exp) EMU_FLOAT(exp2) EMU_FLOAT(expm1) EMU_FLOAT(log) EMU_FLOAT(log2) EMU_FLOAT(log10) EMU_FLOAT(log1p)
EMU_FLOAT(sqrt) EMU_FLOAT(sin) EMU_FLOAT(cos) EMU_FLOAT(tan) EMU_FLOAT(tanh) EMU_FLOAT(erf) EMU_FLOAT(erfc)
EMU_FLOAT(floor) EMU_FLOAT(ceil) EMU_FLOAT(trunc) EMU_FLOAT(round) EMU_FLOAT(rint) EMU_FLOAT(fabs)
#undef EMU_FLOAT
inline float pow(float x, float y) { return powf(x, y); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline void sincos(double x, double* s, double* c) { *s = sin(x), *c = cos(x); }
inline float sinpif(float x) { return static_cast<float>(sin(3.14159265358979323846 * x)); }
inline float cospif(float x) { return static_cast<float>(cos(3.14159265358979323846 * x)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

inline float emu_ex2(float x) { return exp2f(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
// Of no use to a compiler that never contracts: on a GPU they keep a product and a sum apart.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }

// min and max: the smaller (larger) number where one operand is NaN, as CUDA has it.

template <class A, class B> inline auto min(A a, B b) {
    using T = decltype(a + b);
    if constexpr (T(0.5) == T(0)) return T(b) < T(a) ? T(b) : T(a);
    else return T(__builtin_fmin(a, b));
}
template <class A, class B> inline auto max(A a, B b) {
    using T = decltype(a + b);
    if constexpr (T(0.5) == T(0)) return T(a) < T(b) ? T(b) : T(a);
    else return T(__builtin_fmax(a, b));
}

// Bits.

#define EMU_CAST(name, To, From) inline To name(From x) { return __builtin_bit_cast(To, x); }
EMU_CAST(__float_as_int, int, float)
EMU_CAST(__float_as_uint, unsigned, float)
EMU_CAST(__int_as_float, float, int)
EMU_CAST(__uint_as_float, float, unsigned)
EMU_CAST(__double_as_longlong, long long, double)
EMU_CAST(__longlong_as_double, double, long long)
#undef EMU_CAST

inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int bit = 0; bit < 32; bit++) y |= (x >> bit & 1u) << (31 - bit);
    return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline int __mulhi(int x, int y) { return static_cast<int>(static_cast<long long>(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

// Memory. Cache hints mean nothing here.

#define EMU_LOAD(name) template <class T> inline T name(const T* p) { return *p; }
EMU_LOAD(__ldg) EMU_LOAD(__ldcs) EMU_LOAD(__ldca) EMU_LOAD(__ldcg) EMU_LOAD(__ldlu) EMU_LOAD(__ldcv)
#undef EMU_LOAD
#define EMU_STORE(name) template <class T> inline void name(T* p, T value) { *p = value; }
EMU_STORE(__stcs) EMU_STORE(__stcg) EMU_STORE(__stwb) EMU_STORE(__stwt)
#undef EMU_STORE

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline long long clock64() { return static_cast<long long>(__builtin_ia32_rdtsc()); }
inline int clock() { return static_cast<int>(clock64()); }

// Atomics: real ones, since blocks run side by side. Each returns the old value.

template <class T, class U> inline T atomicExch(T* p, U value) {
    T old, desired = static_cast<T>(value);
    __atomic_exchange(p, &desired, &old, __ATOMIC_SEQ_CST);
    return old;
}
template <class T, class U, class V> inline T atomicCAS(T* p, U expected, V value) {
    T old = static_cast<T>(expected), desired = static_cast<T>(value);
    __atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return old;
}
template <class T, class F> inline T emu_atomic(T* p, F update) {
    T old, desired;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do desired = update(old);
    while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
#define EMU_ATOMIC(name, expression)                                                                              \
    template <class T, class U> inline T name(T* p, U operand) {                                                  \
        const T b = static_cast<T>(operand);                                                                      \
        return emu_atomic(p, [b](T a) { return static_cast<T>(expression); });                                    \
    }
EMU_ATOMIC(atomicAdd, a + b)
EMU_ATOMIC(atomicSub, a - b)
EMU_ATOMIC(atomicMin, min(a, b))
EMU_ATOMIC(atomicMax, max(a, b))
EMU_ATOMIC(atomicAnd, a & b)
EMU_ATOMIC(atomicOr, a | b)
EMU_ATOMIC(atomicXor, a ^ b)
EMU_ATOMIC(atomicInc, a >= b ? 0 : a + 1)
#undef EMU_ATOMIC
