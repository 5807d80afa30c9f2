// Crops from decoded images, as data/augment.rs makes them on the CPU: cut, resized, mirrored, distorted, blurred,
// solarised, normalised. Every operation rounds where the CPU's does. Products and sums are kept apart (`__fmul_rn`,
// `__fadd_rn`): fused, they would round once instead of twice, and a pixel would now and then be another.
//
// Images and crops are interleaved values `[rows, columns, channels]`, of 8 bits or 16 (a job is `wide`), until they are
// finished into planes. Every kernel is there twice: for 8-bit RGB, and (`_any`) for any depth and number of channels. The
// functions behind both take the type of a value, `V`, and the number of channels where it is known, `C` (else 0).
//
// Offsets are in bytes. Jobs are structs of gpu/jobs.rs; a block finds its own in blockIdx.x (there may be more than the 65,535 that y counts to).

typedef unsigned char u8;
typedef unsigned short u16;

template <class V> struct Range;
template <> struct Range<u8> {
    static constexpr int TOP = 255;
};
template <> struct Range<u16> {
    static constexpr int TOP = 65535;
};

// ---- resizing: fixed-point weights, vertical pass first, each pass rounded to whole values

// One axis of a resize. For each output its first input, the number of inputs, and as many weights of `precision`
// fractional bits, in `width` shorts from `table`; for values of 16 bits in as many ints there.
struct Axis {
    int table, width, precision;
};

struct Resize {
    u64 source, middle, target;
    int stride, columns, side;
    Axis vertical, horizontal;
    int wide;
};

// Output `i`, for inputs `stride` values apart.
__device__ __forceinline__ u8 weighted(const short* tables, Axis axis, int i, const u8* first, int stride) {
    const short* table = tables + axis.table + i * axis.width;
    const u8* x = first + (size_t)(unsigned short)table[0] * stride;
    int sum = 1 << (axis.precision - 1);
    for (int k = 0; k < table[1]; k++) sum += table[2 + k] * x[(size_t)k * stride];
    return (u8)min(max(sum >> axis.precision, 0), 255);
}

__device__ __forceinline__ u16 weighted(const short* tables, Axis axis, int i, const u16* first, int stride) {
    const int* table = (const int*)(tables + axis.table) + (size_t)i * axis.width;
    const u16* x = first + (size_t)table[0] * stride;
    long long sum = 1ll << (axis.precision - 1);
    for (int k = 0; k < table[1]; k++) sum += (long long)table[2 + k] * x[(size_t)k * stride];
    sum >>= axis.precision;
    return (u16)(sum < 0 ? 0 : sum > 65535 ? 65535 : sum);
}

// source, rows of `stride` pixels -> middle [side, columns, channels].
template <class V, int C>
__device__ __forceinline__ void columns(const Resize& job, const short* tables, const u8* from, u8* scratch, int channels) {
    const int n = C ? C : channels, row = n * job.columns;
    const V* source = (const V*)(from + job.source);
    V* middle = (V*)(scratch + job.middle);
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < job.side * row; i += gridDim.y * blockDim.x)
        middle[i] = weighted(tables, job.vertical, i / row, source + i % row, n * job.stride);
}

extern "C" __global__ void resize_columns(const Resize* jobs, const short* tables, const u8* from, u8* scratch, int channels) {
    columns<u8, 3>(jobs[blockIdx.x], tables, from, scratch, channels);
}

extern "C" __global__ void resize_columns_any(const Resize* jobs, const short* tables, const u8* from, u8* scratch, int channels) {
    const Resize job = jobs[blockIdx.x];
    if (job.wide) columns<u16, 0>(job, tables, from, scratch, channels);
    else columns<u8, 0>(job, tables, from, scratch, channels);
}

// middle -> target [side, side, channels].
template <class V, int C>
__device__ __forceinline__ void rows(const Resize& job, const short* tables, u8* scratch, int channels) {
    const int n = C ? C : channels, row = n * job.side;
    const V* middle = (const V*)(scratch + job.middle);
    V* target = (V*)(scratch + job.target);
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < job.side * row; i += gridDim.y * blockDim.x) {
        const int y = i / row, x = i % row;
        const V* line = middle + (size_t)y * n * job.columns + x % n;
        target[i] = weighted(tables, job.horizontal, x / n, line, n);
    }
}

