// Fibers and their scheduler: contexts are switched by hand, a thread runs until it meets others, a deadlock is seen.
#include "fibers.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif

namespace {

constexpr size_t PAGE = 4096, STACK = 64 << 10;
/// Every stack has a guard page below. An odd number of pages apart, stacks do not share the same cache lines.
constexpr size_t STRIDE = STACK + PAGE;

char* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("emulator: memory for fibers");
        std::abort();
    }
    return static_cast<char*>(memory);
}

} // namespace

// switch_stacks(&saved, next) leaves one stack and goes on with another. A new fiber begins in start_fiber with the
// kernel's caller in r12, its parameters in r13 and itself in r15, where the kernel looks for it.
extern "C" void emu_switch_stacks(void** saved, void* next);
extern "C" void emu_start_fiber();
asm(R"(
    .text
    .hidden emu_switch_stacks
    .type emu_switch_stacks, @function
emu_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .hidden emu_start_fiber
    .type emu_start_fiber, @function
emu_start_fiber:
    movq %r13, %rdi
    callq *%r12
    movq %r15, %rdi
    callq emu_end_fiber
    ud2
)");

extern "C" __attribute__((used, visibility("hidden"))) void emu_end_fiber(EmuThread* self) {
    Fiber& fiber = *static_cast<Fiber*>(self);
    Warp& warp = *fiber.warp;
    const unsigned bit = 1u << fiber.lane;
    warp.live &= ~bit;
    warp.runnable &= ~bit;
    fiber.worker->live--;
    // Those who wait for this thread wait no longer.
    fiber.worker->finish_barrier_if_all_came();
    fiber.worker->finish_meetings(warp, warp.meeting);
    fiber.worker->yield();
}

Order Order::from_environment() {
    const char* text = std::getenv("CUDA_EMULATOR_ORDER");
    if (text == nullptr || std::strcmp(text, "forward") == 0) return {};
    if (std::strcmp(text, "backward") == 0) return {Backward, 0};
    char* end = nullptr;
    const uint64_t seed = std::strtoull(text, &end, 10);
    if (end == text || *end != 0) {
        std::fprintf(stderr, "emulator: CUDA_EMULATOR_ORDER is \"forward\", \"backward\" or a seed, not \"%s\"\n",
                     text);
        std::exit(2);
    }
    return {Shuffled, seed};
}

Worker::Worker() : order(Order::from_environment()) {
    stacks = map(STRIDE * MAX_THREADS);
    for (unsigned i = 0; i < MAX_THREADS; i++) mprotect(stacks + STRIDE * i, PAGE, PROT_NONE);
    constexpr size_t shared_pages = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
    shared = map(shared_pages + PAGE) + shared_pages;
    mprotect(shared, PAGE, PROT_NONE);
    signal_stack = map(STACK);
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        fibers[i].worker = this;
        fibers[i].warp = &warps[i / 32];
        fibers[i].lane = i % 32;
        fibers[i].block = &block;
    }
}

const char* Worker::stack_guard() const { return stacks + STRIDE * static_cast<size_t>(current - fibers); }

void Worker::run_block(uint3 index) {
    block.block_index = index;
    // A shuffle depends on the block, not on who runs it.
    random = order.seed +
        ((static_cast<uint64_t>(index.z) * launch->grid.y + index.y) * launch->grid.x + index.x) * 0x2545f4914f6cdd1d;
    block.block_dim = launch->block;
    block.grid_dim = launch->grid;
    // What nobody has written is NaN, and what lies behind the end is a guard page.
    const size_t bytes = (launch->dynamic_shared + 127) / 128 * 128;
    block.shared = shared - bytes;
    std::memset(block.shared, 0xff, bytes);
    std::memset(static_shared, 0xff, launch->program->shared_bytes);

    start_fibers();
    while (live > 0) {
        const unsigned warp_count = (threads + 31) / 32;
        uint8_t turns[MAX_THREADS / 32];
        for (unsigned i = 0; i < warp_count; i++) turns[i] = order.kind == Order::Backward ? warp_count - 1 - i : i;
        if (order.kind == Order::Shuffled)
            for (unsigned i = warp_count; i > 1; i--) std::swap(turns[i - 1], turns[next_random() % i]);
        bool progress = false;
        for (unsigned i = 0; i < warp_count; i++) {
            Warp& warp = warps[turns[i]];
            progress |= warp.runnable != 0;
            // Shuffled, warps take turns at each meeting; else a warp runs as far as it can, which is faster.
            do run_warp(warp);
            while (warp.runnable != 0 && order.kind != Order::Shuffled);
        }
        if (!progress) report_deadlock();
    }
}

void Worker::start_fibers() {
    const dim3 dim = launch->block;
    threads = live = dim.x * dim.y * dim.z;
    at_barrier = 0;
    for (unsigned first = 0; first < threads; first += 32) {
        const unsigned lanes = threads - first >= 32 ? ~0u : (1u << (threads - first)) - 1;
        warps[first / 32] = {lanes, lanes, 0, 0};
    }
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.thread_index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
        fiber.copies.clear();
        fiber.groups = 0;
        // Tops of stacks are spread over the cache's sets. The return address of start_fiber lies at 8 modulo 16.
        auto** top = reinterpret_cast<void**>(stacks + STRIDE * (i + 1) - 64 * (i % 61) - 64);
        void* registers[] = {static_cast<EmuThread*>(&fiber),
                             nullptr,
                             parameters.data(),
                             reinterpret_cast<void*>(launch->kernel->call),
                             nullptr,
                             nullptr,
                             reinterpret_cast<void*>(emu_start_fiber)};
        constexpr size_t count = sizeof registers / sizeof *registers;
        fiber.stack_pointer = top - count;
        std::memcpy(fiber.stack_pointer, registers, sizeof registers);
    }
}

