// What surrounds a linear layer's matrix products: activations in front of it, and the scale behind it, which is folded
// into weight and bias.

// dx = df slope(x), in place of df; f = gelu(x) again; partial sums of the rows of dx.
template <class T, int N> __device__ void undo_gelu_by(float* partial, T* df, T* f, const T* x, int rows, int d) {
    auto row = [&](int r, int c, float sums[1][N]) {
        const size_t at = (size_t)r * d + c;
        float g[N], xs[N];
        get_all<N>(g, df + at);
        get_all<N>(xs, x + at);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const Gaussian n = gaussian(xs[k]);
            g[k] *= n.cdf + xs[k] * n.pdf;
            xs[k] *= n.cdf;
            sums[0][k] += g[k];
        }
        put_all<N>(df + at, g);
        put_all<N>(f + at, xs);
    };
    column_sums<1, N>(partial, rows, d, row);
}

template <class T> __device__ void undo_gelu(float* partial, T* df, T* f, const T* x, int rows, int d) {
    BY_PACKS(T, d, aligned16(df) && aligned16(f) && aligned16(x), (undo_gelu_by<T, N>(partial, df, f, x, rows, d)))
}
KERNEL(undo_gelu, (float* partial, T* df, T* f, const T* x, int rows, int d), (partial, df, f, x, rows, d))

// With s = sigmoid(gate): dgate = df up s (1 + gate (1 - s)); dup = df gate s, in place of df; f = gate s up again; partial
// sums of the rows of dgate and dup.
template <class T, int N>
__device__ void undo_swiglu_by(float* partial, T* dgate, T* df, T* f, const T* gate, const T* up, int rows, int d) {
    auto row = [&](int r, int c, float sums[2][N]) {
        const size_t at = (size_t)r * d + c;
        float g[N], gates[N], ups[N];
        get_all<N>(g, df + at);
        get_all<N>(gates, gate + at);
        get_all<N>(ups, up + at);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float s = sigmoid(gates[k]), silu = gates[k] * s;
            const float to_gate = g[k] * ups[k] * s * (1.0f + gates[k] * (1.0f - s));
            g[k] *= silu;
            ups[k] *= silu;
            gates[k] = to_gate;
            sums[0][k] += to_gate;
            sums[1][k] += g[k];
        }
        put_all<N>(dgate + at, gates);
        put_all<N>(df + at, g);
        put_all<N>(f + at, ups);
    };
    column_sums<2, N>(partial, rows, d, row);
}

template <class T>
__device__ void undo_swiglu(float* partial, T* dgate, T* df, T* f, const T* gate, const T* up, int rows, int d) {
    BY_PACKS(T, d, aligned16(dgate) && aligned16(df) && aligned16(f) && aligned16(gate) && aligned16(up),
             (undo_swiglu_by<T, N>(partial, dgate, df, f, gate, up, rows, d)))
}
KERNEL(undo_swiglu, (float* partial, T* dgate, T* df, T* f, const T* gate, const T* up, int rows, int d),
       (partial, dgate, df, f, gate, up, rows, d))

// Row o of w times scale[o]; the same for the bias. A thread takes 16 bytes.
template <class T>
__device__ void fold_scale(T* w_out, T* b_out, const T* w, const T* bias, const T* scale, u32 rows, u32 d) {
    constexpr int N = Pack<T>::N;
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (d % N == 0 && aligned16(w_out) && aligned16(w)) {
        const u32 row = i / (d / N);
        if (row < rows) {
            const float s = to_float(scale[row]);
            float x[N];
            get_all<N>(x, w + (size_t)i * N);
#pragma unroll
            for (int k = 0; k < N; k++) x[k] *= s;
            put_all<N>(w_out + (size_t)i * N, x);
        }
    } else {
        const size_t n = (size_t)rows * d;
        for (size_t j = (size_t)i * N; j < n && j < (size_t)(i + 1) * N; j++) {
            w_out[j] = from_float<T>(to_float(w[j]) * to_float(scale[j / d]));
        }
    }
    for (u32 row = i; bias && row < rows; row += gridDim.x * blockDim.x) {
        b_out[row] = from_float<T>(to_float(bias[row]) * to_float(scale[row]));
    }
}
KERNEL(fold_scale, (T* w_out, T* b_out, const T* w, const T* bias, const T* scale, u32 rows, u32 d),
       (w_out, b_out, w, bias, scale, rows, d))

// From the gradients of the folded weight and bias: dw[o] = scale[o] folded[o], dbias[o] = scale[o] folded_bias[o],
// dscale[o] = w[o] folded[o] + bias[o] folded_bias[o]. A block a row.
template <class T, int N>
__device__ void unfold_scale_by(Gradient dw, Gradient dbias, Gradient dscale, const float* folded, const float* folded_bias,
                                const T* w, const T* bias, const T* scale, int d) {
    const int row = blockIdx.x;
    const float s = to_float(scale[row]);
    float dot = 0.0f;
    for (int i = threadIdx.x * N; i < d; i += blockDim.x * N) {
        const size_t at = (size_t)row * d + i;
        float g[N], ws[N];
        get_all<N>(g, folded + at);
        get_all<N>(ws, w + at);
#pragma unroll
        for (int k = 0; k < N; k++) {
            dot += ws[k] * g[k];
            g[k] *= s;
        }
        if (dw.at) put_all<N>(dw, at, g);
    }
    dot = block_sum(dot);
    if (threadIdx.x != 0) return;
    if (bias) {
        dot += to_float(bias[row]) * folded_bias[row];
        if (dbias.at) put(dbias, row, s * folded_bias[row]);
    }
    if (dscale.at) put(dscale, row, dot);
}

template <class T>
__device__ void unfold_scale(Gradient dw, Gradient dbias, Gradient dscale, const float* folded, const float* folded_bias,
                             const T* w, const T* bias, const T* scale, int d) {
    BY_PACKS(T, d, aligned16(folded) && aligned16(w),
             (unfold_scale_by<T, N>(dw, dbias, dscale, folded, folded_bias, w, bias, scale, d)))
}
KERNEL(unfold_scale,
       (Gradient dw, Gradient dbias, Gradient dscale, const float* folded, const float* folded_bias, const T* w, const T* bias, const T* scale, int d),
       (dw, dbias, dscale, folded, folded_bias, w, bias, scale, d))
