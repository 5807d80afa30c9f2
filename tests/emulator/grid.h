// Runs the blocks of a kernel. The driver's only door to the code that knows of fibers.
#pragma once
#include <cstddef>
#include <vector>

#include "include/emu_runtime.h"
#include "results.h"

/// A compiled program: its handle (dlopen) and its `__shared__` variables, which are thread-local ones.
struct Program {
    void* handle;
    const EmuKernel* kernels;
    size_t shared_bytes;
    /// Makes the loader allot them to the calling thread.
    void* (*allot_shared)();
};

/// A kernel with all that it needs: its parameters are copied, so that a graph can run it again.
struct Launch {
    const EmuKernel* kernel;
    const Program* program;
    dim3 grid, block;
    size_t dynamic_shared;
    std::vector<std::byte> parameters;
};

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 << 10;

/// Runs all blocks to their end. What went wrong has been said on stderr when it returns an error.
CUresult run_grid(const Launch& launch);
