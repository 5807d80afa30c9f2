// Entropies of distributions: for each row p of k numbers, -sum p ln p, in nats. A block a row; 0 ln 0 is 0.

template <class T> __device__ void row_entropy(float* out, const T* p, int k) {
    p += (size_t)blockIdx.x * k;
    float sum = 0.0f;
    visit(k, threadIdx.x, blockDim.x, [&](int, float x) { sum -= x > 0.0f ? x * logf(x) : 0.0f; }, p);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
KERNEL(row_entropy, (float* out, const T* p, int k), (out, p, k))
