//! cuBLASLt: products of column-major matrices with their epilogues, against plain loops.

use std::ffi::c_void;

use cudarc::cublaslt::result;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t as Attribute;
use cudarc::cublaslt::sys::cublasLtMatrixLayoutAttribute_t as Layout;
use cudarc::cublaslt::sys::{cublasComputeType_t, cublasLtEpilogue_t, cudaDataType, cudaDataType_t};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use dinolab_tests::gpu_test;
use half::bf16;

use super::Gpu;

/// f32 or bf16, in memory.
trait Element: DeviceRepr + Copy {
    const TYPE: cudaDataType;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const TYPE: cudaDataType = cudaDataType_t::CUDA_R_32F;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const TYPE: cudaDataType = cudaDataType_t::CUDA_R_16BF;
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

/// A column-major matrix of a batch, all of them in one piece of device memory.
struct Matrix<T> {
    rows: usize,
    columns: usize,
    /// Elements from column to column: a few more than there are rows.
    ld: usize,
    values: Vec<f32>,
    memory: CudaSlice<T>,
}

const BATCH: usize = 2;

impl<T: Element> Matrix<T> {
    /// Values that bf16 holds exactly, and whose products and sums f32 does.
    fn new(gpu: &Gpu, rows: usize, columns: usize, seed: usize) -> Self {
        let ld = rows + 8 - rows % 8;
        let values: Vec<f32> =
            (0..BATCH * ld * columns).map(|i| ((i * 37 + seed * 11) % 17) as f32 / 4.0 - 2.0).collect();
        let memory = gpu.upload(&values.iter().map(|&v| T::from_f32(v)).collect::<Vec<_>>());
        Self { rows, columns, ld, values, memory }
    }

    fn get(&self, batch: usize, row: usize, column: usize) -> f32 {
        self.values[(batch * self.columns + column) * self.ld + row]
    }

    fn address(&self, gpu: &Gpu) -> u64 {
        self.memory.device_ptr(&gpu.stream).0
    }

