// Initialisation, the device and its attributes, contexts, error names.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"
#include "grid.h"
#include "version.h"

namespace {

bool initialised = false;
CUresult fault = CUDA_SUCCESS;
int primary_context;
thread_local void* current_context = nullptr;

/// An H100 SXM, by CUDA's numbers of the attributes. Those that are not here are 0.
int attribute_value(int attribute) {
    switch (attribute) {
    case 1: case 2: case 3: return 1024; // threads of a block; its x, y
    case 4: return 64; // its z
    case 5: return 2147483647; // grid x, y, z
    case 6: case 7: return 65535;
    case 8: return 48 << 10;        // shared memory of a block without opting in
    case 9: return 64 << 10;        // constant memory
    case 10: return 32;             // warp
    case 12: case 82: return 65536; // registers of a block, of a multiprocessor
    case 13: return 1980000;        // clock, kHz
    case 16: return 132;            // multiprocessors
    case 31: case 40: return 1;     // concurrent kernels, copy engines
    case 36: return 2619000;        // memory clock, kHz
    case 37: return 5120;           // memory bus, bits
    case 38: return 0;              // L2, which is of no use to anybody here
    case 39: return 2048;           // threads of a multiprocessor
    case 41: return 1;              // unified addressing
    case 75: return 9;              // compute capability
    case 76: return 0;
    case 78: return 1;         // stream priorities
    case 81: return 228 << 10; // shared memory of a multiprocessor
    case 97: return MAX_SHARED;
    case 102: return 1; // virtual memory management
    case 106: return 32; // blocks of a multiprocessor
    case 111: return 1 << 10; // shared memory that each block loses
    case 115: return 1; // stream-ordered allocation
    }
    return 0;
}

} // namespace

std::recursive_mutex& driver_lock() {
    static auto* lock = new std::recursive_mutex;
    return *lock;
}

CUresult check_context() {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (fault != CUDA_SUCCESS) return fault;
    return current_context == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

void set_fault(CUresult error) { fault = error; }

API cuInit(unsigned flags) {
    if (const char* error = std::getenv("CUDA_EMULATOR_INIT")) return static_cast<CUresult>(std::atoi(error));
    initialised = true;
    return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API cuDriverGetVersion(int* version) {
    *version = emulated_version("CUDA_EMULATOR_DRIVER", 13000);
    return CUDA_SUCCESS;
}

// Device.

#define NEED_DEVICE(device)                              \
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED; \
    if ((device) != 0) return CUDA_ERROR_INVALID_DEVICE

API cuDeviceGetCount(int* count) {
    NEED_DEVICE(0);
    *count = 1;
    return CUDA_SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
    NEED_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}
API cuDeviceGetName(char* name, int bytes, int device) {
    NEED_DEVICE(device);
    std::snprintf(name, static_cast<size_t>(bytes), "CUDA emulator");
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid_v2(char uuid[16], int device) {
    NEED_DEVICE(device);
    std::memcpy(uuid, "emulated on CPU", 16);
    return CUDA_SUCCESS;
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    NEED_DEVICE(device);
    *value = attribute_value(attribute);
    return CUDA_SUCCESS;
}

// Contexts. There is one, the primary context; who has retained it is of no consequence.

API cuDevicePrimaryCtxRetain(void** context, int device) {
    NEED_DEVICE(device);
    *context = &primary_context;
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    NEED_DEVICE(device);
    return CUDA_SUCCESS;
}
API cuCtxGetCurrent(void** context) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context;
    return CUDA_SUCCESS;
}
API cuCtxSetCurrent(void* context) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (context != nullptr && context != &primary_context) return CUDA_ERROR_INVALID_CONTEXT;
    current_context = context;
    return CUDA_SUCCESS;
}
API cuCtxGetDevice(int* device) {
    ENTER;
    *device = 0;
    return CUDA_SUCCESS;
}
API cuCtxSetFlags(unsigned) {
    ENTER;
    return CUDA_SUCCESS;
}
API cuCtxSynchronize() {
    ENTER;
    return forbid_during_capture();
}
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER;
    *least = 0, *greatest = -5;
    return CUDA_SUCCESS;
}

// Errors.

API cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
#define X(code, number, words) \
    case code: *name = #code; return CUDA_SUCCESS;
        FOR_EACH_RESULT(X)
#undef X
    }
    return CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
#define X(code, number, words) \
    case code: *text = words; return CUDA_SUCCESS;
        FOR_EACH_RESULT(X)
#undef X
    }
    return CUDA_ERROR_INVALID_VALUE;
}
