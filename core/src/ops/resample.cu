// A separable linear map of a grid of feature vectors: for each output row and column the inputs it sees.

// taps[i]..taps[i + 1] are the entries of output i: which input (`from`), with what weight.
struct Axis {
    const u32* taps;
    const u32* from;
    const float* weight;
    int inputs, outputs;
};

// A block an output patch; threads share its features.
template <class T> __device__ void resample(T* out, const T* x, Axis rows, Axis columns, int d) {
    const int patch = blockIdx.x % (rows.outputs * columns.outputs);
    const size_t image = blockIdx.x / (rows.outputs * columns.outputs);
    const int row = patch / columns.outputs, column = patch % columns.outputs;
    x += image * rows.inputs * columns.inputs * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = 0.0f;
        for (u32 j = columns.taps[column]; j < columns.taps[column + 1]; j++) {
            float mixed = 0.0f;
            for (u32 i = rows.taps[row]; i < rows.taps[row + 1]; i++) {
                mixed += rows.weight[i] * to_float(x[((size_t)rows.from[i] * columns.inputs + columns.from[j]) * d + c]);
            }
            sum += columns.weight[j] * mixed;
        }
        out[(size_t)blockIdx.x * d + c] = from_float<T>(sum);
    }
}
KERNEL(resample, (T* out, const T* x, Axis rows, Axis columns, int d), (out, x, rows, columns, d))
