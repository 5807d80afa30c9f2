// out = softmax(s Q K^T + bias) V with Q and K as rotate.cu leaves them, some keys at a time (FlashAttention-2, arXiv:2307.08691): each row keeps its
// maximum, its sum and the weighted values so far, and rescales them when the maximum has grown by more than SLACK: until
// then weights are up to 2^SLACK in place of 1, which costs f32 and bf16 no digit.
//
// Shared memory: K and V of the chunk, and 16 rows for each warp's results. d = 64: 288 bytes a row of the chunk, 2.3 KiB a
// warp; 261 tokens and 6 warps take 90 KiB and at most 168 registers a thread, so that two blocks run side by side, one
// loading while the other computes.
//
// A warp owns 16 R queries. Where a sequence is too long for shared memory, two times 16: what is loaded of K and V, chunk
// by chunk, then serves twice as many. Short ones leave fewer warps idle with 16.

constexpr float SLACK = 8.0f;  // in powers of two

template <int R> struct Forward {
    static constexpr int TILE = 16 * R;
    static constexpr int N = D > 64 ? 8 : 4 / R;  // 16 N keys at a time

    const Item& item;
    const bf16* qkv;
    bf16* out;
    float* log_sum;
    bf16 *keys, *values, *staging;
    float scale;  // of the scores, for powers of two

    Operand q[R];
    Accumulators<COLUMNS> o[R];
    float top[R][2], sum[R][2];  // of rows g and g + 8: the maximum, and this lane's part of the sum

    __device__ __forceinline__ int width() const { return item.total_heads * D; }
    __device__ __forceinline__ Rows rows(int part, int head) const {
        const int stride = 3 * width();
        return {qkv + (size_t)item.image_row * stride + part * width() + head * D, stride, item.segment.tokens};
    }

    __device__ __forceinline__ void begin(Tile tile) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            q[r] = global_operand(rows(0, tile.head), tile.row + 16 * r);
            o[r] = {};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                top[r][h] = -1e30f;  // finite, so that the difference of two is a number
                sum[r][h] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void load(int head, int slot, int first, int count) {
        load_plain(keys + slot * STRIDE, rows(1, head), first, count, this_block());
        load_plain(values + slot * STRIDE, rows(2, head), first, count, this_block());
    }

    __device__ __forceinline__ void step(Tile tile, int slot, int first, int count) {
        in_blocks<16 * N>(count, [&](int j, int valid) {
            const int at = slot + j;
            Accumulators<2 * N> s[R];
            multiply<N, R>(s, q, keys + at * STRIDE, valid);
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (BIASED) add_bias<false>(s[r], item.segment, tile.head, tile.row + 16 * r, first + j, LOG2_E / scale);
                if (valid < 16 * N) {
                    s[r].each([&](float& x, int, int c) { x = c < valid ? x : -INFINITY; });
                }
            }
            weigh(s, valid);
            add_product<N, R>(o, s, values + at * STRIDE, valid);
        });
    }

    // Scores to weights relative to the rows' maxima, or to what these were when they last grew.
    __device__ __forceinline__ void weigh(Accumulators<2 * N>* s, int valid) {
        float now[R][2];
        bool grows = false;
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int h = 0; h < 2; h++) now[r][h] = top[r][h];
            s[r].each([&](float& x, int e, int) { now[r][e / 2] = fmaxf(now[r][e / 2], x); }, valid);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float& x = now[r][h];
                x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
                x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
                grows |= (x - top[r][h]) * scale > SLACK;
            }
        }
        if (__any_sync(FULL_WARP, grows)) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                float shrink[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    shrink[h] = exp2_fast((top[r][h] - now[r][h]) * scale);
                    top[r][h] = now[r][h];
                    sum[r][h] *= shrink[h];
                }
                o[r].each([&](float& x, int e, int) { x *= shrink[e / 2]; });
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float origin[2] = {top[r][0] * scale, top[r][1] * scale};
            auto weight = [&](float& x, int e, int) {
                x = exp2_fast(x * scale - origin[e / 2]);
                sum[r][e / 2] += x;
            };
            s[r].each(weight, valid);
        }
    }

    __device__ __forceinline__ void end(Tile tile) {
        float* sums = log_sum + item.sums(tile.head);
        bf16* to = out + (size_t)item.image_row * width() + tile.head * D;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int first = tile.row + 16 * r;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float x = sum[r][h];
                x += __shfl_xor_sync(FULL_WARP, x, 1);
                x += __shfl_xor_sync(FULL_WARP, x, 2);
                sum[r][h] = 1.0f / x;
                const int row = first + 8 * h + lane_id() / 4;
                if (lane_id() % 4 != 0 || row >= item.segment.tokens) continue;
                sums[row] = (top[r][h] * scale + log2f(x)) / LOG2_E;
            }
            o[r].each([&](float& x, int e, int) { x *= sum[r][e / 2]; });
            store_rows(to, width(), first, item.segment.tokens, o[r], staging);
        }
    }
};

// qkv [T, 3 D H] to out [T, D H] and, for each image, the logarithms of the rows' normalisers [H, tokens].
template <int R>
__device__ __forceinline__ void forward(bf16* shared, const bf16* qkv, bf16* out, float* log_sum, const Segments& all) {
    __shared__ Item item;
    if (threadIdx.x == 0) item = item_of(all, blockIdx.x);
    __syncthreads();
    const Buffers to(shared, item);
    Forward<R> work = {item, qkv, out, log_sum, to.first, to.second, to.staging, LOG2_E * rsqrtf(float(D))};
    sweep(item, work);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
attention_forward_bf16(const bf16* qkv, bf16* out, float* log_sum, Segments all) {
    DYNAMIC_SHARED(bf16, shared);
    forward<1>(shared, qkv, out, log_sum, all);
}

#if HEAD_DIM <= 64
extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
attention_forward_long_bf16(const bf16* qkv, bf16* out, float* log_sum, Segments all) {
    DYNAMIC_SHARED(bf16, shared);
    forward<2>(shared, qkv, out, log_sum, all);
}
#endif
