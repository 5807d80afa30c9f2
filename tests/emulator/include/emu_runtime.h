// What a compiled kernel and the emulated driver know of each other. Both include this file; it needs no other header,
// because a kernel is compiled as NVRTC compiles it: without the C library's headers.
#pragma once

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

/// The warp-wide operations: all lanes that the mask names meet, then each goes on with its result.
enum class EmuOp : int {
    SyncWarp,
    Shuffle,
    ShuffleUp,
    ShuffleDown,
    ShuffleXor,
    Ballot,
    MmaBf16,
    MmaTf32,
    LoadMatrix,
    LoadMatrixTransposed,
};

/// A place in a kernel's source.
struct EmuPlace {
    const char* file;
    int line;
};

/// The operands of one lane in a warp-wide operation.
struct EmuCollective {
    EmuOp op;
    unsigned mask;
    EmuPlace place;
    /// Shuffles: the lane (or distance) asked for and the width of a segment. Loads: the number of matrices.
    int argument, width;
    /// Shuffles and votes: this lane's value, and where its result goes.
    unsigned long long value, result;
    /// Matrix operations.
    float* d;
    const unsigned *a, *b;
    const float* c;
    unsigned* loaded;
    const void* row;
};

/// What the threads of a block share and a kernel reads.
struct EmuBlock {
    uint3 block_index;
    dim3 block_dim, grid_dim;
    void* shared;
};

/// What a kernel's thread reads of itself. Its address lives in register r15 while the thread runs.
struct EmuThread {
    uint3 thread_index;
    const EmuBlock* block;
    EmuCollective collective;
};

/// One entry of the table `emu_kernels` that ends each compiled program; the last one has no name.
struct EmuKernel {
    const char* name;
    /// Calls the kernel with its parameters, each given by address.
    void (*call)(void* const* parameters);
    const unsigned* parameter_sizes;
    unsigned parameter_count;
    /// From `__launch_bounds__`, or 1024.
    unsigned max_threads;
};

#pragma GCC visibility push(default)
extern "C" {
/// Meets the other lanes that `self->collective` names.
void emu_meet(EmuThread* self);
/// `__syncthreads()`.
void emu_barrier(EmuThread* self, EmuPlace place);
void emu_copy_async(EmuThread* self, void* shared, const void* global, int bytes, int source_bytes, EmuPlace place);
void emu_copy_commit(EmuThread* self);
void emu_copy_wait(EmuThread* self, int groups_left);
[[noreturn]] void emu_trap(EmuThread* self, EmuPlace place);
}
#pragma GCC visibility pop
