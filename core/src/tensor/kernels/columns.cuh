// Sums over the rows of a matrix, in a fixed order and without atomics. A block takes a run of rows, its threads own
// columns, and partial sums stay in registers; `add_blocks` (columns.cu) adds the blocks' sums in order.

// For every row r of this block's run and every N columns c.., once: row(r, c, sums), which adds to sums[SUMS][N]. Leaves
// the run's sums in partial[block][SUMS][d]. Launched by `Partial::launch`. A row that only reads may be UNROLLed.
template <int SUMS, int N, int UNROLL = 1, class Row>
__device__ __forceinline__ void column_sums(float* partial, int rows, int d, Row row) {
    const int groups = (d + N - 1) / N, threads = blockDim.x;
    const int wide = groups < threads ? groups : threads, lanes = threads / wide;
    const int lane = threadIdx.x / wide, group = threadIdx.x % wide;
    const int run = (rows + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * run, end = first + run < rows ? first + run : rows;
    __shared__ float of_lane[512 * N];
    for (int base = 0; base < groups; base += wide) {
        const int column = (base + group) * N;
        const bool mine = lane < lanes && base + group < groups;
        float sums[SUMS][N] = {};
        // Rows that are not UNROLLed are visited in chunks: as one loop, it is compiled to ten registers more.
        const int step = UNROLL > 1 ? run : 32;
        for (int chunk = first; chunk < end; chunk += step) {
            const int last = chunk + step < end ? chunk + step : end;
            if (mine) {
#pragma unroll UNROLL
                for (int r = chunk + lane; r < last; r += lanes) row(r, column, sums);
            }
        }
#pragma unroll
        for (int s = 0; s < SUMS; s++) {
            __syncthreads();
            if (mine) {
#pragma unroll
                for (int k = 0; k < N; k++) of_lane[(lane * wide + group) * N + k] = sums[s][k];
            }
            __syncthreads();
            if (lane == 0 && mine) {
                for (int k = 0; k < N && column + k < d; k++) {
                    float total = 0.0f;
                    for (int l = 0; l < lanes; l++) total += of_lane[(l * wide + group) * N + k];
                    partial[((size_t)blockIdx.x * SUMS + s) * d + column + k] = total;
                }
            }
        }
    }
}
