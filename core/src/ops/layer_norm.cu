// LayerNorm and RMSNorm. A row belongs to `lanes` threads, a power of two, so that it is read once and all its loads are
// under way together; rows that are too wide for that, or not made of packs, take a plain path.

constexpr int MOST_LANES = 128;

// Up to P packs of a row for every lane: pack p of a lane is pack p * lanes + lane of the row.
template <class T, int P> struct Lane {
    static constexpr int N = Pack<T>::N;
    int lanes, lane, d;

    __device__ __forceinline__ int column(int p) const { return (p * lanes + lane) * N; }
    __device__ __forceinline__ bool has(int p) const { return column(p) < d; }

    // Zeros where the row ends, or if there is no row.
    __device__ __forceinline__ void load(Pack<T>* to, const T* row, bool there) const {
#pragma unroll
        for (int p = 0; p < P; p++) to[p] = there && has(p) ? *(const Pack<T>*)(row + column(p)) : Pack<T>{};
    }
};

// Has what is in memory read again: registers are dearer than shared memory.
__device__ __forceinline__ void forget_memory() {
#ifndef DINOLAB_EMULATED
    asm volatile("" ::: "memory");
#endif
}

// f(p, k) for every element of a lane.
template <int P, int N, class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int p = 0; p < P; p++) {
#pragma unroll
        for (int k = 0; k < N; k++) f(p, k);
    }
}

// K sums over the lanes of a row, known to all of them; the whole block takes part.
template <int K> __device__ __forceinline__ void row_sums(float* x, int lanes) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            if (o < lanes) x[k] += __shfl_xor_sync(FULL_WARP, x[k], o);
        }
    }
    if (lanes <= 32) return;
    __shared__ float of_warp[K][MOST_LANES / 32];
    const int warp = threadIdx.x / 32, warps = lanes / 32, first = warp / warps * warps;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        for (int k = 0; k < K; k++) of_warp[k][warp] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
        x[k] = 0.0f;
        for (int w = 0; w < warps; w++) x[k] += of_warp[k][first + w];
    }
}

// call<3> or call<4>, which of them has fewer packs without a column. `lanes` is 0 where rows do not fit.
#define BY_ROWS(d, lanes, aligned, call, plain)                        \
    if ((lanes) > 0 && (aligned)) {                                    \
        if ((d) <= 3 * Pack<T>::N * (lanes)) {                         \
            constexpr int P = 3;                                       \
            call;                                                      \
        } else {                                                       \
            constexpr int P = 4;                                       \
            call;                                                      \
        }                                                              \
    } else {                                                           \
        plain;                                                         \
    }

