// What surrounds a linear layer's matrix products: GELU, and the sums of rows that are a bias's gradient.

// In place: h becomes gelu(h).
template <class T> __device__ void gelu_in_place(T* h, size_t n) {
    elements(h, n, [](size_t, float x) { return x * normal_cdf(x); }, h);
}
KERNEL(gelu_in_place, (T* h, size_t n), (h, n))

// y = gelu(h); h becomes the slope there.
template <class T> __device__ void gelu_and_slope(T* y, T* h, size_t n) {
    elements(y, n, [](size_t, float x) { return x * normal_cdf(x); }, h);
    elements(h, n, [](size_t, float x) { return normal_cdf(x) + x * normal_pdf(x); }, h);
}
KERNEL(gelu_and_slope, (T* y, T* h, size_t n), (y, h, n))

// In place: dy becomes dy slope; partial sums of its rows.
template <class T, int N> __device__ void gelu_backward_by(float* partial, T* dy, const T* slope, int rows, int d) {
    auto row = [&](int r, int c, float sums[1][N]) {
        const size_t at = (size_t)r * d + c;
        float g[N], s[N];
        get_all<N>(g, dy + at);
        get_all<N>(s, slope + at);
#pragma unroll
        for (int k = 0; k < N; k++) {
            g[k] *= s[k];
            sums[0][k] += g[k];
        }
        put_all<N>(Gradient{dy, sizeof(T) == 2, 0}, at, g);
    };
    column_sums<1, N>(partial, rows, d, [](int, int) {}, row);
}

template <class T> __device__ void gelu_backward(float* partial, T* dy, const T* slope, int rows, int d) {
    BY_PACKS(T, d, aligned16(dy) && aligned16(slope), (gelu_backward_by<T, N>(partial, dy, slope, rows, d)))
}
KERNEL(gelu_backward, (float* partial, T* dy, const T* slope, int rows, int d), (partial, dy, slope, rows, d))

// Partial sums of the rows of x.
template <class T, int N> __device__ void sum_rows_by(float* partial, const T* x, int rows, int d) {
    auto row = [&](int r, int c, float sums[1][N]) {
        float v[N];
        get_all<N>(v, x + (size_t)r * d + c);
#pragma unroll
        for (int k = 0; k < N; k++) sums[0][k] += v[k];
    };
    column_sums<1, N>(partial, rows, d, [](int, int) {}, row);
}

template <class T> __device__ void sum_rows(float* partial, const T* x, int rows, int d) {
    BY_PACKS(T, d, aligned16(x), (sum_rows_by<T, N>(partial, x, rows, d)))
}
KERNEL(sum_rows, (float* partial, const T* x, int rows, int d), (partial, x, rows, d))