extern "C" __global__ void resize_rows(const Resize* jobs, const short* tables, u8* scratch, int channels) {
    rows<u8, 3>(jobs[blockIdx.x], tables, scratch, channels);
}

extern "C" __global__ void resize_rows_any(const Resize* jobs, const short* tables, u8* scratch, int channels) {
    const Resize job = jobs[blockIdx.x];
    if (job.wide) rows<u16, 0>(job, tables, scratch, channels);
    else rows<u8, 0>(job, tables, scratch, channels);
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

__device__ __forceinline__ unsigned luma(Rgb p) {
    return (19595u * (unsigned)p.r + 38470u * (unsigned)p.g + 7471u * (unsigned)p.b + 32768u) >> 16;
}

template <class V> __device__ __forceinline__ float blend(float base, float x, float factor) {
    return floorf(fminf(fmaxf(__fadd_rn(base, __fmul_rn(factor, x - base)), 0.0f), (float)Range<V>::TOP));
}

template <class V> __device__ __forceinline__ Rgb blend(float base, Rgb p, float factor) {
    return Rgb{blend<V>(base, p.r, factor), blend<V>(base, p.g, factor), blend<V>(base, p.b, factor)};
}

template <class V> __device__ __forceinline__ Rgb turn_hue(Rgb p, float shift) {
    constexpr float TOP = Range<V>::TOP;
    const float most = fmaxf(fmaxf(p.r, p.g), p.b);
    const float range = most - fminf(fminf(p.r, p.g), p.b);
    const float saturation = (float)floor(__dmul_rn(range / fmaxf(most, 1.0f), (double)TOP));
    const float wide = fmaxf(range, 1.0f);
    const float red = (most - p.r) / wide, green = (most - p.g) / wide, blue = (most - p.b) / wide;
    const bool is_red = p.r == most, is_green = p.g == most;
    const double sector = is_red ? 0.0 : is_green ? 2.0 : 4.0;
    const float plus = is_red ? blue : is_green ? red : green, minus = is_red ? green : is_green ? blue : red;
    const float sixths = (float)(sector + plus - minus);
    double turns = __dadd_rn(__dmul_rn(sixths, 1.0 / 6.0), 1.0);
    turns = (float)(turns - floor(turns));
    float hue = (float)floor(__dmul_rn(turns, (double)TOP)) + shift;
    hue = hue < 0.0f ? hue + (TOP + 1.0f) : hue;
    hue = hue > TOP ? hue - (TOP + 1.0f) : hue;
    const float place = __fmul_rn(hue, 6.0f / TOP);
    const float chroma = __fmul_rn(__fmul_rn(most, saturation), 1.0f / TOP);
    auto channel = [&](float offset) {
        float k = offset + place;
        k = k >= 6.0f ? k - 6.0f : k;
        const float share = fminf(fmaxf(fminf(k, 4.0f - k), 0.0f), 1.0f);
        return floorf(__fadd_rn(__fadd_rn(most, -__fmul_rn(chroma, share)), 0.5f));
    };
    return Rgb{channel(5.0f), channel(3.0f), channel(1.0f)};
}

// The operations of `color` before number `end`; `grey` is what contrast blends with.
template <class V> __device__ __forceinline__ Rgb distort(Rgb p, const Color& color, int end, float grey) {
    for (int i = 0; i < end; i++) {
        const float factor = color.factor[i];
        switch (color.op[i]) {
            case BRIGHTNESS: p = blend<V>(0.0f, p, factor); break;
            case CONTRAST: p = blend<V>(grey, p, factor); break;
            case SATURATION: p = blend<V>((float)luma(p), p, factor); break;
            case HUE: p = turn_hue<V>(p, factor); break;
            case GREY: {
                const float y = (float)luma(p);
                p = Rgb{y, y, y};
            }
        }
    }
    return p;
}

// The same of a value of an image that is not RGB: it has brightness and contrast.
template <class V> __device__ __forceinline__ float distort(float x, const Color& color, int end, float grey) {
    for (int i = 0; i < end; i++) {
        if (color.op[i] == BRIGHTNESS) x = blend<V>(0.0f, x, color.factor[i]);
        if (color.op[i] == CONTRAST) x = blend<V>(grey, x, color.factor[i]);
    }
    return x;
}

// Pixels and what is done to their colours.
struct Paint {
    u64 source, pixels;
    Color color;
    int wide;
};

template <class V> __device__ __forceinline__ Rgb pixel(const V* p) { return Rgb{(float)p[0], (float)p[1], (float)p[2]}; }

// The mean grey, rounded, of the pixels as they are when their contrast is changed; of images that are not RGB, the mean of
// all values. A block for each job. Whole numbers sum to the same in any order.
template <class V, int C>
__device__ __forceinline__ void mean_of(const Paint& job, const u8* from, int* mean, int channels, u64* total) {
    const int n = C ? C : channels;
    int at = 0;
    while (at < job.color.count && job.color.op[at] != CONTRAST) at++;
    if (at == job.color.count) return;
    const V* source = (const V*)(from + job.source);
    const u64 count = n == 3 ? job.pixels : n * job.pixels;
    u64 sum = 0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x)
        sum += n == 3 ? luma(distort<V>(pixel(source + 3 * i), job.color, at, 0.0f))
                      : (unsigned)distort<V>((float)source[i], job.color, at, 0.0f);
    if (threadIdx.x == 0) *total = 0;
    __syncthreads();
    atomicAdd(total, sum);
    __syncthreads();
    if (threadIdx.x == 0) *mean = (int)((2 * *total + count) / (2 * count));
}

