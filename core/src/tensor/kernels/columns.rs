//! Sums over the rows of a matrix: what the gradients of biases, norms and other vectors that meet every row have in
//! common. Rows are cut into blocks by their number alone, and the blocks' sums added in order.

use crate::cuda::{args, Arg, Kernel, Launch};
use crate::tensor::blocks::*;
use crate::tensor::{GradMut, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Result, Tensor};

/// What a kernel that makes such sums stands behind: `column_sums`.
pub(crate) const COLUMN_SUMS: &str = include_str!("columns.cuh");

cuda_source! { static COLUMNS = "columns" { COLUMN_SUMS, include_str!("columns.cu") } }

/// Blocks that rows are dealt to on a GPU, at most. A number of its own, not the device's, so that results do not depend
/// on it.
const MOST_BLOCKS: usize = 512;
/// Rows that a block takes at least.
const LEAST_ROWS: usize = 32;
/// Threads of a block at most.
const MOST_THREADS: usize = 512;

/// Room on a GPU for the blocks' parts of several sums: f32 `[blocks, sums, d]`, filled by a kernel that uses
/// `column_sums` of `columns.cuh`.
pub(crate) struct Partial(Tensor);

impl Partial {
    /// Room for `count` sums a column over `rows` rows of width `d`.
    pub(crate) fn new(rows: usize, count: usize, d: usize) -> Self {
        Self::of_blocks(rows.div_ceil(LEAST_ROWS).clamp(1, MOST_BLOCKS), count, d)
    }

    /// Room for the sums of as many blocks as a kernel of another kind has.
    pub(crate) fn of_blocks(blocks: usize, count: usize, d: usize) -> Self {
        Self(Tensor::uninit(&[blocks, count, d], DType::F32))
    }

    /// How a kernel that fills it is launched; `dtype` is that of the rows.
    pub(crate) fn launch(&self, kernel: Kernel, dtype: DType) -> Launch {
        // As many rows of threads that own columns as there is room for.
        let groups = self.0.dim(2).div_ceil(16 / dtype.size()).clamp(1, MOST_THREADS);
        let threads = (MOST_THREADS / groups * groups).next_multiple_of(32);
        kernel.grid(self.0.dim(0), threads as u32)
    }

    /// The buffer to be filled.
    pub(crate) fn buffer(&mut self) -> &mut Tensor {
        &mut self.0
    }

    /// Writes or adds the sums, which are three, to their places, once the kernel has been launched.
    pub(crate) fn put(&self, places: [Arg; 3]) -> Result<()> {
        add_blocks(&self.0, 0, places, 3)
    }

    /// One of the sums, once the kernel has been launched.
    pub(crate) fn sum(&self, which: usize) -> RowSums {
        RowSums { blocks: self.0.clone(), which }
    }
}

/// A sum over the rows of a matrix, still in blocks: `[blocks, sums, d]`, of which this is one.
#[derive(Clone)]
pub(crate) struct RowSums {
    blocks: Tensor,
    which: usize,
}

impl RowSums {
    /// From the CPU: `[blocks, d]`.
    pub(crate) fn of_blocks(blocks: Tensor) -> Self {
        let blocks = blocks.view(0, &[blocks.dim(0), 1, blocks.dim(1)]);
        Self { blocks, which: 0 }
    }

    /// A sum on a GPU that is complete: f32 `[d]`.
    pub(crate) fn complete(total: &Tensor) -> Self {
        Self::of_blocks(total.view(0, &[1, total.len()]))
    }

