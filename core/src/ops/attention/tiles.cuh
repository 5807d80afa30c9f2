// Attention on tensor cores: tiles in shared memory and in registers. bf16, head dimension HEAD_DIM: a multiple of 16,
// at most 128.
//
// A warp owns 16 rows of the result, or 32 (queries in forward and for dQ, keys for dK and dV), and goes through all the rows
// of the other side, which the block holds in shared memory. Its own rows are operands in registers from beginning to end. A row
// in shared memory is HEAD_DIM + 8 elements long: eight consecutive rows then lie in different banks, for every head
// dimension. BIASED says whether a segment has a score bias.

// The most threads of a block, and the blocks that run side by side on a multiprocessor: as cuda.rs has them.
#define MAX_THREADS 192
#define BLOCKS (HEAD_DIM <= 64 ? 2 : 1)

constexpr int D = HEAD_DIM;
constexpr int HALF = D / 2;
constexpr int STRIDE = D + 8;
constexpr int K_STEPS = D / 16;  // steps of a product over the head dimension
constexpr int COLUMNS = D / 8;   // blocks of 8 columns

static_assert(D % 16 == 0 && D >= 16 && D <= 128, "head dimension");

constexpr float LOG2_E = 1.4426950408889634f;

// The accumulators of 16 rows and N blocks of 8 columns. Lane 4 g + t holds, of each block, row g and
// columns 2 t, 2 t + 1 ([0], [1]), then row g + 8 ([2], [3]).
template <int N> struct Accumulators {
    float at[N][4];

    __device__ __forceinline__ Accumulators() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) at[n][e] = 0.0f;
    }

    // f(x, e, column) for each element x; its row is 8 (e / 2) + g. Columns from `valid` on (rounded up to 16) are left
    // out.
    template <class F> __device__ __forceinline__ void each(F f, int valid = 8 * N) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (n >= 2 && n / 2 * 16 >= valid) break;
#pragma unroll
            for (int e = 0; e < 4; e++) f(at[n][e], e, 8 * n + 2 * t + e % 2);
        }
    }
};

// 16 rows as the left operand of a product over the head dimension.
struct Operand {
    u32 at[K_STEPS][4];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// What lane l gives to ldmatrix for a 16x16 tile whose 8x8 matrices are wanted rows first, or columns first.
__device__ __forceinline__ const bf16* rows_first(const bf16* tile) {
    const int l = lane_id();
    return tile + (l % 16) * STRIDE + l / 16 * 8;
}
__device__ __forceinline__ const bf16* columns_first(const bf16* tile) {
    const int l = lane_id();
    return tile + (l % 8 + l / 16 * 8) * STRIDE + l / 8 % 2 * 8;
}

// 16 rows of shared memory as a left operand.
__device__ __forceinline__ Operand operand(const bf16* rows) {
    Operand a;
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) ldmatrix_x4(a.at[k], rows_first(rows + 16 * k));
    return a;
}

// s += a b^T, with a R times 16 rows of the warp and b up to 16 N rows of shared memory, of which those from `valid` on
// (rounded up to 16) are left out.
template <int N, int R>
__device__ __forceinline__ void multiply(Accumulators<2 * N>* s, const Operand* a, const bf16* b, int valid) {
    // Step by step over the head dimension, so that products that follow each other do not wait for each other.
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) {
        u32 fragments[N][4];
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (n > 0 && 16 * n >= valid) break;
            ldmatrix_x4(fragments[n], columns_first(b + 16 * n * STRIDE + 16 * k));
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (n > 0 && 16 * n >= valid) break;
#pragma unroll
            for (int r = 0; r < R; r++) {
                mma_bf16(s[r].at[2 * n], a[r].at[k], fragments[n], s[r].at[2 * n]);
                mma_bf16(s[r].at[2 * n + 1], a[r].at[k], fragments[n] + 2, s[r].at[2 * n + 1]);
            }
        }
    }
}

// The same for 16 rows, from 0.
template <int N>
__device__ __forceinline__ Accumulators<2 * N> products(const Operand& a, const bf16* b, int valid) {
    Accumulators<2 * N> s;
    multiply<N, 1>(&s, &a, b, valid);
    return s;
}

