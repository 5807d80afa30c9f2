// The residual connection with LayerScale; a warp a row forward, blocks of rows backward.

template <class T> __device__ void residual(T* out, const T* x, const T* y, const T* gamma, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const size_t at = (size_t)row * d;
    if (gamma) {
        transform(out + at, d, lane, 32, [](int, float x, float y, float g) { return x + g * y; }, x + at, y + at, gamma);
    } else {
        transform(out + at, d, lane, 32, [](int, float x, float y) { return x + y; }, x + at, y + at);
    }
}
KERNEL(residual, (T* out, const T* x, const T* y, const T* gamma, int rows, int d), (out, x, y, gamma, rows, d))

// out, a copy of x, becomes out[rows[i]] + scale[i] gamma y[i]; all rows[i] are different.
template <class T>
__device__ void residual_subset(T* out, const T* y, const T* gamma, const u32* rows, const float* scale, int count, int d) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    T* x = out + (size_t)rows[i] * d;
    y += (size_t)i * d;
    const float s = scale[i];
    if (gamma) {
        transform(x, d, lane, 32, [=](int, float x, float y, float g) { return x + g * (y * s); }, x, y, gamma);
    } else {
        transform(x, d, lane, 32, [=](int, float x, float y) { return x + y * s; }, x, y);
    }
}
KERNEL(residual_subset, (T* out, const T* y, const T* gamma, const u32* rows, const float* scale, int count, int d),
       (out, y, gamma, rows, scale, count, d))

// dy[i] = scale[i] gamma dout[rows[i]]; partial sums of scale[i] y[i] dout[rows[i]]. Without rows: i, 1.
template <class T, int N>
__device__ void residual_backward_by(Gradient dy, float* partial, const T* dout, const T* y, const T* gamma, const u32* rows,
                                     const float* scale, int count, int d) {
    auto row = [&](int i, int c, float sums[1][N]) {
        const float s = rows ? scale[i] : 1.0f;
        float g[N], ys[N], w[N];
        get_all<N>(g, dout + (size_t)(rows ? rows[i] : i) * d + c);
        if (gamma) {
            get_all<N>(ys, y + (size_t)i * d + c);
            get_all<N>(w, gamma + c);
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            g[k] *= s;
            if (gamma) {
                sums[0][k] += g[k] * ys[k];
                g[k] *= w[k];
            }
        }
        if (dy.at) put_all<N>(dy, (size_t)i * d + c, g);
    };
    column_sums<1, N>(partial, count, d, [](int, int) {}, row);
}

template <class T>
__device__ void residual_backward(Gradient dy, float* partial, const T* dout, const T* y, const T* gamma, const u32* rows,
                                  const float* scale, int count, int d) {
    BY_PACKS(T, d, aligned16(dout) && aligned16(y) && aligned16(gamma),
             (residual_backward_by<T, N>(dy, partial, dout, y, gamma, rows, scale, count, d)))
}
KERNEL(residual_backward,
       (Gradient dy, float* partial, const T* dout, const T* y, const T* gamma, const u32* rows, const float* scale, int count, int d),
       (dy, partial, dout, y, gamma, rows, scale, count, d))
