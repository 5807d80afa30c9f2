// Rotary tables of augmented coordinates, computed in double precision as on the host.

// A bf16 table rounds after every operation, by way of f32.
__device__ __forceinline__ double rounded(double x, int narrow) {
    return narrow ? to_float(from_float<bf16>((float)x)) : x;
}

// One thread a patch, axis and period: the two places of the half-split layout that share its angle.
// draw = shift_h, shift_w, jitter_h, jitter_w, rescale.
template <class T>
__device__ void rope_box(T* sine, T* cosine, const double* rows, const double* columns, const double* periods,
                         const double* draw, int width, int n, int narrow, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int patch = i / (2 * n), axis = i / n % 2, period = i % n;
    auto round = [=](double x) { return rounded(x, narrow); };
    double c = axis == 0 ? rows[patch / width] : columns[patch % width];
    c = round(round(round(c + round(draw[axis])) * round(draw[2 + axis])) * round(draw[4]));
    const double angle = round(round(6.283185307179586 * c) / periods[period]);
    const size_t at = (size_t)patch * 4 * n + axis * n + period;
    sine[at] = sine[at + 2 * n] = from_float<T>((float)round(sin(angle)));
    cosine[at] = cosine[at + 2 * n] = from_float<T>((float)round(cos(angle)));
}
KERNEL(rope_box,
       (T* sine, T* cosine, const double* rows, const double* columns, const double* periods, const double* draw, int width, int n, int narrow, int count),
       (sine, cosine, rows, columns, periods, draw, width, n, narrow, count))
