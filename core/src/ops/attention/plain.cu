// Attention without tensor cores: f32, and bf16 with a head dimension that the tiles do not cover. Everything is f32
// in shared memory, and each warp goes through the other side's rows 32 at a time, one a lane.
//
// A block computes ROWS rows of one image and head (`rows_per_item`), a warp every eighth of them. Shared memory: tiles
// of 32 rows of d + 1 floats (for even d, lanes are in different banks): 4 in forward, 5 for dQ, 6 for dK and dV.

#define ROWS 32
#define WARPS 8

// One of the packed parts (or the output, or its gradient) of one image and head.
template <class T> struct Matrix {
    const T* at;
    size_t stride;
};

// What the kernels share: the item, and a tile of shared memory at a time.
template <class T> struct Head {
    Item item;
    int d;
    float* next;  // unused shared memory

    __device__ Head(const Segments& all, float* shared)
        : item(item_of(all, blockIdx.x)), d(all.head_dim), next(shared) {}

    __device__ float* tile() {
        float* t = next;
        next += 32 * (d + 1);
        return t;
    }
    __device__ size_t width() const { return (size_t)item.total_heads * d; }
    __device__ size_t place(int part) const { return item.image_row * 3 * width() + part * width() + item.head * d; }
    __device__ Matrix<T> packed(const T* qkv, int part) const { return {qkv + place(part), 3 * width()}; }
    __device__ Matrix<T> mixed(const T* x) const { return {x + item.image_row * width() + item.head * d, width()}; }
    __device__ float scale() const { return 1.0f / sqrtf(float(d)); }

    // The angle of column c of a row: (cosine, sine).
    __device__ float2 angle(int row, int c) const {
        const Segment& s = item.segment;
        if (!s.sin || row < s.prefix) return {1.0f, 0.0f};
        const size_t i = (size_t)(row - s.prefix) * d + c;
        return {to_float(((const T*)s.cos)[i]), to_float(((const T*)s.sin)[i])};
    }
    __device__ float rotated(Matrix<T> x, int row, int c) const {
        const T* at = x.at + row * x.stride;
        const float2 turn = angle(row, c);
        if (turn.y == 0.0f) return to_float(at[c]) * turn.x;
        const float other = c < d / 2 ? -to_float(at[c + d / 2]) : to_float(at[c - d / 2]);
        return to_float(at[c]) * turn.x + other * turn.y;
    }
    // The transpose of `rotated`, of a row in shared memory.
    __device__ float unrotated(const float* x, int row, int c) const {
        const int other = c < d / 2 ? c + d / 2 : c - d / 2;
        const float y = x[c] * angle(row, c).x;
        if (!item.segment.sin || row < item.segment.prefix) return y;
        const float sine = angle(row, other).y;
        return c < d / 2 ? y + x[other] * sine : y - x[other] * sine;
    }
    // Bias between two tokens.
    __device__ float bias(int query, int key) const {
        const Segment& s = item.segment;
        const int patches = s.tokens - s.prefix, i = query - s.prefix, j = key - s.prefix;
        if (!s.bias || i < 0 || j < 0) return 0.0f;
        return to_float(((const T*)s.bias)[((size_t)item.head * patches + i) * patches + j]);
    }

    // Rows [first, first + 32) to a tile, by the whole block; zeros behind the last token.
    __device__ void load(float* to, Matrix<T> x, int first, bool rotate) const {
        for (int i = threadIdx.x; i < 32 * d; i += blockDim.x) {
            const int row = first + i / d, c = i % d;
            const bool inside = row < item.segment.tokens;
            to[i / d * (d + 1) + c] = !inside ? 0.0f : rotate ? rotated(x, row, c) : to_float(x.at[row * x.stride + c]);
        }
    }
    __device__ float dot(const float* a, const float* b) const {
        float sum = 0.0f;
        for (int c = 0; c < d; c++) sum = fmaf(a[c], b[c], sum);
        return sum;
    }
    // row = row * keep + sum over the 32 rows of a tile of weight * tile row; lane l brings the weight of row l.
    __device__ void accumulate(float* row, float keep, float weight, const float* tile, float* weights) const {
        const int lane = threadIdx.x % 32;
        __syncwarp();
        weights[lane] = weight;
        __syncwarp();
        for (int c = lane; c < d; c += 32) {
            float sum = row[c] * keep;
            for (int j = 0; j < 32; j++) sum = fmaf(weights[j], tile[j * (d + 1) + c], sum);
            row[c] = sum;
        }
    }
};

