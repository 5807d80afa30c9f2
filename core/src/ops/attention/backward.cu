// With P = exp(S - log_sum), computed again, and delta = rowsum(dO O):
// dV = P^T dO, dS = P (dO V^T - delta), dR(Q) = s dS R(K), dR(K) = s dS^T R(Q), dbias = dS, and dQ, dK by the transposes of
// the rotations. qkv has R(Q) and R(K) where Q and K were (rotate.cu).
//
// Two kernels, so that every sum has one owner and its order is fixed: one gives each warp rows of dQ, which sweep over
// the keys; the other rows of dK and dV, which sweep over the queries. P and dP are computed in both: 7 products in
// place of 5, and no atomic additions.
//
// Shared memory as in forward; the second kernel also holds log_sum and delta of the chunk, 8 bytes a row.

constexpr int N = D <= 96 ? 2 : 1;  // 16 N rows of the other side at a time

// What both kernels read and write.
struct Backward {
    static constexpr int TILE = 16;  // rows of a warp

    const bf16 *qkv, *out, *dout;
    const float* log_sum;
    float* delta;
    bf16* dqkv;
    const Item& item;

    __device__ __forceinline__ int width() const { return item.total_heads * D; }
    __device__ __forceinline__ size_t place(int part, int head) const {
        return (size_t)item.image_row * 3 * width() + part * width() + head * D;
    }
    __device__ __forceinline__ Rows packed(int part, int head) const {
        return {qkv + place(part, head), 3 * width(), item.segment.tokens};
    }
    __device__ __forceinline__ size_t mixed(int head) const { return (size_t)item.image_row * width() + head * D; }
    __device__ __forceinline__ Rows gradient(int head) const {
        return {dout + mixed(head), width(), item.segment.tokens};
    }
};

// ---- dQ and delta

struct QueryGradient : Backward {
    bf16 *keys, *values, *staging;
    float scale;  // of the scores, for powers of two

    Operand q, dy;
    Accumulators<COLUMNS> dq;
    float sums[2], deltas[2];  // of rows g and g + 8; log_sum in base 2

    __device__ __forceinline__ QueryGradient(const Backward& b, const Buffers& to)
        : Backward(b), keys(to.first), values(to.second), staging(to.staging), scale(LOG2_E * rsqrtf(float(D))) {}

    __device__ __forceinline__ void begin(Tile tile) {
        dy = global_operand(gradient(tile.head), tile.row);
        q = global_operand(packed(0, tile.head), tile.row);
        dq = {};
        row_statistics(tile);
    }

    // delta of the warp's rows, from dO as it lies in the operand; also written for the other kernel.
    __device__ __forceinline__ void row_statistics(Tile tile) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const size_t place = item.sums(tile.head);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int wanted = tile.row + 8 * h + g, row = min(wanted, item.segment.tokens - 1);
            const bf16* y = out + mixed(tile.head) + row * width();
            float dot = 0.0f;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                const u32 dy_pair = dy.at[n / 2][h + n % 2 * 2];
                const u32 y_pair = __ldg((const u32*)(y + 8 * n + 2 * t));
                dot += low(dy_pair) * low(y_pair) + high(dy_pair) * high(y_pair);
            }
            dot += __shfl_xor_sync(FULL_WARP, dot, 1);
            dot += __shfl_xor_sync(FULL_WARP, dot, 2);
            deltas[h] = dot;
            sums[h] = log_sum[place + row] * LOG2_E;
            if (wanted == row && t == 0) delta[place + row] = dot;
        }
    }

    __device__ __forceinline__ void load(int head, int slot, int first, int count) {
        load_plain(keys + slot * STRIDE, packed(1, head), first, count, this_block());
        load_plain(values + slot * STRIDE, packed(2, head), first, count, this_block());
    }

    __device__ __forceinline__ void step(Tile tile, int slot, int first, int count) {
        in_blocks<16 * N>(count, [&](int j, int valid) {
            const int at = slot + j;
            auto p = products<N>(q, keys + at * STRIDE, valid);
            auto ds = products<N>(dy, values + at * STRIDE, valid);
            if (BIASED) add_bias<false>(p, item.segment, tile.head, tile.row, first + j, LOG2_E / scale);
            p.each([&](float& x, int e, int) { x = exp2_fast(x * scale - sums[e / 2]); }, valid);
            auto slope = [&](float& x, int e, int c) {
                x = c < valid ? p.at[c / 8][e] * (x - deltas[e / 2]) : 0.0f;
            };
            ds.each(slope, valid);
            add_product<N>(&dq, &ds, keys + at * STRIDE, valid);
        });
    }

    __device__ __forceinline__ void end(Tile tile) {
        unrotate(dq, tile.row, item.segment);
        dq.each([](float& x, int, int) { x *= rsqrtf(float(D)); });
        store_rows(dqkv + place(0, tile.head), 3 * width(), tile.row, item.segment.tokens, dq, staging);
    }
};

