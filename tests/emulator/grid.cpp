// A grid's blocks, shared out over two OS threads, and what happens when a thread of them faults.
#include "grid.h"

#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <dlfcn.h>
#include <mutex>
#include <thread>

#include "fibers.h"

namespace {

/// The grid that runs now. Both workers take its blocks in order; after a failure no block begins.
struct Grid {
    const Launch* launch;
    std::atomic<uint64_t> next = 0;
    std::atomic<int> error = CUDA_SUCCESS;
};

/// The worker whose fibers run on this OS thread, for the signal handler.
thread_local Worker* running = nullptr;

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[32];

/// A fault in a kernel ends the grid. A fault anywhere else is its owner's.
void on_fault(int signal, siginfo_t* info, void*) {
    Worker* worker = running;
    if (worker == nullptr || worker->current == nullptr) {
        sigaction(signal, &previous[signal], nullptr);
        return;
    }
    const auto* address = static_cast<const char*>(info->si_addr);
    const char* guard = worker->stack_guard();
    if (signal == SIGFPE) worker->fail(CUDA_ERROR_LAUNCH_FAILED, "integer division by zero");
    if (signal == SIGILL) worker->fail(CUDA_ERROR_LAUNCH_FAILED, "illegal instruction");
    if (address >= guard && address < guard + 4096)
        worker->fail(CUDA_ERROR_HARDWARE_STACK_ERROR, "stack overflow: local variables take more than 64 KiB");
    char text[96];
    // Addresses that x86 cannot form, such as a pointer made of NaN bytes, are not told.
    if (info->si_code == SI_KERNEL) std::snprintf(text, sizeof text, "illegal address");
    else if (address >= worker->shared && address < worker->shared + 4096)
        std::snprintf(text, sizeof text, "%zu bytes behind the end of dynamic shared memory, which is of %zu",
                      static_cast<size_t>(address - worker->shared), worker->launch->dynamic_shared);
    else std::snprintf(text, sizeof text, "illegal address %p", info->si_addr);
    worker->fail(CUDA_ERROR_ILLEGAL_ADDRESS, text);
}

void run_blocks(Worker& worker, Grid& grid) {
    const stack_t mine = {worker.signal_stack, 0, 64 << 10};
    stack_t old;
    sigaltstack(&mine, &old);
    worker.launch = grid.launch;
    worker.parameters.clear();
    const std::byte* parameter = grid.launch->parameters.data();
    for (unsigned i = 0; i < grid.launch->kernel->parameter_count; i++) {
        worker.parameters.push_back(const_cast<std::byte*>(parameter));
        parameter += (grid.launch->kernel->parameter_sizes[i] + 15) / 16 * 16;
    }
    grid.launch->program->allot_shared();
    dlinfo(grid.launch->program->handle, RTLD_DI_TLS_DATA, &worker.static_shared);
    running = &worker;
    if (setjmp(worker.escape) == 0) {
        const dim3 dim = grid.launch->grid;
        const uint64_t blocks = static_cast<uint64_t>(dim.x) * dim.y * dim.z;
        while (grid.error == CUDA_SUCCESS) {
            const uint64_t i = grid.next++;
            if (i >= blocks) break;
            worker.run_block({static_cast<unsigned>(i % dim.x), static_cast<unsigned>(i / dim.x % dim.y),
                              static_cast<unsigned>(i / dim.x / dim.y)});
        }
    } else {
        grid.error = worker.error;
    }
    running = nullptr;
    sigaltstack(&old, nullptr);
}

/// The second worker has an OS thread of its own, which waits for a grid, runs its share and waits again.
struct Helper {
    Worker worker;
    std::mutex mutex;
    std::condition_variable changed;
    Grid* grid = nullptr;

    Helper() {
        std::thread([this] {
            std::unique_lock lock(mutex);
            for (;;) {
                changed.wait(lock, [this] { return grid != nullptr; });
                run_blocks(worker, *grid);
                grid = nullptr;
                changed.notify_all();
            }
        }).detach();
    }

    void begin(Grid& work) {
        {
            std::lock_guard lock(mutex);
            grid = &work;
        }
        changed.notify_all();
    }

    void wait() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return grid == nullptr; });
    }
};

} // namespace

CUresult run_grid(const Launch& launch) {
    // Never freed: a detached thread uses them until the process ends.
    static Worker* const first = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        // The handler leaves by longjmp, so that its signal has to stay open.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int signal : SIGNALS) sigaction(signal, &action, &previous[signal]);
        return new Worker;
    }();
    static Helper* const helper = new Helper;

    Grid grid{&launch};
    const bool shared = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z > 1;
    if (shared) helper->begin(grid);
    run_blocks(*first, grid);
    if (shared) helper->wait();
    return static_cast<CUresult>(grid.error.load());
}

// What -fsanitize=alignment,bounds calls: accesses that a GPU refuses, and indices outside of an array.

namespace {
struct SourceLocation {
    const char* file;
    unsigned line, column;
};
void fault_at(const SourceLocation& at, CUresult error, const char* what) {
    const EmuPlace place = {at.file, static_cast<int>(at.line)};
    if (running != nullptr) running->fail(error, what, &place);
}
} // namespace

#pragma GCC visibility push(default)
extern "C" {
void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, void*) {
    fault_at(*at, CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address");
}
void __ubsan_handle_out_of_bounds(const SourceLocation* at, void*) {
    fault_at(*at, CUDA_ERROR_ILLEGAL_ADDRESS, "index outside of an array");
}
}
#pragma GCC visibility pop
