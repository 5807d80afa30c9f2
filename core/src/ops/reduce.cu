// Sums, in f32 whatever the type of what is summed.

constexpr int ELEMENTS_OF_BLOCK = 8192;

// partial[block] = sum of its elements.
template <class T> __device__ void sum_blocks(float* partial, const T* x, size_t n) {
    const size_t first = (size_t)blockIdx.x * ELEMENTS_OF_BLOCK;
    const int count = n - first < ELEMENTS_OF_BLOCK ? (int)(n - first) : ELEMENTS_OF_BLOCK;
    float sum = 0.0f;
    visit(count, threadIdx.x, blockDim.x, [&](int, float x) { sum += x; }, x + first);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
KERNEL(sum_blocks, (float* partial, const T* x, size_t n), (partial, x, n))

// y = sum of the partial sums; one block.
extern "C" __global__ void __launch_bounds__(1024) sum_partial_f32(float* y, const float* partial, int n) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *y = sum;
}

// y[i] = *value for all i.
template <class T> __device__ void spread(T* y, const float* value, size_t n) {
    const float v = *value;
    elements(y, n, [=](size_t) { return v; });
}
KERNEL(spread, (T* y, const float* value, size_t n), (y, value, n))

// y[o][j] = sum over i of x[o][i][j], i < n, j < inner: a thread an output.
template <class T> __device__ void sum_axis(float* y, const T* x, size_t outer, size_t n, size_t inner) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= outer * inner) return;
    const T* from = x + at / inner * n * inner + at % inner;
    float sum = 0.0f;
    for (size_t i = 0; i < n; i++) sum += to_float(from[i * inner]);
    y[at] = sum;
}
KERNEL(sum_axis, (float* y, const T* x, size_t outer, size_t n, size_t inner), (y, x, outer, n, inner))

// dx[o][i][j] = dy[o][j].
template <class T> __device__ void sum_axis_backward(T* dx, const float* dy, size_t outer, size_t n, size_t inner) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < outer * n * inner) dx[at] = from_float<T>(dy[at / (n * inner) * inner + at % inner]);
}
KERNEL(sum_axis_backward, (T* dx, const float* dy, size_t outer, size_t n, size_t inner), (dx, dy, outer, n, inner))
