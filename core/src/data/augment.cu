// Batches on a GPU.

// Pixels that were made elsewhere, in the type of the step.
template <class T> __device__ void unpack(T* y, const float* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<T>(x[i]);
}
KERNEL(unpack, (T* y, const float* x, size_t n), (y, x, n))
