// The product itself: packed tiles, sums over k in order, so that a result does not depend on threads or tiles.
#include "product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <thread>
#include <vector>

namespace {

constexpr int64_t ROWS = 32, COLUMNS = 6;

float to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t to_bf16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float truncate(float value, bool tf32) {
    return tf32 ? std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xffffe000u) : value;
}

/// The tanh form, with its inner function u and the derivative of that.
float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }
float gelu_derivative(float x) {
    const float t = std::tanh(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
}

} // namespace

float View::get(int64_t batch, int64_t i, int64_t j) const {
    const int64_t at = batch * batch_step + i * row_step + j * column_step;
    return type == Type::F32 ? reinterpret_cast<const float*>(address)[at]
                             : to_float(reinterpret_cast<const uint16_t*>(address)[at]);
}

void View::set(int64_t batch, int64_t i, int64_t j, float value) const {
    const int64_t at = batch * batch_step + i * row_step + j * column_step;
    if (type == Type::F32)
        reinterpret_cast<float*>(address)[at] = value;
    else
        reinterpret_cast<uint16_t*>(address)[at] = to_bf16(value);
}

size_t View::bytes(int64_t batches) const {
    const int64_t last = (batches - 1) * batch_step + (rows - 1) * row_step + (columns - 1) * column_step;
    return static_cast<size_t>(last + 1) * (type == Type::F32 ? 4 : 2);
}

void Product::compute() const {
    for (int64_t batch = 0; batch < batches; batch++) {
        const int64_t n = d.columns;
        // A second thread costs about as much as a million multiplications.
        if (n >= 2 * COLUMNS && d.rows * n * a.columns > 4'000'000) {
            const int64_t half = n / 2 / COLUMNS * COLUMNS;
            std::thread other([=, this] { compute_columns(batch, half, n); });
            compute_columns(batch, 0, half);
            other.join();
        } else {
            compute_columns(batch, 0, n);
        }
        if (bias_gradient != BiasGradient::None) sum_bias_gradient(batch);
    }
}

void Product::compute_columns(int64_t batch, int64_t first, int64_t last) const {
    const int64_t m = d.rows, k = a.columns;
    std::vector<float> packed_b(static_cast<size_t>(k * COLUMNS));
    std::vector<float> packed_a(static_cast<size_t>((m + ROWS - 1) / ROWS * ROWS * k));
    for (int64_t i = 0; i < m; i++)
        for (int64_t l = 0; l < k; l++)
            packed_a[static_cast<size_t>((i / ROWS * k + l) * ROWS + i % ROWS)] = truncate(a.get(batch, i, l), tf32);

    for (int64_t j0 = first; j0 < last; j0 += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, last - j0);
        for (int64_t l = 0; l < k; l++)
            for (int64_t j = 0; j < COLUMNS; j++)
                packed_b[static_cast<size_t>(l * COLUMNS + j)] =
                    j < columns ? truncate(b.get(batch, l, j0 + j), tf32) : 0;
        for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
            float sums[COLUMNS][ROWS] = {};
            const float* a_at = &packed_a[static_cast<size_t>(i0 * k)];
            for (int64_t l = 0; l < k; l++)
                for (int64_t j = 0; j < COLUMNS; j++)
                    for (int64_t i = 0; i < ROWS; i++)
                        sums[j][i] += a_at[l * ROWS + i] * packed_b[static_cast<size_t>(l * COLUMNS + j)];
            for (int64_t j = 0; j < columns; j++)
                for (int64_t i = 0; i < std::min(ROWS, m - i0); i++) {
                    const int64_t row = i0 + i, column = j0 + j;
                    float value = alpha * sums[j][i];
                    // With beta 0 nothing is read: c may hold anything.
                    if (beta != 0) value += beta * c.get(batch, row, column);
                    if (has_bias) value += bias.get(batch, row, 0);
                    if (activation == Activation::GeluGradient)
                        value *= gelu_derivative(auxiliary.get(batch, row, column));
                    else if (has_auxiliary)
                        auxiliary.set(batch, row, column, value);
                    if (activation == Activation::Relu) value = std::fmax(value, 0.0f);
                    if (activation == Activation::Gelu) value = gelu(value);
                    d.set(batch, row, column, value);
                }
        }
    }
}

void Product::sum_bias_gradient(int64_t batch) const {
    const View of = bias_gradient == BiasGradient::OfA ? a : bias_gradient == BiasGradient::OfB ? b.transposed() : d;
    for (int64_t i = 0; i < of.rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < of.columns; j++) sum += of.get(batch, i, j);
        bias.set(batch, i, 0, sum);
    }
}
