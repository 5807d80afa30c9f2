// What every kernel starts from: element types, rows read 16 bytes at a time, reductions in a fixed order, and the few
// instructions that have no name in CUDA C++. NVRTC finds no cuda_bf16.h without an include path, so bfloat16 is ours.
//
// Conventions: kernels are `extern "C" __global__`, one name a storage type (`..._f32`, `..._bf16`); arithmetic is f32;
// sizes are `int`, offsets into tensors `size_t`. No sum depends on the order in which blocks run: atomics add nothing.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// ---- element types

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// Two floats, rounded to nearest even, as one register: `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef DINOLAB_EMULATED
    auto round = [](float x) -> u32 {
        u32 b = __float_as_uint(x);
        return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    };
    return round(low) | round(high) << 16;
#else
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return bf16{(unsigned short)(pack_bf16(x, 0.0f) & 0xffffu)};
}

// ---- a float in two halves of 16 bits: rounded to bf16, half-way numbers away from zero, and its lower bits. From both it is told exactly

__device__ __forceinline__ bf16 rounded_half(float x) { return bf16{(u16)((__float_as_uint(x) + 0x8000u) >> 16)}; }
__device__ __forceinline__ u16 lower_half(float x) { return (u16)__float_as_uint(x); }
__device__ __forceinline__ float join_halves(bf16 rounded, u16 lower) {
    return __uint_as_float(((u32)rounded.bits << 16) - (((u32)lower & 0x8000u) << 1) + lower);
}

// Instantiates a kernel template for both storage types: KERNEL(name, (params), (args)) defines name_f32 and name_bf16,
// which call name<float> and name<bf16>. `T` in the parameters is the storage type. Blocks have at most 512 threads, so
// that registers suffice whatever the kernel; a source with other needs defines KERNEL_BOUNDS anew.
#define KERNEL_BOUNDS 512
#define KERNEL(name, params, args)                                                                                        \
    namespace name##_for_f32 {                                                                                            \
    typedef float T;                                                                                                      \
    extern "C" __global__ void __launch_bounds__(KERNEL_BOUNDS) name##_f32 params { name<float> args; }                             \
    }                                                                                                                     \
    namespace name##_for_bf16 {                                                                                           \
    typedef bf16 T;                                                                                                       \
    extern "C" __global__ void __launch_bounds__(KERNEL_BOUNDS) name##_bf16 params { name<bf16> args; }                             \
    }

// ---- gradients: written to memory of f32 or bf16, added to what is there if asked

struct Gradient {
    void* at;
    int is_bf16;
    int add;
};

__device__ __forceinline__ void put(Gradient g, size_t i, float x) {
    if (g.is_bf16) {
        bf16* p = (bf16*)g.at + i;
        *p = from_float<bf16>(g.add ? to_float(*p) + x : x);
    } else {
        float* p = (float*)g.at + i;
        *p = g.add ? *p + x : x;
    }
}

template <class T> struct alignas(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T at[N];
};

__device__ __forceinline__ bool aligned16(const void* p) { return ((size_t)p & 15) == 0; }

// x becomes what is at p afterwards, before it is rounded; N neighbours, in packs.
template <int N, class T> __device__ __forceinline__ void put_packs(T* p, bool add, float* x) {
    constexpr int M = Pack<T>::N;
    Pack<T> y[N / M];
    if (add) {
#pragma unroll
        for (int i = 0; i < N / M; i++) y[i] = ((const Pack<T>*)p)[i];
#pragma unroll
        for (int k = 0; k < N; k++) x[k] += to_float(y[k / M].at[k % M]);
    }
#pragma unroll
    for (int k = 0; k < N; k++) y[k / M].at[k % M] = from_float<T>(x[k]);
#pragma unroll
    for (int i = 0; i < N / M; i++) ((Pack<T>*)p)[i] = y[i];
}