template <class T>
__device__ void attention_forward(const T* qkv, T* out, float* log_sum, Segments all) {
    DYNAMIC_SHARED(float, shared);
    __shared__ float weights[WARPS][32];
    Head<T> head(all, shared);
    const int d = head.d;
    float *q = head.tile(), *k = head.tile(), *v = head.tile(), *o = head.tile();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = head.item.segment.tokens;
    float top[ROWS / WARPS], sum[ROWS / WARPS];
    for (int r = 0; r < ROWS / WARPS; r++) top[r] = -1e30f, sum[r] = 0.0f;
    head.load(q, head.packed(qkv, 0), head.item.row, true);
    for (int i = threadIdx.x; i < ROWS * (d + 1); i += blockDim.x) o[i] = 0.0f;
    for (int first = 0; first < tokens; first += 32) {
        __syncthreads();
        head.load(k, head.packed(qkv, 1), first, true);
        head.load(v, head.packed(qkv, 2), first, false);
        __syncthreads();
        const int key = first + lane;
        for (int r = 0; r < ROWS / WARPS; r++) {
            const int i = warp + r * WARPS, row = head.item.row + i;
            if (row >= tokens) break;
            float s = -INFINITY;
            if (key < tokens) s = head.dot(q + i * (d + 1), k + lane * (d + 1)) * head.scale() + head.bias(row, key);
            const float now = fmaxf(top[r], warp_max(s)), keep = expf(top[r] - now), p = expf(s - now);
            top[r] = now;
            sum[r] = sum[r] * keep + warp_sum(p);
            head.accumulate(o + i * (d + 1), keep, p, v, weights[warp]);
        }
    }
    for (int r = 0; r < ROWS / WARPS; r++) {
        const int i = warp + r * WARPS, row = head.item.row + i;
        if (row >= tokens) break;
        T* to = out + (head.item.image_row + row) * head.width() + head.item.head * d;
        for (int c = lane; c < d; c += 32) to[c] = from_float<T>(o[i * (d + 1) + c] / sum[r]);
        if (lane == 0) log_sum[head.item.sums(head.item.head) + row] = top[r] + logf(sum[r]);
    }
}

KERNEL(attention_forward, (const T* qkv, T* out, float* log_sum, Segments all), (qkv, out, log_sum, all))

#define BACKWARD_PARAMS                                                                                            \
    const T *qkv, const T *out, const T *dout, const float *log_sum, float *delta, T *dqkv, Segments all

// dQ, and delta = rowsum(dO O).
template <class T>
__device__ void attention_backward_queries(BACKWARD_PARAMS) {
    DYNAMIC_SHARED(float, shared);
    __shared__ float weights[WARPS][32];
    Head<T> head(all, shared);
    const int d = head.d;
    float *q = head.tile(), *dy = head.tile(), *k = head.tile(), *v = head.tile(), *dq = head.tile();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = head.item.segment.tokens;
    const size_t sums = head.item.sums(head.item.head);
    head.load(q, head.packed(qkv, 0), head.item.row, true);
    head.load(dy, head.mixed(dout), head.item.row, false);
    head.load(dq, head.mixed(out), head.item.row, false);
    __syncthreads();
    float deltas[ROWS / WARPS];
    for (int r = 0; r < ROWS / WARPS; r++) {
        const int i = warp + r * WARPS, row = head.item.row + i;
        float *y = dq + i * (d + 1), dot = 0.0f;
        for (int c = lane; c < d; c += 32) {
            dot += dy[i * (d + 1) + c] * y[c];
            y[c] = 0.0f;
        }
        deltas[r] = warp_sum(dot);
        if (lane == 0 && row < tokens) delta[sums + row] = deltas[r];
    }
    for (int first = 0; first < tokens; first += 32) {
        __syncthreads();
        head.load(k, head.packed(qkv, 1), first, true);
        head.load(v, head.packed(qkv, 2), first, false);
        __syncthreads();
        const int key = first + lane;
        for (int r = 0; r < ROWS / WARPS; r++) {
            const int i = warp + r * WARPS, row = head.item.row + i;
            if (row >= tokens) break;
            float ds = 0.0f;
            if (key < tokens) {
                const float s = head.dot(q + i * (d + 1), k + lane * (d + 1)) * head.scale() + head.bias(row, key);
                ds = expf(s - log_sum[sums + row]) * (head.dot(dy + i * (d + 1), v + lane * (d + 1)) - deltas[r]);
            }
            head.accumulate(dq + i * (d + 1), 1.0f, ds, k, weights[warp]);
        }
    }
    __syncwarp();
    for (int r = 0; r < ROWS / WARPS; r++) {
        const int i = warp + r * WARPS, row = head.item.row + i;
        if (row >= tokens) break;
        T* to = dqkv + head.place(0) + row * 3 * head.width();
        for (int c = lane; c < d; c += 32) {
            to[c] = from_float<T>(head.unrotated(dq + i * (d + 1), row, c) * head.scale());
        }
    }
}

