// R(Q) and R(K), in place of Q and K: a pair of columns (c, c + d / 2) of a patch's row turns by its angle, in f32, and is
// rounded. Once here, so that the sweeps, which read every row several times, read rotated rows as they lie.
//
// A thread turns eight pairs of some heads by the same angles; its loads are all under way before the first is used.
// 4 bytes read and written for each of the 2 D numbers of a token.

// x cos - y sin, pair by pair.
__device__ __forceinline__ Eight turned(const Eight& x, const Eight& y, const Eight& cos, const Eight& sin, float sign) {
    Eight z;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        z.pair[k] = pack_bf16(low(x.pair[k]) * low(cos.pair[k]) + sign * (low(y.pair[k]) * low(sin.pair[k])),
                              high(x.pair[k]) * high(cos.pair[k]) + sign * (high(y.pair[k]) * high(sin.pair[k])));
    }
    return z;
}

// qkv [T, 3 D H]. Blocks: (threads of the largest segment, segments).
extern "C" __global__ void attention_rotate_bf16(bf16* qkv, Segments all) {
    constexpr int HEADS = 4;
    const Segment& s = all.at[blockIdx.y];
    if (!s.sin) return;
    const int d = all.head_dim, half = d / 2, columns = half / 8, patches = s.tokens - s.prefix;
    const int heads = 2 * all.heads, groups = (heads + HEADS - 1) / HEADS;  // those of K follow those of Q
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int c = i % columns * 8;
    i /= columns;
    const int head = i % groups * HEADS;
    i /= groups;
    const int patch = i % patches, image = i / patches;
    if (image >= s.images) return;

    bf16* row = qkv + (size_t)(s.first_row + image * s.tokens + s.prefix + patch) * 3 * all.heads * d + head * d + c;
    Eight a[HEADS], b[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (head + h >= heads) break;
        a[h] = *(const Eight*)(row + h * d);
        b[h] = *(const Eight*)(row + h * d + half);
    }
    const bf16 *sin = (const bf16*)s.sin + patch * d + c, *cos = (const bf16*)s.cos + patch * d + c;
    const Eight sin_a = *(const Eight*)sin, sin_b = *(const Eight*)(sin + half);
    const Eight cos_a = *(const Eight*)cos, cos_b = *(const Eight*)(cos + half);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (head + h >= heads) break;
        *(Eight*)(row + h * d) = turned(a[h], b[h], cos_a, sin_a, -1.0f);
        *(Eight*)(row + h * d + half) = turned(b[h], a[h], cos_b, sin_b, 1.0f);
    }
}
