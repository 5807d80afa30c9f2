// Sums of powers of two, held relative to the greatest exponent met so far: one reading of a row gives its softmax.

// sum * 2^top. No element yet: {-INFINITY, 0}.
struct LogSum {
    float top, sum;
};

// Adds 2^z for N exponents.
template <int N> __device__ __forceinline__ void add(LogSum& s, const float* z) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, z[i]);
    if (top > s.top) {
        s.sum *= exp2_fast(s.top - top);
        s.top = top;
    }
#pragma unroll
    for (int i = 0; i < N; i++) s.sum += exp2_fast(z[i] - s.top);
}

// Over all threads of a block; every thread gets the result.
__device__ __forceinline__ LogSum block_log_sum(LogSum s) {
    const float top = block_max(s.top);
    return {top, block_sum(s.sum * exp2_fast(s.top - top))};
}

__device__ __forceinline__ float log2_of(LogSum s) { return s.top + log2f(s.sum); }

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
