// The update of all weights over flat memory: AdamW in one pass, or steps along directions that others computed, with the
// EMA teacher.

// Neighbouring parameters that are updated alike. They start at multiples of 64 elements.
struct Rule {
    u32 start;  // in units of 64 elements
    u32 len;
    float lr;  // multiplier
    float decays;
    u32 module;
    u32 last_layer;
    u32 moments;  // where its moments start: in units of 64 elements; in eight bits, in blocks
    u32 block;    // its first block of `adamw`
};

// What changes from step to step.
struct Numbers {
    float lr, weight_decay;
    float momentum, rest_momentum;
    float last_layer_lr;
    float max_norm;  // 0: no clipping
    float longest_gradient, greatest_loss;  // a step beyond is not taken
};

struct AdamW {
    float beta1, rest1, beta2, rest2, eps;
    float correction1;   // 1 / (1 - beta1^t)
    float inverse_root;  // 1 / sqrt(1 - beta2^t)
};

// What a sub-model's gradient of length `norm` is multiplied by.
__device__ __forceinline__ float clip_of(float max_norm, float norm) {
    return max_norm > 0.0f ? fminf(1.0f, max_norm / (norm + 1e-6f)) : 1.0f;
}

// Whether a step is taken: 1 if all values are finite, no clipped norm (`modules` values from `first`) is too long, and
// the loss number `total` (-1: none) not too great; otherwise 0. One block.
extern "C" __global__ void verdict_f32(float* taken, const float* values, int count, int first, int modules, int total,
                                       const Numbers* numbers) {
    const Numbers s = *numbers;
    float bad = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float x = values[i];
        bool fits = fabsf(x) <= 3.402823466e38f;
        if (i >= first && i < first + modules) fits = fits && clip_of(s.max_norm, x) * x <= s.longest_gradient;
        if (i == total) fits = fits && x <= s.greatest_loss;
        if (!fits) bad = 1.0f;
    }
    bad = block_max(bad);
    if (threadIdx.x == 0) *taken = 1.0f - bad;
}

// What AdamW and the EMA do to the numbers of a parameter.
struct Update {
    float keep, size, clip, momentum, rest_momentum;
    AdamW a;

    __device__ __forceinline__ Update(const Rule& r, const Numbers& s, const AdamW& a, const float* norms) : a(a) {
        const float lr = (r.last_layer ? s.last_layer_lr : s.lr) * r.lr;
        keep = 1.0f - lr * (r.decays * s.weight_decay);
        size = lr * a.correction1;
        clip = clip_of(s.max_norm, norms[r.module]);
        momentum = s.momentum;
        rest_momentum = s.rest_momentum;
    }

    __device__ __forceinline__ void operator()(float& p, float g, float& m, float& v, float& e) const {
        const float x = g * clip;
        m = a.beta1 * m + a.rest1 * x;
        v = a.beta2 * v + a.rest2 * (x * x);
        p = p * keep - size * m / (sqrtf(v) * a.inverse_root + a.eps);
        e = momentum * e + rest_momentum * p;
    }
};

// Flat numbers: floats, or floats in halves. Without either there are none.
struct Flat {
    float* wide;
    bf16* rounded;
    u16* lower;

    __device__ __forceinline__ explicit operator bool() const { return wide || rounded; }

    __device__ __forceinline__ float get(size_t i) const { return wide ? wide[i] : join_halves(rounded[i], lower[i]); }

    __device__ __forceinline__ void put(size_t i, float x) const {
        if (wide) {
            wide[i] = x;
        } else {
            rounded[i] = rounded_half(x);
            lower[i] = lower_half(x);
        }
    }

    // Four at a time.
    __device__ __forceinline__ void get4(size_t i, float* x) const {
        if (wide) {
            *(float4*)x = *(const float4*)(wide + i);
            return;
        }
        const ushort4 r = *(const ushort4*)(rounded + i), l = *(const ushort4*)(lower + i);
        x[0] = join_halves(bf16{r.x}, l.x);
        x[1] = join_halves(bf16{r.y}, l.y);
        x[2] = join_halves(bf16{r.z}, l.z);
        x[3] = join_halves(bf16{r.w}, l.w);
    }

