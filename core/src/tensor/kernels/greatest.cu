// The greatest number in size, as bits: those of sizes are in the order of the sizes, infinity and then NaN the last.

// *greatest = max(*greatest, bits of |x[i]| for all i).
template <class T> __device__ void greatest(u32* greatest, const T* x, size_t n) {
    __shared__ u32 of_warp[32];
    const size_t all = (size_t)gridDim.x * blockDim.x;
    u32 most = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += all)
        most = max(most, __float_as_uint(to_float(x[i])) & 0x7fffffffu);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(FULL_WARP, most, step));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < blockDim.x / 32; i++) most = max(most, of_warp[i]);
        // Whatever the order of the blocks, the maximum of whole numbers is the same.
        atomicMax(greatest, most);
    }
}
KERNEL(greatest, (u32* out, const T* x, size_t n), (out, x, n))
