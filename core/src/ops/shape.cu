// Moving elements: windows of rows, rows by index, transposes.

// Where unit i of rows of `width` units is: row and column. In 32 bits where that suffices, which is much faster.
struct Place {
    size_t row, column;
    __device__ __forceinline__ Place(size_t i, size_t width) {
        if ((i | width) >> 32) {
            row = i / width;
            column = i % width;
        } else {
            row = (u32)i / (u32)width;
            column = (u32)i % (u32)width;
        }
    }
};

// f(i) for the units of N elements, of `units` in all, that are this thread's 16 bytes of T.
template <class T, int N, class F> __device__ __forceinline__ void units_of_thread(size_t units, F f) {
    const size_t first = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * (Pack<T>::N / N);
#pragma unroll
    for (int k = 0; k < Pack<T>::N / N; k++) {
        if (first + k < units) f(first + k);
    }
}

// y[r][i] = x[r][start + i] for i < len, rows of `row` elements.
template <class T, int N> __device__ void window_by(T* y, const T* x, size_t row, size_t start, size_t len, size_t rows) {
    units_of_thread<T, N>(rows * len / N, [&](size_t i) {
        const Place at(i, len / N);
        float v[N];
        get_all<N>(v, x + at.row * row + start + at.column * N);
        put_all<N>(y + i * N, v);
    });
}

template <class T> __device__ void window(T* y, const T* x, size_t row, size_t start, size_t len, size_t rows) {
    BY_PACKS(T, row, start % Pack<T>::N == 0 && len % Pack<T>::N == 0 && aligned16(x) && aligned16(y),
             (window_by<T, N>(y, x, row, start, len, rows)))
}
KERNEL(window, (T* y, const T* x, size_t row, size_t start, size_t len, size_t rows), (y, x, row, start, len, rows))

// The gradient of a window: dy inside, 0 outside. Where it is added, threads are for the inside alone.
template <class T, int N> __device__ void window_backward_by(Gradient dx, const T* dy, size_t row, size_t start, size_t len, size_t rows) {
    const size_t width = dx.add ? len : row, shift = dx.add ? start : 0;
    units_of_thread<T, N>(rows * width / N, [&](size_t i) {
        const Place at(i, width / N);
        const size_t column = at.column * N + shift;
        float v[N] = {};
        if (column >= start && column < start + len) get_all<N>(v, dy + at.row * len + column - start);
        put_all<N>(dx, at.row * row + column, v);
    });
}

template <class T> __device__ void window_backward(Gradient dx, const T* dy, size_t row, size_t start, size_t len, size_t rows) {
    BY_PACKS(T, row, start % Pack<T>::N == 0 && len % Pack<T>::N == 0 && aligned16(dy),
             (window_backward_by<T, N>(dx, dy, row, start, len, rows)))
}
KERNEL(window_backward, (Gradient dx, const T* dy, size_t row, size_t start, size_t len, size_t rows), (dx, dy, row, start, len, rows))

// y[i] = x[rows[i]], a warp a row.
template <class T> __device__ void gather(T* y, const T* x, const u32* rows, int count, int d) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    transform(y + (size_t)i * d, d, lane, 32, [](int, float x) { return x; }, x + (size_t)rows[i] * d);
}
KERNEL(gather, (T* y, const T* x, const u32* rows, int count, int d), (y, x, rows, count, d))

// dx[r] (+)= sum of dy[i] with rows[i] = r, in order of i: a warp looks for ROWS_OF_WARP rows of x in the list.
constexpr int ROWS_OF_WARP = 8;

template <class T, int N>
__device__ void gather_backward_by(Gradient dx, const T* dy, const u32* rows, int count, int total, int d) {
    const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS_OF_WARP, lane = threadIdx.x % 32;
    if (first >= total) return;
    u32 written = dx.add ? ~0u : 0u;
    for (int base = 0; base < count; base += 32) {
        const u32 own = base + lane < count ? rows[base + lane] - (u32)first : ~0u;
        for (u32 found = __ballot_sync(FULL_WARP, own < ROWS_OF_WARP); found; found &= found - 1) {
            const int i = __ffs(found) - 1;
            const u32 r = __shfl_sync(FULL_WARP, own, i);
            const Gradient to = {dx.at, dx.is_bf16, int(written >> r & 1)};
            for (int c = lane * N; c < d; c += 32 * N) {
                float v[N];
                get_all<N>(v, dy + (size_t)(base + i) * d + c);
                put_all<N>(to, ((size_t)first + r) * d + c, v);
            }
            written |= 1u << r;
        }
    }
    for (int r = 0; r < ROWS_OF_WARP && first + r < total; r++) {
        if (written >> r & 1) continue;
        for (int c = lane * N; c < d; c += 32 * N) {
            float zeros[N] = {};
            put_all<N>(dx, ((size_t)first + r) * d + c, zeros);
        }
    }
}

template <class T> __device__ void gather_backward(Gradient dx, const T* dy, const u32* rows, int count, int total, int d) {
    BY_PACKS(T, d, aligned16(dy), (gather_backward_by<T, N>(dx, dy, rows, count, total, d)))
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