    __device__ __forceinline__ void put4(size_t i, const float* x) const {
        if (wide) {
            *(float4*)(wide + i) = *(const float4*)x;
            return;
        }
        *(ushort4*)(rounded + i) = make_ushort4(rounded_half(x[0]).bits, rounded_half(x[1]).bits, rounded_half(x[2]).bits, rounded_half(x[3]).bits);
        *(ushort4*)(lower + i) = make_ushort4(lower_half(x[0]), lower_half(x[1]), lower_half(x[2]), lower_half(x[3]));
    }
};

// The last of `count` rules, in ascending order, that starts at or before a place; the first if none does.
template <class F> __device__ __forceinline__ int last_rule(int count, F starts_before) {
    int rule = 0;
    for (int low = 0, high = count; low < high;) {
        const int middle = (low + high) / 2;
        if (starts_before(middle)) {
            rule = middle;
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return rule;
}

constexpr int ELEMENTS_OF_BLOCK = 4096;

// Blocks from `begin` on, of which every rule has its own. If `taken` is not 0. There may be no `ema`.
extern "C" __global__ void adamw_f32(Flat params, Flat ema, const float* grads, float* mean, float* square, const Rule* rules,
                                     int count, const Numbers* numbers, const AdamW* adamw, const float* norms,
                                     const float* taken, u32 begin) {
    if (*taken == 0.0f) return;
    const u32 block = begin + blockIdx.x;
    const Rule r = rules[last_rule(count, [&](int i) { return rules[i].block <= block; })];
    const Update update(r, *numbers, *adamw, norms);
    const size_t start = (size_t)r.start * 64, end = start + r.len;
    const size_t first = start + (size_t)(block - r.block) * ELEMENTS_OF_BLOCK;
    for (size_t i = first + threadIdx.x * 4; i < first + ELEMENTS_OF_BLOCK && i < end; i += blockDim.x * 4) {
        const size_t at = (size_t)r.moments * 64 + (i - start);
        float p[4], g[4], m[4], v[4], e[4] = {};
        params.get4(i, p);
        if (ema) ema.get4(i, e);
        *(float4*)g = *(const float4*)(grads + i);
        *(float4*)m = *(const float4*)(mean + at);
        *(float4*)v = *(const float4*)(square + at);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            // The rest of the last four are padding.
            if (i + k >= end) break;
            update(p[k], g[k], m[k], v[k], e[k]);
        }
        params.put4(i, p);
        if (ema) ema.put4(i, e);
        *(float4*)(mean + at) = *(const float4*)m;
        *(float4*)(square + at) = *(const float4*)v;
    }
}

// ---- moments in eight bits: eight_bit.rs

constexpr int NUMBERS_OF_SCALE = 256, THREADS_OF_SCALE = NUMBERS_OF_SCALE / 4, SCALES_OF_BLOCK = 256 / THREADS_OF_SCALE;
constexpr float LEAST_SCALE = 7.888609052210118e-31f;  // 2^-100

// The sizes that seven bits stand for and the numbers that eight do, ascending from 0 to 1.
struct Values {
    float with_sign[128], without_sign[256];
};

// The place of the value nearest to x, of two the smaller. Values lie as eight_bit.rs says: decade e of 7 in equal steps. That gives the
// place but for rounding, which the values themselves decide.
template <int BITS> __device__ __forceinline__ u32 nearest(const float* values, float x) {
    constexpr int FIRST = BITS == 7 ? 1 : 2, LAST = (1 << BITS) - 1;
    constexpr float POWERS[7] = {1e0f, 1e1f, 1e2f, 1e3f, 1e4f, 1e5f, 1e6f};
    int steps = FIRST << 6;
    float share = x;  // of the decade's end
#pragma unroll
    for (int k = 1; k <= 6; k++) {
        if (x * POWERS[k] < 1.0f) {
            steps = FIRST << (6 - k);
            share = x * POWERS[k];
        }
    }
    int at = 1 + steps - FIRST + (int)((share - 0.1f) * (steps / 0.9f));
    at = min(max(at, 0), LAST);
    while (at < LAST && x > 0.5f * (values[at] + values[at + 1])) at++;
    while (at > 0 && x <= 0.5f * (values[at - 1] + values[at])) at--;
    return at;
}

// The greatest among the numbers of a scale, whose threads are two warps.
__device__ __forceinline__ float greatest_of_scale(const float* x, float* of_warp) {
    float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    return fmaxf(of_warp[threadIdx.x / 64 * 2], of_warp[threadIdx.x / 64 * 2 + 1]);
}

// As above for parameters whose moments are in eight bits, four codes a word. Four scales a block of 256 threads, from scale `begin`
// to `end`.
extern "C" __global__ void __launch_bounds__(256)
adamw_8bit_f32(Flat params, Flat ema, const float* grads, u32* mean, float* mean_scales, u32* square, float* square_scales,
               const Rule* rules, int count, const Values* all, const Numbers* numbers, const AdamW* adamw, const float* norms,
               const float* taken, u32 begin, u32 end) {
    if (*taken == 0.0f) return;
    __shared__ Values values;
    __shared__ float of_warp[2][8];
    for (int i = threadIdx.x; i < sizeof(Values) / 4; i += 256) ((float*)&values)[i] = ((const float*)all)[i];
    __syncthreads();
    const u32 scale = begin + blockIdx.x * SCALES_OF_BLOCK + threadIdx.x / THREADS_OF_SCALE;
    const Rule r = rules[last_rule(count, [&](int i) { return rules[i].moments <= scale; })];
    const u32 k = (scale - r.moments) * NUMBERS_OF_SCALE + threadIdx.x % THREADS_OF_SCALE * 4;
    const bool inside = scale < end && scale >= r.moments && k < r.len;
    const size_t i = (size_t)r.start * 64 + k, word = (size_t)scale * THREADS_OF_SCALE + threadIdx.x % THREADS_OF_SCALE;
    float p[4], g[4], m[4] = {}, v[4] = {}, e[4] = {};
    if (inside) {
        const Update update(r, *numbers, *adamw, norms);
        params.get4(i, p);
        if (ema) ema.get4(i, e);
        *(float4*)g = *(const float4*)(grads + i);
        const u32 of_m = mean[word], of_v = square[word];
        const float scale_m = mean_scales[scale], scale_v = square_scales[scale];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (k + j >= r.len) break;
            const u32 code = of_m >> 8 * j & 0xff;
            const float size = values.with_sign[code & 0x7f] * scale_m;
            m[j] = code & 0x80 ? -size : size;
            v[j] = values.without_sign[of_v >> 8 * j & 0xff] * scale_v;
            update(p[j], g[j], m[j], v[j], e[j]);
        }
        params.put4(i, p);
        if (ema) ema.put4(i, e);
    }
    const float most_m = greatest_of_scale(m, of_warp[0]), most_v = greatest_of_scale(v, of_warp[1]);
    if (!inside) return;
    // Smaller means are zero, squares are not.
    const float scale_m = most_m < LEAST_SCALE ? 0.0f : most_m, scale_v = most_v > 0.0f ? fmaxf(most_v, LEAST_SCALE) : 0.0f;
    u32 of_m = 0, of_v = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (scale_m > 0.0f) {
            const u32 size = nearest<7>(values.with_sign, fabsf(m[j] / scale_m));
            of_m |= (size | (size > 0 && m[j] < 0.0f ? 0x80u : 0u)) << 8 * j;
        }
        if (scale_v > 0.0f) of_v |= max(nearest<8>(values.without_sign, v[j] / scale_v), v[j] > 0.0f ? 1u : 0u) << 8 * j;
    }
    mean[word] = of_m;
    square[word] = of_v;
    if (threadIdx.x % THREADS_OF_SCALE == 0) {
        mean_scales[scale] = scale_m;
        square_scales[scale] = scale_v;
    }
}

