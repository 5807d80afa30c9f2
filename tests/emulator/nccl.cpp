// An emulated NCCL: ranks are processes of one machine, and bytes go through shared memory. What NCCL has as one operation on
// a stream is one piece of work that enters the emulated stream; all ranks have to bring the same one.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"

#define NCCL_API extern "C" __attribute__((visibility("default"))) ncclResult

enum ncclResult : int { ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInvalidArgument = 4 };

struct Id {
    char bytes[128];
};

namespace {

constexpr int MOST_RANKS = 16;
constexpr size_t ROOM = size_t(64) << 20;
constexpr auto PATIENCE = std::chrono::seconds(60);

/// What a rank brings: the kind of operation, and bytes for each rank.
struct Seat {
    std::atomic<uint64_t> round;
    uint64_t kind;
    uint64_t bytes;
};

struct Table {
    Seat seats[MOST_RANKS];
};

struct Communicator {
    int world, rank;
    Table* table;
    /// Of every rank, what it brings.
    char* data;
    uint64_t round = 0;

    /// Waits until all have come as often as this rank.
    bool meet() {
        table->seats[rank].round.store(++round, std::memory_order_release);
        const auto begin = std::chrono::steady_clock::now();
        for (int other = 0; other < world; other++) {
            while (table->seats[other].round.load(std::memory_order_acquire) < round) {
                if (std::chrono::steady_clock::now() - begin > PATIENCE) return false;
                std::this_thread::sleep_for(std::chrono::microseconds(20));
            }
        }
        return true;
    }

    char* of(int rank) { return data + size_t(rank) * ROOM; }
};

/// A send or a receive of a group.
struct Part {
    bool sends;
    uint64_t address;
    size_t bytes;
    int peer;
    Communicator* comm;
    CUstream stream;
};

thread_local int depth = 0;
thread_local std::vector<Part> group;

bool fits(uint64_t address, size_t bytes) { return bytes == 0 || is_device_range(address, bytes); }

/// All ranks bring `kind` and `bytes`, or none goes on.
bool agree(Communicator& comm, uint64_t kind, uint64_t bytes) {
    comm.table->seats[comm.rank].kind = kind;
    comm.table->seats[comm.rank].bytes = bytes;
    if (!comm.meet()) return false;
    bool same = true;
    for (int other = 0; other < comm.world; other++)
        same &= comm.table->seats[other].kind == kind && comm.table->seats[other].bytes == bytes;
    return same;
}

CUresult gather(Communicator& comm, uint64_t from, uint64_t to, size_t bytes) {
    if (!fits(from, bytes) || !fits(to, bytes * comm.world)) return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t start = 0; start < bytes || start == 0; start += ROOM) {
        const size_t part = std::min(ROOM, bytes - start);
        std::memcpy(comm.of(comm.rank), reinterpret_cast<char*>(from) + start, part);
        if (!agree(comm, 1, bytes)) return CUDA_ERROR_LAUNCH_FAILED;
        for (int rank = 0; rank < comm.world; rank++)
            std::memcpy(reinterpret_cast<char*>(to) + rank * bytes + start, comm.of(rank), part);
        if (!comm.meet()) return CUDA_ERROR_LAUNCH_FAILED;
    }
    return CUDA_SUCCESS;
}

/// Sums in another order than that of ranks, as nobody may rely on one.
CUresult reduce_scatter(Communicator& comm, uint64_t from, uint64_t to, size_t count) {
    const size_t most = ROOM / comm.world / sizeof(float);
    if (!fits(from, count * comm.world * sizeof(float)) || !fits(to, count * sizeof(float))) return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t start = 0; start < count || start == 0; start += most) {
        const size_t piece = std::min(most, count - start);
        for (int peer = 0; peer < comm.world; peer++)
            std::memcpy(comm.of(comm.rank) + peer * most * sizeof(float), reinterpret_cast<float*>(from) + peer * count + start,
                        piece * sizeof(float));
        if (!agree(comm, 3, count)) return CUDA_ERROR_LAUNCH_FAILED;
        auto* sum = reinterpret_cast<float*>(to) + start;
        for (int rank = comm.world - 1; rank >= 0; rank--) {
            const auto* own = reinterpret_cast<float*>(comm.of(rank)) + comm.rank * most;
            for (size_t i = 0; i < piece; i++) sum[i] = rank == comm.world - 1 ? own[i] : sum[i] + own[i];
        }
        if (!comm.meet()) return CUDA_ERROR_LAUNCH_FAILED;
    }
    return CUDA_SUCCESS;
}

