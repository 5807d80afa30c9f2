//! Matrix products by cuBLASLt: plans kept by shape, the fastest algorithm of a shape found by trying, once.
//!
//! Which algorithm is fastest decides the last bits of a result. What was found is therefore kept on disk by device,
//! library version and shape, so that a second run has the same bits as the first.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys as driver;

use super::buffer::CudaBuffer;
use super::profile::device_ms;
use super::source::{cache_folder, write_whole};
use super::{Failure, Gpu};
use crate::{DType, Error, Result};

/// Scratch memory that algorithms may use: what NVIDIA recommends for Hopper.
pub(crate) const WORKSPACE: usize = 32 << 20;
/// Algorithms tried for a shape.
const CANDIDATES: usize = 24;
/// Those of them that were fastest at first are tried again, so often, but no longer than so many milliseconds.
const FINALISTS: usize = 4;
const TRIES: usize = 10;
const TRIED_MS: f64 = 30.0;

/// Terms of a sum that kernels take at a time, at most.
const BLOCK_OF_TERMS: usize = 128;

/// A row-major matrix in device memory, one of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Where its first element is.
    pub address: u64,
    /// bf16 or f32.
    pub dtype: DType,
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub cols: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
    /// Elements from one matrix of the batch to the next.
    pub batch_stride: usize,
}

impl Matrix {
    /// A dense matrix at an address.
    pub fn at(address: u64, dtype: DType, rows: usize, cols: usize) -> Self {
        Self { address, dtype, rows, cols, stride: cols, transposed: false, batch_stride: rows * cols }
    }

    /// The transpose; no copy.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn dims(&self) -> (usize, usize) {
        if self.transposed {
            (self.cols, self.rows)
        } else {
            (self.rows, self.cols)
        }
    }
}

/// `out = alpha a b (+ out, or another matrix) (+ bias to every row)`, for every matrix of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Left factor, `[m, k]`.
    pub a: Matrix,
    /// Right factor, `[k, n]`, of the type of the left one.
    pub b: Matrix,
    /// Result, `[m, n]`, of that type or f32.
    pub out: Matrix,
    /// Added to what is there.
    pub add: bool,
    /// Added to the matrix at this address, which has the layout of the result.
    pub onto: Option<u64>,
    /// Factor of the product.
    pub alpha: f32,
    /// Address of a row of n, of the type of the result.
    pub bias: Option<u64>,
    /// How many products.
    pub batch: usize,
}

impl Product {
    /// A single product that overwrites `out`.
    pub fn new(a: Matrix, b: Matrix, out: Matrix) -> Self {
        Self { a, b, out, add: false, onto: None, alpha: 1.0, bias: None, batch: 1 }
    }

    fn adds(&self) -> bool {
        self.add || self.onto.is_some()
    }
}

/// Everything that a plan depends on. Alignment is that of all operands together, at most 256.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    mnk: [usize; 3],
    transposed: [bool; 2],
    types: [DType; 2],
    strides: [usize; 3],
    batch: (usize, [usize; 3]),
    add: bool,
    bias: bool,
    alignment: u32,
    tf32: bool,
}

impl Shape {
    /// Whether its sums are whole numbers of blocks.
    fn is_whole(&self) -> bool {
        self.mnk[2].is_multiple_of(BLOCK_OF_TERMS)
    }

    /// Whether an algorithm may leave out the last terms of its sums: cuBLASLt 12.8 and 13.1 do so where they split a sum
    /// that is no whole number of blocks (seen on an H100 and a GB300: facebookexperimental/triton, pull request 2767).
    fn drops_terms(&self, algo: &sys::cublasLtMatmulAlgo_t) -> bool {
        let (mut parts, mut written) = (1i32, 0usize);
        // SAFETY: the algorithm is plain data, and the attribute a number of 32 bits.
        let status = unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                algo,
                sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
                (&raw mut parts).cast(),
                size_of::<i32>(),
                &mut written,
            )
        };
        (status.result().is_err() || parts != 1) && !self.is_whole()
    }
}

struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle and the plans made so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuffer,
    plans: Mutex<HashMap<Shape, Plan>>,
    tuned: Mutex<Tuned>,
}

thread_local! {
    static TF32: Cell<bool> = const { Cell::new(false) };
}

/// Products of this thread are as they were before when it is dropped.
#[must_use = "what was set ends with the guard"]
pub(crate) struct Tf32Guard(bool);

/// Computes this thread's f32 products with TF32 tensor cores (10 bits of mantissa), or exactly.
pub(crate) fn with_tf32(on: bool) -> Tf32Guard {
    Tf32Guard(TF32.replace(on))
}

impl Drop for Tf32Guard {
    fn drop(&mut self) {
        TF32.set(self.0);
    }
}

