// The difference of two matrices of similarities, entry by entry.

constexpr int ELEMENTS_OF_BLOCK = 4096;

// partial[block] = sum of squared differences of student and teacher. e (where asked) = the difference that counts in
// the gradient: a removed entry of the student has a loss but no slope. `remove`: 0 nothing, 1 negative entries of
// both, 2 those of the teacher.
template <class T>
__device__ void similarity_difference(T* e, float* partial, const float* student, const float* teacher, int remove, size_t n) {
    const size_t first = (size_t)blockIdx.x * ELEMENTS_OF_BLOCK;
    const int count = n - first < ELEMENTS_OF_BLOCK ? (int)(n - first) : ELEMENTS_OF_BLOCK;
    float squares = 0.0f;
    visit(count, threadIdx.x, blockDim.x, [&](int i, float s, float t) {
        // Not fmaxf, which would hide a NaN.
        if (remove != 0 && t < 0.0f) t = 0.0f;
        const bool removed = remove == 1 && s < 0.0f;
        const float difference = removed ? -t : s - t;
        squares += difference * difference;
        if (e) e[first + i] = from_float<T>(removed ? 0.0f : difference);
    }, student + first, teacher + first);
    squares = block_sum(squares);
    if (threadIdx.x == 0) partial[blockIdx.x] = squares;
}
KERNEL(similarity_difference, (T* e, float* partial, const float* student, const float* teacher, int remove, size_t n),
       (e, partial, student, teacher, remove, n))
