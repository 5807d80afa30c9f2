// Cross-entropy with soft targets: a block a student row, one reading of its logits and targets each way.

// The first entry of an ascending list that is not less than `value`.
__device__ __forceinline__ int lower_bound(const u32* list, int n, u32 value) {
    int first = 0;
    while (n > 0) {
        const int half = n / 2;
        if (list[first + half] < value) {
            first += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return first;
}

// Students, their targets and weights: entry e compares row student_rows[e] (ascending) with row target_rows[e].
struct Pairs {
    const u32* student_rows;
    const u32* target_rows;
    const float* weights;
    int entries;
};

// A student row, its logits relative to the first one: a common offset must not cost digits.
template <class T, int N> struct StudentRow {
    const T* logits;
    const T* targets;
    Pairs pairs;
    int first, last, k;
    float origin;

    __device__ StudentRow(const T* logits, const T* targets, Pairs pairs, int k) : targets(targets), pairs(pairs), k(k) {
        first = lower_bound(pairs.student_rows, pairs.entries, blockIdx.x);
        last = lower_bound(pairs.student_rows, pairs.entries, blockIdx.x + 1);
        this->logits = logits + (size_t)blockIdx.x * k;
        origin = to_float(this->logits[0]);
    }

    // f(i, z, t) for this thread's columns: z the exponents of two, t = sum of weight times target.
    template <class F> __device__ __forceinline__ void visit(float scale, F f) const {
        for (int i = threadIdx.x * N; i < k; i += blockDim.x * N) {
            float z[N], t[N] = {};
            get_all<N>(z, logits + i);
#pragma unroll
            for (int j = 0; j < N; j++) z[j] = (z[j] - origin) * scale;
            for (int e = first; e < last; e++) {
                const float weight = pairs.weights[e];
                float q[N];
                get_all<N>(q, targets + (size_t)pairs.target_rows[e] * k + i);
#pragma unroll
                for (int j = 0; j < N; j++) t[j] += weight * q[j];
            }
            f(i, z, t);
        }
    }
};

// With z = logits log2(e) / temperature: loss = ln(2) (mass log2(sum 2^z) - sum t z), mass = sum t. For backward, where
// asked: the greatest z, and mass / sum 2^(z - greatest).
template <class T, int N>
__device__ void cross_entropy_by(float* losses, float* stats, const T* logits, const T* targets, Pairs pairs, float scale, int k) {
    const StudentRow<T, N> row(logits, targets, pairs, k);
    LogSum sum = {-INFINITY, 0.0f};
    float mass = 0.0f, energy = 0.0f;
    if (row.first < row.last) {
        row.visit(scale, [&](int, const float* z, const float* t) {
            add<N>(sum, z);
#pragma unroll
            for (int j = 0; j < N; j++) {
                mass += t[j];
                energy += t[j] * z[j];
            }
        });
        sum = block_log_sum(sum);
        mass = block_sum(mass);
        energy = block_sum(energy);
    }
    if (threadIdx.x > 0) return;
    const bool used = row.first < row.last;
    losses[blockIdx.x] = used ? LN_2 * (mass * log2_of(sum) - energy) : 0.0f;
    if (stats) {
        stats[2 * blockIdx.x] = sum.top;
        stats[2 * blockIdx.x + 1] = used ? mass / sum.sum : 0.0f;
    }
}

// dlogits = dy / temperature (mass softmax(z) - t).
template <class T, int N>
__device__ void cross_entropy_backward_by(Gradient dx, const float* dy, const float* stats, const T* logits, const T* targets,
                                          Pairs pairs, float scale, int k) {
    const StudentRow<T, N> row(logits, targets, pairs, k);
    const size_t start = (size_t)blockIdx.x * k;
    if (row.first == row.last) {
        if (!dx.add) {
            for (int i = threadIdx.x; i < k; i += blockDim.x) put(dx, start + i, 0.0f);
        }
        return;
    }
    const float factor = *dy * scale * LN_2, top = stats[2 * blockIdx.x], share = stats[2 * blockIdx.x + 1];
    row.visit(scale, [&](int i, const float* z, const float* t) {
        float out[N];
#pragma unroll
        for (int j = 0; j < N; j++) out[j] = factor * (share * exp2_fast(z[j] - top) - t[j]);
        put_all<N>(dx, start + i, out);
    });
}

template <class T>
__device__ void cross_entropy(float* losses, float* stats, const T* logits, const T* targets, Pairs pairs, float scale, int k) {
    BY_PACKS(T, k, aligned16(logits) && aligned16(targets),
             (cross_entropy_by<T, N>(losses, stats, logits, targets, pairs, scale, k)))
}
KERNEL(cross_entropy,
       (float* losses, float* stats, const T* logits, const T* targets, Pairs pairs, float scale, int k),
       (losses, stats, logits, targets, pairs, scale, k))

template <class T>
__device__ void cross_entropy_backward(Gradient dx, const float* dy, const float* stats, const T* logits, const T* targets,
                                       Pairs pairs, float scale, int k) {
    BY_PACKS(T, k, aligned16(logits) && aligned16(targets),
             (cross_entropy_backward_by<T, N>(dx, dy, stats, logits, targets, pairs, scale, k)))
}
KERNEL(cross_entropy_backward,
       (Gradient dx, const float* dy, const float* stats, const T* logits, const T* targets, Pairs pairs, float scale, int k),
       (dx, dy, stats, logits, targets, pairs, scale, k))