// SAFETY: the library's handle is thread-safe; plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Algorithms by shape, in words of eight bytes, and the file that keeps them.
#[derive(Default)]
struct Tuned {
    file: Option<PathBuf>,
    known: BTreeMap<String, Vec<u64>>,
}

impl Tuned {
    fn open(gpu: &Gpu, version: usize) -> Self {
        let name = gpu.info().name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let file = cache_folder().map(|f| f.join(format!("products-{name}-{version}-in-f32.json")));
        let known = file.as_deref().map(Self::read).unwrap_or_default();
        Self { file, known }
    }

    fn read(file: &Path) -> BTreeMap<String, Vec<u64>> {
        std::fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// Keeps other processes from choosing until the result is dropped, and takes in what they chose: runs that start
    /// together have the same bits.
    fn alone(&mut self) -> Option<File> {
        let file = self.file.as_deref()?;
        // Where nothing can be locked, every process chooses for itself.
        let lock = File::create(file.with_extension("lock")).ok()?;
        lock.lock().ok()?;
        self.known.extend(Self::read(file));
        Some(lock)
    }

    fn keep(&mut self, shape: &Shape, algo: &sys::cublasLtMatmulAlgo_t) {
        self.known.insert(format!("{shape:?}"), algo.data.to_vec());
        if let (Some(file), Ok(text)) = (&self.file, serde_json::to_vec(&self.known)) {
            // A cache that cannot be written only costs time.
            let _ = write_whole(file, &text);
        }
    }

    fn find(&self, shape: &Shape) -> Option<sys::cublasLtMatmulAlgo_t> {
        let data = self.known.get(&format!("{shape:?}"))?;
        Some(sys::cublasLtMatmulAlgo_t { data: data.as_slice().try_into().ok()? })
    }
}

fn blas_error(call: &'static str, e: result::CublasError) -> Error {
    let help = match e.0 {
        sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => "this shape has no algorithm; report it with the message",
        _ => "run `dinolab doctor`: it tries every part of the GPU engine alone",
    };
    Error::user(format!("cuBLASLt failed: {call}: {e}"), help)
}

fn cuda_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Blas {
    pub(super) fn new(gpu: &'static Gpu) -> Result<Self> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::user(
                "cuBLASLt (libcublasLt.so) was not found: matrix products cannot be computed",
                "install CUDA's cuBLAS (`pip install nvidia-cublas`) and put its folder on LD_LIBRARY_PATH",
            ));
        }
        gpu.bind();
        let handle = result::create_handle().map_err(|e| blas_error("create", e))?;
        // SAFETY: no arguments.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(Self {
            handle,
            workspace: CudaBuffer::new(gpu, WORKSPACE),
            plans: Mutex::default(),
            tuned: Mutex::new(Tuned::open(gpu, version)),
        })
    }

    /// Runs the product with one algorithm.
    fn run(&self, gpu: &Gpu, plan: &Plan, algo: &sys::cublasLtMatmulAlgo_t, p: &Product, out: u64) -> Result<()> {
        let beta: f32 = if p.adds() { 1.0 } else { 0.0 };
        let [first, second, result_layout] = plan.layouts;
        let pointer = |address: u64| address as *const c_void;
        if let Some(bias) = p.bias {
            set(plan.desc, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        // SAFETY: layouts describe memory that the caller holds. A row-major matrix is the transpose of the
        // column-major one that the library sees, so the factors change places.
        let done = unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const p.alpha).cast(),
                (&raw const beta).cast(),
                pointer(p.b.address),
                first,
                pointer(p.a.address),
                second,
                pointer(p.onto.unwrap_or(out)),
                result_layout,
                out as *mut c_void,
                result_layout,
                algo,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                gpu.stream().cast(),
            )
        };
        done.map_err(|e| blas_error("matmul", e))
    }

    fn plan(&self, gpu: &'static Gpu, shape: &Shape, p: &Product) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        let compute = match (p.a.dtype, shape.tf32) {
            (DType::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        let desc = desc.map_err(|e| blas_error("create_matmul_desc", e))?;
        let op = |transposed: bool| i32::from(transposed);
        set(desc, D::CUBLASLT_MATMUL_DESC_TRANSA, &op(p.b.transposed))?;
        set(desc, D::CUBLASLT_MATMUL_DESC_TRANSB, &op(p.a.transposed))?;
        if p.bias.is_some() {
            set(desc, D::CUBLASLT_MATMUL_DESC_EPILOGUE, &(sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32))?;
            set(desc, D::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(cuda_type(p.out.dtype) as u32))?;
            set(desc, D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias.unwrap_or(0))?;
        }
        let mut layouts = [std::ptr::null_mut(); 3];
        for (layout, m) in layouts.iter_mut().zip([&p.b, &p.a, &p.out]) {
            *layout = create_layout(m, p.batch)?;
        }
        let mut plan = Plan { desc, layouts, algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] } };
        let mut tuned = self.tuned.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |tuned: &Tuned| tuned.find(shape).filter(|algo| self.can_run(&plan, algo, shape));
        let (mut known, mut _alone) = (find(&tuned), None);
        if known.is_none() {
            _alone = tuned.alone();
            known = find(&tuned);
        }
        if let Some(algo) = known {
            plan.algo = algo;
            return Ok(plan);
        }
        let candidates = self.candidates(&plan, shape)?;
        plan.algo = match candidates.as_slice() {
            [] => {
                let problem = format!("cuBLASLt has no algorithm for {shape:?}");
                return Err(Error::user(problem, "report it with the message"));
            }
            [one] => *one,
            several => {
                let best = self.fastest(gpu, &plan, several, p)?;
                tuned.keep(shape, &best);
                best
            }
        };
        Ok(plan)
    }

    /// Whether an algorithm from the file, which may be damaged, is one for this product.
    fn can_run(&self, plan: &Plan, algo: &sys::cublasLtMatmulAlgo_t, shape: &Shape) -> bool {
        let [first, second, out] = plan.layouts;
        if shape.drops_terms(algo) {
            return false;
        }
        // SAFETY: the struct is plain data that the library fills.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: all handles are alive.
        let status =
            unsafe { sys::cublasLtMatmulAlgoCheck(self.handle, plan.desc, first, second, out, out, algo, &mut found) };
        status.result().is_ok() && found.workspaceSize <= WORKSPACE
    }

    fn candidates(&self, plan: &Plan, shape: &Shape) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let preference = result::create_matmul_pref().map_err(|e| blas_error("create_matmul_pref", e))?;
        let put = |attribute, value: *const c_void, size| {
            // SAFETY: the preference is alive and the value is of the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) }
                .map_err(|e| blas_error("set_matmul_pref_attribute", e))
        };
        let workspace = WORKSPACE;
        put(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
        // Partial sums are never rounded to the type of the result; sums that could lose terms are not split.
        let reduction = match shape.is_whole() {
            true => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32,
            false => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32,
        };
        put(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduction).cast(), 4)?;
        for attribute in [
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            put(attribute, (&raw const shape.alignment).cast(), 4)?;
        }
        // SAFETY: the struct is plain data that the library fills.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        let [first, second, out] = plan.layouts;
        // SAFETY: all handles are alive; `found` has room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.desc,
                first,
                second,
                out,
                out,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        // SAFETY: made above, destroyed once.
        unsafe { result::destroy_matmul_pref(preference) }.map_err(|e| blas_error("destroy_matmul_pref", e))?;
        status.result().map_err(|e| blas_error("choose an algorithm", e))?;
        let good = |r: &&sys::cublasLtMatmulHeuristicResult_t| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let all: Vec<_> = found[..usize::try_from(count).unwrap_or(0)].iter().filter(good).map(|r| r.algo).collect();
        // Where the library knows no other, it is taken at its word.
        let (dropping, whole): (Vec<_>, Vec<_>) = all.into_iter().partition(|algo| shape.drops_terms(algo));
        Ok(if whole.is_empty() { dropping } else { whole })
    }

    /// Tries algorithms on a scratch result.
    fn fastest(
        &self,
        gpu: &'static Gpu,
        plan: &Plan,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        p: &Product,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        let elements = p.out.batch_stride * (p.batch - 1) + p.out.stride * p.out.rows;
        let scratch = CudaBuffer::new(gpu, elements * p.out.dtype.size());
        let cache = CacheFiller::new(gpu);
        let run = |algo| self.run(gpu, plan, algo, p, scratch.address());
        let timed = |algo| {
            cache.fill()?;
            device_ms(gpu, || run(algo))
        };
        let (mut field, mut refused) = (Vec::new(), Ok(()));
        for algo in candidates {
            // An algorithm that was proposed may still refuse.
            match run(algo) {
                Ok(()) => field.push((timed(algo)?, *algo)),
                Err(error) => refused = Err(error),
            }
        }
        if field.is_empty() {
            refused?;
        }
        field.sort_by(|a, b| a.0.total_cmp(&b.0));
        field.truncate(FINALISTS);
        for (best, algo) in &mut field {
            let mut spent = *best;
            for _ in 1..TRIES {
                if spent > TRIED_MS {
                    break;
                }
                let ms = timed(algo)?;
                spent += ms;
                *best = best.min(ms);
            }
        }
        let fastest = field.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        Ok(fastest.map_or(candidates[0], |(_, algo)| algo))
    }
}