extern "C" __global__ void mean_grey(const char* jobs, int job_bytes, const u8* from, int* means, int channels) {
    __shared__ u64 total;
    mean_of<u8, 3>(*(const Paint*)(jobs + (size_t)blockIdx.x * job_bytes), from, means + blockIdx.x, channels, &total);
}

extern "C" __global__ void mean_grey_any(const char* jobs, int job_bytes, const u8* from, int* means, int channels) {
    __shared__ u64 total;
    const Paint job = *(const Paint*)(jobs + (size_t)blockIdx.x * job_bytes);
    if (job.wide) mean_of<u16, 0>(job, from, means + blockIdx.x, channels, &total);
    else mean_of<u8, 0>(job, from, means + blockIdx.x, channels, &total);
}

// Distorts whole images in place.
template <class V, int C>
__device__ __forceinline__ void paint(const Paint& job, u8* images, float grey, int channels) {
    const int n = C ? C : channels;
    V* source = (V*)(images + job.source);
    const u64 count = n == 3 ? job.pixels : n * job.pixels;
    for (size_t i = blockIdx.y * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.y * blockDim.x) {
        if (n == 3) {
            V* p = source + 3 * i;
            const Rgb made = distort<V>(pixel(p), job.color, job.color.count, grey);
            p[0] = (V)made.r, p[1] = (V)made.g, p[2] = (V)made.b;
        } else {
            source[i] = (V)distort<V>((float)source[i], job.color, job.color.count, grey);
        }
    }
}

extern "C" __global__ void repaint(const Paint* jobs, u8* images, const int* means, int channels) {
    paint<u8, 3>(jobs[blockIdx.x], images, (float)means[blockIdx.x], channels);
}

