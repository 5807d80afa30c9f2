// Normalised rows x [rows, d]: nearest neighbours, distances, and the gradient of both ends.

constexpr float EPS = 1e-8f;

// A warp a row. `dots` [rows, group] are the similarities to the rows of the group. Neighbours come nearest first, of
// equals the first row first.
extern "C" __global__ void neighbour_distance_f32(float* values, u32* neighbours, float* slopes, const float* dots, const float* x, int group,
                                     int topk, int rows, int d) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const int first = row / group * group, self = row - first;
    dots += (size_t)row * group;
    float last = INFINITY, value = 0.0f;
    int last_at = -1;
    for (int t = 0; t < topk; t++) {
        // The best that comes after the last one.
        float best = -INFINITY;
        int at = group;
        for (int j = lane; j < group; j += 32) {
            const float dot = dots[j];
            if (j != self && (dot < last || (dot == last && j > last_at)) && dot > best) {
                best = dot;
                at = j;
            }
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            const float other = __shfl_xor_sync(FULL_WARP, best, o);
            const int other_at = __shfl_xor_sync(FULL_WARP, at, o);
            if (other > best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
        // Rows that are not numbers are nobody's neighbours; any other row will say so.
        if (at == group) at = self == 0;
        last = best;
        last_at = at;
        float squared = 0.0f;
        visit(d, lane, 32, [&](int, float a, float b) {
            const float e = a - b + EPS;
            squared += e * e;
        }, x + (size_t)row * d, x + (size_t)(first + at) * d);
        const float distance = sqrtf(warp_sum(squared)), share = 1.0f / topk;
        value -= share * logf(distance + EPS);
        if (lane == 0) {
            neighbours[(size_t)row * topk + t] = first + at;
            // The norm's derivative at 0 is taken as 0.
            slopes[(size_t)row * topk + t] = distance > 0.0f ? -share / (distance * (distance + EPS)) : 0.0f;
        }
    }
    if (lane == 0) values[row] = value;
}

// A block a row and 256 columns: what its own edges give, then, in order, those of the rows that chose it.
extern "C" __global__ void neighbour_distance_backward_f32(float* dx, const float* dy, const float* x, const u32* neighbours,
                                              const float* slopes, int group, int topk, int d) {
    const int row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    auto at = [&](u32 r) { return column < d ? x[(size_t)r * d + column] : 0.0f; };
    const float own = at(row);
    float sum = 0.0f;
    for (int edge = row * topk; edge < (row + 1) * topk; edge++) {
        sum += dy[row] * slopes[edge] * (own - at(neighbours[edge]) + EPS);
    }
    const int first = row / group * group * topk, last = first + group * topk;
    for (int base = first; base < last; base += 32) {
        const bool chosen = base + lane < last && neighbours[base + lane] == (u32)row;
        for (u32 edges = __ballot_sync(FULL_WARP, chosen); edges; edges &= edges - 1) {
            const int edge = base + __ffs(edges) - 1, from = edge / topk;
            sum -= dy[from] * slopes[edge] * (at(from) - own + EPS);
        }
    }
    if (column < d) dx[(size_t)row * d + column] = sum;
}