// sum += p b, with p the result of `multiply`, rounded to bf16, and b the same rows of shared memory.
template <int N, int R = 1>
__device__ __forceinline__ void add_product(Accumulators<COLUMNS>* sum, const Accumulators<2 * N>* p, const bf16* b,
                                            int valid) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (n > 0 && 16 * n >= valid) break;
        u32 a[R][4];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = p[r].at[2 * n + i / 2] + i % 2 * 2;
                a[r][i] = pack_bf16(pair[0], pair[1]);
            }
#pragma unroll
        for (int c = 0; c < K_STEPS; c++) {
            u32 fragment[4];
            ldmatrix_x4_trans(fragment, rows_first(b + 16 * n * STRIDE + 16 * c));
#pragma unroll
            for (int r = 0; r < R; r++) {
                mma_bf16(sum[r].at[2 * c], a[r], fragment, sum[r].at[2 * c]);
                mma_bf16(sum[r].at[2 * c + 1], a[r], fragment + 2, sum[r].at[2 * c + 1]);
            }
        }
    }
}

// f(first, valid) for `count` rows, SIZE at a time and then what is left: in full blocks `valid` is a constant, and nothing
// in them depends on it.
template <int SIZE, class F> __device__ __forceinline__ void in_blocks(int count, F f) {
    int first = 0;
    for (; first + SIZE <= count; first += SIZE) f(first, SIZE);
    if (first < count) f(first, count - first);
}

// ---- rows between global and shared memory

// The threads that do something together: a warp or a block.
struct Threads {
    int index, count;
};
__device__ __forceinline__ Threads this_warp() { return {lane_id(), 32}; }
__device__ __forceinline__ Threads this_block() { return {(int)threadIdx.x, (int)blockDim.x}; }

// One head's rows of one image: `stride` elements from row to row. Offsets within an image are `int`: registers are few.
struct Rows {
    const bf16* at;
    int stride;
    int tokens;
};

// Rows [first, first + count) to shared memory as they are, in the background: `copy_wait` ends it. Zeros behind the
// last token.
__device__ __forceinline__ void load_plain(bf16* to, Rows from, int first, int count, Threads threads) {
    for (int i = threads.index; i < count * COLUMNS; i += threads.count) {
        const int row = first + i / COLUMNS, c = i % COLUMNS * 8;
        const bool inside = row < from.tokens;
        copy_async16(to + i / COLUMNS * STRIDE + c, from.at + (inside ? row : 0) * from.stride + c, inside ? 16 : 0);
    }
    copy_commit();
}

// Rows [first, first + 16) as a left operand, straight from global memory. Behind the last token it is repeated:
// what comes of it is not stored.
__device__ __forceinline__ Operand global_operand(Rows from, int first) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    Operand a;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = min(first + 8 * h + g, from.tokens - 1);
        const u32* at = (const u32*)(from.at + row * from.stride + 2 * t);
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            a.at[k][h] = __ldg(at + 8 * k);
            a.at[k][h + 2] = __ldg(at + 8 * k + 4);
        }
    }
    return a;
}

// The transpose of the rotation: the gradients of rotated rows to those of packed ones, where they were accumulated.
__device__ __forceinline__ void unrotate(Accumulators<COLUMNS>& x, int first, const Segment& s) {
    if (!s.sin) return;
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = first + 8 * h + g;
        if (row < s.prefix || row >= s.tokens) continue;
        const int at = (row - s.prefix) * D + 2 * t;
        const u32 *sin = (const u32*)((const bf16*)s.sin + at), *cos = (const u32*)((const bf16*)s.cos + at);
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; n++) {
            // Pairs of columns: two elements each.
            const u32 sin_a = __ldg(sin + 4 * n), sin_b = __ldg(sin + 4 * n + HALF / 2);
            const u32 cos_a = __ldg(cos + 4 * n), cos_b = __ldg(cos + 4 * n + HALF / 2);
            float *a = x.at[n] + 2 * h, *b = x.at[n + COLUMNS / 2] + 2 * h;
            const float old[2] = {a[0], a[1]};
            a[0] = a[0] * low(cos_a) + b[0] * low(sin_b);
            a[1] = a[1] * high(cos_a) + b[1] * high(sin_b);
            b[0] = b[0] * low(cos_b) - old[0] * low(sin_a);
            b[1] = b[1] * high(cos_b) - old[1] * high(sin_a);
        }
    }
}

