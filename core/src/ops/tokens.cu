// Patch embeddings to token rows: a warp a row.

// Row t of an image: the prefix in front, then its patches, the masked ones replaced by the token.
template <class T>
__device__ void assemble(T* out, const T* patches, const T* prefix, const T* token, const u32* mask, int rows, int before, int tokens, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const int image = row / tokens, t = row % tokens;
    const int patch = image * (tokens - before) + t - before;
    const T* source = t < before ? prefix + (size_t)t * d : mask && mask[patch] ? token : patches + (size_t)patch * d;
    transform(out + (size_t)row * d, d, lane, 32, [](int, float x) { return x; }, source);
}
KERNEL(assemble, (T* out, const T* patches, const T* prefix, const T* token, const u32* mask, int rows, int before, int tokens, int d),
       (out, patches, prefix, token, mask, rows, before, tokens, d))

// The gradient of the patches: that of their row, 0 where the token stood. Partial sums of the rows of masked patches.
template <class T, int N>
__device__ void assemble_backward_by(Gradient dpatches, float* partial, const T* dout, const u32* mask, int count, int before, int tokens, int d) {
    const int per_image = tokens - before;
    auto row = [&](int i, int c, float sums[1][N]) {
        float g[N];
        get_all<N>(g, dout + ((size_t)(i / per_image) * tokens + before + i % per_image) * d + c);
        if (mask && mask[i]) {
#pragma unroll
            for (int k = 0; k < N; k++) {
                sums[0][k] += g[k];
                g[k] = 0.0f;
            }
        }
        if (dpatches.at) put_all<N>(dpatches, (size_t)i * d + c, g);
    };
    column_sums<1, N>(partial, count, d, row);
}

template <class T>
__device__ void assemble_backward(Gradient dpatches, float* partial, const T* dout, const u32* mask, int count, int before, int tokens, int d) {
    BY_PACKS(T, d, aligned16(dout), (assemble_backward_by<T, N>(dpatches, partial, dout, mask, count, before, tokens, d)))
}
KERNEL(assemble_backward,
       (Gradient dpatches, float* partial, const T* dout, const u32* mask, int count, int before, int tokens, int d),
       (dpatches, partial, dout, mask, count, before, tokens, d))

// Partial sums over the images of the first `width` elements of each (its prefix); images are `stride` elements apart.
template <class T, int N> __device__ void prefix_sums_by(float* partial, const T* dout, int images, size_t stride, int width) {
    auto row = [&](int i, int c, float sums[1][N]) {
        float g[N];
        get_all<N>(g, dout + i * stride + c);
#pragma unroll
        for (int k = 0; k < N; k++) sums[0][k] += g[k];
    };
    column_sums<1, N, 4>(partial, images, width, row);
}

template <class T> __device__ void prefix_sums(float* partial, const T* dout, int images, size_t stride, int width) {
    BY_PACKS(T, width, stride % Pack<T>::N == 0 && aligned16(dout), (prefix_sums_by<T, N>(partial, dout, images, stride, width)))
}
KERNEL(prefix_sums, (float* partial, const T* dout, int images, size_t stride, int width), (partial, dout, images, stride, width))

// rows[i * tokens + t] = first + images[i] * tokens + t.
extern "C" __global__ void rows_of_images(u32* rows, const u32* images, u32 first, u32 tokens, u32 count) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) rows[i] = first + images[i / tokens] * tokens + i % tokens;
}
