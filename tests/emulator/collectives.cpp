// What a warp computes when its lanes have met (shuffles, votes, matrix fragments), and each lane's asynchronous
// copies.
#include <bit>
#include <cstring>

#include "fibers.h"

namespace {

float bf16(unsigned pair, int half) { return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000u); }

/// TF32 ignores the thirteen lowest bits of a float.
float tf32(unsigned bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

/// Shuffles between the lanes of a group. A lane outside of it has nothing to give: what it would is NaN.
void shuffle(EmuThread* lanes[32], unsigned group, EmuOp op) {
    for (int lane = 0; lane < 32; lane++) {
        if ((group >> lane & 1) == 0) continue;
        EmuCollective& mine = lanes[lane]->collective;
        const int first = lane & ~(mine.width - 1);
        int from = lane;
        if (op == EmuOp::Shuffle) from = first + (mine.argument & (mine.width - 1));
        if (op == EmuOp::ShuffleXor) from = lane ^ mine.argument;
        if (op == EmuOp::ShuffleUp) from = lane - mine.argument;
        if (op == EmuOp::ShuffleDown) from = lane + mine.argument;
        // Beyond its segment a lane keeps its own value; xor may look into an earlier segment.
        const bool outside = from >= first + mine.width || (from < first && op != EmuOp::ShuffleXor);
        if (outside) from = lane;
        mine.result = (group >> from & 1) != 0 ? lanes[from]->collective.value : ~0ull;
    }
}

/// d = a b + c for the 16x8 tile of a warp. Lane l holds of each fragment what the PTX manual gives to group l / 4 and
/// to its member l % 4. Sums are exact to a rounding.
template <int K, class A, class B> void matrix(EmuThread* lanes[32], A a_at, B b_at) {
    float a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const EmuCollective& mine = lanes[lane]->collective;
        const int group = lane / 4, member = lane % 4;
        for (int i = 0; i < 4; i++) {
            a_at(a, mine.a[i], group + 8 * (i % 2), member, i / 2);
            d[group + 8 * (i / 2)][2 * member + i % 2] = mine.c[i];
        }
        for (int i = 0; i < 2; i++) b_at(b, mine.b[i], group, member, i);
    }
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            double sum = d[row][column];
            for (int k = 0; k < K; k++) sum += static_cast<double>(a[row][k]) * b[k][column];
            d[row][column] = static_cast<float>(sum);
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) lanes[lane]->collective.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

void load_matrices(Worker& worker, EmuThread* lanes[32], bool transposed) {
    const int count = lanes[0]->collective.argument;
    uint16_t rows[8][8];
    for (int number = 0; number < count; number++) {
        for (int row = 0; row < 8; row++) {
            const EmuCollective& owner = lanes[8 * number + row]->collective;
            if (reinterpret_cast<uintptr_t>(owner.row) % 16 != 0)
                worker.fail(CUDA_ERROR_MISALIGNED_ADDRESS, "ldmatrix: a row that is not 16-byte aligned", &owner.place);
            std::memcpy(rows[row], owner.row, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const unsigned low = transposed ? rows[j][i] : rows[i][j];
            const unsigned high = transposed ? rows[j + 1][i] : rows[i][j + 1];
            lanes[lane]->collective.loaded[number] = low | high << 16;
        }
    }
}

} // namespace

const char* name_of(EmuOp op) {
    switch (op) {
    case EmuOp::SyncWarp: return "__syncwarp";
    case EmuOp::Shuffle: return "__shfl_sync";
    case EmuOp::ShuffleUp: return "__shfl_up_sync";
    case EmuOp::ShuffleDown: return "__shfl_down_sync";
    case EmuOp::ShuffleXor: return "__shfl_xor_sync";
    case EmuOp::Ballot: return "a vote";
    case EmuOp::MmaBf16:
    case EmuOp::MmaTf32: return "mma";
    case EmuOp::LoadMatrix:
    case EmuOp::LoadMatrixTransposed: return "ldmatrix";
    }
    return "?";
}

