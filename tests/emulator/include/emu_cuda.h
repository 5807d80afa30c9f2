// CUDA C++ for g++: the part of the language that kernels use, included before a kernel's own source.
// A thread of a block is a fiber. Everything that a GPU's thread does alone is plain C++ here; what it does with others
// (barriers, shuffles, matrix fragments) is a call into the emulated driver, which runs the other threads meanwhile.
#pragma once
#include "emu_runtime.h"

#define DINOLAB_EMULATED 1

/// The thread that runs now. Fibers keep it in a register of their own, so reading it costs nothing.
register EmuThread* emu_self asm("r15");

#define threadIdx (emu_self->thread_index)
#define blockIdx (emu_self->block->block_index)
#define blockDim (emu_self->block->block_dim)
#define gridDim (emu_self->block->grid_dim)
constexpr int warpSize = 32;

// `__global__` and `__launch_bounds__` are left for the emulated NVRTC, which makes the table of kernels from them.
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// Blocks run on several OS threads, one at a time on each: what a block shares is what such a thread owns.
#define __shared__ static thread_local
// The driver finds these by name (cuModuleGetGlobal).
#define __constant__ __attribute__((visibility("default")))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emu_self->block->shared)

using size_t = decltype(sizeof 0);
using ptrdiff_t = decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr));

#define EMU_HERE const char *emu_file = __builtin_FILE(), int emu_line = __builtin_LINE()

// Vector types.

#define EMU_VECTORS(T, name, pair_align, quad_align)                                                              \
    struct name##1 { T x; };                                                                                      \
    struct alignas(pair_align) name##2 { T x, y; };                                                               \
    struct alignas(quad_align) name##4 { T x, y, z, w; };                                                         \
    inline name##1 make_##name##1(T x) { return {x}; }                                                            \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                    \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                            \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
struct float3 { float x, y, z; };
struct double3 { double x, y, z; };
struct int3 { int x, y, z; };
struct char3 { signed char x, y, z; };
struct uchar3 { unsigned char x, y, z; };
struct short3 { short x, y, z; };
struct ushort3 { unsigned short x, y, z; };
struct longlong3 { long long x, y, z; };
struct ulonglong3 { unsigned long long x, y, z; };
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned, uint, 8, 16)
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef EMU_VECTORS

#include "emu_math.h"
#include "emu_warp.h"

// The table of kernels.

template <auto kernel> struct EmuEntry;
template <class... P, void (*kernel)(P...)> struct EmuEntry<kernel> {
    static constexpr unsigned sizes[] = {sizeof(P)..., 0};

    template <size_t n, size_t... i> struct Upto : Upto<n - 1, n - 1, i...> {};
    template <size_t... i> struct Upto<0, i...> {
        static void call(void* const* p) { kernel(*static_cast<P*>(p[i])...); }
    };

    static constexpr EmuKernel entry(const char* name, unsigned max_threads = 1024, ...) {
        return {name, Upto<sizeof...(P)>::call, sizes, sizeof...(P), max_threads};
    }
};
