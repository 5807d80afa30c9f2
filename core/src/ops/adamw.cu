// The update of all weights over flat memory: AdamW in one pass, or steps along directions that others computed, with the
// EMA teacher and the bf16 copies of both.

// Neighbouring parameters that are updated alike. They start at multiples of 64 elements.
struct Rule {
    u32 start;  // in units of 64 elements
    u32 len;
    float lr;  // multiplier
    float decays;
    u32 module;
    u32 last_layer;
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

constexpr int ELEMENTS_OF_BLOCK = 4096;

// If `taken` is not 0. `ema` and the bf16 copies may be missing.
extern "C" __global__ void adamw_f32(float* params, const float* grads, float* mean, float* square, float* ema, bf16* narrow,
                                     bf16* narrow_ema, const Rule* rules, int count, const Numbers* numbers, const AdamW* adamw,
                                     const float* norms, const float* taken, size_t n) {
    if (*taken == 0.0f) return;
    const Numbers s = *numbers;
    const AdamW a = *adamw;
    const size_t first = (size_t)blockIdx.x * ELEMENTS_OF_BLOCK;
    int rule = 0;
    for (int low = 0, high = count; low < high;) {
        // The last rule that starts at or before the block, if any.
        const int middle = (low + high) / 2;
        if ((size_t)rules[middle].start * 64 <= first) {
            rule = middle;
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (size_t i = first + threadIdx.x * 4; i < first + ELEMENTS_OF_BLOCK && i < n; i += blockDim.x * 4) {
        while (rule + 1 < count && (size_t)rules[rule + 1].start * 64 <= i) rule++;
        const Rule r = rules[rule];
        const size_t start = (size_t)r.start * 64, end = start + r.len;
        if (i < start || i >= end) continue;
        const float lr = (r.last_layer ? s.last_layer_lr : s.lr) * r.lr;
        const float keep = 1.0f - lr * (r.decays * s.weight_decay), size = lr * a.correction1;
        const float clip = clip_of(s.max_norm, norms[r.module]);
        float p[4], e[4];
        *(float4*)p = *(const float4*)(params + i);
        float g[4], m[4], v[4];
        *(float4*)g = *(const float4*)(grads + i);
        *(float4*)m = *(const float4*)(mean + i);
        *(float4*)v = *(const float4*)(square + i);
        if (ema) *(float4*)e = *(const float4*)(ema + i);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            // The rest of the last four are padding.
            if (i + k >= end) break;
            const float x = g[k] * clip;
            m[k] = a.beta1 * m[k] + a.rest1 * x;
            v[k] = a.beta2 * v[k] + a.rest2 * (x * x);
            p[k] = p[k] * keep - size * m[k] / (sqrtf(v[k]) * a.inverse_root + a.eps);
            if (ema) e[k] = s.momentum * e[k] + s.rest_momentum * p[k];
        }
        *(float4*)(params + i) = *(const float4*)p;
        *(float4*)(mean + i) = *(const float4*)m;
        *(float4*)(square + i) = *(const float4*)v;
        if (narrow) *(uint2*)(narrow + i) = make_uint2(pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3]));
        if (ema) {
            *(float4*)(ema + i) = *(const float4*)e;
            if (narrow_ema) *(uint2*)(narrow_ema + i) = make_uint2(pack_bf16(e[0], e[1]), pack_bf16(e[2], e[3]));
        }
    }
}

// clips[m] = what the gradient of sub-model m is multiplied by. One block.
extern "C" __global__ void clips_f32(float* clips, const float* norms, const Numbers* numbers, int count) {
    for (int m = threadIdx.x; m < count; m += blockDim.x) clips[m] = clip_of(numbers->max_norm, norms[m]);
}

// One parameter along its direction, if `taken` is not 0. `ema` and the bf16 copies may be missing.
extern "C" __global__ void descend_f32(float* params, const float* direction, float* ema, bf16* narrow, bf16* narrow_ema,
                                       const Rule* rule, const Numbers* numbers, const float* taken) {
    if (*taken == 0.0f) return;
    const Numbers s = *numbers;
    const Rule r = *rule;
    const size_t start = (size_t)r.start * 64;
    const float lr = (r.last_layer ? s.last_layer_lr : s.lr) * r.lr, keep = 1.0f - lr * (r.decays * s.weight_decay);
    for (size_t k = (size_t)blockIdx.x * blockDim.x + threadIdx.x; k < r.len; k += (size_t)gridDim.x * blockDim.x) {
        const size_t i = start + k;
        const float p = params[i] * keep - lr * direction[k];
        params[i] = p;
        if (narrow) narrow[i] = from_float<bf16>(p);
        if (ema) {
            const float e = s.momentum * ema[i] + s.rest_momentum * p;
            ema[i] = e;
            if (narrow_ema) narrow_ema[i] = from_float<bf16>(e);
        }
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

// partial[block] = sum of squares, in double precision; 256 threads.
extern "C" __global__ void square_sums_f32(double* partial, const float* x, const Module* modules, int count) {
    int m = 0;
    while (m + 1 < count && modules[m + 1].block <= blockIdx.x) m++;
    const size_t first = (blockIdx.x - modules[m].block) * UNITS_OF_BLOCK;
    const size_t units = modules[m].len - first < UNITS_OF_BLOCK ? modules[m].len - first : UNITS_OF_BLOCK;
    const float4* from = (const float4*)(x + (modules[m].start + first) * 64);
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < units * 16; i += 256) {
        const float4 v = from[i];
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// norms[m] = root of the sum of its blocks; a block a module, 256 threads.
extern "C" __global__ void norms_f32(float* norms, const double* partial, const Module* modules, int count, int blocks) {
    const int m = blockIdx.x, end = m + 1 < count ? (int)modules[m + 1].block : blocks;
    double sum = 0.0;
    for (int b = modules[m].block + threadIdx.x; b < end; b += 256) sum += partial[b];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) norms[m] = (float)sqrt(sum);
}
