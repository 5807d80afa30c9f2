// The threads of one block: fibers on one OS thread, each with a small stack, run in turn up to their next meeting.
#pragma once
#include <atomic>
#include <csetjmp>
#include <cstdint>
#include <string>

#include "grid.h"

struct Worker;

/// 32 threads, as sets of lanes. A lane that lives is runnable, meeting others, or at the block's barrier.
struct Warp {
    unsigned live, runnable, meeting, at_barrier;
};

struct Fiber : EmuThread {
    Worker* worker;
    Warp* warp;
    unsigned lane;
    void* stack_pointer;
    /// The asynchronous copies that it has begun, oldest first, and how many groups it has committed.
    struct Copy {
        void* shared;
        const void* global;
        int bytes, source_bytes, group;
    };
    std::vector<Copy> copies;
    int groups;
};

/// In which order the runnable threads of a block get their turn (CUDA_EMULATOR_ORDER).
struct Order {
    enum {
        Forward,
        Backward,
        Shuffled
    } kind = Forward;
    uint64_t seed = 0;
    static Order from_environment();
};

/// One OS thread's share of a grid: the block it runs, and the memory that its fibers live in.
struct Worker {
    const Launch* launch = nullptr;
    std::vector<void*> parameters;
    void* static_shared = nullptr;
    EmuBlock block = {};
    Order order;
    uint64_t random = 0;

    Fiber fibers[MAX_THREADS] = {};
    Warp warps[MAX_THREADS / 32] = {};
    unsigned threads = 0, live = 0, at_barrier = 0;
    /// Where the threads of the block wait that are at a barrier.
    EmuPlace barrier_place = {};

    Fiber* current = nullptr;
    void* scheduler_stack_pointer = nullptr;
    jmp_buf escape;
    CUresult error = CUDA_SUCCESS;

    char *stacks, *shared, *signal_stack;

    Worker();
    void run_block(uint3 index);
    /// Says what happened where, and leaves the grid. Does not return.
    [[noreturn]] void fail(CUresult error, const std::string& what, const EmuPlace* place = nullptr);
    /// Stops the current fiber until the scheduler comes back to it.
    void yield();
    void finish_barrier_if_all_came();
    void finish_meetings(Warp& warp, unsigned lanes);
    /// The page below the current fiber's stack.
    const char* stack_guard() const;

  private:
    uint64_t next_random();
    void start_fibers();
    void run_warp(Warp& warp);
    void resume(Fiber& fiber);
    [[noreturn]] void report_deadlock();
};

/// The results of a warp-wide operation for the lanes of `group`, who have all come.
void perform(Worker& worker, Warp& warp, unsigned group);

const char* name_of(EmuOp op);
