// The gate of SwiGLU.

template <class T> __device__ void swiglu(T* y, const T* gate, const T* up, size_t n) {
    elements(y, n, [](size_t, float g, float u) { return g * sigmoid(g) * u; }, gate, up);
}
KERNEL(swiglu, (T* y, const T* gate, const T* up, size_t n), (y, gate, up, n))

// dgate = dy up s (1 + gate (1 - s)); dy becomes dup = dy gate s.
template <class T> __device__ void swiglu_backward(T* dgate, T* dy, const T* gate, const T* up, size_t n) {
    elements(dgate, n, [](size_t, float dy, float g, float u) {
        const float s = sigmoid(g);
        return dy * u * s * (1.0f + g * (1.0f - s));
    }, dy, gate, up);
    elements(dy, n, [](size_t, float dy, float g) { return dy * g * sigmoid(g); }, dy, gate);
}
KERNEL(swiglu_backward, (T* dgate, T* dy, const T* gate, const T* up, size_t n), (dgate, dy, gate, up, n))