// clips[m] = what the gradient of sub-model m is multiplied by. One block.
extern "C" __global__ void clips_f32(float* clips, const float* norms, const Numbers* numbers, int count) {
    for (int m = threadIdx.x; m < count; m += blockDim.x) clips[m] = clip_of(numbers->max_norm, norms[m]);
}

// One parameter along its direction, if `taken` is not 0. There may be no `ema`.
extern "C" __global__ void descend_f32(Flat params, Flat ema, const float* direction, const Rule* rule, const Numbers* numbers,
                                       const float* taken) {
    if (*taken == 0.0f) return;
    const Numbers s = *numbers;
    const Rule r = *rule;
    const size_t start = (size_t)r.start * 64;
    const float lr = (r.last_layer ? s.last_layer_lr : s.lr) * r.lr, keep = 1.0f - lr * (r.decays * s.weight_decay);
    for (size_t k = (size_t)blockIdx.x * blockDim.x + threadIdx.x; k < r.len; k += (size_t)gridDim.x * blockDim.x) {
        const size_t i = start + k;
        const float p = params.get(i) * keep - lr * direction[k];
        params.put(i, p);
        if (ema) ema.put(i, s.momentum * ema.get(i) + s.rest_momentum * p);
    }
}

// ema = momentum ema + (1 - momentum) params.
extern "C" __global__ void ema_f32(float* ema, const float* params, float momentum, size_t n) {
    elements(ema, n, [=](size_t, float e, float p) { return momentum * e + (1.0f - momentum) * p; }, ema, params);
}

