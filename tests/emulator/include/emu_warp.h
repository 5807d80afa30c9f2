// What the threads of a block do together: barriers, shuffles, votes, matrix fragments, asynchronous copies.
#pragma once

inline void __syncthreads(EMU_HERE) { emu_barrier(emu_self, {emu_file, emu_line}); }

inline void emu_meet(EmuOp op, unsigned mask, EmuPlace place) {
    emu_self->collective.op = op;
    emu_self->collective.mask = mask;
    emu_self->collective.place = place;
    emu_meet(emu_self);
}

inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) { emu_meet(EmuOp::SyncWarp, mask, {emu_file, emu_line}); }

// Lanes stay together only where they meet: any subset that runs between two meetings is a correct answer.
inline unsigned __activemask() {
    return 1u << ((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31);
}

template <class T> inline T emu_shuffle(EmuOp op, unsigned mask, T value, int argument, int width, EmuPlace place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move values of 4 or 8 bytes");
    EmuCollective& mine = emu_self->collective;
    mine.value = 0;
    __builtin_memcpy(&mine.value, &value, sizeof(T));
    mine.argument = argument;
    mine.width = width;
    emu_meet(op, mask, place);
    __builtin_memcpy(&value, &mine.result, sizeof(T));
    return value;
}
template <class T> inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_HERE) {
    return emu_shuffle(EmuOp::Shuffle, mask, value, lane, width, {emu_file, emu_line});
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    return emu_shuffle(EmuOp::ShuffleUp, mask, value, static_cast<int>(delta), width, {emu_file, emu_line});
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    return emu_shuffle(EmuOp::ShuffleDown, mask, value, static_cast<int>(delta), width, {emu_file, emu_line});
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_HERE) {
    return emu_shuffle(EmuOp::ShuffleXor, mask, value, lanes, width, {emu_file, emu_line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_HERE) {
    emu_self->collective.value = predicate != 0;
    emu_meet(EmuOp::Ballot, mask, {emu_file, emu_line});
    return static_cast<unsigned>(emu_self->collective.result);
}
inline int __any_sync(unsigned mask, int predicate, EMU_HERE) {
    return __ballot_sync(mask, predicate, emu_file, emu_line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMU_HERE) {
    return __ballot_sync(mask, predicate == 0, emu_file, emu_line) == 0;
}

// Warp-wide reductions of sm_80: integers only.
#define EMU_REDUCE(name, expression)                                                                              \
    template <class T> inline T name(unsigned mask, T value, EMU_HERE) {                                          \
        T result = value;                                                                                         \
        for (int lane = 0, first = 1; lane < 32; lane++) {                                                        \
            if ((mask >> lane & 1) == 0) continue;                                                                \
            const T a = result, b = __shfl_sync(mask, value, lane, 32, emu_file, emu_line);                       \
            result = first ? b : static_cast<T>(expression);                                                      \
            first = 0;                                                                                            \
        }                                                                                                         \
        return result;                                                                                            \
    }
EMU_REDUCE(__reduce_add_sync, a + b)
EMU_REDUCE(__reduce_min_sync, min(a, b))
EMU_REDUCE(__reduce_max_sync, max(a, b))
EMU_REDUCE(__reduce_or_sync, a | b)
EMU_REDUCE(__reduce_and_sync, a & b)
#undef EMU_REDUCE

// Stand-ins for PTX: a kernel calls them where it would have inline assembly.

inline void emu_mma(EmuOp op, float* d, const unsigned* a, const unsigned* b, const float* c, EmuPlace place) {
    EmuCollective& mine = emu_self->collective;
    mine.d = d, mine.a = a, mine.b = b, mine.c = c;
    emu_meet(op, ~0u, place);
}
/// `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`
inline void emu_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, EMU_HERE) {
    emu_mma(EmuOp::MmaBf16, d, a, b, c, {emu_file, emu_line});
}
/// `mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32`
inline void emu_mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b, const float* c, EMU_HERE) {
    emu_mma(EmuOp::MmaTf32, d, a, b, c, {emu_file, emu_line});
}

inline void emu_ldmatrix(EmuOp op, int count, unsigned* r, const void* row, EmuPlace place) {
    EmuCollective& mine = emu_self->collective;
    mine.argument = count, mine.loaded = r, mine.row = row;
    emu_meet(op, ~0u, place);
}
/// `ldmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared.b16`; `row` is where this lane's row is.
#define EMU_LDMATRIX(count)                                                                                       \
    inline void emu_ldmatrix_x##count(unsigned* r, const void* row, EMU_HERE) {                                   \
        emu_ldmatrix(EmuOp::LoadMatrix, count, r, row, {emu_file, emu_line});                                     \
    }                                                                                                             \
    inline void emu_ldmatrix_x##count##_trans(unsigned* r, const void* row, EMU_HERE) {                           \
        emu_ldmatrix(EmuOp::LoadMatrixTransposed, count, r, row, {emu_file, emu_line});                           \
    }
EMU_LDMATRIX(1) EMU_LDMATRIX(2) EMU_LDMATRIX(4)
#undef EMU_LDMATRIX

/// `cp.async` of 4, 8 or 16 bytes, of which the first `source_bytes` are read and the others are zero.
inline void emu_cp_async(void* shared, const void* global, int bytes, int source_bytes, EMU_HERE) {
    emu_copy_async(emu_self, shared, global, bytes, source_bytes, {emu_file, emu_line});
}
inline void emu_cp_async_commit() { emu_copy_commit(emu_self); }
/// `cp.async.wait_group n`
inline void emu_cp_async_wait(int n) { emu_copy_wait(emu_self, n); }

inline void __trap(EMU_HERE) { emu_trap(emu_self, {emu_file, emu_line}); }
