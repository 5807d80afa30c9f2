// Softmax of (x - center) / temperature over rows, a block a row: one reading for the sum, one for the result.

// `center` and `temperature` may be missing. Exponents are relative to the first, so that an offset costs no digits.
template <class T, int N>
__device__ void softmax_by(T* y, const T* x, const float* center, const float* temperature, int log, int d) {
    x += (size_t)blockIdx.x * d;
    y += (size_t)blockIdx.x * d;
    const float scale = temperature ? LOG2_E / *temperature : LOG2_E;
    const float origin = to_float(x[0]) - (center ? center[0] : 0.0f);
    auto exponents = [&](float* z, int i) {
        float c[N] = {};
        get_all<N>(z, x + i);
        if (center) get_all<N>(c, center + i);
#pragma unroll
        for (int j = 0; j < N; j++) z[j] = (z[j] - c[j] - origin) * scale;
    };
    LogSum sum = {-INFINITY, 0.0f};
    float z[N];
    for (int i = threadIdx.x * N; i < d; i += blockDim.x * N) {
        exponents(z, i);
        add<N>(sum, z);
    }
    const float norm = log2_of(block_log_sum(sum));
    for (int i = threadIdx.x * N; i < d; i += blockDim.x * N) {
        exponents(z, i);
#pragma unroll
        for (int j = 0; j < N; j++) z[j] = log ? (z[j] - norm) * LN_2 : exp2_fast(z[j] - norm);
        put_all<N>(y + i, z);
    }
}

template <class T> __device__ void softmax(T* y, const T* x, const float* center, const float* temperature, int log, int d) {
    BY_PACKS(T, d, aligned16(x) && aligned16(y) && aligned16(center), (softmax_by<T, N>(y, x, center, temperature, log, d)))
}
KERNEL(softmax, (T* y, const T* x, const float* center, const float* temperature, int log, int d),
       (y, x, center, temperature, log, d))

// dx = y (dy - sum(y dy)), or for the logarithm dy - exp(y) sum(dy).
template <class T> __device__ void softmax_backward(T* dx, const T* y, const T* dy, int log, int d) {
    const size_t row = (size_t)blockIdx.x * d;
    float sum = 0.0f;
    visit(d, threadIdx.x, blockDim.x, [&](int, float y, float dy) { sum += log ? dy : y * dy; }, y + row, dy + row);
    sum = block_sum(sum);
    auto slope = [=](int, float y, float dy) { return log ? dy - exp2_fast(y * LOG2_E) * sum : y * (dy - sum); };
    transform(dx + row, d, threadIdx.x, blockDim.x, slope, y + row, dy + row);
}
KERNEL(softmax_backward, (T* dx, const T* y, const T* dy, int log, int d), (dx, y, dy, log, d))
