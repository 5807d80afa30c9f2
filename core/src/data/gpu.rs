//! Batches on a GPU, at addresses that do not change from step to step, so that a recorded step finds them.

use super::batch::Batch;
use crate::cuda::{args, Gpu, Staging};
use crate::{cuda_source, DType, Device, Error, Result, Tensor};

cuda_source! { static AUGMENT = "augment" { include_str!("augment.cu") } }

/// Parts of an upload begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// The micro-batches of the step that runs, on a GPU. Batches of the same shapes always lie at the same addresses.
///
/// Two uploads are under way at most: the one that is copied while the step before it is computed, and that of the step.
#[derive(Debug)]
pub struct DeviceBatches {
    gpu: &'static Gpu,
    dtype: DType,
    staging: [Staging; 2],
    turn: usize,
    /// One for each combination of shapes met so far.
    sets: Vec<Vec<Batch>>,
}

impl DeviceBatches {
    /// With crops in `dtype`, f32 or bf16; everything else keeps its type.
    ///
    /// # Errors
    /// If the device gives no memory for copies, or `dtype` is another.
    pub fn new(gpu: &'static Gpu, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16) {
            return Err(Error::shape("batches", format!("crops on a GPU are f32 or bf16, not {dtype:?}")));
        }
        Ok(Self { gpu, dtype, staging: [Staging::new(gpu)?, Staging::new(gpu)?], turn: 0, sets: Vec::new() })
    }

    /// Copies finished micro-batches of a step to the device, behind all work given before: what the step before reads
    /// is overwritten when it is done. The host does not wait.
    ///
    /// # Errors
    /// If crops or mask weights are not f32, or the device fails.
    pub fn upload(&mut self, batches: &[Batch]) -> Result<&[Batch]> {
        let set = self.set(batches)?;
        let sources: Vec<&Tensor> = batches.iter().flat_map(Batch::tensors).collect();
        let mut end = 0;
        let offsets: Vec<usize> = sources
            .iter()
            .map(|t| {
                let start = end;
                end += (t.len() * t.dtype().size()).next_multiple_of(ALIGN);
                start
            })
            .collect();
        let staging = &mut self.staging[self.turn];
        self.turn = 1 - self.turn;
        let host = staging.host(end)?;
        for (&start, source) in offsets.iter().zip(&sources) {
            host[start..][..source.as_bytes().len()].copy_from_slice(source.as_bytes());
        }
        staging.send()?;
        let from = staging.receive()?;
        for ((&start, source), target) in
            offsets.iter().zip(sources).zip(self.sets[set].iter().flat_map(Batch::tensors))
        {
            place(self.gpu, target, from + start as u64, source.dtype())?;
        }
        staging.release()?;
        for (batch, source) in self.sets[set].iter_mut().zip(batches) {
            batch.indices.clone_from(&source.indices);
        }
        Ok(&self.sets[set])
    }

    /// The place of batches of these shapes, made if it is not there yet.
    fn set(&mut self, batches: &[Batch]) -> Result<usize> {
        let shapes = |set: &[Batch]| -> Vec<Vec<usize>> {
            set.iter().flat_map(Batch::tensors).map(|t| t.shape().to_vec()).collect()
        };
        let wanted = shapes(batches);
        if let Some(known) = self.sets.iter().position(|set| shapes(set) == wanted) {
            return Ok(known);
        }
        let real = batches.iter().flat_map(Batch::tensors).filter(|t| t.dtype() != DType::U32);
        if let Some(other) = real.map(Tensor::dtype).find(|&dtype| dtype != DType::F32) {
            return Err(Error::shape("batches", format!("crops and mask weights are uploaded as f32, not {other:?}")));
        }
        let here = Device::Cuda(self.gpu.ordinal());
        // Crops have a side; masks are lists.
        let dtype = |t: &Tensor| if t.rank() == 4 { self.dtype } else { t.dtype() };
        let made = here.with(|| batches.iter().map(|b| b.map(|t| Tensor::uninit(t.shape(), dtype(t)))).collect());
        self.sets.push(made);
        Ok(self.sets.len() - 1)
    }
}

/// Copies `target.len()` numbers of type `dtype` from an address into `target`, which steps hold as well: they come
/// before or after in the stream.
fn place(gpu: &'static Gpu, target: &Tensor, from: u64, dtype: DType) -> Result<()> {
    let n = target.len();
    if n == 0 {
        return Ok(());
    }
    if dtype == target.dtype() {
        return gpu.copy(target.device_address(), from, n * dtype.size());
    }
    let bytes = (n * (dtype.size() + target.dtype().size())) as f64;
    let kernel = gpu.kernel(&AUGMENT, "unpack", target.dtype())?;
    kernel.over(n).work(0.0, bytes).launch(args![target, from, n])
}