// ---- dK and dV

struct KeyGradient : Backward {
    bf16 *queries, *gradients, *staging;
    float *sums, *deltas;  // of the rows of the chunk; log_sum in base 2
    float scale;           // of the scores, for powers of two

    Operand k, v;
    Accumulators<COLUMNS> dk, dv;

    __device__ __forceinline__ KeyGradient(const Backward& b, const Buffers& to)
        : Backward(b), queries(to.first), gradients(to.second), staging(to.staging), sums(to.sums), deltas(to.deltas),
          scale(LOG2_E * rsqrtf(float(D))) {}

    __device__ __forceinline__ void begin(Tile tile) {
        v = global_operand(packed(2, tile.head), tile.row);
        k = global_operand(packed(1, tile.head), tile.row);
        dk = {};
        dv = {};
    }

    // Rows behind the last token are zeros with log_sum 0 and delta 0, and add nothing.
    __device__ __forceinline__ void load(int head, int slot, int first, int count) {
        load_plain(gradients + slot * STRIDE, gradient(head), first, count, this_block());
        load_plain(queries + slot * STRIDE, packed(0, head), first, count, this_block());
        const size_t place = item.sums(head) + first;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const bool inside = first + i < item.segment.tokens;
            sums[slot + i] = inside ? log_sum[place + i] * LOG2_E : 0.0f;
            deltas[slot + i] = inside ? delta[place + i] : 0.0f;
        }
    }

    __device__ __forceinline__ void step(Tile tile, int slot, int first, int count) {
        in_blocks<16 * N>(count, [&](int j, int valid) {
            const int at = slot + j;
            auto p = products<N>(k, queries + at * STRIDE, valid);
            auto ds = products<N>(v, gradients + at * STRIDE, valid);
            if (BIASED) add_bias<true>(p, item.segment, tile.head, tile.row, first + j, LOG2_E / scale);
            p.each([&](float& x, int, int c) { x = exp2_fast(x * scale - sums[at + c]); }, valid);
            ds.each([&](float& x, int e, int c) { x = p.at[c / 8][e] * (x - deltas[at + c]); }, valid);
            add_product<N>(&dv, &p, gradients + at * STRIDE, valid);
            add_product<N>(&dk, &ds, queries + at * STRIDE, valid);
        });
    }

    __device__ __forceinline__ void end(Tile tile) {
        const int stride = 3 * width(), tokens = item.segment.tokens;
        unrotate(dk, tile.row, item.segment);
        dk.each([](float& x, int, int) { x *= rsqrtf(float(D)); });
        store_rows(dqkv + place(1, tile.head), stride, tile.row, tokens, dk, staging);
        store_rows(dqkv + place(2, tile.head), stride, tile.row, tokens, dv, staging);
    }
};

