// Images to rows of pixels, in the order of convolution weights. A thread takes 16 bytes of them.

struct Images {
    u32 channels, height, width, patch;
};

// f(where in the patch rows, where in the images) for every N pixels of this thread's 16 bytes of the n pixels of patches.
template <class T, int N, class F> __device__ __forceinline__ void pixels(Images images, u32 n, F f) {
    constexpr u32 UNITS = Pack<T>::N / N;
    const u32 patch = images.patch, runs = patch / N, columns = images.width / patch, rows = images.height / patch;
    const u32 first = (blockIdx.x * blockDim.x + threadIdx.x) * UNITS;
    for (u32 unit = first; unit < first + UNITS && unit < n / N; unit++) {
        u32 rest = unit;
        auto next = [&](u32 count) {
            const u32 before = rest;
            rest /= count;
            return before - rest * count;
        };
        const u32 x = next(runs) * N, y = next(patch), c = next(images.channels), column = next(columns), row = next(rows);
        const size_t line = ((size_t)rest * images.channels + c) * images.height + row * patch + y;
        f((size_t)unit * N, line * images.width + column * patch + x);
    }
}

template <class T, int N> __device__ void patchify_by(T* out, const T* in, Images images, u32 n) {
    pixels<T, N>(images, n, [&](size_t to, size_t from) {
        float x[N];
        get_all<N>(x, in + from);
        put_all<N>(out + to, x);
    });
}

template <class T> __device__ void patchify(T* out, const T* in, Images images, u32 n) {
    BY_PACKS(T, images.patch, images.width % Pack<T>::N == 0 && aligned16(in) && aligned16(out), (patchify_by<T, N>(out, in, images, n)))
}
KERNEL(patchify, (T* out, const T* in, Images images, u32 n), (out, in, images, n))

// Adds to gradients that are zero where no patch reaches.
template <class T, int N> __device__ void patchify_backward_by(Gradient dx, const T* dy, Images images, u32 n) {
    pixels<T, N>(images, n, [&](size_t from, size_t to) {
        float x[N];
        get_all<N>(x, dy + from);
        put_all<N>(dx, to, x);
    });
}

template <class T> __device__ void patchify_backward(Gradient dx, const T* dy, Images images, u32 n) {
    BY_PACKS(T, images.patch, images.width % Pack<T>::N == 0 && aligned16(dy), (patchify_backward_by<T, N>(dx, dy, images, n)))
}
KERNEL(patchify_backward, (Gradient dx, const T* dy, Images images, u32 n), (dx, dy, images, n))
