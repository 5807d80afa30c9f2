// Crops from decoded images, as data/augment.rs makes them on the CPU: cut, resized, mirrored, distorted, blurred,
// solarised, normalised. Every operation rounds where the CPU's does. Products and sums are kept apart (`__fmul_rn`,
// `__fadd_rn`): fused, they would round once instead of twice, and a pixel would now and then be another.
//
// Images and crops are interleaved bytes `[rows, columns, 3]` until they are finished into planes. Jobs are structs of
// gpu/jobs.rs; a block finds its own in blockIdx.x (there may be more than the 65,535 that y counts to).

typedef unsigned char u8;

// ---- resizing: fixed-point weights, vertical pass first, each pass rounded to 8 bits

// One axis of a resize. For each output its first input, the number of inputs, and as many weights of `precision`
// fractional bits, in `width` shorts from `table`.
struct Axis {
    int table, width, precision;
};

struct Resize {
    u64 source, middle, target;
    int stride, columns, side;
    Axis vertical, horizontal;
    int pad;
};

// Output `i`, for inputs `stride` bytes apart.
__device__ __forceinline__ u8 weighted(const short* tables, Axis axis, int i, const u8* first, int stride) {
    const short* table = tables + axis.table + i * axis.width;
    const u8* x = first + (size_t)(unsigned short)table[0] * stride;
    int sum = 1 << (axis.precision - 1);
    for (int k = 0; k < table[1]; k++) sum += table[2 + k] * x[(size_t)k * stride];
    return (u8)min(max(sum >> axis.precision, 0), 255);
}

// source, rows of `stride` pixels -> middle [side, columns, 3].
extern "C" __global__ void resize_columns(const Resize* jobs, const short* tables, const u8* from, u8* scratch) {
    const Resize job = jobs[blockIdx.x];
    const int row = 3 * job.columns;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < job.side * row; i += gridDim.y * blockDim.x) {
        const u8* column = from + job.source + i % row;
        scratch[job.middle + i] = weighted(tables, job.vertical, i / row, column, 3 * job.stride);
    }
}

// middle -> target [side, side, 3].
extern "C" __global__ void resize_rows(const Resize* jobs, const short* tables, u8* scratch) {
    const Resize job = jobs[blockIdx.x];
    const int row = 3 * job.side;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < job.side * row; i += gridDim.y * blockDim.x) {
        const int y = i / row, x = i % row;
        const u8* line = scratch + job.middle + (size_t)y * 3 * job.columns + x % 3;
        scratch[job.target + i] = weighted(tables, job.horizontal, x / 3, line, 3);
    }
}

// ---- colour: data/color.rs

enum { BRIGHTNESS = 1, CONTRAST, SATURATION, HUE, GREY };

struct Color {
    int count;
    int op[5];
    float factor[5];
};

struct Rgb {
    float r, g, b;
};

__device__ __forceinline__ int luma(Rgb p) { return (19595 * (int)p.r + 38470 * (int)p.g + 7471 * (int)p.b + 32768) >> 16; }

__device__ __forceinline__ float blend(float base, float x, float factor) {
    return floorf(fminf(fmaxf(__fadd_rn(base, __fmul_rn(factor, x - base)), 0.0f), 255.0f));
}

__device__ __forceinline__ Rgb blend(float base, Rgb p, float factor) {
    return Rgb{blend(base, p.r, factor), blend(base, p.g, factor), blend(base, p.b, factor)};
}

__device__ __forceinline__ Rgb turn_hue(Rgb p, float shift) {
    const float most = fmaxf(fmaxf(p.r, p.g), p.b);
    const float range = most - fminf(fminf(p.r, p.g), p.b);
    const float saturation = (float)floor(__dmul_rn(range / fmaxf(most, 1.0f), 255.0));
    const float wide = fmaxf(range, 1.0f);
    const float red = (most - p.r) / wide, green = (most - p.g) / wide, blue = (most - p.b) / wide;
    const bool is_red = p.r == most, is_green = p.g == most;
    const double sector = is_red ? 0.0 : is_green ? 2.0 : 4.0;
    const float plus = is_red ? blue : is_green ? red : green, minus = is_red ? green : is_green ? blue : red;
    const float sixths = (float)(sector + plus - minus);
    double turns = __dadd_rn(__dmul_rn(sixths, 1.0 / 6.0), 1.0);
    turns = (float)(turns - floor(turns));
    float hue = (float)floor(__dmul_rn(turns, 255.0)) + shift;
    hue = hue < 0.0f ? hue + 256.0f : hue;
    hue = hue > 255.0f ? hue - 256.0f : hue;
    const float place = __fmul_rn(hue, 6.0f / 255.0f);
    const float chroma = __fmul_rn(__fmul_rn(most, saturation), 1.0f / 255.0f);
    auto channel = [&](float offset) {
        float k = offset + place;
        k = k >= 6.0f ? k - 6.0f : k;
        const float share = fminf(fmaxf(fminf(k, 4.0f - k), 0.0f), 1.0f);
        return floorf(__fadd_rn(__fadd_rn(most, -__fmul_rn(chroma, share)), 0.5f));
    };
    return Rgb{channel(5.0f), channel(3.0f), channel(1.0f)};
}

// The operations of `color` before number `end`; `grey` is what contrast blends with.
__device__ __forceinline__ Rgb distort(Rgb p, const Color& color, int end, float grey) {
    for (int i = 0; i < end; i++) {
        const float factor = color.factor[i];
        switch (color.op[i]) {
            case BRIGHTNESS: p = blend(0.0f, p, factor); break;
            case CONTRAST: p = blend(grey, p, factor); break;
            case SATURATION: p = blend((float)luma(p), p, factor); break;
            case HUE: p = turn_hue(p, factor); break;
            case GREY: {
                const float y = (float)luma(p);
                p = Rgb{y, y, y};
            }
        }
    }
    return p;
}

