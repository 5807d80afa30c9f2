// The sums of the rows of a matrix, and the second half of every kernel that makes such sums on the way.

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

// out[c] (+)= sum over blocks b of partial[b * stride + c], for d columns: 32 columns and 32 lanes a block.
extern "C" __global__ void __launch_bounds__(1024) add_blocks_f32(Gradient out, const float* partial, int blocks, size_t stride, int d) {
    __shared__ float of_lane[32][33];
    const int column = blockIdx.x * 32 + threadIdx.x % 32, lane = threadIdx.x / 32;
    float sum = 0.0f;
    if (column < d) {
        for (int b = lane; b < blocks; b += 32) sum += partial[b * stride + column];
    }
    of_lane[lane][threadIdx.x % 32] = sum;
    __syncthreads();
    if (lane == 0 && column < d) {
        sum = 0.0f;
        for (int l = 0; l < 32; l++) sum += of_lane[l][threadIdx.x];
        put(out, column, sum);
    }
}