// ---- gradient norms of sub-models

// A sub-model's range in units of 64 elements, and its first block.
struct Module {
    u32 start, len, block;
};

constexpr int UNITS_OF_BLOCK = 512;

__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double of_thread[256];
    of_thread[threadIdx.x] = x;
    __syncthreads();
    for (int o = 128; o > 0; o >>= 1) {
        if (threadIdx.x < o) of_thread[threadIdx.x] += of_thread[threadIdx.x + o];
        __syncthreads();
    }
    return of_thread[0];
}

// partial[block] = sum of squares, in double precision, of blocks from `begin` on; 256 threads.
extern "C" __global__ void square_sums_f32(double* partial, const float* x, const Module* modules, int count, int begin) {
    const u32 block = begin + blockIdx.x;
    int m = 0;
    while (m + 1 < count && modules[m + 1].block <= block) m++;
    const size_t first = (block - modules[m].block) * UNITS_OF_BLOCK;
    const size_t units = modules[m].len - first < UNITS_OF_BLOCK ? modules[m].len - first : UNITS_OF_BLOCK;
    const float4* from = (const float4*)(x + (modules[m].start + first) * 64);
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < units * 16; i += 256) {
        const float4 v = from[i];
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partial[block] = sum;
}

// flag = 1 if a step of which `taken` is not 0 updates a layer with the blocks from `begin` to `end`: if its gradient is finite and,
// clipped as one of length `norm`, not too long. One block of 256 threads.
extern "C" __global__ void layer_verdict_f32(float* flag, const double* partial, int begin, int end, const float* taken,
                                             const float* norm, const Numbers* numbers) {
    double sum = 0.0;
    for (int b = begin + threadIdx.x; b < end; b += 256) sum += partial[b];
    const float own = (float)sqrt(block_sum_double(sum));
    if (threadIdx.x > 0) return;
    const bool fits = own <= 3.402823466e38f && clip_of(numbers->max_norm, *norm) * own <= numbers->longest_gradient;
    *flag = fits && *taken != 0.0f ? 1.0f : 0.0f;
}

// norms[m] = root of the sum of its blocks; a block a module, 256 threads.
extern "C" __global__ void norms_f32(float* norms, const double* partial, const Module* modules, int count, int blocks) {
    const int m = blockIdx.x, end = m + 1 < count ? (int)modules[m + 1].block : blocks;
    double sum = 0.0;
    for (int b = modules[m].block + threadIdx.x; b < end; b += 256) sum += partial[b];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) norms[m] = (float)sqrt(sum);
}