KERNEL(attention_backward_queries, (BACKWARD_PARAMS), (qkv, out, dout, log_sum, delta, dqkv, all))

// dK and dV.
template <class T>
__device__ void attention_backward_keys(BACKWARD_PARAMS) {
    DYNAMIC_SHARED(float, shared);
    __shared__ float weights[WARPS][32];
    Head<T> head(all, shared);
    const int d = head.d;
    float *k = head.tile(), *v = head.tile(), *q = head.tile(), *dy = head.tile();
    float *dk = head.tile(), *dv = head.tile();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = head.item.segment.tokens;
    const size_t sums = head.item.sums(head.item.head);
    head.load(k, head.packed(qkv, 1), head.item.row, true);
    head.load(v, head.packed(qkv, 2), head.item.row, false);
    for (int i = threadIdx.x; i < ROWS * (d + 1); i += blockDim.x) dk[i] = dv[i] = 0.0f;
    for (int first = 0; first < tokens; first += 32) {
        __syncthreads();
        head.load(q, head.packed(qkv, 0), first, true);
        head.load(dy, head.mixed(dout), first, false);
        __syncthreads();
        const int query = first + lane;
        for (int r = 0; r < ROWS / WARPS; r++) {
            const int i = warp + r * WARPS, row = head.item.row + i;
            if (row >= tokens) break;
            float p = 0.0f, ds = 0.0f;
            if (query < tokens) {
                const float s = head.dot(k + i * (d + 1), q + lane * (d + 1)) * head.scale() + head.bias(query, row);
                p = expf(s - log_sum[sums + query]);
                ds = p * (head.dot(v + i * (d + 1), dy + lane * (d + 1)) - delta[sums + query]);
            }
            head.accumulate(dv + i * (d + 1), 1.0f, p, dy, weights[warp]);
            head.accumulate(dk + i * (d + 1), 1.0f, ds, q, weights[warp]);
        }
    }
    __syncwarp();
    for (int r = 0; r < ROWS / WARPS; r++) {
        const int i = warp + r * WARPS, row = head.item.row + i;
        if (row >= tokens) break;
        T* to = dqkv + head.place(1) + row * 3 * head.width();
        for (int c = lane; c < d; c += 32) {
            to[c] = from_float<T>(head.unrotated(dk + i * (d + 1), row, c) * head.scale());
            to[c + head.width()] = from_float<T>(dv[i * (d + 1) + c]);
        }
    }
}

KERNEL(attention_backward_keys, (BACKWARD_PARAMS), (qkv, out, dout, log_sum, delta, dqkv, all))

// dbias, a thread for each element of [H, P, P]: the sum over each part of the images, `partial` [parts, H, P, P], of
// the only segment. Blocks: (elements, 1, parts).
template <class T>
__device__ void attention_backward_bias(BACKWARD_PARAMS, float* partial) {
    const Segment& s = all.at[0];
    const int patches = s.tokens - s.prefix;
    const size_t elements = (size_t)all.heads * patches * patches;
    const size_t element = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (element >= elements) return;
    Head<T> head(all, nullptr);
    const int query = s.prefix + element / patches % patches, key = s.prefix + element % patches;
    head.item.segment = s;
    head.item.head = element / patches / patches;
    const int first = blockIdx.z * all.images_per_part, last = min(first + all.images_per_part, s.images);
    float sum = 0.0f;
    for (int image = first; image < last; image++) {
        head.item.image_row = s.first_row + image * s.tokens;
        const Matrix<T> q = head.packed(qkv, 0), k = head.packed(qkv, 1), v = head.packed(qkv, 2);
        const Matrix<T> dy = head.mixed(dout);
        float score = 0.0f, dp = 0.0f;
        for (int c = 0; c < head.d; c++) {
            score += head.rotated(q, query, c) * head.rotated(k, key, c);
            dp += to_float(dy.at[query * dy.stride + c]) * to_float(v.at[key * v.stride + c]);
        }
        const size_t row = head.item.sums(head.item.head) + query;
        sum += expf(score * head.scale() + head.bias(query, key) - log_sum[row]) * (dp - delta[row]);
    }
    partial[blockIdx.z * elements + element] = sum;
}

KERNEL(attention_backward_bias, (BACKWARD_PARAMS, float* partial),
       (qkv, out, dout, log_sum, delta, dqkv, all, partial))

// dbias = the sum of the parts, n elements each; of either path.
extern "C" __global__ void attention_sum_bias_f32(const float* partial, int parts, int n, Gradient dbias) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += partial[(size_t)part * n + i];
    put(dbias, i, sum);
}