// Pixels and what is done to their colours.
struct Paint {
    u64 source, pixels;
    Color color;
    int pad;
};

__device__ __forceinline__ Rgb pixel(const u8* p) { return Rgb{(float)p[0], (float)p[1], (float)p[2]}; }

// The mean grey, rounded, of the pixels as they are when their contrast is changed, a block for each job. Whole numbers
// sum to the same in any order.
extern "C" __global__ void mean_grey(const char* jobs, int job_bytes, const u8* from, int* means) {
    const Paint job = *(const Paint*)(jobs + (size_t)blockIdx.x * job_bytes);
    int at = 0;
    while (at < job.color.count && job.color.op[at] != CONTRAST) at++;
    if (at == job.color.count) return;
    u64 sum = 0;
    for (size_t i = threadIdx.x; i < job.pixels; i += blockDim.x)
        sum += luma(distort(pixel(from + job.source + 3 * i), job.color, at, 0.0f));
    __shared__ u64 total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    atomicAdd(&total, sum);
    __syncthreads();
    if (threadIdx.x == 0) means[blockIdx.x] = (int)((2 * total + job.pixels) / (2 * job.pixels));
}

// Distorts whole images in place.
extern "C" __global__ void repaint(const Paint* jobs, u8* images, const int* means) {
    const Paint job = jobs[blockIdx.x];
    for (size_t i = blockIdx.y * blockDim.x + threadIdx.x; i < job.pixels; i += (size_t)gridDim.y * blockDim.x) {
        u8* p = images + job.source + 3 * i;
        const Rgb made = distort(pixel(p), job.color, job.color.count, (float)means[blockIdx.x]);
        p[0] = (u8)made.r, p[1] = (u8)made.g, p[2] = (u8)made.b;
    }
}

// ---- the rest

struct Finish {
    Paint paint;
    // In elements of the result.
    u64 target;
    // The crop is the window of `out` pixels at (x, y) of the square at `paint.source`. Values from `solarize` on are
    // inverted.
    int side, flip, x, y, out, solarize, blur;
    // Weights of the blur: centre, then distance 1 to 4.
    float taps[5];
};

struct Normal {
    float scale[3], shift[3];
};

// Index `i` mirrored at both ends of 0..n as often as needed.
__device__ __forceinline__ int mirror(int i, int n) {
    if (n == 1) return 0;
    const int period = 2 * (n - 1);
    i = (i % period + period) % period;
    return min(i, period - i);
}

__device__ __forceinline__ float blurred(const float* taps, const float* x, int stride) {
    float sum = __fmul_rn(taps[0], x[0]);
#pragma unroll
    for (int d = 1; d <= 4; d++) sum = __fadd_rn(sum, __fmul_rn(taps[d], x[-d * stride] + x[d * stride]));
    return sum;
}

// A block of 256 threads for each tile of 32x32 pixels of a crop.
template <class T> __device__ void finish(T* out, const Finish* jobs, const u8* scratch, const int* means, Normal normal) {
    constexpr int TILE = 32, HALO = 4, WIDE = TILE + 2 * HALO;
    __shared__ float in[3][WIDE][WIDE];
    __shared__ float rows[3][WIDE][TILE];
    const Finish job = jobs[blockIdx.x];
    const int across = (job.out + TILE - 1) / TILE;
    if ((int)blockIdx.y >= across * across) return;
    const int top = (int)blockIdx.y / across * TILE, left = (int)blockIdx.y % across * TILE;
    const float grey = (float)means[blockIdx.x];
    const int halo = job.blur ? HALO : 0, wide = TILE + 2 * halo;
    for (int i = threadIdx.x; i < wide * wide; i += blockDim.x) {
        const int v = i / wide - halo, u = i % wide - halo;
        const int y = mirror(job.y + top + v, job.side);
        int x = mirror(job.x + left + u, job.side);
        x = job.flip ? job.side - 1 - x : x;
        const u8* p = scratch + job.paint.source + 3 * ((size_t)y * job.side + x);
        const Rgb made = distort(pixel(p), job.paint.color, job.paint.color.count, grey);
        in[0][v + HALO][u + HALO] = made.r, in[1][v + HALO][u + HALO] = made.g, in[2][v + HALO][u + HALO] = made.b;
    }
    __syncthreads();
    if (job.blur) {
        for (int i = threadIdx.x; i < 3 * WIDE * TILE; i += blockDim.x) {
            const int c = i / (WIDE * TILE), v = i / TILE % WIDE, u = i % TILE;
            rows[c][v][u] = blurred(job.taps, &in[c][v][u + HALO], 1);
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 3 * TILE * TILE; i += blockDim.x) {
        const int c = i / (TILE * TILE), v = i / TILE % TILE, u = i % TILE;
        if (top + v >= job.out || left + u >= job.out) continue;
        float x = job.blur ? rintf(blurred(job.taps, &rows[c][v + HALO][u], TILE)) : in[c][v + HALO][u + HALO];
        if (x >= (float)job.solarize) x = 255.0f - x;
        x = __fadd_rn(__fmul_rn(x, normal.scale[c]), normal.shift[c]);
        out[job.target + ((size_t)c * job.out + top + v) * job.out + left + u] = from_float<T>(x);
    }
}
KERNEL(finish, (T* out, const Finish* jobs, const u8* scratch, const int* means, Normal normal), (out, jobs, scratch, means, normal))

// Crops that were finished elsewhere, in the type of the step.
template <class T> __device__ void unpack(T* y, const float* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<T>(x[i]);
}
KERNEL(unpack, (T* y, const float* x, size_t n), (y, x, n))
