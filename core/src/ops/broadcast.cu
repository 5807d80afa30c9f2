// A vector met with every row (a warp a row), and the sums over rows that are its gradient.

template <class T> __device__ void add_row(T* y, const T* x, const T* v, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t at = (size_t)row * d;
    transform(y + at, d, lane, 32, [](int, float x, float v) { return x + v; }, x + at, v);
}
KERNEL(add_row, (T* y, const T* x, const T* v, int rows, int d), (y, x, v, rows, d))

template <class T> __device__ void mul_row(T* y, const T* x, const T* v, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t at = (size_t)row * d;
    transform(y + at, d, lane, 32, [](int, float x, float v) { return x * v; }, x + at, v);
}
KERNEL(mul_row, (T* y, const T* x, const T* v, int rows, int d), (y, x, v, rows, d))

template <class T> __device__ void scale_rows(T* y, const T* x, const T* v, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t at = (size_t)row * d;
    const float s = to_float(v[row]);
    transform(y + at, d, lane, 32, [=](int, float x) { return x * s; }, x + at);
}
KERNEL(scale_rows, (T* y, const T* x, const T* v, int rows, int d), (y, x, v, rows, d))

// y[r] = sum over c of a[r][c] b[r][c].
template <class T> __device__ void row_dots(T* y, const T* a, const T* b, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t at = (size_t)row * d;
    float sum = 0.0f;
    visit(d, lane, 32, [&](int, float a, float b) { sum += a * b; }, a + at, b + at);
    sum = warp_sum(sum);
    if (lane == 0) y[row] = from_float<T>(sum);
}
KERNEL(row_dots, (T* y, const T* a, const T* b, int rows, int d), (y, a, b, rows, d))

// Partial sums over rows of x, or of x y.
template <class T, int N> __device__ void product_sums_by(float* partial, const T* x, const T* y, int rows, int d) {
    auto row = [&](int r, int c, float sums[1][N]) {
        float a[N], b[N];
        get_all<N>(a, x + (size_t)r * d + c);
        if (y) get_all<N>(b, y + (size_t)r * d + c);
#pragma unroll
        for (int k = 0; k < N; k++) sums[0][k] += y ? a[k] * b[k] : a[k];
    };
    column_sums<1, N, 4>(partial, rows, d, row);
}

template <class T> __device__ void product_sums(float* partial, const T* x, const T* y, int rows, int d) {
    BY_PACKS(T, d, aligned16(x) && aligned16(y), (product_sums_by<T, N>(partial, x, y, rows, d)))
}
KERNEL(product_sums, (float* partial, const T* x, const T* y, int rows, int d), (partial, x, y, rows, d))
