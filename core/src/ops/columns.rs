//! Sums over the rows of a matrix on a GPU: what the gradients of biases, norms and LayerScale have in common.

use crate::cuda::{Arg, Gpu, Kernel, Launch, Source};
use crate::{DType, Result, Tensor};

/// Blocks that rows are dealt to, at most: their partial sums are added in order. A number of its own, not the
/// device's, so that results do not depend on it.
const MOST_BLOCKS: usize = 512;
/// Rows that a block takes at a time.
const CHUNK_ROWS: usize = 32;

/// Partial sums `[blocks, sums, d]` in f32, made by a kernel that uses `column_sums` of `columns.cuh`.
pub(crate) struct Partial {
    sums: Tensor,
    blocks: usize,
    count: usize,
    d: usize,
}

impl Partial {
    /// Room for `count` sums a column over `rows` rows of width `d`.
    pub(crate) fn new(rows: usize, count: usize, d: usize) -> Self {
        let blocks = rows.div_ceil(CHUNK_ROWS).clamp(1, MOST_BLOCKS);
        Self { sums: Tensor::uninit(&[blocks, count, d], DType::F32), blocks, count, d }
    }

    /// How a kernel that fills them is launched; `elements` of a column group is what a thread takes at a time.
    pub(crate) fn launch(&self, kernel: Kernel, dtype: DType) -> Launch {
        let groups = self.d.div_ceil(16 / dtype.size());
        kernel.grid(self.blocks, groups.next_multiple_of(32).clamp(256, 1024) as u32)
    }

    /// The buffer to be filled.
    pub(crate) fn buffer(&mut self) -> &mut Tensor {
        &mut self.sums
    }

    /// Writes, or adds, sum `which` of every column to its place. `source` holds `columns.cuh`.
    pub(crate) fn finish(&self, gpu: &'static Gpu, source: &'static Source, which: usize, out: Arg) -> Result<()> {
        let start = self.sums.view(which * self.d, &[self.d]);
        let kernel = gpu.kernel(source, "add_blocks", DType::F32)?.grid(self.d.div_ceil(32), 1024);
        let bytes = (4 * self.d * (self.blocks + 1)) as f64;
        let [partial, blocks, stride, d] =
            [Arg::from(&start), (self.blocks as i32).into(), (self.count * self.d).into(), (self.d as i32).into()];
        kernel.work(0.0, bytes).launch(&mut [out, partial, blocks, stride, d])
    }
}

/// `args!` with an [`Arg`] among tensors and numbers.
impl From<&Arg> for Arg {
    fn from(arg: &Arg) -> Self {
        *arg
    }
}