template <class T, int P>
__device__ void norm_rows(T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d, int lanes) {
    constexpr int N = Pack<T>::N;
    const int row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    const Lane<T, P> own = {lanes, (int)threadIdx.x % lanes, d};
    const bool there = row < rows;
    Pack<T> xs[P];
    own.load(xs, x + (size_t)row * d, there);
    float mean = 0.0f, variance = 0.0f;
    if (centred) {
        each<P, N>([&](int p, int k) { mean += to_float(xs[p].at[k]); });
        row_sums<1>(&mean, lanes);
        mean /= d;
    }
    each<P, N>([&](int p, int k) {
        const float h = to_float(xs[p].at[k]) - mean;
        variance += own.has(p) ? h * h : 0.0f;
    });
    row_sums<1>(&variance, lanes);
    const float rstd = 1.0f / sqrtf(variance / d + eps);
    if (!there) return;
#pragma unroll
    for (int p = 0; p < P; p++) {
        if (!own.has(p)) continue;
        float out[N], w[N], b[N] = {};
        get_all<N>(w, weight + own.column(p));
        if (bias) get_all<N>(b, bias + own.column(p));
#pragma unroll
        for (int k = 0; k < N; k++) out[k] = (to_float(xs[p].at[k]) - mean) * rstd * w[k] + b[k];
        put_all<N>(y + (size_t)row * d + own.column(p), out);
    }
    if (own.lane == 0 && stats) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// A warp a row.
template <class T>
__device__ void norm_plain(T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d) {
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (int row = blockIdx.x * warps + threadIdx.x / 32; row < rows; row += gridDim.x * warps) {
        const T* from = x + (size_t)row * d;
        float mean = 0.0f, variance = 0.0f;
        if (centred) {
            visit(d, lane, 32, [&](int, float x) { mean += x; }, from);
            mean = warp_sum(mean) / d;
        }
        visit(d, lane, 32, [&](int, float x) { variance += (x - mean) * (x - mean); }, from);
        const float rstd = 1.0f / sqrtf(warp_sum(variance) / d + eps);
        visit(d, lane, 32, [&](int c, float x, float w) {
            const float h = (x - mean) * rstd * w;
            y[(size_t)row * d + c] = from_float<T>(bias ? h + to_float(bias[c]) : h);
        }, from, weight);
        if (lane == 0 && stats) {
            stats[2 * row] = mean;
            stats[2 * row + 1] = rstd;
        }
    }
}

template <class T>
__device__ void norm(T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d, int lanes) {
    BY_ROWS(d, lanes, aligned16(y) && aligned16(x) && aligned16(weight) && aligned16(bias),
            (norm_rows<T, P>(y, stats, x, weight, bias, eps, centred, rows, d, lanes)),
            norm_plain(y, stats, x, weight, bias, eps, centred, rows, d))
}
#undef KERNEL_BOUNDS
#define KERNEL_BOUNDS MOST_LANES, 8
KERNEL(norm,
       (T* y, float* stats, const T* x, const T* weight, const T* bias, float eps, int centred, int rows, int d, int lanes),
       (y, stats, x, weight, bias, eps, centred, rows, d, lanes))

// dx (+)= rstd (g - mean(g) - h mean(g h)) with h = (x - mean) rstd and g = weight dy; partial sums of dy h, of dy, and of
// what dx is afterwards, in registers over all rows of this block: partial[block][3][d]. If `again`, it becomes
// y = weight h + bias. While a row is computed the next one is on its way to shared memory: every thread waits for, and
// reads, what it asked for itself.
template <class T, int P>
__device__ void norm_backward_rows(Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias,
                                   const float* stats, const T* dy, int centred, int rows, int d, int lanes) {
    constexpr int N = Pack<T>::N;
    DYNAMIC_SHARED(Pack<T>, staged);
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, step = gridDim.x * groups;
    const Lane<T, P> own = {lanes, (int)threadIdx.x % lanes, d};
    T* const to = (T*)dx.at;
    enum { X, DY, OLD, TENSORS };
    auto place = [&](int stage, int tensor, int p) -> Pack<T>& {
        return staged[((stage * TENSORS + tensor) * P + p) * MOST_LANES + threadIdx.x];
    };
    float next_mean = 0.0f, next_rstd = 0.0f;
    auto fetch = [&](int r, int stage) {
#pragma unroll
        for (int p = 0; p < P; p++) {
            const bool there = r < rows && own.has(p);
            const size_t at = there ? (size_t)r * d + own.column(p) : 0;
            copy_async16(&place(stage, X, p), x + at, there ? 16 : 0);
            copy_async16(&place(stage, DY, p), dy + at, there ? 16 : 0);
            if (dx.add) copy_async16(&place(stage, OLD, p), to + at, there ? 16 : 0);
        }
        copy_commit();
        next_mean = r < rows ? stats[2 * r] : 0.0f;
        next_rstd = r < rows ? stats[2 * r + 1] : 0.0f;
    };
    Pack<T> w[P];
    own.load(w, weight, true);
    float sums[3][P * N] = {};
    int stage = 0;
    fetch(blockIdx.x * groups + group, stage);
    for (int first = blockIdx.x * groups; first < rows; first += step, stage ^= 1) {
        const int r = first + group;
        const float mean = next_mean, rstd = next_rstd;
        fetch(r + step, stage ^ 1);
        copy_wait<1>();
        float means[2] = {};
#pragma unroll
        for (int p = 0; p < P; p++) {
            const Pack<T> xs = place(stage, X, p), dys = place(stage, DY, p);
#pragma unroll
            for (int k = 0; k < N; k++) {
                const float g = to_float(dys.at[k]) * to_float(w[p].at[k]);
                means[0] += g;
                means[1] += g * (to_float(xs.at[k]) - mean);
            }
        }
        row_sums<2>(means, lanes);
        forget_memory();
        const float g = centred ? means[0] / d : 0.0f, gh = means[1] * rstd / d;
#pragma unroll
        for (int p = 0; p < P; p++) {
            if (r >= rows || !own.has(p)) continue;
            const size_t at = (size_t)r * d + own.column(p);
            const Pack<T> xs = place(stage, X, p), dys = place(stage, DY, p);
            Pack<T> old = {};
            if (dx.add) old = place(stage, OLD, p);
            float h[N], out[N], b[N] = {};
            if (again && bias) get_all<N>(b, bias + own.column(p));
#pragma unroll
            for (int k = 0; k < N; k++) {
                const float dy = to_float(dys.at[k]);
                h[k] = (to_float(xs.at[k]) - mean) * rstd;
                out[k] = (dy * to_float(w[p].at[k]) - g - h[k] * gh) * rstd + to_float(old.at[k]);
                sums[0][p * N + k] += dy * h[k];
                sums[1][p * N + k] += dy;
                sums[2][p * N + k] += out[k];
                h[k] = h[k] * to_float(w[p].at[k]) + b[k];
            }
            if (to) put_all<N>(to + at, out);
            if (again) put_all<N>(again + at, h);
        }
    }
    copy_wait<0>();
    float* of_group = (float*)staged;
    const int width = lanes * P * N;
#pragma unroll
    for (int s = 0; s < 3; s++) {
        __syncthreads();
        each<P, N>([&](int p, int k) { of_group[group * width + own.column(p) + k] = sums[s][p * N + k]; });
        __syncthreads();
        for (int c = threadIdx.x; c < d; c += blockDim.x) {
            float total = 0.0f;
            for (int g = 0; g < groups; g++) total += of_group[g * width + c];
            partial[((size_t)blockIdx.x * 3 + s) * d + c] = total;
        }
    }
}

// The same, a block a row, with the sums in `partial` itself: a thread owns columns.
template <class T>
__device__ void norm_backward_plain(Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias,
                                    const float* stats, const T* dy, int centred, int rows, int d) {
    float* sums = partial + (size_t)blockIdx.x * 3 * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) sums[c] = sums[d + c] = sums[2 * d + c] = 0.0f;
    for (int r = blockIdx.x; r < rows; r += gridDim.x) {
        const size_t start = (size_t)r * d;
        const float mean = stats[2 * r], rstd = stats[2 * r + 1];
        float g = 0.0f, gh = 0.0f;
        for (int c = threadIdx.x; c < d; c += blockDim.x) {
            const float dyw = to_float(dy[start + c]) * to_float(weight[c]);
            g += dyw;
            gh += dyw * (to_float(x[start + c]) - mean);
        }
        g = block_sum(g);
        g = centred ? g / d : 0.0f;
        gh = block_sum(gh) * rstd / d;
        for (int c = threadIdx.x; c < d; c += blockDim.x) {
            const float dyc = to_float(dy[start + c]), w = to_float(weight[c]), h = (to_float(x[start + c]) - mean) * rstd;
            float out[1] = {(dyc * w - g - h * gh) * rstd};
            if (dx.at) put_all<1>(dx, start + c, out);
            if (again) again[start + c] = from_float<T>(h * w + (bias ? to_float(bias[c]) : 0.0f));
            sums[c] += dyc * h;
            sums[d + c] += dyc;
            sums[2 * d + c] += out[0];
        }
    }
}

template <class T>
__device__ void norm_backward(Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias,
                              const float* stats, const T* dy, int centred, int rows, int d, int lanes) {
    const bool packs = (!dx.at || (dx.is_bf16 == (sizeof(T) == 2) && aligned16(dx.at))) && aligned16(again) && aligned16(x);
    BY_ROWS(d, lanes, packs && aligned16(dy) && aligned16(weight) && aligned16(bias),
            (norm_backward_rows<T, P>(dx, again, partial, x, weight, bias, stats, dy, centred, rows, d, lanes)),
            norm_backward_plain(dx, again, partial, x, weight, bias, stats, dy, centred, rows, d))
}
#undef KERNEL_BOUNDS
#define KERNEL_BOUNDS MOST_LANES, 3
KERNEL(norm_backward,
       (Gradient dx, T* again, float* partial, const T* x, const T* weight, const T* bias, const float* stats, const T* dy, int centred, int rows, int d, int lanes),
       (dx, again, partial, x, weight, bias, stats, dy, centred, rows, d, lanes))