// N neighbours from element i on, which is a multiple of N; in packs where memory is aligned for them. x becomes what is
// there afterwards, before it is rounded.
template <int N> __device__ __forceinline__ void put_all(Gradient g, size_t i, float* x) {
    if constexpr (N % Pack<bf16>::N == 0) {
        if (g.is_bf16 && aligned16(g.at)) return put_packs<N>((bf16*)g.at + i, g.add, x);
    }
    if constexpr (N % Pack<float>::N == 0) {
        if (!g.is_bf16 && aligned16(g.at)) return put_packs<N>((float*)g.at + i, g.add, x);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (g.add) x[k] += g.is_bf16 ? to_float(((bf16*)g.at)[i + k]) : ((float*)g.at)[i + k];
        put(Gradient{g.at, g.is_bf16, 0}, i + k, x[k]);
    }
}

// N neighbours of a row as floats; `x` is aligned for packs if N > 1.
template <int N, class T> __device__ __forceinline__ void get_all(float* y, const T* x) {
    constexpr int P = Pack<T>::N;
    if (N % P == 0) {
#pragma unroll
        for (int i = 0; i < N / P; i++) {
            const Pack<T> p = ((const Pack<T>*)x)[i];
#pragma unroll
            for (int k = 0; k < P; k++) y[(i * P + k) % N] = to_float(p.at[k]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = to_float(x[k]);
    }
}

// N neighbours of a row, rounded; `y` is aligned for packs if N > 1.
template <int N, class T> __device__ __forceinline__ void put_all(T* y, const float* x) {
    if (N == Pack<T>::N) {
        Pack<T> p;
#pragma unroll
        for (int k = 0; k < Pack<T>::N; k++) p.at[k] = from_float<T>(x[k % N]);
        *(Pack<T>*)y = p;
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = from_float<T>(x[k]);
    }
}

// Elements that a thread takes at a time: packs where rows of d elements at these addresses allow it, else one.
#define BY_PACKS(T, d, aligned, call)                      \
    if ((d) % Pack<T>::N == 0 && (aligned)) {              \
        constexpr int N = Pack<T>::N;                      \
        call;                                              \
    } else {                                               \
        constexpr int N = 1;                               \
        call;                                              \
    }

// ---- rows

// f(i, x[i], ...) for the columns i of rows of d elements that belong to `lane` of `lanes`, values as float; 16 bytes
// at a time where all rows allow it. Which columns a lane gets depends on d and alignment alone.
template <class F, class T, class... More>
__device__ __forceinline__ void visit(int d, int lane, int lanes, F f, const T* x, const More*... more) {
    constexpr int N = Pack<T>::N;
    if (d % N == 0 && aligned16(x) && (true && ... && aligned16(more))) {
        for (int i = lane * N; i < d; i += lanes * N) {
            const Pack<T> p = *(const Pack<T>*)(x + i);
            [&](const Pack<More>... q) {
#pragma unroll
                for (int k = 0; k < N; k++) f(i + k, to_float(p.at[k]), to_float(q.at[k])...);
            }(*(const Pack<More>*)(more + i)...);
        }
    } else {
        for (int i = lane; i < d; i += lanes) f(i, to_float(x[i]), to_float(more[i])...);
    }
}

// out[i] = f(i, x[i], ...) for this lane's columns.
template <class F, class T, class... More>
__device__ __forceinline__ void transform(T* out, int d, int lane, int lanes, F f, const T* x, const More*... more) {
    constexpr int N = Pack<T>::N;
    if (d % N == 0 && aligned16(out) && aligned16(x) && (true && ... && aligned16(more))) {
        for (int i = lane * N; i < d; i += lanes * N) {
            const Pack<T> p = *(const Pack<T>*)(x + i);
            Pack<T> y;
            [&](const Pack<More>... q) {
#pragma unroll
                for (int k = 0; k < N; k++) y.at[k] = from_float<T>(f(i + k, to_float(p.at[k]), to_float(q.at[k])...));
            }(*(const Pack<More>*)(more + i)...);
            *(Pack<T>*)(out + i) = y;
        }
    } else {
        for (int i = lane; i < d; i += lanes) out[i] = from_float<T>(f(i, to_float(x[i]), to_float(more[i])...));
    }
}

// ---- elements

// out[i] = f(i, x[i], ...) for all n elements, 16 bytes of T a thread: launched with `over(n / Pack<T>::N, rounded up)`.
template <class F, class T, class... X>
__device__ __forceinline__ void elements(T* out, size_t n, F f, const X*... x) {
    constexpr int N = Pack<T>::N;
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    const bool packs = aligned16(out) && (true && ... && (sizeof(X) == sizeof(T) && aligned16(x)));
    if (packs && i + N <= n) {
        Pack<T> y;
        [&](const Pack<X>... p) {
#pragma unroll
            for (int k = 0; k < N; k++) y.at[k] = from_float<T>(f(i + k, to_float(p.at[k])...));
        }(*(const Pack<X>*)(x + i)...);
        *(Pack<T>*)(out + i) = y;
    } else {
        for (size_t j = i; j < n && j < i + N; j++) out[j] = from_float<T>(f(j, to_float(x[j])...));
    }
}

// ---- reductions

#define FULL_WARP 0xffffffffu

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(FULL_WARP, x, o);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, o));
    return x;
}

