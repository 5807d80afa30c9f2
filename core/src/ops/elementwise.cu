// Element by element. `elements` gives each thread 16 bytes.

template <class T> __device__ void affine(T* y, const T* x, float factor, float shift, size_t n) {
    elements(y, n, [=](size_t, float x) { return x * factor + shift; }, x);
}
KERNEL(affine, (T* y, const T* x, float factor, float shift, size_t n), (y, x, factor, shift, n))

// ---- a function of one variable and its derivative, from x and y = f(x)

#define UNARY(name, f, derivative)                                                                              \
    template <class T> __device__ void unary_##name(T* out, const T* in, size_t n) {                            \
        elements(out, n, [](size_t, float x) { return f; }, in);                                                \
    }                                                                                                           \
    KERNEL(unary_##name, (T* out, const T* in, size_t n), (out, in, n))                                         \
    template <class T>                                                                                          \
    __device__ void unary_##name##_backward(T* out, const T* in, const T* value, const T* slope, size_t n) {    \
        elements(out, n, [](size_t, float x, float y, float dy) { return dy * (derivative); }, in, value, slope); \
    }                                                                                                           \
    KERNEL(unary_##name##_backward, (T* out, const T* in, const T* value, const T* slope, size_t n), (out, in, value, slope, n))

UNARY(exp, expf(x), y)
UNARY(ln, logf(x), 1.0f / x)
UNARY(sqrt, sqrtf(x), 0.5f / y)
UNARY(sin, sinf(x), cosf(x))
UNARY(cos, cosf(x), -sinf(x))
UNARY(tanh, tanhf(x), 1.0f - y * y)
UNARY(square, x* x, x + x)
UNARY(relu, x <= 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f)
UNARY(recip, 1.0f / x, -y * y)
UNARY(abs, fabsf(x), x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)
UNARY(gelu, x* gaussian(x).cdf, gaussian(x).cdf + x * gaussian(x).pdf)
UNARY(sigmoid, sigmoid(x), y*(1.0f - y))

// ---- a and b, of one shape

template <class T> __device__ void add(T* y, const T* a, const T* b, size_t n) {
    elements(y, n, [](size_t, float a, float b) { return a + b; }, a, b);
}
KERNEL(add, (T* y, const T* a, const T* b, size_t n), (y, a, b, n))

template <class T> __device__ void sub(T* y, const T* a, const T* b, size_t n) {
    elements(y, n, [](size_t, float a, float b) { return a - b; }, a, b);
}
KERNEL(sub, (T* y, const T* a, const T* b, size_t n), (y, a, b, n))

template <class T> __device__ void mul(T* y, const T* a, const T* b, size_t n) {
    elements(y, n, [](size_t, float a, float b) { return a * b; }, a, b);
}
KERNEL(mul, (T* y, const T* a, const T* b, size_t n), (y, a, b, n))

// ---- a, and b of one element (f32, or bf16 if `narrow`)

__device__ __forceinline__ float one(const void* b, int narrow) {
    return narrow ? to_float(*(const bf16*)b) : *(const float*)b;
}

template <class T> __device__ void add_one(T* y, const T* a, const void* b, int narrow, float sign, size_t n) {
    const float s = sign * one(b, narrow);
    elements(y, n, [=](size_t, float a) { return a + s; }, a);
}
KERNEL(add_one, (T* y, const T* a, const void* b, int narrow, float sign, size_t n), (y, a, b, narrow, sign, n))

template <class T> __device__ void mul_one(T* y, const T* a, const void* b, int narrow, size_t n) {
    const float s = one(b, narrow);
    elements(y, n, [=](size_t, float a) { return a * s; }, a);
}
KERNEL(mul_one, (T* y, const T* a, const void* b, int narrow, size_t n), (y, a, b, narrow, n))

// ---- what a step decides on the device

// dst = src if flag, else dst stays.
extern "C" __global__ void copy_if_f32(float* dst, const float* src, const float* flag, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && *flag != 0.0f) dst[i] = src[i];
}
