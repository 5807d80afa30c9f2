// The sums of the rows of a matrix, and the second half of every kernel that makes such sums on the way.

// Partial sums of the rows of x.
template <class T, int N> __device__ void sum_rows_by(float* partial, const T* x, int rows, int d) {
    auto row = [&](int r, int c, float sums[1][N]) {
        float v[N];
        get_all<N>(v, x + (size_t)r * d + c);
#pragma unroll
        for (int k = 0; k < N; k++) sums[0][k] += v[k];
    };
    column_sums<1, N, 4>(partial, rows, d, row);
}

template <class T> __device__ void sum_rows(float* partial, const T* x, int rows, int d) {
    BY_PACKS(T, d, aligned16(x), (sum_rows_by<T, N>(partial, x, rows, d)))
}
KERNEL(sum_rows, (float* partial, const T* x, int rows, int d), (partial, x, rows, d))

// out[c] (+)= sum over blocks b of partial[b * stride + s * d + c], for up to three sums s (grid y) with an `out` each: 32
// columns and 32 lanes a block.
extern "C" __global__ void __launch_bounds__(1024)
    add_blocks_f32(Gradient first, Gradient second, Gradient third, const float* partial, int blocks, size_t stride, int d) {
    __shared__ float of_lane[32][33];
    const Gradient out = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
    if (!out.at) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * 32 + lane;
    partial += (size_t)blockIdx.y * d + column;
    float sum = 0.0f;
    // One after the other, these loads would be all that the kernel waits for.
    constexpr int TOGETHER = 16;
    for (int base = warp; base < blocks; base += 32 * TOGETHER) {
        float x[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int b = base + 32 * i;
            x[i] = column < d && b < blocks ? partial[b * stride] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) sum += x[i];
    }
    of_lane[warp][lane] = sum;
    __syncthreads();
    sum = warp_sum(of_lane[lane][warp]);
    if (lane == 0 && blockIdx.x * 32 + warp < d) put(out, blockIdx.x * 32 + warp, sum);
}