// The warp's rows of a result, scaled and rounded, to global memory by way of `staging`, [16, STRIDE] of the warp's
// own, so that whole sectors are written.
__device__ __forceinline__ void store_rows(bf16* to, int stride, int first, int tokens,
                                           const Accumulators<COLUMNS>& x, bf16* staging) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float* pair = x.at[n] + 2 * h;
            *(u32*)(staging + (8 * h + g) * STRIDE + 8 * n + 2 * t) = pack_bf16(pair[0], pair[1]);
        }
    __syncwarp();
    const int count = min(16, tokens - first);
    for (int i = lane_id(); i < count * COLUMNS; i += 32) {
        const int row = i / COLUMNS, c = i % COLUMNS * 8;
        *(Eight*)(to + (first + row) * stride + c) = *(const Eight*)(staging + row * STRIDE + c);
    }
    __syncwarp();
}

// Adds the bias between patches to scores of the rows from `row` on with the columns from `column` on. `inverse_scale`
// makes it of the size of scores before they are scaled. Rows are queries, or keys if `transposed`.
template <bool transposed, int N>
__device__ __forceinline__ void add_bias(Accumulators<N>& s, const Segment& segment, int head, int row, int column,
                                         float inverse_scale) {
    if (!segment.bias) return;
    const int patches = segment.tokens - segment.prefix, g = lane_id() / 4;
    const bf16* bias = (const bf16*)segment.bias + (size_t)head * patches * patches;
    s.each([&](float& x, int e, int c) {
        const int i = row + 8 * (e / 2) + g - segment.prefix, j = column + c - segment.prefix;
        if (min(i, j) < 0 || max(i, j) >= patches) return;
        x += to_float(bias[transposed ? j * patches + i : i * patches + j]) * inverse_scale;
    });
}

// ---- the sweep that all kernels are

// A block's dynamic shared memory: two sets of the rows of its chunks (keys and values, say), 16 rows for each warp, then two floats for each row of the chunks, where a kernel wants them.
struct Buffers {
    bf16 *first, *second, *staging;
    float *sums, *deltas;

    __device__ __forceinline__ Buffers(bf16* shared, const Item& item) {
        const int rows = item.segment.chunk * item.segment.slots, warps = blockDim.x / 32;
        first = shared;
        second = first + rows * STRIDE;
        bf16* stagings = second + rows * STRIDE;
        staging = stagings + threadIdx.x / 32 * 16 * STRIDE;
        sums = (float*)(stagings + warps * 16 * STRIDE);
        deltas = sums + rows;
    }
};

// The tile that a warp computes: its head, and its first row in the image.
struct Tile {
    int head, row;
};

// For every tile of Work::TILE rows of the item that is this warp's: work.begin(tile); work.step(tile, slot, first, count) for all rows of
// the image, chunk by chunk; work.end(tile). work.load(head, slot, first, count) fills rows of shared memory, from row
// `slot` on, in two groups of copies. A short sequence is one chunk, which stays for all tiles of all heads of the item.
// A long one has as many tiles in an item as there are warps, and two buffers: one is filled while the other is read.
template <class Work> __device__ __forceinline__ void sweep(const Item& item, Work& work) {
    // What the item says is read again where it is needed: registers are few.
    constexpr int TILE = Work::TILE;
    const int per_head = (item.rows + TILE - 1) / TILE;
    const auto load = [&](int head, int slot, int first) {
        const int count = min(item.segment.chunk, item.segment.tokens - first);
        work.load(item.head + head, slot * item.segment.chunk, first, (count + 15) / 16 * 16);
    };
    const bool whole = item.segment.tokens <= item.segment.chunk;
    for (int round = 0; round < item.heads * per_head; round += blockDim.x / 32) {
        const int index = round + threadIdx.x / 32, h = index / per_head;
        const Tile tile = {item.head + h, item.row + index % per_head * TILE};
        const bool mine = h < item.heads;
        if (mine) work.begin(tile);
        if (round == 0 || !whole) {
            for (int i = 0; i < (whole ? item.heads : 1); i++) load(i, i, 0);
        }
        for (int first = 0, slot = whole ? h : 0; first < item.segment.tokens; first += item.segment.chunk, slot ^= 1) {
            const int count = min(item.segment.chunk, item.segment.tokens - first);
            const bool more = first + count < item.segment.tokens;
            if (more) {
                load(0, slot ^ 1, first + count);
                copy_wait<2>();
            } else {
                copy_wait<0>();
            }
            if (round == 0 || !whole) __syncthreads();
            if (mine) work.step(tile, slot * item.segment.chunk, first, count);
            if (!whole) __syncthreads();
        }
        if (mine) work.end(tile);
    }
}
