// Rows divided by their length: a warp a row.

// scale = 1 / max(|x|, eps), negative where |x| < eps.
template <class T> __device__ void l2_normalize(T* y, float* scale, const T* x, float eps, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (size_t)row * d;
    float squares = 0.0f;
    visit(d, lane, 32, [&](int, float x) { squares += x * x; }, x);
    const float norm = sqrtf(warp_sum(squares)), s = 1.0f / (norm < eps ? eps : norm);
    transform(y + (size_t)row * d, d, lane, 32, [=](int, float x) { return x * s; }, x);
    if (lane == 0) scale[row] = norm < eps ? -s : s;
}
KERNEL(l2_normalize, (T* y, float* scale, const T* x, float eps, int rows, int d), (y, scale, x, eps, rows, d))

// dx = (dy - y (y . dy)) |scale|, without the second term where the row was shorter than eps.
template <class T> __device__ void l2_normalize_backward(T* dx, const T* y, const T* dy, const float* scale, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    y += (size_t)row * d;
    dy += (size_t)row * d;
    float along = 0.0f;
    visit(d, lane, 32, [&](int, float y, float dy) { along += y * dy; }, y, dy);
    along = warp_sum(along);
    const float s = scale[row];
    auto slope = [=](int, float y, float dy) { return s < 0.0f ? -s * dy : s * (dy - y * along); };
    transform(dx + (size_t)row * d, d, lane, 32, slope, y, dy);
}
KERNEL(l2_normalize_backward, (T* dx, const T* y, const T* dy, const float* scale, int rows, int d),
       (dx, y, dy, scale, rows, d))
