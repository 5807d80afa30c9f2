// cuBLASLt: handles, descriptors with their attributes, "algorithms", and matmul as a node of a stream.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "driver.h"
#include "product.h"
#include "version.h"

enum cublasStatus_t : int {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};

#define LT_API extern "C" __attribute__((visibility("default"))) cublasStatus_t

namespace {

// Numbers of attributes.
enum : int {
    COMPUTE_TYPE = 0, SCALE_TYPE = 1, POINTER_MODE = 2, TRANS_A = 3, TRANS_B = 4, TRANS_C = 5, EPILOGUE = 7,
    BIAS_POINTER = 8, BIAS_BATCH_STRIDE = 10, AUX_POINTER = 11, AUX_LD = 12, AUX_BATCH_STRIDE = 13, AUX_TYPE = 22, BIAS_TYPE = 26,
};
enum : int { LAYOUT_TYPE = 0, ORDER = 1, ROWS = 2, COLUMNS = 3, LD = 4, BATCH_COUNT = 5, BATCH_OFFSET = 6 };
// Bits of epilogues, and computations.
enum : int { RELU = 2, BIAS = 4, GELU = 32, DGELU = 64, AUX = 128, BGRAD = 16, BGRAD_A = 256, BGRAD_B = 512 };
enum : int { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };

/// A descriptor is its attributes; those that nobody has set are 0.
struct Attributes {
    std::map<int, int64_t> values;

    int64_t get(int name, int64_t otherwise = 0) const {
        const auto found = values.find(name);
        return found == values.end() ? otherwise : found->second;
    }
    /// Attributes are of 4 or 8 bytes; those of 4 are not negative.
    cublasStatus_t set(int name, const void* value, size_t bytes) {
        if (value == nullptr || (bytes != 4 && bytes != 8)) return CUBLAS_STATUS_INVALID_VALUE;
        int64_t wide = 0;
        std::memcpy(&wide, value, bytes);
        values[name] = wide;
        return CUBLAS_STATUS_SUCCESS;
    }
};

struct Algorithm {
    uint64_t data[8];
};
constexpr uint64_t ALGORITHM = 0x656d756c61746564;

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    cublasStatus_t state;
    float waves;
    int reserved[4];
};

std::optional<View> view(const Attributes& layout, uint64_t address) {
    const auto type = static_cast<Type>(layout.get(LAYOUT_TYPE));
    const int64_t order = layout.get(ORDER), ld = layout.get(LD);
    if ((type != Type::F32 && type != Type::BF16) || order > 1) return {};
    if (ld < layout.get(order == 0 ? ROWS : COLUMNS)) return {};
    return View{type,
                address,
                layout.get(ROWS),
                layout.get(COLUMNS),
                order == 0 ? 1 : ld,
                order == 0 ? ld : 1,
                layout.get(BATCH_OFFSET)};
}

struct Operands {
    const Attributes *desc, *a, *b, *c, *d;
};

