// Matrix products with an epilogue, as cuBLASLt defines them, on plain memory.
#pragma once
#include <cstddef>
#include <cstdint>

enum class Type : int {
    F32 = 0,
    BF16 = 14
};

/// A matrix of a batch: element (i, j) lies at i * row_step + j * column_step.
struct View {
    Type type;
    uint64_t address;
    int64_t rows, columns, row_step, column_step, batch_step;

    View transposed() const { return {type, address, columns, rows, column_step, row_step, batch_step}; }
    float get(int64_t batch, int64_t i, int64_t j) const;
    void set(int64_t batch, int64_t i, int64_t j, float value) const;
    /// From the first byte to behind the last one of all matrices of the batch.
    size_t bytes(int64_t batches) const;
};

enum class Activation {
    None,
    Relu,
    Gelu,
    GeluGradient
};
enum class BiasGradient {
    None,
    OfA,
    OfB,
    OfResult
};

/// d = activation(alpha a b + beta c + bias), [m, n], for each of a batch. The bias is one column, `[m]`. GELU may keep
/// its input in `auxiliary`; its gradient multiplies by the derivative there. A bias gradient sums over the columns of
/// a, over the rows of b or over the columns of d.
struct Product {
    View a, b, c, d;
    float alpha, beta;
    int64_t batches;
    bool tf32;
    Activation activation;
    bool has_bias, has_auxiliary;
    BiasGradient bias_gradient;
    View bias, auxiliary;

    void compute() const;

  private:
    void compute_columns(int64_t batch, int64_t first, int64_t last) const;
    void sum_bias_gradient(int64_t batch) const;
};
