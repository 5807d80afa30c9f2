// What the parts of the emulated driver share: the lock, handles, memory ranges, and how work enters a stream.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_set>

#include "results.h"

/// For functions that the emulated cuBLASLt calls.
#define SHARED __attribute__((visibility("default")))
#define API extern "C" __attribute__((visibility("default"))) CUresult

using CUdeviceptr = uint64_t;
using CUstream = void*;

/// One call at a time: whatever a call starts has ended when it returns, unless a stream captures it.
SHARED std::recursive_mutex& driver_lock();
/// Not initialised, no context on this thread, or an earlier kernel's fault, which ends a process's use of CUDA.
SHARED CUresult check_context();
/// Keeps a kernel's fault for all later calls.
void set_fault(CUresult error);

/// Opens a function that needs a context.
#define ENTER                               \
    std::lock_guard entered(driver_lock()); \
    if (const CUresult error = check_context(); error != CUDA_SUCCESS) return error

#define TRY(call) \
    if (const CUresult error = (call); error != CUDA_SUCCESS) return error

/// The objects behind a kind of handle.
template <class T> struct Handles {
    std::unordered_set<T*> alive;

    template <class... A> T* create(A&&... a) { return *alive.insert(new T{std::forward<A>(a)...}).first; }
    T* find(void* handle) const {
        auto* object = static_cast<T*>(handle);
        return alive.contains(object) ? object : nullptr;
    }
    CUresult destroy(void* handle) {
        T* object = find(handle);
        if (object == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        alive.erase(object);
        delete object;
        return CUDA_SUCCESS;
    }
};

// Memory (memory.cpp).

/// Whether all of these bytes lie in device memory that is allocated or mapped.
SHARED bool is_device_range(CUdeviceptr address, size_t bytes);
/// A global variable of a module becomes device memory, and stops being it.
void add_global(CUdeviceptr address, size_t bytes);
void remove_global(CUdeviceptr address);

// Streams (stream.cpp).

/// CUDA's numbers of the kinds of graph nodes.
enum class NodeType : int {
    Kernel = 0,
    Memcpy = 1,
    Memset = 2,
    EventRecord = 7
};

/// Does the work now, or records it if the stream captures. The work's own error is returned; a fault of a kernel is
/// asynchronous, as on a GPU: it shows in the next call, unless CUDA_LAUNCH_BLOCKING is set.
SHARED CUresult enqueue(CUstream stream, NodeType type, std::function<CUresult()> work);
bool is_capturing(CUstream stream);
/// For what a capturing stream cannot record.
CUresult invalidate_capture(CUstream stream);
/// For calls that CUDA forbids while a capture is under way: fails, and invalidates the capture.
CUresult forbid_during_capture();