/// One turn for each lane that is runnable now.
void Worker::run_warp(Warp& warp) {
    Fiber* lanes = fibers + 32 * (&warp - warps);
    unsigned waiting = warp.runnable;
    while (waiting != 0) {
        unsigned lane = static_cast<unsigned>(std::countr_zero(waiting));
        if (order.kind == Order::Backward) lane = 31u - static_cast<unsigned>(std::countl_zero(waiting));
        if (order.kind == Order::Shuffled) {
            const int from = static_cast<int>(next_random() % 32);
            lane =
                (static_cast<unsigned>(std::countr_zero(std::rotr(waiting, from))) + static_cast<unsigned>(from)) % 32;
        }
        waiting &= ~(1u << lane);
        resume(lanes[lane]);
    }
}

void Worker::resume(Fiber& fiber) {
    current = &fiber;
    emu_switch_stacks(&scheduler_stack_pointer, fiber.stack_pointer);
    current = nullptr;
}

void Worker::yield() { emu_switch_stacks(&current->stack_pointer, scheduler_stack_pointer); }

uint64_t Worker::next_random() {
    uint64_t z = random += 0x9e3779b97f4a7c15; // SplitMix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void Worker::finish_barrier_if_all_came() {
    if (at_barrier == 0 || at_barrier < live) return;
    at_barrier = 0;
    for (unsigned i = 0; i < (threads + 31) / 32; i++) {
        warps[i].runnable |= warps[i].at_barrier;
        warps[i].at_barrier = 0;
    }
}

/// Of the lanes given, those whose meeting is complete get their results and may go on.
void Worker::finish_meetings(Warp& warp, unsigned candidates) {
    const Fiber* lanes = fibers + 32 * (&warp - warps);
    while (candidates != 0) {
        const EmuCollective& one = lanes[std::countr_zero(candidates)].collective;
        const unsigned group = one.mask & warp.live;
        candidates &= candidates - 1;
        if ((warp.meeting & group) != group) continue;
        bool same = true;
        for (unsigned rest = group; rest != 0; rest &= rest - 1) {
            const EmuCollective& other = lanes[std::countr_zero(rest)].collective;
            same &= other.op == one.op && other.mask == one.mask;
        }
        if (!same) continue;
        perform(*this, warp, group);
        warp.meeting &= ~group;
        warp.runnable |= group;
        candidates &= ~group;
    }
}

void emu_meet(EmuThread* self) {
    Fiber& fiber = *static_cast<Fiber*>(self);
    const unsigned bit = 1u << fiber.lane;
    if ((self->collective.mask & bit) == 0)
        fiber.worker->fail(CUDA_ERROR_LAUNCH_FAILED, "a lane that is not in its own mask", &self->collective.place);
    fiber.warp->runnable &= ~bit;
    fiber.warp->meeting |= bit;
    fiber.worker->finish_meetings(*fiber.warp, bit);
    fiber.worker->yield();
}

void emu_barrier(EmuThread* self, EmuPlace place) {
    Fiber& fiber = *static_cast<Fiber*>(self);
    Worker& worker = *fiber.worker;
    const unsigned bit = 1u << fiber.lane;
    if (worker.at_barrier == 0) worker.barrier_place = place;
    const EmuPlace other = worker.barrier_place;
    if (place.line != other.line || std::strcmp(place.file, other.file) != 0)
        worker.fail(CUDA_ERROR_LAUNCH_FAILED,
                    "__syncthreads reached while other threads of the block wait in the one at " +
                        std::string(other.file) + ":" + std::to_string(other.line),
                    &place);
    fiber.warp->runnable &= ~bit;
    fiber.warp->at_barrier |= bit;
    worker.at_barrier++;
    worker.finish_barrier_if_all_came();
    worker.yield();
}

void emu_trap(EmuThread* self, EmuPlace place) {
    static_cast<Fiber*>(self)->worker->fail(CUDA_ERROR_LAUNCH_FAILED, "__trap()", &place);
}

void Worker::fail(CUresult code, const std::string& what, const EmuPlace* place) {
    error = code;
    std::string text = "emulator: kernel " + std::string(launch->kernel->name);
    const auto triple = [](auto v) {
        return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
    };
    text += ", block " + triple(block.block_index);
    if (current != nullptr) text += ", thread " + triple(current->thread_index);
    if (place != nullptr) text += ", " + std::string(place->file) + ":" + std::to_string(place->line);
    std::fprintf(stderr, "%s: %s\n", text.c_str(), what.c_str());
    current = nullptr;
    longjmp(escape, 1);
}

/// Nobody can go on: some wait for threads that wait elsewhere. Says who waits where, one thread for each place.
void Worker::report_deadlock() {
    std::string text = "deadlock:";
    EmuPlace last = {};
    int places = 0;
    for (unsigned i = 0; i < threads && places < 8; i++) {
        const Fiber& fiber = fibers[i];
        const unsigned bit = 1u << fiber.lane;
        if ((fiber.warp->live & bit) == 0) continue;
        const bool barrier = fiber.warp->at_barrier & bit;
        const EmuPlace place = barrier ? barrier_place : fiber.collective.place;
        if (place.line == last.line && place.file == last.file) continue;
        last = place, places++;
        text += "\n  thread " + std::to_string(i) + " and others wait in ";
        text += barrier ? "__syncthreads" : name_of(fiber.collective.op);
        text += " at " + std::string(place.file) + ":" + std::to_string(place.line);
    }
    fail(CUDA_ERROR_LAUNCH_FAILED, text);
}
