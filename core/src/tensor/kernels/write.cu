// Elements as they are written: one value everywhere, a gradient to its place, another type. `elements` gives each thread 16
// bytes.

template <class T> __device__ void fill(T* y, float value, size_t n) {
    elements(y, n, [=](size_t) { return value; });
}
KERNEL(fill, (T* y, float value, size_t n), (y, value, n))

extern "C" __global__ void fill(u32* y, u32 value, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = value;
}

// dst (+)= src, whatever the types.
template <class T> __device__ void accumulate(Gradient dst, const T* src, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) put(dst, i, to_float(src[i]));
}
KERNEL(accumulate, (Gradient dst, const T* src, size_t n), (dst, src, n))

// ---- another type

extern "C" __global__ void narrow_f32(bf16* y, const float* x, size_t n) {
    elements(y, n, [](size_t, float x) { return x; }, x);
}

extern "C" __global__ void widen_bf16(float* y, const bf16* x, size_t n) {
    elements(y, n, [](size_t, float x) { return x; }, x);
}

template <class T> __device__ void from_double(T* y, const double* x, size_t n) {
    elements(y, n, [=](size_t i) { return (float)x[i]; });
}
KERNEL(from_double, (T* y, const double* x, size_t n), (y, x, n))