#define BACKWARD_PARAMS                                                                                           \
    const bf16 *qkv, const bf16 *out, const bf16 *dout, const float *log_sum, float *delta, bf16 *dqkv, Segments all

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS) attention_backward_queries_bf16(BACKWARD_PARAMS) {
    DYNAMIC_SHARED(bf16, shared);
    __shared__ Item item;
    if (threadIdx.x == 0) item = item_of(all, blockIdx.x);
    __syncthreads();
    QueryGradient work({qkv, out, dout, log_sum, delta, dqkv, item}, Buffers(shared, item));
    sweep(item, work);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS) attention_backward_keys_bf16(BACKWARD_PARAMS) {
    DYNAMIC_SHARED(bf16, shared);
    __shared__ Item item;
    if (threadIdx.x == 0) item = item_of(all, blockIdx.x);
    __syncthreads();
    KeyGradient work({qkv, out, dout, log_sum, delta, dqkv, item}, Buffers(shared, item));
    sweep(item, work);
}

#if BIASED

// ---- dbias

// The sum over each part of the images, `partial` [parts, H, P, P], of the only segment: a warp owns 16 queries by
// 16 N keys of one head. Blocks: (tiles, heads, parts). Shared memory: 32 (1 + N) rows a warp.
extern "C" __global__ void attention_backward_bias_bf16(BACKWARD_PARAMS, float* partial) {
    constexpr int KEYS = 16 * N;
    const Segment& s = all.at[0];
    const int patches = s.tokens - s.prefix, across = (patches + KEYS - 1) / KEYS;
    const int warp = threadIdx.x / 32, index = blockIdx.x * (blockDim.x / 32) + warp;
    const int head = blockIdx.y;
    const int row = s.prefix + index / across * 16, column = s.prefix + index % across * KEYS;
    if (row >= s.tokens) return;
    DYNAMIC_SHARED(bf16, shared);
    bf16* queries = shared + warp * (32 + 2 * KEYS) * STRIDE;
    bf16 *gradients = queries + 16 * STRIDE, *keys = gradients + 16 * STRIDE, *values = keys + KEYS * STRIDE;

    const int first = blockIdx.z * all.images_per_part, last = min(first + all.images_per_part, s.images);
    const float scale = LOG2_E * rsqrtf(float(D));
    Accumulators<2 * N> total;
    for (int image = first; image < last; image++) {
        const Item item = {s, s.first_row + image * s.tokens, head, 1, 0, s.tokens, all.heads};
        const Backward b = {qkv, out, dout, log_sum, delta, dqkv, item};
        load_plain(gradients, b.gradient(head), row, 16, this_warp());
        load_plain(values, b.packed(2, head), column, KEYS, this_warp());
        load_plain(queries, b.packed(0, head), row, 16, this_warp());
        load_plain(keys, b.packed(1, head), column, KEYS, this_warp());
        copy_wait<0>();
        __syncwarp();
        auto p = products<N>(operand(queries), keys, KEYS);
        auto ds = products<N>(operand(gradients), values, KEYS);
        add_bias<false>(p, s, head, row, column, LOG2_E / scale);
        float sums[2], deltas[2];
        for (int h = 0; h < 2; h++) {
            const size_t at = item.sums(head) + min(row + 8 * h + lane_id() / 4, s.tokens - 1);
            sums[h] = log_sum[at] * LOG2_E;
            deltas[h] = delta[at];
        }
        total.each([&](float& x, int e, int c) {
            const int n = c / 8, h = e / 2;
            x += exp2_fast(p.at[n][e] * scale - sums[h]) * (ds.at[n][e] - deltas[h]);
        });
        __syncwarp();
    }
    float* to = partial + ((size_t)blockIdx.z * all.heads + head) * patches * patches;
    total.each([&](float& x, int e, int c) {
        const int i = row - s.prefix + 8 * (e / 2) + lane_id() / 4, j = column - s.prefix + c;
        if (i < patches && j < patches) to[(size_t)i * patches + j] = x;
    });
}

#endif
