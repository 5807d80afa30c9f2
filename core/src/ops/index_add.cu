// Rows added to some rows of a matrix, a warp a row.

// out, a copy of x, becomes out[rows[i]] + scale[i] y[i]; all rows[i] are different.
template <class T> __device__ void index_add(T* out, const T* y, const u32* rows, const float* scale, int count, int d) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    T* x = out + (size_t)rows[i] * d;
    const float s = scale[i];
    transform(x, d, lane, 32, [=](int, float x, float y) { return x + y * s; }, x, y + (size_t)i * d);
}
KERNEL(index_add, (T* out, const T* y, const u32* rows, const float* scale, int count, int d), (out, y, rows, scale, count, d))

// dy[i] = scale[i] dout[rows[i]].
template <class T>
__device__ void index_add_backward(T* dy, const T* dout, const u32* rows, const float* scale, int count, int d) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    const float s = scale[i];
    transform(dy + (size_t)i * d, d, lane, 32, [=](int, float g) { return g * s; }, dout + (size_t)rows[i] * d);
}
KERNEL(index_add_backward, (T* dy, const T* dout, const u32* rows, const float* scale, int count, int d),
       (dy, dout, rows, scale, count, d))