    fn layout(&self) -> cudarc::cublaslt::sys::cublasLtMatrixLayout_t {
        let layout = result::create_matrix_layout(T::TYPE, self.rows as u64, self.columns as u64, self.ld as i64)
            .expect("a layout");
        let (count, offset) = (BATCH as i32, (self.ld * self.columns) as i64);
        // SAFETY: the layout is alive and the values have the attributes' sizes.
        unsafe {
            let (count, offset) = ((&raw const count).cast(), (&raw const offset).cast());
            result::set_matrix_layout_attribute(layout, Layout::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count, 4)
                .expect("a count");
            result::set_matrix_layout_attribute(layout, Layout::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, offset, 8)
                .expect("an offset");
        }
        layout
    }
}

/// `d = epilogue(alpha op(a) op(b) + beta d)` for every matrix of the batch.
struct Product {
    transposed: [bool; 2],
    alpha: f32,
    beta: f32,
    epilogue: cublasLtEpilogue_t,
    bias: u64,
    /// Address and distance of columns.
    auxiliary: (u64, i64),
}

impl Product {
    fn run<T: Element, D: Element>(&self, gpu: &Gpu, a: &Matrix<T>, b: &Matrix<T>, d: &Matrix<D>) -> Vec<f32> {
        let handle = result::create_handle().expect("a handle");
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, cudaDataType_t::CUDA_R_32F).expect("a description");
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: the description is alive and the value has the attribute's size.
            unsafe { result::set_matmul_desc_attribute(desc, attribute, value, size) }.expect("an attribute");
        };
        let transposed = self.transposed.map(i32::from);
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const transposed[0]).cast(), 4);
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const transposed[1]).cast(), 4);
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const self.epilogue).cast(), 4);
        if self.bias != 0 {
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, (&raw const self.bias).cast(), 8);
        }
        if self.auxiliary.0 != 0 {
            let (address, ld, step) = (self.auxiliary.0, self.auxiliary.1, self.auxiliary.1 * d.columns as i64);
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (&raw const address).cast(), 8);
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (&raw const ld).cast(), 8);
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, (&raw const step).cast(), 8);
        }
        let [la, lb, ld] = [a.layout(), b.layout(), d.layout()];
        let preference = result::create_matmul_pref().expect("a preference");
        let [pa, pb, pd] = [a.address(gpu), b.address(gpu), d.address(gpu)].map(|address| address as *mut c_void);
        // SAFETY: all handles are alive; the operands have the sizes of their layouts.
        unsafe {
            let found =
                result::get_matmul_algo_heuristic(handle, desc, la, lb, ld, ld, preference).expect("an algorithm");
            let (alpha, beta) = ((&raw const self.alpha).cast(), (&raw const self.beta).cast());
            let (null, stream) = (std::ptr::null_mut(), gpu.stream.cu_stream().cast());
            result::matmul(handle, desc, alpha, beta, pa, la, pb, lb, pd, ld, pd, ld, &found.algo, null, 0, stream)
                .expect("a product");
            result::destroy_matmul_pref(preference).expect("destroyed");
            for layout in [la, lb, ld] {
                result::destroy_matrix_layout(layout).expect("destroyed");
            }
            result::destroy_matmul_desc(desc).expect("destroyed");
            result::destroy_handle(handle).expect("destroyed");
        }
        gpu.download(&d.memory).into_iter().map(D::to_f32).collect()
    }

    /// The product before its epilogue, element by element.
    fn expect<T: Element, D: Element>(
        &self,
        a: &Matrix<T>,
        b: &Matrix<T>,
        d: &Matrix<D>,
        mut check: impl FnMut(usize, [usize; 3], f32),
    ) {
        let [of_a, of_b] = self.transposed;
        let k = if of_a { a.rows } else { a.columns };
        for (batch, column, row) in
            (0..BATCH).flat_map(|n| (0..d.columns).flat_map(move |c| (0..d.rows).map(move |r| (n, c, r))))
        {
            let term = |l: usize| {
                let left = if of_a { a.get(batch, l, row) } else { a.get(batch, row, l) };
                left * if of_b { b.get(batch, column, l) } else { b.get(batch, l, column) }
            };
            let product: f32 = (0..k).map(term).sum();
            let at = (batch * d.columns + column) * d.ld + row;
            check(at, [batch, row, column], self.alpha * product + self.beta * d.values[at]);
        }
    }
}

const PLAIN: Product = Product {
    transposed: [false; 2],
    alpha: 1.0,
    beta: 0.0,
    epilogue: cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
    bias: 0,
    auxiliary: (0, 0),
};

/// Sizes that no tile divides.
const M: usize = 45;
const N: usize = 27;
const K: usize = 19;

/// `op(a)` is `[M, K]` and `op(b)` is `[K, N]`.
fn operands<T: Element>(gpu: &Gpu, [of_a, of_b]: [bool; 2]) -> [Matrix<T>; 2] {
    let a = if of_a { Matrix::new(gpu, K, M, 1) } else { Matrix::new(gpu, M, K, 1) };
    let b = if of_b { Matrix::new(gpu, N, K, 2) } else { Matrix::new(gpu, K, N, 2) };
    [a, b]
}

fn transposes_with_bias<T: Element, D: Element>(tolerance: f32) {
    let gpu = Gpu::new();
    let bias: Vec<f32> = (0..M).map(|i| i as f32 / 4.0 - 3.0).collect();
    let column = gpu.upload(&bias.iter().map(|&v| D::from_f32(v)).collect::<Vec<_>>());
    for transposed in [[false, false], [true, false], [false, true], [true, true]] {
        let [a, b] = operands::<T>(&gpu, transposed);
        let d = Matrix::<D>::new(&gpu, M, N, 3);
        let product = Product {
            transposed,
            alpha: 0.5,
            beta: 2.0,
            epilogue: cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            bias: column.device_ptr(&gpu.stream).0,
            ..PLAIN
        };
        let result = product.run(&gpu, &a, &b, &d);
        product.expect(&a, &b, &d, |at, [batch, row, column], value| {
            let expected = value + bias[row];
            let close = (result[at] - expected).abs() <= tolerance * expected.abs();
            assert!(close, "{transposed:?} [{batch}, {row}, {column}]: {} is not {expected}", result[at]);
        });
    }
}