void perform(Worker& worker, Warp& warp, unsigned group) {
    Fiber* fibers = worker.fibers + 32 * (&warp - worker.warps);
    EmuThread* lanes[32];
    for (int lane = 0; lane < 32; lane++) lanes[lane] = &fibers[lane];
    const EmuCollective& one = lanes[std::countr_zero(group)]->collective;
    const bool whole = one.op == EmuOp::MmaBf16 || one.op == EmuOp::MmaTf32 || one.op == EmuOp::LoadMatrix ||
        one.op == EmuOp::LoadMatrixTransposed;
    if (whole && group != ~0u)
        worker.fail(CUDA_ERROR_LAUNCH_FAILED, std::string(name_of(one.op)) + " needs all 32 lanes", &one.place);

    switch (one.op) {
    case EmuOp::SyncWarp: break;
    case EmuOp::Shuffle:
    case EmuOp::ShuffleUp:
    case EmuOp::ShuffleDown:
    case EmuOp::ShuffleXor: shuffle(lanes, group, one.op); break;
    case EmuOp::Ballot: {
        unsigned votes = 0;
        for (unsigned rest = group; rest != 0; rest &= rest - 1) {
            const int lane = std::countr_zero(rest);
            votes |= static_cast<unsigned>(lanes[lane]->collective.value) << lane;
        }
        for (unsigned rest = group; rest != 0; rest &= rest - 1)
            lanes[std::countr_zero(rest)]->collective.result = votes;
        break;
    }
    case EmuOp::MmaBf16:
        matrix<16>(
            lanes,
            [](auto& a, unsigned pair, int row, int member, int half) {
                for (int i = 0; i < 2; i++) a[row][8 * half + 2 * member + i] = bf16(pair, i);
            },
            [](auto& b, unsigned pair, int column, int member, int half) {
                for (int i = 0; i < 2; i++) b[8 * half + 2 * member + i][column] = bf16(pair, i);
            });
        break;
    case EmuOp::MmaTf32:
        matrix<8>(
            lanes,
            [](auto& a, unsigned bits, int row, int member, int half) { a[row][4 * half + member] = tf32(bits); },
            [](auto& b, unsigned bits, int column, int member, int half) {
                b[4 * half + member][column] = tf32(bits);
            });
        break;
    case EmuOp::LoadMatrix: load_matrices(worker, lanes, false); break;
    case EmuOp::LoadMatrixTransposed: load_matrices(worker, lanes, true); break;
    }
}

// A copy happens as late as it may: in the wait that covers its group. A kernel that reads too early reads NaN.

void emu_copy_async(EmuThread* self, void* shared, const void* global, int bytes, int source_bytes, EmuPlace place) {
    Fiber& fiber = *static_cast<Fiber*>(self);
    if (bytes != 4 && bytes != 8 && bytes != 16)
        fiber.worker->fail(CUDA_ERROR_LAUNCH_FAILED, "cp.async copies 4, 8 or 16 bytes", &place);
    if (source_bytes < 0 || source_bytes > bytes)
        fiber.worker->fail(CUDA_ERROR_LAUNCH_FAILED, "cp.async reads no more bytes than it copies", &place);
    const auto aligned = [bytes](const void* p) {
        return reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
    };
    if (!aligned(shared) || (source_bytes > 0 && !aligned(global)))
        fiber.worker->fail(CUDA_ERROR_MISALIGNED_ADDRESS, "cp.async: misaligned address", &place);
    fiber.copies.push_back({shared, global, bytes, source_bytes, fiber.groups});
}

void emu_copy_commit(EmuThread* self) { static_cast<Fiber*>(self)->groups++; }

void emu_copy_wait(EmuThread* self, int groups_left) {
    Fiber& fiber = *static_cast<Fiber*>(self);
    size_t done = 0;
    for (const Fiber::Copy& copy : fiber.copies) {
        if (copy.group >= fiber.groups - groups_left) break;
        std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
        std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.source_bytes));
        done++;
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(done));
}