/// Memory as large as the device's cache: when it was written, no operand of a product is in the cache, as in a step. There
/// is none on a device that is full or has no cache.
struct CacheFiller {
    gpu: &'static Gpu,
    address: driver::CUdeviceptr,
    bytes: usize,
}

impl CacheFiller {
    fn new(gpu: &'static Gpu) -> Self {
        let (mut address, bytes) = (0, gpu.info().cache);
        // SAFETY: an out-pointer to a local; the block is freed when this value is dropped.
        let given =
            bytes > 0 && unsafe { driver::cuMemAlloc_v2(&mut address, bytes) } == driver::CUresult::CUDA_SUCCESS;
        Self { gpu, address, bytes: if given { bytes } else { 0 } }
    }

    fn fill(&self) -> Result<()> {
        self.gpu.zero(self.address, self.bytes)
    }
}

impl Drop for CacheFiller {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated in `new`, freed once; freeing waits for work that uses it.
            let _ = unsafe { driver::cuMemFree_v2(self.address) };
        }
    }
}

fn set<T>(desc: sys::cublasLtMatmulDesc_t, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
    // SAFETY: the descriptor is alive; the value has the attribute's type.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(|e| blas_error("set_matmul_desc_attribute", e))
}

fn create_layout(m: &Matrix, batch: usize) -> Result<sys::cublasLtMatrixLayout_t> {
    use sys::cublasLtMatrixLayoutAttribute_t as L;
    // Row-major rows are column-major columns.
    let layout = result::create_matrix_layout(cuda_type(m.dtype), m.cols as u64, m.rows as u64, m.stride as i64);
    let layout = layout.map_err(|e| blas_error("create_matrix_layout", e))?;
    if batch > 1 {
        let (count, offset) = (batch as i32, m.batch_stride as i64);
        let put = |attribute, value: *const c_void, size| {
            // SAFETY: the layout is alive; the value has the attribute's size.
            unsafe { result::set_matrix_layout_attribute(layout, attribute, value, size) }
                .map_err(|e| blas_error("set_matrix_layout_attribute", e))
        };
        put(L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
        put(L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const offset).cast(), 8)?;
    }
    Ok(layout)
}

