// LayerNorm and RMSNorm: a warp a row forward; backward by blocks of rows, so that the parameters' gradients are summed
// on the way.

template <class T>
__device__ void norm(T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (size_t)row * d;
    y += (size_t)row * d;
    float mean = 0.0f;
    if (centred) {
        visit(d, lane, 32, [&](int, float x) { mean += x; }, x);
        mean = warp_sum(mean) / d;
    }
    float variance = 0.0f;
    visit(d, lane, 32, [&](int, float x) { variance += (x - mean) * (x - mean); }, x);
    const float rstd = 1.0f / sqrtf(warp_sum(variance) / d + eps);
    if (bias) {
        transform(y, d, lane, 32, [=](int, float x, float w, float b) { return (x - mean) * rstd * w + b; }, x, weight, bias);
    } else {
        transform(y, d, lane, 32, [=](int, float x, float w) { return (x - mean) * rstd * w; }, x, weight);
    }
    if (lane == 0 && stats) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}
KERNEL(norm, (T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d),
       (y, stats, x, weight, bias, eps, centred, rows, d))

// dx (+)= rstd (g - mean(g) - h mean(g h)) with h = (x - mean) rstd and g = weight dy; partial sums of dy h, of dy, and of
// what dx is afterwards. If `again`, it becomes y = weight h + bias.
template <class T, int N>
__device__ void norm_backward_by(Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias,
                                 const float* stats, const T* dy, int centred, int rows, int d) {
    __shared__ float means[CHUNK_ROWS][2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    auto prepare = [&](int first, int last) {
        __syncthreads();
        for (int r = first + warp; r < last; r += warps) {
            const float mean = stats[2 * r], rstd = stats[2 * r + 1];
            float g = 0.0f, gh = 0.0f;
            visit(d, lane, 32, [&](int, float x, float dy, float w) {
                g += dy * w;
                gh += dy * w * (x - mean);
            }, x + (size_t)r * d, dy + (size_t)r * d, weight);
            g = warp_sum(g);
            gh = warp_sum(gh);
            if (lane == 0) {
                means[r - first][0] = centred ? g / d : 0.0f;
                means[r - first][1] = gh * rstd / d;
            }
        }
        __syncthreads();
    };
    const int run = ((rows + gridDim.x - 1) / gridDim.x + CHUNK_ROWS - 1) / CHUNK_ROWS * CHUNK_ROWS;
    auto row = [&](int r, int c, float sums[3][N]) {
        const int in_chunk = (r - blockIdx.x * run) % CHUNK_ROWS;
        const size_t at = (size_t)r * d + c;
        const float mean = stats[2 * r], rstd = stats[2 * r + 1], g = means[in_chunk][0], gh = means[in_chunk][1];
        float xs[N], dys[N], w[N], out[N];
        get_all<N>(xs, x + at);
        get_all<N>(dys, dy + at);
        get_all<N>(w, weight + c);
#pragma unroll
        for (int k = 0; k < N; k++) {
            xs[k] = (xs[k] - mean) * rstd;
            out[k] = (dys[k] * w[k] - g - xs[k] * gh) * rstd;
            sums[0][k] += dys[k] * xs[k];
            sums[1][k] += dys[k];
        }
        if (dx.at) {
            put_all<N>(dx, at, out);
#pragma unroll
            for (int k = 0; k < N; k++) sums[2][k] += out[k];
        }
        if (again) {
            float b[N] = {};
            if (bias) get_all<N>(b, bias + c);
#pragma unroll
            for (int k = 0; k < N; k++) xs[k] = xs[k] * w[k] + b[k];
            put_all<N>(again + at, xs);
        }
    };
    column_sums<3, N>(partial, rows, d, prepare, row);
}

template <class T>
__device__ void norm_backward(Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias,
                              const float* stats, const T* dy, int centred, int rows, int d) {
    BY_PACKS(T, d, aligned16(x) && aligned16(dy) && aligned16(weight) && aligned16(bias),
             (norm_backward_by<T, N>(dx, again, partial, x, weight, bias, stats, dy, centred, rows, d)))
}
KERNEL(norm_backward,
       (Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias, const float* stats, const T* dy, int centred, int rows, int d),
       (dx, again, partial, x, weight, bias, stats, dy, centred, rows, d))
