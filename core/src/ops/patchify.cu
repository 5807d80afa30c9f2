// Images to rows of pixels, in the order of convolution weights.

struct Images {
    int channels, height, width, patch;
    // Where element i of the patch rows is in the images.
    __device__ __forceinline__ size_t source(size_t i) const {
        const int x = i % patch, y = i / patch % patch, c = i / ((size_t)patch * patch) % channels;
        const size_t p = i / ((size_t)patch * patch * channels);
        const int columns = width / patch, rows = height / patch;
        const int column = p % columns, row = p / columns % rows;
        const size_t image = p / ((size_t)columns * rows);
        return ((image * channels + c) * height + row * patch + y) * width + column * patch + x;
    }
};

template <class T> __device__ void patchify(T* out, const T* in, Images images, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[images.source(i)];
}
KERNEL(patchify, (T* out, const T* in, Images images, size_t n), (out, in, images, n))

// Adds to gradients that are zero where no patch reaches.
template <class T> __device__ void patchify_backward(Gradient dx, const T* dy, Images images, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) put(dx, images.source(i), to_float(dy[i]));
}
KERNEL(patchify_backward, (Gradient dx, const T* dy, Images images, size_t n), (dx, dy, images, n))