impl Gpu {
    /// Computes a matrix product.
    ///
    /// # Errors
    /// If cuBLASLt is missing or fails.
    ///
    /// # Panics
    /// If the sizes or types do not fit: operations check them first.
    pub fn matmul(&'static self, p: &Product) -> Result<()> {
        let ((m, k), (k2, n)) = (p.a.dims(), p.b.dims());
        assert_eq!((k, (m, n)), (k2, p.out.dims()), "sizes of a matrix product");
        assert!(p.a.dtype == p.b.dtype && !p.out.transposed, "types of a matrix product");
        if m * n * p.batch == 0 {
            return Ok(());
        }
        if k == 0 {
            // The sum of nothing.
            assert!(p.add || p.out.stride == n && p.out.batch_stride == m * n, "an empty product is dense");
            let bytes = m * n * p.batch * p.out.dtype.size();
            return match p.onto {
                _ if p.add => Ok(()),
                Some(onto) => Ok(self.copy(p.out.address, onto, bytes)?),
                None => Ok(self.zero(p.out.address, bytes)?),
            };
        }
        let blas = self.blas()?;
        let addresses = [p.a.address, p.b.address, p.out.address, p.bias.unwrap_or(0), p.onto.unwrap_or(0)];
        let alignment =
            addresses.into_iter().fold(256u64, |low, a| if a == 0 { low } else { low.min(1 << a.trailing_zeros()) });
        let shape = Shape {
            mnk: [m, n, k],
            transposed: [p.a.transposed, p.b.transposed],
            types: [p.a.dtype, p.out.dtype],
            strides: [p.a.stride, p.b.stride, p.out.stride],
            batch: (p.batch, if p.batch > 1 { [&p.a, &p.b, &p.out].map(|m| m.batch_stride) } else { [0; 3] }),
            add: p.adds(),
            bias: p.bias.is_some(),
            alignment: alignment as u32,
            tf32: TF32.get(),
        };
        let mut plans = blas.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if !plans.contains_key(&shape) {
            let plan = blas.plan(self, &shape, p)?;
            plans.insert(shape.clone(), plan);
        }
        let plan = &plans[&shape];
        let elements = (m * k + k * n) * p.a.dtype.size() + m * n * p.out.dtype.size();
        let work = (2.0 * (m * n * k * p.batch) as f64, (elements * p.batch) as f64);
        let mut failed = None;
        self.timed("matmul", work, || {
            failed = blas.run(self, plan, &plan.algo, p, p.out.address).err();
            Ok::<(), Failure>(())
        })?;
        failed.map_or(Ok(()), Err)
    }
}
