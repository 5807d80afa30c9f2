// Moving elements: windows of rows, rows by index, transposes.

// y[r][i] = x[r][start + i] for i < len, rows of `row` elements.
template <class T> __device__ void window(T* y, const T* x, size_t row, size_t start, size_t len, size_t rows) {
    constexpr int N = Pack<T>::N;
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (row % N == 0 && start % N == 0 && len % N == 0 && aligned16(x) && aligned16(y)) {
        if (i < rows * len) *(Pack<T>*)(y + i) = *(const Pack<T>*)(x + i / len * row + start + i % len);
    } else {
        for (size_t j = i; j < i + N && j < rows * len; j++) y[j] = x[j / len * row + start + j % len];
    }
}
KERNEL(window, (T* y, const T* x, size_t row, size_t start, size_t len, size_t rows), (y, x, row, start, len, rows))

// The gradient of a window: dy inside, 0 outside (nothing, where it is added).
template <class T> __device__ void window_backward(Gradient dx, const T* dy, size_t row, size_t start, size_t len, size_t rows) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * row) return;
    const size_t r = i / row, c = i % row;
    const bool inside = c >= start && c < start + len;
    if (inside || !dx.add) put(dx, i, inside ? to_float(dy[r * len + c - start]) : 0.0f);
}
KERNEL(window_backward, (Gradient dx, const T* dy, size_t row, size_t start, size_t len, size_t rows), (dx, dy, row, start, len, rows))

// y[i] = x[rows[i]], a warp a row.
template <class T> __device__ void gather(T* y, const T* x, const u32* rows, int count, int d) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    transform(y + (size_t)i * d, d, lane, 32, [](int, float x) { return x; }, x + (size_t)rows[i] * d);
}
KERNEL(gather, (T* y, const T* x, const u32* rows, int count, int d), (y, x, rows, count, d))

// dx[r] (+)= sum of dy[i] with rows[i] = r, in order of i: a warp a row of x looks for itself in the list.
template <class T> __device__ void gather_backward(Gradient dx, const T* dy, const u32* rows, int count, int total, int d) {
    const int r = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= total) return;
    bool first = !dx.add;
    for (int base = 0; base < count; base += 32) {
        const bool here = base + lane < count && rows[base + lane] == (u32)r;
        for (u32 found = __ballot_sync(FULL_WARP, here); found; found &= found - 1) {
            const T* g = dy + (size_t)(base + __ffs(found) - 1) * d;
            const Gradient to = Gradient{dx.at, dx.is_bf16, !first};
            visit(d, lane, 32, [&](int c, float x) { put(to, (size_t)r * d + c, x); }, g);
            first = false;
        }
    }
    if (first) {
        for (int c = lane; c < d; c += 32) put(dx, (size_t)r * d + c, 0.0f);
    }
}
KERNEL(gather_backward, (Gradient dx, const T* dy, const u32* rows, int count, int total, int d), (dx, dy, rows, count, total, d))

// y [n, m] = the transpose of x [m, n], for each matrix of a batch (grid z); 32x32 tiles through shared memory.
template <class T> __device__ void transpose(T* y, const T* x, int m, int n) {
    __shared__ T tile[32][33];
    const size_t matrix = (size_t)blockIdx.z * m * n;
    const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
    const int column = blockIdx.x * 32 + tx;
    for (int i = ty; i < 32; i += 8) {
        const int row = blockIdx.y * 32 + i;
        if (row < m && column < n) tile[i][tx] = x[matrix + (size_t)row * n + column];
    }
    __syncthreads();
    const int to = blockIdx.y * 32 + tx;
    for (int i = ty; i < 32; i += 8) {
        const int row = blockIdx.x * 32 + i;
        if (row < n && to < m) y[matrix + (size_t)row * m + to] = tile[tx][i];
    }
}
KERNEL(transpose, (T* y, const T* x, int m, int n), (y, x, m, n))
