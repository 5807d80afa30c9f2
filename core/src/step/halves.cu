// Numbers of f32 in two halves of 16 bits: flat.rs.

// out = the `n` numbers from `start` on.
extern "C" __global__ void join_f32(float* out, const bf16* rounded, const u16* lower, size_t start, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = join_halves(rounded[start + i], lower[start + i]);
}

// ema = momentum ema + (1 - momentum) params, as in adamw.cu.
extern "C" __global__ void average_f32(bf16* ema, u16* ema_lower, const bf16* params, const u16* lower, float momentum, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = momentum * join_halves(ema[i], ema_lower[i]) + (1.0f - momentum) * join_halves(params[i], lower[i]);
    ema[i] = rounded_half(x);
    ema_lower[i] = lower_half(x);
}
