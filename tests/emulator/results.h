// The driver's result codes that the emulator returns, with CUDA's numbers and words.
#pragma once

#define FOR_EACH_RESULT(X)                                                                                     \
    X(CUDA_SUCCESS, 0, "no error")                                                                             \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                                                         \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                            \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                                                   \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                                                \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")                                         \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                                               \
    X(CUDA_ERROR_FILE_NOT_FOUND, 301, "file not found")                                                        \
    X(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, 303, "shared object initialization failed")                        \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                               \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                                                     \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                                           \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                             \
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch")                      \
    X(CUDA_ERROR_HARDWARE_STACK_ERROR, 714, "hardware stack error")                                            \
    X(CUDA_ERROR_MISALIGNED_ADDRESS, 716, "misaligned address")                                                \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                                             \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                                                \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")          \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")   \
    X(CUDA_ERROR_STREAM_CAPTURE_MERGE, 902, "operation would result in a merge of separate capture sequences") \
    X(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, 903, "capture was not ended in the same stream as it began")        \
    X(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                           \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream")     \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906,                                                                 \
      "operation would make the legacy stream depend on a capturing blocking stream")                          \
    X(CUDA_ERROR_CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream")

enum CUresult : int {
#define X(name, number, words) name = number,
    FOR_EACH_RESULT(X)
#undef X
};
