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
    column_sums<1, N>(partial, rows, d, [](int, int) {}, row);
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
    column_sums<2, N>(partial, rows, d, [](int, int) {}, row);
}

template <class T>
__device__ void undo_swiglu(float* partial, T* dgate, T* df, T* f, const T* gate, const T* up, int rows, int d) {
    BY_PACKS(T, d, aligned16(dgate) && aligned16(df) && aligned16(f) && aligned16(gate) && aligned16(up),
             (undo_swiglu_by<T, N>(partial, dgate, df, f, gate, up, rows, d)))
}
KERNEL(undo_swiglu, (float* partial, T* dgate, T* df, T* f, const T* gate, const T* up, int rows, int d),
       (partial, dgate, df, f, gate, up, rows, d))

// Row o of w times scale[o]; the same for the bias. A warp a row.
template <class T>
__device__ void fold_scale(T* w_out, T* b_out, const T* w, const T* bias, const T* scale, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float s = to_float(scale[row]);
    const size_t at = (size_t)row * d;
    transform(w_out + at, d, lane, 32, [=](int, float w) { return w * s; }, w + at);
    if (bias && lane == 0) b_out[row] = from_float<T>(to_float(bias[row]) * s);
}
KERNEL(fold_scale, (T* w_out, T* b_out, const T* w, const T* bias, const T* scale, int rows, int d),
       (w_out, b_out, w, bias, scale, rows, d))

// From the gradients of the folded weight and bias: dw[o] = scale[o] folded[o], dbias[o] = scale[o] folded_bias[o],
// dscale[o] = w[o] folded[o] + bias[o] folded_bias[o].
template <class T>
__device__ void unfold_scale(Gradient dw, Gradient dbias, Gradient dscale, const float* folded, const float* folded_bias,
                             const T* w, const T* bias, const T* scale, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float s = to_float(scale[row]);
    const size_t at = (size_t)row * d;
    float dot = 0.0f;
    for (int i = lane; i < d; i += 32) {
        const float g = folded[at + i];
        dot += to_float(w[at + i]) * g;
        if (dw.at) put(dw, at + i, s * g);
    }
    dot = warp_sum(dot);
    if (lane != 0) return;
    if (bias) {
        dot += to_float(bias[row]) * folded_bias[row];
        if (dbias.at) put(dbias, row, s * folded_bias[row]);
    }
    if (dscale.at) put(dscale, row, dot);
}
KERNEL(unfold_scale,
       (Gradient dw, Gradient dbias, Gradient dscale, const float* folded, const float* folded_bias, const T* w, const T* bias, const T* scale, int rows, int d),
       (dw, dbias, dscale, folded, folded_bias, w, bias, scale, rows, d))