CUresult exchange(const std::vector<Part>& parts) {
    Communicator& comm = *parts[0].comm;
    const size_t bytes = parts[0].bytes, most = ROOM / comm.world;
    for (const Part& part : parts)
        if (part.bytes != bytes || !fits(part.address, bytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t start = 0; start < bytes || start == 0; start += most) {
        const size_t piece = std::min(most, bytes - start);
        for (const Part& part : parts)
            if (part.sends)
                std::memcpy(comm.of(comm.rank) + part.peer * most, reinterpret_cast<char*>(part.address) + start, piece);
        if (!agree(comm, 2, bytes)) return CUDA_ERROR_LAUNCH_FAILED;
        for (const Part& part : parts)
            if (!part.sends)
                std::memcpy(reinterpret_cast<char*>(part.address) + start, comm.of(part.peer) + comm.rank * most, piece);
        if (!comm.meet()) return CUDA_ERROR_LAUNCH_FAILED;
    }
    return CUDA_SUCCESS;
}

CUresult broadcast(Communicator& comm, uint64_t from, uint64_t to, size_t bytes, int root) {
    if (!fits(comm.rank == root ? from : to, bytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t start = 0; start < bytes || start == 0; start += ROOM) {
        const size_t piece = std::min(size_t(ROOM), bytes - start);
        if (comm.rank == root) std::memcpy(comm.of(root), reinterpret_cast<char*>(from) + start, piece);
        if (!agree(comm, 4 + root, bytes)) return CUDA_ERROR_LAUNCH_FAILED;
        if (comm.rank != root) std::memcpy(reinterpret_cast<char*>(to) + start, comm.of(root), piece);
        if (!comm.meet()) return CUDA_ERROR_LAUNCH_FAILED;
    }
    return CUDA_SUCCESS;
}

ncclResult given(CUresult result) { return result == CUDA_SUCCESS ? ncclSuccess : ncclUnhandledCudaError; }

/// One send and one receive for every rank, as a group has that exchanges pieces.
bool whole(const std::vector<Part>& parts) {
    const Communicator& comm = *parts[0].comm;
    std::vector<int> sent(comm.world), received(comm.world);
    for (const Part& part : parts) {
        if (part.comm != parts[0].comm || part.stream != parts[0].stream) return false;
        if (part.peer < 0 || part.peer >= comm.world) return false;
        (part.sends ? sent : received)[part.peer]++;
    }
    for (int rank = 0; rank < comm.world; rank++)
        if (sent[rank] != 1 || received[rank] != 1) return false;
    return true;
}

ncclResult part(bool sends, uint64_t address, size_t count, int type, int peer, Communicator* comm, CUstream stream) {
    if (type != 0 || depth == 0) return ncclInvalidArgument;
    group.push_back({sends, address, count, peer, comm, stream});
    return ncclSuccess;
}

} // namespace

NCCL_API ncclGetVersion(int* version) {
    *version = 22'300;
    return ncclSuccess;
}

extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(ncclResult result) {
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    default: return "invalid argument";
    }
}

NCCL_API ncclGetUniqueId(Id* id) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    std::snprintf(id->bytes, sizeof id->bytes, "/cuda-emulator-%d-%lld", int(getpid()), static_cast<long long>(now));
    return ncclSuccess;
}

NCCL_API ncclCommInitRank(Communicator** comm, int world, Id id, int rank) {
    if (world < 1 || world > MOST_RANKS || rank < 0 || rank >= world) return ncclInvalidArgument;
    const size_t bytes = sizeof(Table) + world * ROOM;
    const int file = shm_open(id.bytes, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return ncclSystemError;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return ncclSystemError;
    auto* table = static_cast<Table*>(memory);
    *comm = new Communicator{world, rank, table, static_cast<char*>(memory) + sizeof(Table)};
    if (!(*comm)->meet()) return ncclSystemError;
    // All have it; the name is not needed any more.
    shm_unlink(id.bytes);
    return ncclSuccess;
}

NCCL_API ncclAllGather(uint64_t from, uint64_t to, size_t count, int type, Communicator* comm, CUstream stream) {
    if (type != 0) return ncclInvalidArgument;
    return given(enqueue(stream, NodeType::Kernel, [=] { return gather(*comm, from, to, count); }));
}

NCCL_API ncclReduceScatter(uint64_t from, uint64_t to, size_t count, int type, int operation, Communicator* comm,
                           CUstream stream) {
    if (type != 7 || operation != 0) return ncclInvalidArgument;
    return given(enqueue(stream, NodeType::Kernel, [=] { return reduce_scatter(*comm, from, to, count); }));
}

/// In a group too: ranks give them in the same order.
NCCL_API ncclBroadcast(uint64_t from, uint64_t to, size_t count, int type, int root, Communicator* comm, CUstream stream) {
    if (type != 0 || root < 0 || root >= comm->world) return ncclInvalidArgument;
    return given(enqueue(stream, NodeType::Kernel, [=] { return broadcast(*comm, from, to, count, root); }));
}

NCCL_API ncclGroupStart() {
    depth++;
    return ncclSuccess;
}

NCCL_API ncclSend(uint64_t from, size_t count, int type, int peer, Communicator* comm, CUstream stream) {
    return part(true, from, count, type, peer, comm, stream);
}

NCCL_API ncclRecv(uint64_t to, size_t count, int type, int peer, Communicator* comm, CUstream stream) {
    return part(false, to, count, type, peer, comm, stream);
}

NCCL_API ncclGroupEnd() {
    if (depth == 0) return ncclInvalidArgument;
    if (--depth > 0 || group.empty()) return ncclSuccess;
    std::vector<Part> parts;
    parts.swap(group);
    if (!whole(parts)) return ncclInvalidArgument;
    return given(enqueue(parts[0].stream, NodeType::Kernel, [parts] { return exchange(parts); }));
}
