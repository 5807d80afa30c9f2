// Sinkhorn-Knopp in the logarithm: an assignment is 2^(c x - shift of its prototype - norm of its sample) with
// c = log2(e) / temperature, so that passes read the logits and write nothing but sums.

__device__ __forceinline__ float scale_of(const float* temperature) { return LOG2_E / *temperature; }

// f(r, z) for the rows of this block's run, z the exponents of N columns of this thread. A thread owns columns.
template <class T, int N, class F>
__device__ __forceinline__ void down_columns(const T* x, float scale, int run, int rows, int k, int column, F f) {
    const int first = blockIdx.y * run, last = first + run < rows ? first + run : rows;
#pragma unroll 4
    for (int r = first; r < last; r++) {
        float z[N];
        get_all<N>(z, x + (size_t)r * k + column);
#pragma unroll
        for (int j = 0; j < N; j++) z[j] *= scale;
        f(r, z);
    }
}

// For every run of rows and column: the greatest exponent, and the sum of powers relative to it.
template <class T, int N>
__device__ void column_sums_by(float* tops, float* sums, const T* x, const float* temperature, int run, int rows, int k) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (column >= k) return;
    LogSum s[N];
#pragma unroll
    for (int j = 0; j < N; j++) s[j] = {-INFINITY, 0.0f};
    down_columns<T, N>(x, scale_of(temperature), run, rows, k, column, [&](int, const float* z) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float e = exp2_fast(-fabsf(z[j] - s[j].top));
            const bool above = z[j] > s[j].top;
            s[j].sum = above ? s[j].sum * e + 1.0f : s[j].sum + e;
            s[j].top = above ? z[j] : s[j].top;
        }
    });
    const size_t at = (size_t)blockIdx.y * k + column;
#pragma unroll
    for (int j = 0; j < N; j++) {
        tops[at + j] = s[j].top;
        sums[at + j] = s[j].sum;
    }
}

template <class T>
__device__ void column_sums(float* tops, float* sums, const T* x, const float* temperature, int run, int rows, int k) {
    BY_PACKS(T, k, aligned16(x), (column_sums_by<T, N>(tops, sums, x, temperature, run, rows, k)))
}
KERNEL(column_sums, (float* tops, float* sums, const T* x, const float* temperature, int run, int rows, int k),
       (tops, sums, x, temperature, run, rows, k))

// For every run of rows and column: the mass that the prototype has of these samples.
template <class T, int N>
__device__ void column_mass_by(float* sums, const T* x, const float* temperature, const float* shift, const float* norms,
                               int run, int rows, int k) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (column >= k) return;
    float base[N], mass[N] = {};
    get_all<N>(base, shift + column);
    down_columns<T, N>(x, scale_of(temperature), run, rows, k, column, [&](int r, const float* z) {
        const float norm = norms[r];
#pragma unroll
        for (int j = 0; j < N; j++) mass[j] += exp2_fast(z[j] - base[j] - norm);
    });
#pragma unroll
    for (int j = 0; j < N; j++) sums[(size_t)blockIdx.y * k + column + j] = mass[j];
}

template <class T>
__device__ void column_mass(float* sums, const T* x, const float* temperature, const float* shift, const float* norms, int run,
                            int rows, int k) {
    BY_PACKS(T, k, aligned16(x), (column_mass_by<T, N>(sums, x, temperature, shift, norms, run, rows, k)))
}
KERNEL(column_mass,
       (float* sums, const T* x, const float* temperature, const float* shift, const float* norms, int run, int rows, int k),
       (sums, x, temperature, shift, norms, run, rows, k))

// top[c] = the greatest of the runs.
extern "C" __global__ void top_of_runs_f32(float* top, const float* tops, int runs, int k) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= k) return;
    float most = -INFINITY;
    for (int run = 0; run < runs; run++) most = fmaxf(most, tops[(size_t)run * k + column]);
    top[column] = most;
}

// total[c] = sum over runs, in order; sums that are relative to `tops` become relative to `top`.
extern "C" __global__ void sum_of_runs_f32(float* total, const float* sums, const float* tops, const float* top, int runs, int k) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= k) return;
    float sum = 0.0f;
    for (int run = 0; run < runs; run++) {
        const size_t at = (size_t)run * k + column;
        sum += tops ? sums[at] * exp2f(tops[at] - top[column]) : sums[at];
    }
    total[column] = sum;
}

// shift[c] = base[c] + log2(total[c] * share).
extern "C" __global__ void shift_f32(float* shift, const float* base, const float* total, float share, int k) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column < k) shift[column] = base[column] + log2f(total[column] * share);
}

// The norm of R samples, or (with `out`) their assignments; a block takes R rows, so that the shifts are read once for
// all of them.
template <class T, int N, int R>
__device__ void rows_by(T* out, float* norms, const T* x, const float* temperature, const float* shift, int rows, int k) {
    const float scale = scale_of(temperature);
    const int first = blockIdx.x * R;
    x += (size_t)first * k;
    // f(r, i, z) for every row and N columns of this thread, z their exponents. The rows' packs are read before any is used;
    // a row that is not there is the last one again.
    auto visit = [&](auto f) {
        for (int i = threadIdx.x * N; i < k; i += blockDim.x * N) {
            float base[N], z[R][N];
            get_all<N>(base, shift + i);
#pragma unroll
            for (int r = 0; r < R; r++) get_all<N>(z[r], x + (size_t)(first + r < rows ? r : rows - 1 - first) * k + i);
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int j = 0; j < N; j++) z[r][j] = z[r][j] * scale - base[j];
                f(r, i, z[r]);
            }
        }
    };
    LogSum sums[R];
#pragma unroll
    for (int r = 0; r < R; r++) sums[r] = {-INFINITY, 0.0f};
    visit([&](int r, int, const float* z) { add<N>(sums[r], z); });
    float norm[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        norm[r] = log2_of(block_log_sum(sums[r]));
        if (!out && threadIdx.x == 0 && first + r < rows) norms[first + r] = norm[r];
    }
    if (!out) return;
    out += (size_t)first * k;
    visit([&](int r, int i, float* z) {
        if (first + r >= rows) return;
#pragma unroll
        for (int j = 0; j < N; j++) z[j] = exp2_fast(z[j] - norm[r]);
        put_all<N>(out + (size_t)r * k + i, z);
    });
}

template <class T>
__device__ void row_norms(T* out, float* norms, const T* x, const float* temperature, const float* shift, int rows, int k) {
    BY_PACKS(T, k, aligned16(x) && aligned16(out), (rows_by<T, N, 1>(out, norms, x, temperature, shift, rows, k)))
}
KERNEL(row_norms, (T* out, float* norms, const T* x, const float* temperature, const float* shift, int rows, int k),
       (out, norms, x, temperature, shift, rows, k))

template <class T>
__device__ void row_norms_by_four(T* out, float* norms, const T* x, const float* temperature, const float* shift, int rows, int k) {
    BY_PACKS(T, k, aligned16(x) && aligned16(out), (rows_by<T, N, 4>(out, norms, x, temperature, shift, rows, k)))
}
KERNEL(row_norms_by_four, (T* out, float* norms, const T* x, const float* temperature, const float* shift, int rows, int k),
       (out, norms, x, temperature, shift, rows, k))
