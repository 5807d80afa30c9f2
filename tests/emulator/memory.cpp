// Device memory: host memory that is counted, filled with NaN, fenced by guard pages, and checked in every copy.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"

namespace {

constexpr size_t PAGE = 4096, GRANULARITY = 2 << 20;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

/// What cuMemCreate made: memory without an address. It lives until it is released and nowhere mapped.
struct Physical {
    int file;
    size_t size;
    int mappings = 0;
    bool released = false;
};

/// A range of addresses that may be used. Its size is what was asked for.
struct Range {
    enum {
        Allocated,
        Mapped,
        Pinned,
        Global
    } kind;
    size_t size;
    Physical* physical = nullptr;
};

std::map<uint64_t, Range> ranges;
std::map<uint64_t, size_t> reservations;
Handles<Physical> physicals;
size_t used = 0;

size_t total() {
    static const size_t bytes = [] {
        const char* mebibytes = std::getenv("CUDA_EMULATOR_MEMORY");
        return (mebibytes == nullptr ? 8192 : std::strtoull(mebibytes, nullptr, 10)) << 20;
    }();
    return bytes;
}

/// The last range that begins at or before an address, if the address lies in it.
auto containing(uint64_t address) {
    auto range = ranges.upper_bound(address);
    if (range == ranges.begin()) return ranges.end();
    --range;
    return address < range->first + range->second.size ? range : ranges.end();
}

/// Ranges that touch count as one: an arena may grow by mapping behind its end.
bool covered(uint64_t address, size_t bytes, bool pinned) {
    const uint64_t end = address + bytes;
    while (address < end) {
        const auto range = containing(address);
        if (range == ranges.end() || (range->second.kind == Range::Pinned) != pinned) return false;
        address = range->first + range->second.size;
    }
    return true;
}

/// An allocation ends at a guard page, up to the 256 bytes to which CUDA aligns, and begins behind another.
CUresult allocate(CUdeviceptr* address, size_t bytes) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const size_t size = round_up(bytes, 256), pages = round_up(size, PAGE);
    if (used + size > total()) return CUDA_ERROR_OUT_OF_MEMORY;
    void* memory = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char* first = static_cast<char*>(memory) + PAGE;
    mprotect(first, pages, PROT_READ | PROT_WRITE);
    std::memset(first, 0xff, pages);
    *address = reinterpret_cast<uint64_t>(first + pages - size);
    ranges[*address] = {Range::Allocated, bytes};
    used += size;
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
    if (address == 0) return CUDA_SUCCESS;
    const auto range = ranges.find(address);
    if (range == ranges.end() || range->second.kind != Range::Allocated) return CUDA_ERROR_INVALID_VALUE;
    const size_t size = round_up(range->second.size, 256), pages = round_up(size, PAGE);
    munmap(reinterpret_cast<void*>(address + size - pages - PAGE), pages + 2 * PAGE);
    ranges.erase(range);
    used -= size;
    return CUDA_SUCCESS;
}

void free_if_unused(Physical* physical) {
    if (!physical->released || physical->mappings > 0) return;
    used -= physical->size;
    close(physical->file);
    physicals.destroy(physical);
}

enum class Direction {
    HostToDevice,
    DeviceToHost,
    DeviceToDevice
};

CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t bytes, Direction direction) {
    if (direction != Direction::DeviceToHost && !is_device_range(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    if (direction != Direction::HostToDevice && !is_device_range(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return CUDA_SUCCESS;
}

/// A copy that a graph is to repeat needs a host side that stays. Stricter than CUDA: it has to be pinned memory.
CUresult copy_async(CUdeviceptr to, CUdeviceptr from, size_t bytes, Direction direction, CUstream stream) {
    const uint64_t host = direction == Direction::HostToDevice ? from : to;
    if (is_capturing(stream) && direction != Direction::DeviceToDevice && !covered(host, bytes, true))
        return invalidate_capture(stream);
    return enqueue(stream, NodeType::Memcpy, [=] { return copy(to, from, bytes, direction); });
}

template <class T> CUresult fill(CUdeviceptr address, T value, size_t count) {
    if (address % sizeof(T) != 0 || !is_device_range(address, count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
    std::fill_n(reinterpret_cast<T*>(address), count, value);
    return CUDA_SUCCESS;
}

} // namespace

bool is_device_range(CUdeviceptr address, size_t bytes) { return covered(address, bytes, false); }
void add_global(CUdeviceptr address, size_t bytes) { ranges[address] = {Range::Global, bytes}; }
void remove_global(CUdeviceptr address) { ranges.erase(address); }

API cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = total();
    return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
API cuMemGetInfo_v2(size_t* free, size_t* all) {
    ENTER;
    *free = total() - used, *all = total();
    return CUDA_SUCCESS;
}

// Allocations.

API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    ENTER;
    TRY(forbid_during_capture());
    return allocate(address, bytes);
}
API cuMemFree_v2(CUdeviceptr address) {
    ENTER;
    TRY(forbid_during_capture());
    return release(address);
}
// A graph could own memory; the emulator's cannot.
API cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
    ENTER;
    return is_capturing(stream) ? CUDA_ERROR_NOT_SUPPORTED : allocate(address, bytes);
}
API cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    ENTER;
    return is_capturing(stream) ? CUDA_ERROR_NOT_SUPPORTED : release(address);
}
API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    ENTER;
    TRY(forbid_during_capture());
    *memory = std::aligned_alloc(PAGE, round_up(bytes, PAGE));
    if (*memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    ranges[reinterpret_cast<uint64_t>(*memory)] = {Range::Pinned, bytes};
    return CUDA_SUCCESS;
}
API cuMemFreeHost(void* memory) {
    ENTER;
    const auto range = ranges.find(reinterpret_cast<uint64_t>(memory));
    if (range == ranges.end() || range->second.kind != Range::Pinned) return CUDA_ERROR_INVALID_VALUE;
    ranges.erase(range);
    std::free(memory);
    return CUDA_SUCCESS;
}

// Virtual memory management.

API cuMemGetAllocationGranularity(size_t* granularity, const void*, int) {
    ENTER;
    *granularity = GRANULARITY;
    return CUDA_SUCCESS;
}
API cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
    ENTER;
    if (bytes == 0 || bytes % GRANULARITY != 0) return CUDA_ERROR_INVALID_VALUE;
    // Aligned to the granularity, as real ones are: what is too much at both ends is given back.
    void* memory = mmap(nullptr, bytes + GRANULARITY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    const uint64_t begin = reinterpret_cast<uint64_t>(memory);
    *address = round_up(begin, GRANULARITY);
    if (*address > begin) munmap(memory, *address - begin);
    if (*address < begin + GRANULARITY)
        munmap(reinterpret_cast<void*>(*address + bytes), begin + GRANULARITY - *address);
    reservations[*address] = bytes;
    return CUDA_SUCCESS;
}
API cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    ENTER;
    const auto reservation = reservations.find(address);
    if (reservation == reservations.end() || reservation->second != bytes) return CUDA_ERROR_INVALID_VALUE;
    const auto mapped = ranges.lower_bound(address);
    if (mapped != ranges.end() && mapped->first < address + bytes) return CUDA_ERROR_INVALID_VALUE;
    munmap(reinterpret_cast<void*>(address), bytes);
    reservations.erase(reservation);
    return CUDA_SUCCESS;
}
API cuMemCreate(Physical** handle, size_t bytes, const void*, unsigned long long) {
    ENTER;
    if (bytes == 0 || bytes % GRANULARITY != 0) return CUDA_ERROR_INVALID_VALUE;
    if (used + bytes > total()) return CUDA_ERROR_OUT_OF_MEMORY;
    const int file = memfd_create("device memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(memory, 0xff, bytes);
    munmap(memory, bytes);
    *handle = physicals.create(file, bytes);
    used += bytes;
    return CUDA_SUCCESS;
}
API cuMemRelease(Physical* handle) {
    ENTER;
    Physical* physical = physicals.find(handle);
    if (physical == nullptr || physical->released) return CUDA_ERROR_INVALID_VALUE;
    physical->released = true;
    free_if_unused(physical);
    return CUDA_SUCCESS;
}
API cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, Physical* handle, unsigned long long) {
    ENTER;
    Physical* physical = physicals.find(handle);
    auto reservation = reservations.upper_bound(address);
    if (physical == nullptr || reservation == reservations.begin()) return CUDA_ERROR_INVALID_VALUE;
    --reservation;
    if (offset != 0 || bytes != physical->size || address + bytes > reservation->first + reservation->second)
        return CUDA_ERROR_INVALID_VALUE;
    const auto next = ranges.lower_bound(address);
    if (containing(address) != ranges.end() || (next != ranges.end() && next->first < address + bytes))
        return CUDA_ERROR_INVALID_VALUE;
    void* memory = mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->file, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    ranges[address] = {Range::Mapped, bytes, physical};
    physical->mappings++;
    return CUDA_SUCCESS;
}
API cuMemUnmap(CUdeviceptr address, size_t bytes) {
    ENTER;
    TRY(forbid_during_capture());
    const uint64_t end = address + bytes;
    for (uint64_t at = address; at < end;) {
        const auto range = ranges.find(at);
        if (range == ranges.end() || range->second.kind != Range::Mapped) return CUDA_ERROR_INVALID_VALUE;
        at += range->second.size;
    }
    mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    for (auto range = ranges.find(address); range != ranges.end() && range->first < end; range = ranges.erase(range)) {
        range->second.physical->mappings--;
        free_if_unused(range->second.physical);
    }
    return CUDA_SUCCESS;
}
API cuMemSetAccess(CUdeviceptr address, size_t bytes, const void*, size_t count) {
    ENTER;
    if (count == 0 || !is_device_range(address, bytes)) return CUDA_ERROR_INVALID_VALUE;
    mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}

// Copies and fills. The forms without a stream wait for the device, which a capture does not allow.

API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    ENTER;
    TRY(forbid_during_capture());
    return copy(to, reinterpret_cast<uint64_t>(from), bytes, Direction::HostToDevice);
}
API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    ENTER;
    TRY(forbid_during_capture());
    return copy(reinterpret_cast<uint64_t>(to), from, bytes, Direction::DeviceToHost);
}
API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    ENTER;
    TRY(forbid_during_capture());
    return copy(to, from, bytes, Direction::DeviceToDevice);
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    ENTER;
    return copy_async(to, reinterpret_cast<uint64_t>(from), bytes, Direction::HostToDevice, stream);
}
API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    return copy_async(reinterpret_cast<uint64_t>(to), from, bytes, Direction::DeviceToHost, stream);
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    return copy_async(to, from, bytes, Direction::DeviceToDevice, stream);
}

#define MEMSET(name, T)                                                                        \
    API name##_v2(CUdeviceptr address, T value, size_t count) {                                \
        ENTER;                                                                                 \
        TRY(forbid_during_capture());                                                          \
        return fill(address, value, count);                                                    \
    }                                                                                          \
    API name##Async(CUdeviceptr address, T value, size_t count, CUstream stream) {             \
        ENTER;                                                                                 \
        return enqueue(stream, NodeType::Memset, [=] { return fill(address, value, count); }); \
    }
MEMSET(cuMemsetD8, uint8_t)
MEMSET(cuMemsetD16, uint16_t)
MEMSET(cuMemsetD32, uint32_t)