/// The product that descriptors describe, or why there is none. Scalars are left open.
cublasStatus_t describe(const Operands& o, Product& p, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    for (const Attributes* each : {o.desc, o.a, o.b, o.c, o.d})
        if (each == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    const int64_t compute = o.desc->get(COMPUTE_TYPE), epilogue = o.desc->get(EPILOGUE, 1);
    const auto va = view(*o.a, a), vb = view(*o.b, b), vc = view(*o.c, c), vd = view(*o.d, d);
    if (!va || !vb || !vc || !vd) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC && compute != COMPUTE_32F_FAST_TF32)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (va->type != vb->type || vc->type != vd->type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (va->type == Type::F32 && vd->type != Type::F32) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (o.desc->get(SCALE_TYPE) != 0 || o.desc->get(TRANS_C) != 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    p.a = o.desc->get(TRANS_A) != 0 ? va->transposed() : *va;
    p.b = o.desc->get(TRANS_B) != 0 ? vb->transposed() : *vb;
    p.c = *vc, p.d = *vd;
    const bool fits = p.a.rows == p.d.rows && p.b.columns == p.d.columns && p.a.columns == p.b.rows &&
        p.c.rows == p.d.rows && p.c.columns == p.d.columns;
    if (!fits || p.d.rows <= 0 || p.d.columns <= 0 || p.a.columns <= 0) return CUBLAS_STATUS_INVALID_VALUE;
    p.batches = o.d->get(BATCH_COUNT, 1);
    for (const Attributes* each : {o.a, o.b, o.c})
        if (each->get(BATCH_COUNT, 1) != p.batches) return CUBLAS_STATUS_INVALID_VALUE;
    p.tf32 = compute == COMPUTE_32F_FAST_TF32 && p.a.type == Type::F32;

    constexpr int64_t known = 1 | RELU | BIAS | GELU | DGELU | AUX | BGRAD | BGRAD_A | BGRAD_B;
    const auto has = [epilogue](int64_t bits) { return (epilogue & bits) != 0; };
    // ReLU with a mask is of no use to anybody here.
    if (has(~known) || (has(AUX) && !has(GELU | DGELU))) return CUBLAS_STATUS_NOT_SUPPORTED;
    p.activation = has(DGELU) ? Activation::GeluGradient
        : has(GELU)           ? Activation::Gelu
        : has(RELU)           ? Activation::Relu
                              : Activation::None;
    p.bias_gradient = has(BGRAD_A) ? BiasGradient::OfA
        : has(BGRAD_B)             ? BiasGradient::OfB
        : has(BGRAD)               ? BiasGradient::OfResult
                                   : BiasGradient::None;
    p.has_bias = has(BIAS);
    p.has_auxiliary = has(AUX);
    const auto pointer = [&](int name) { return static_cast<uint64_t>(o.desc->get(name)); };
    const auto type = static_cast<int64_t>(p.d.type);
    if (o.desc->get(BIAS_TYPE, type) != type || o.desc->get(AUX_TYPE, type) != type) return CUBLAS_STATUS_NOT_SUPPORTED;
    const int64_t biases = p.bias_gradient == BiasGradient::OfB ? p.d.columns : p.d.rows;
    p.bias = {p.d.type, pointer(BIAS_POINTER), biases, 1, 1, 0, o.desc->get(BIAS_BATCH_STRIDE)};
    const int64_t ld = o.desc->get(AUX_LD);
    if (p.has_auxiliary && ld < p.d.rows) return CUBLAS_STATUS_INVALID_VALUE;
    p.auxiliary = {p.d.type, pointer(AUX_POINTER), p.d.rows, p.d.columns, 1, ld, o.desc->get(AUX_BATCH_STRIDE)};
    return CUBLAS_STATUS_SUCCESS;
}

/// Whether all operands lie in device memory; a real product would fault where they do not.
CUresult check_ranges(const Product& p) {
    const auto inside = [&](const char* name, const View& v) {
        if (is_device_range(v.address, v.bytes(p.batches))) return true;
        std::fprintf(stderr, "emulator: cublasLtMatmul: %s, %zu bytes at %p, is not in device memory\n", name,
                     v.bytes(p.batches), reinterpret_cast<void*>(v.address));
        return false;
    };
    const bool good = inside("A", p.a) && inside("B", p.b) && (p.beta == 0 || inside("C", p.c)) && inside("D", p.d) &&
        ((!p.has_bias && p.bias_gradient == BiasGradient::None) || inside("the bias", p.bias)) &&
        (!p.has_auxiliary || inside("the auxiliary matrix", p.auxiliary));
    return good ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

int handle;

} // namespace

LT_API cublasLtCreate(void** created) {
    std::lock_guard entered(driver_lock());
    if (check_context() != CUDA_SUCCESS) return CUBLAS_STATUS_NOT_INITIALIZED;
    *created = &handle;
    return CUBLAS_STATUS_SUCCESS;
}
LT_API cublasLtDestroy(void*) { return CUBLAS_STATUS_SUCCESS; }
extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() {
    return static_cast<size_t>(emulated_version("CUDA_EMULATOR_LIBRARIES", 13000)) * 10;
}

#define DESCRIPTOR(kind)                                                                                 \
    LT_API cublasLt##kind##Destroy(Attributes* object) {                                                 \
        delete object;                                                                                   \
        return CUBLAS_STATUS_SUCCESS;                                                                    \
    }                                                                                                    \
    LT_API cublasLt##kind##SetAttribute(Attributes* object, int name, const void* value, size_t bytes) { \
        return object->set(name, value, bytes);                                                          \
    }
DESCRIPTOR(MatmulDesc)
DESCRIPTOR(MatrixLayout)
DESCRIPTOR(MatmulPreference)

