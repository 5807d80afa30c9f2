// Squares of images, cut, turned and put together: a thread takes pixels of the result.

struct Tiles {
    u32 channels, height, width, tiles, tile;
};

// A row of the plan: which image, the square's first column and row, and its quarter turns.
template <class T> __device__ void tiles(T* out, const T* in, const uint4* plan, Tiles shape, u32 n) {
    const u32 tile = shape.tile, side = shape.tiles * tile, last = tile - 1;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const u32 column = i % side, row = i / side % side, plane = i / (side * side);
        const u32 channel = plane % shape.channels, image = plane / shape.channels;
        const uint4 from = plan[(image * shape.tiles + row / tile) * shape.tiles + column / tile];
        const u32 r = row % tile, c = column % tile;
        const u32 y = from.w == 0 ? r : from.w == 1 ? c : from.w == 2 ? last - r : last - c;
        const u32 x = from.w == 0 ? c : from.w == 1 ? last - r : from.w == 2 ? last - c : r;
        out[i] = in[(((size_t)from.x * shape.channels + channel) * shape.height + from.z + y) * shape.width + from.y + x];
    }
}
KERNEL(tiles, (T* out, const T* in, const uint4* plan, Tiles shape, u32 n), (out, in, plan, shape, n))