    /// The sum of the rows of `x`, of width `d`.
    pub(crate) fn of(x: &Tensor, d: usize) -> Result<Self> {
        let rows = x.len() / d.max(1);
        if let Some(gpu) = x.gpu() {
            let mut sums = Partial::new(rows, 1, d);
            let launch = sums.launch(gpu.kernel(&COLUMNS, "sum_rows", x.dtype())?, x.dtype());
            let launch = launch.work(0.0, (x.len() * x.dtype().size()) as f64);
            launch.launch(args![sums.buffer(), x, rows as i32, d as i32])?;
            return Ok(sums.sum(0));
        }
        let mut blocks = Tensor::uninit(&[rows.div_ceil(BLOCK), d], x.dtype());
        dispatch_real!("sum_rows", x.dtype(), T => {
            block_sums(blocks.as_mut_slice::<T>(), x.as_slice::<T>(), d);
            Ok(())
        })?;
        Ok(Self::of_blocks(blocks))
    }

    /// Writes, or adds, the sum to its place.
    pub(crate) fn put(&self, place: &mut GradMut<'_>) -> Result<()> {
        if self.blocks.gpu().is_some() {
            return add_blocks(&self.blocks, self.which, [Arg::from(place), Arg::no_gradient(), Arg::no_gradient()], 1);
        }
        dispatch_real!("sum_rows", self.blocks.dtype(), T => {
            let add = place.add;
            add_rows(place.as_mut_slice::<T>(), self.blocks.as_slice::<T>(), add);
            Ok(())
        })
    }

    /// The sum: `[d]`, f32 on a GPU.
    pub(crate) fn total(&self) -> Result<Tensor> {
        let d = self.blocks.dim(2);
        if self.blocks.gpu().is_some() && self.blocks.len() == d {
            return Ok(self.blocks.view(0, &[d]));
        }
        let mut total = Tensor::uninit(&[d], self.blocks.dtype());
        self.put(&mut GradMut::of(&mut total))?;
        Ok(total)
    }
}

/// Adds the blocks' parts of `count` sums from number `from` on, in one launch.
fn add_blocks(partial: &Tensor, from: usize, [first, second, third]: [Arg; 3], count: usize) -> Result<()> {
    let &[blocks, sums, d] = partial.shape() else { unreachable!("made with three axes") };
    let (gpu, start) = (partial.gpu().expect("called for sums on a GPU"), partial.view(from * d, &[count * d]));
    let kernel = gpu.kernel(&COLUMNS, "add_blocks", DType::F32)?.grid((d.div_ceil(32), count), 1024);
    let launch = kernel.work(0.0, (4 * d * count * (blocks + 1)) as f64);
    launch.launch(args![&first, &second, &third, &start, blocks as i32, sums * d, d as i32])
}

/// `args!` with an [`Arg`] among tensors and numbers.
impl From<&Arg> for Arg {
    fn from(arg: &Arg) -> Self {
        *arg
    }
}

/// Rows of a block on the CPU.
const BLOCK: usize = 256;

/// `out (+)= sum of the rows of x` on the CPU.
pub(crate) fn sum_rows<T: Real>(out: &mut [T], x: &[T], add: bool) {
    let d = out.len();
    let mut blocks = Tensor::uninit(&[(x.len() / d.max(1)).div_ceil(BLOCK), d], T::DTYPE);
    block_sums(blocks.as_mut_slice::<T>(), x, d);
    add_rows(out, blocks.as_slice(), add);
}

/// For every block of rows the sum of its rows.
fn block_sums<T: Real>(blocks: &mut [T], x: &[T], d: usize) {
    blocks.par_chunks_mut(d.max(1)).zip(x.par_chunks(BLOCK * d.max(1))).for_each(|(sum, rows)| {
        simd!(T, {
            sum.fill(T::ZERO);
            for row in rows.chunks_exact(d) {
                for (s, &x) in sum.iter_mut().zip(row) {
                    *s += x;
                }
            }
        });
    });
}

/// `out (+)= sum of the rows of x`, one row after the other.
fn add_rows<T: Real>(out: &mut [T], x: &[T], add: bool) {
    if !add {
        out.fill(T::ZERO);
    }
    for row in x.chunks_exact(out.len().max(1)) {
        out.iter_mut().zip(row).for_each(|(o, &s)| *o += s);
    }
}