LT_API cublasLtMatmulDescCreate(Attributes** desc, int compute, int scale) {
    *desc = new Attributes{{{COMPUTE_TYPE, compute}, {SCALE_TYPE, scale}}};
    return CUBLAS_STATUS_SUCCESS;
}
LT_API cublasLtMatrixLayoutCreate(Attributes** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    *layout = new Attributes{
        {{LAYOUT_TYPE, type}, {ROWS, static_cast<int64_t>(rows)}, {COLUMNS, static_cast<int64_t>(columns)}, {LD, ld}}};
    return CUBLAS_STATUS_SUCCESS;
}
LT_API cublasLtMatmulPreferenceCreate(Attributes** preference) {
    *preference = new Attributes;
    return CUBLAS_STATUS_SUCCESS;
}

/// Into how many parts an algorithm splits its sums.
int parts_of(const Algorithm& algorithm) { return algorithm.data[1] == 0 ? 1 : 3; }

/// Proposes two algorithms. The second splits its sums, and leaves out what is no whole block of 64 terms at their end, as some
/// of cuBLASLt's do.
LT_API cublasLtMatmulAlgoGetHeuristic(void*, const Attributes* desc, const Attributes* a, const Attributes* b,
                                      const Attributes* c, const Attributes* d, const Attributes*, int wanted,
                                      Heuristic* results, int* found) {
    Product product;
    *found = 0;
    if (const auto status = describe({desc, a, b, c, d}, product, 0, 0, 0, 0); status != CUBLAS_STATUS_SUCCESS)
        return status;
    for (; *found < std::min(wanted, 2); ++*found) {
        results[*found] = {};
        results[*found].algorithm.data[0] = ALGORITHM;
        results[*found].algorithm.data[1] = static_cast<uint64_t>(*found);
        results[*found].waves = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

LT_API cublasLtMatmulAlgoCheck(void*, const Attributes* desc, const Attributes* a, const Attributes* b,
                               const Attributes* c, const Attributes* d, const Algorithm* algorithm,
                               Heuristic* result) {
    Product product;
    *result = {};
    if (algorithm == nullptr || algorithm->data[0] != ALGORITHM) return CUBLAS_STATUS_INVALID_VALUE;
    return describe({desc, a, b, c, d}, product, 0, 0, 0, 0);
}

LT_API cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int name, void* value, size_t bytes, size_t* written) {
    constexpr int SPLITK_NUM = 2;
    if (name != SPLITK_NUM || bytes != sizeof(int)) return CUBLAS_STATUS_INVALID_VALUE;
    *static_cast<int*>(value) = parts_of(*algorithm);
    if (written != nullptr) *written = sizeof(int);
    return CUBLAS_STATUS_SUCCESS;
}

LT_API cublasLtMatmul(void*, const Attributes* desc, const void* alpha, uint64_t a, const Attributes* a_layout,
                      uint64_t b, const Attributes* b_layout, const void* beta, uint64_t c, const Attributes* c_layout,
                      uint64_t d, const Attributes* d_layout, const Algorithm* algorithm, void*, size_t,
                      CUstream stream) {
    if (algorithm != nullptr && algorithm->data[0] != ALGORITHM) return CUBLAS_STATUS_INVALID_VALUE;
    Product product;
    const auto status = describe({desc, a_layout, b_layout, c_layout, d_layout}, product, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (algorithm != nullptr && parts_of(*algorithm) != 1) {
        const int64_t left_out = product.a.columns % 64;
        product.a.columns -= left_out;
        product.b.rows -= left_out;
    }
    const int64_t mode = desc->get(POINTER_MODE);
    if (mode > 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool on_device = mode == 1;
    if (!on_device) {
        product.alpha = *static_cast<const float*>(alpha);
        product.beta = *static_cast<const float*>(beta);
    }
    const CUresult result = enqueue(stream, NodeType::Kernel, [=]() mutable {
        if (on_device) {
            for (const void* scalar : {alpha, beta})
                if (!is_device_range(reinterpret_cast<uint64_t>(scalar), 4)) return CUDA_ERROR_ILLEGAL_ADDRESS;
            product.alpha = *static_cast<const float*>(alpha);
            product.beta = *static_cast<const float*>(beta);
        }
        if (const CUresult error = check_ranges(product); error != CUDA_SUCCESS) return error;
        product.compute();
        return CUDA_SUCCESS;
    });
    return result == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