// Over all threads of a block (a multiple of 32, at most 1024); every thread gets the result.
template <class Op> __device__ __forceinline__ float block_reduce(float x, float neutral, Op op) {
    __shared__ float of_warp[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(FULL_WARP, x, o));
    __syncthreads();
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    x = lane < (int)blockDim.x / 32 ? of_warp[lane] : neutral;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(FULL_WARP, x, o));
    return x;
}

__device__ __forceinline__ float block_sum(float x) {
    return block_reduce(x, 0.0f, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ float block_max(float x) {
    return block_reduce(x, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
}

// ---- functions

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 2^x, to about 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef DINOLAB_EMULATED
    return emu_ex2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The standard normal distribution function and density at x, absolute error below 3e-7 (Abramowitz and Stegun 7.1.26):
// one exponential for both.
struct Gaussian {
    float cdf, pdf;
};
__device__ __forceinline__ Gaussian gaussian(float x) {
    const float a = fabsf(x), t = __fdividef(1.0f, 1.0f + 0.231641888f * a);
    const float e = exp2_fast(-0.72134752044448170f * a * a);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = 0.5f * p * e;
    return {x < 0.0f ? tail : 1.0f - tail, 0.39894228040143268f * e};
}

// ---- tensor cores and asynchronous copies (sm_80 and newer)

#ifndef DINOLAB_EMULATED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) unsigned char name##_bytes[]; type* name = (type*)name##_bytes

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
#endif

// d = a b + c for a [16, 16] (row-major), b [16, 8] (column-major), c and d [16, 8]; bf16 in, f32 out; fragments as in
// the PTX manual, mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float d[4], const u32 a[4], const u32 b[2], const float c[4]) {
#ifdef DINOLAB_EMULATED
    emu_mma_m16n8k16_bf16(d, a, b, c);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 r[4], const void* row) {
#ifdef DINOLAB_EMULATED
    emu_ldmatrix_x4(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 r[4], const void* row) {
#ifdef DINOLAB_EMULATED
    emu_ldmatrix_x4_trans(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Copies 16 bytes from global to shared memory in the background: the first `bytes` of them, zeros behind.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, int bytes) {
#ifdef DINOLAB_EMULATED
    emu_cp_async(shared, global, 16, bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef DINOLAB_EMULATED
    emu_cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's committed groups are still under way.
template <int N> __device__ __forceinline__ void copy_wait() {
#ifdef DINOLAB_EMULATED
    emu_cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