extern "C" __global__ void repaint_any(const Paint* jobs, u8* images, const int* means, int channels) {
    const Paint job = jobs[blockIdx.x];
    if (job.wide) paint<u16, 0>(job, images, (float)means[blockIdx.x], channels);
    else paint<u8, 0>(job, images, (float)means[blockIdx.x], channels);
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

constexpr int TILE = 32, HALO = 4, WIDE = TILE + 2 * HALO;

// A tile of three channels with what is around it, and the same blurred along its rows.
struct Tile {
    float in[3][WIDE][WIDE];
    float rows[3][WIDE][TILE];
};

// A block of 256 threads for each tile of 32x32 pixels of a crop; three channels at a time. `normal` is [3, channels]: factors
// of values of 8 bits, of 16, and summands.
template <class T, class V, int C>
__device__ __forceinline__ void tile_of(T* out, const Finish& job, const u8* scratch, int mean, const float* normal, int channels,
                                        Tile& tile) {
    const int n = C ? C : channels;
    const int across = (job.out + TILE - 1) / TILE;
    if ((int)blockIdx.y >= across * across) return;
    const int top = (int)blockIdx.y / across * TILE, left = (int)blockIdx.y % across * TILE;
    const float grey = (float)mean;
    const int halo = job.blur ? HALO : 0, wide = TILE + 2 * halo;
    const V* source = (const V*)(scratch + job.paint.source);
    const float* scale = normal + (Range<V>::TOP == 255 ? 0 : n);
    const float* shift = normal + 2 * n;
    for (int first = 0; first < n; first += 3) {
        const int group = C ? C : min(3, n - first);
        if (first > 0) __syncthreads();
        for (int i = threadIdx.x; i < wide * wide; i += blockDim.x) {
            const int v = i / wide - halo, u = i % wide - halo;
            const int y = mirror(job.y + top + v, job.side);
            int x = mirror(job.x + left + u, job.side);
            x = job.flip ? job.side - 1 - x : x;
            const V* p = source + n * ((size_t)y * job.side + x) + first;
            if (n == 3) {
                const Rgb made = distort<V>(pixel(p), job.paint.color, job.paint.color.count, grey);
                tile.in[0][v + HALO][u + HALO] = made.r;
                tile.in[1][v + HALO][u + HALO] = made.g;
                tile.in[2][v + HALO][u + HALO] = made.b;
            } else {
                for (int c = 0; c < group; c++)
                    tile.in[c][v + HALO][u + HALO] = distort<V>((float)p[c], job.paint.color, job.paint.color.count, grey);
            }
        }
        __syncthreads();
        if (job.blur) {
            for (int i = threadIdx.x; i < group * WIDE * TILE; i += blockDim.x) {
                const int c = i / (WIDE * TILE), v = i / TILE % WIDE, u = i % TILE;
                tile.rows[c][v][u] = blurred(job.taps, &tile.in[c][v][u + HALO], 1);
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < group * TILE * TILE; i += blockDim.x) {
            const int c = i / (TILE * TILE), v = i / TILE % TILE, u = i % TILE;
            if (top + v >= job.out || left + u >= job.out) continue;
            float x = job.blur ? rintf(blurred(job.taps, &tile.rows[c][v + HALO][u], TILE)) : tile.in[c][v + HALO][u + HALO];
            if (x >= (float)job.solarize) x = (float)Range<V>::TOP - x;
            const int k = first + c;
            x = __fadd_rn(__fmul_rn(x, scale[k]), shift[k]);
            out[job.target + ((size_t)k * job.out + top + v) * job.out + left + u] = from_float<T>(x);
        }
    }
}

template <class T>
__device__ void finish(T* out, const Finish* jobs, const u8* scratch, const int* means, const float* normal, int channels) {
    __shared__ Tile tile;
    const Finish job = jobs[blockIdx.x];
    tile_of<T, u8, 3>(out, job, scratch, means[blockIdx.x], normal, channels, tile);
}
KERNEL(finish, (T* out, const Finish* jobs, const u8* scratch, const int* means, const float* normal, int channels),
       (out, jobs, scratch, means, normal, channels))

template <class T>
__device__ void finish_any(T* out, const Finish* jobs, const u8* scratch, const int* means, const float* normal, int channels) {
    __shared__ Tile tile;
    const Finish job = jobs[blockIdx.x];
    if (job.paint.wide) tile_of<T, u16, 0>(out, job, scratch, means[blockIdx.x], normal, channels, tile);
    else tile_of<T, u8, 0>(out, job, scratch, means[blockIdx.x], normal, channels, tile);
}
KERNEL(finish_any, (T* out, const Finish* jobs, const u8* scratch, const int* means, const float* normal, int channels),
       (out, jobs, scratch, means, normal, channels))

// Crops that were finished elsewhere, in the type of the step.
template <class T> __device__ void unpack(T* y, const float* x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<T>(x[i]);
}
KERNEL(unpack, (T* y, const float* x, size_t n), (y, x, n))