gpu_test!(f32_products_in_all_four_transposes_take_a_bias, { transposes_with_bias::<f32, f32>(0.0) });
gpu_test!(bf16_products_in_all_four_transposes_take_a_bias, { transposes_with_bias::<bf16, bf16>(1.0 / 256.0) });
gpu_test!(bf16_products_can_be_f32, { transposes_with_bias::<bf16, f32>(0.0) });

gpu_test!(beta_0_does_not_read_the_result, {
    let gpu = Gpu::new();
    let [a, b] = operands::<f32>(&gpu, [false; 2]);
    let mut d = Matrix::<f32>::new(&gpu, M, N, 3);
    d.memory = gpu.upload(&vec![f32::NAN; d.values.len()]);
    let result = PLAIN.run(&gpu, &a, &b, &d);
    PLAIN.expect(&a, &b, &d, |at, _, value| assert_eq!(result[at], value));
});

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh())
}

fn gelu_derivative(x: f32) -> f32 {
    let t = (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh();
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x)
}

gpu_test!(gelu_keeps_its_input_for_its_derivative, {
    let gpu = Gpu::new();
    let [a, b] = operands::<bf16>(&gpu, [true, false]);
    let (d, input) = (Matrix::<bf16>::new(&gpu, M, N, 3), Matrix::<bf16>::new(&gpu, M, N, 4));
    let bias = gpu.upload(&[bf16::from_f32(0.25); M]);
    let product = Product {
        transposed: [true, false],
        alpha: 0.125,
        epilogue: cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        bias: bias.device_ptr(&gpu.stream).0,
        auxiliary: (input.address(&gpu), input.ld as i64),
        ..PLAIN
    };
    let close = |x: f32, y: f32| (x - y).abs() <= 0.01 * (1.0 + y.abs());
    let result = product.run(&gpu, &a, &b, &d);
    let kept: Vec<f32> = gpu.download(&input.memory).into_iter().map(bf16::to_f32).collect();
    product.expect(&a, &b, &d, |at, _, value| {
        let value = value + 0.25;
        assert!(close(kept[at], value), "{} was kept of {value}", kept[at]);
        assert!(close(result[at], gelu(value)), "{} is not gelu({value})", result[at]);
    });

    let product = Product { epilogue: cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DGELU, bias: 0, alpha: 1.0, ..product };
    let result = product.run(&gpu, &a, &b, &d);
    product.expect(&a, &b, &d, |at, _, value| {
        let expected = value * gelu_derivative(kept[at]);
        assert!(close(result[at], expected), "{} is not {expected}", result[at]);
    });
});

gpu_test!(bias_gradients_sum_over_a_factor, {
    let gpu = Gpu::new();
    let [a, b] = operands::<bf16>(&gpu, [false, true]);
    let d = Matrix::<bf16>::new(&gpu, M, N, 3);
    for (epilogue, count) in
        [(cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADA, M), (cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADB, N)]
    {
        // Each matrix of the batch overwrites the sums of the one before.
        let gradient = gpu.upload(&vec![bf16::ZERO; count * BATCH]);
        let address = gradient.device_ptr(&gpu.stream).0;
        Product { transposed: [false, true], epilogue, bias: address, ..PLAIN }.run(&gpu, &a, &b, &d);
        let sums = gpu.download(&gradient);
        for (i, sum) in sums.into_iter().take(count).enumerate() {
            let of = |batch: usize| -> f32 {
                (0..K).map(|k| if count == M { a.get(batch, i, k) } else { b.get(batch, i, k) }).sum()
            };
            assert_eq!(sum.to_f32(), of(BATCH - 1), "{epilogue:?} {i}");
        }
    }
});
