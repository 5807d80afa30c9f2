//! The ranks of a run, and what each has of a step.

use std::ops::Range;
use std::sync::Arc;

use super::nccl::Nccl;
use super::watch::{Traffic, Watched};
use super::{shards, Comm, Shards, Single};
use crate::cuda::Gpu;
use crate::tensor::Real;
use crate::{dispatch_real, Error, Result, Tensor};

/// Elements of one rank that are summed at a time: 1 MiB in f32.
const PIECE: usize = 1 << 18;
/// The same on a GPU: 64 MiB in f32.
const GPU_PIECE: usize = 1 << 24;

/// The ranks of a run, and how a batch's shards are spread over them: rank r has the r-th of equal blocks.
#[derive(Clone, Debug)]
pub struct Ranks {
    comm: Arc<Watched>,
    /// What joins their GPUs, if they are on GPUs.
    nccl: Option<Arc<Nccl>>,
    shards: usize,
}

impl Ranks {
    /// One rank with all `shards`.
    pub fn one(shards: usize) -> Self {
        Self { comm: Arc::new(Watched::new(Arc::new(Single))), nccl: None, shards }
    }

    /// Ranks that share `shards` shards.
    ///
    /// # Errors
    /// If they cannot be shared evenly.
    pub fn new(comm: Arc<dyn Comm>, shards: usize) -> Result<Self> {
        let world = comm.world();
        if !shards.is_multiple_of(world) {
            let fit: Vec<String> =
                (0..).map(|i| 1 << i).take_while(|n| *n <= shards).map(|n: usize| n.to_string()).collect();
            let problem = format!("{world} processes cannot share batch.shards = {shards} evenly");
            let more = match world.is_power_of_two() {
                true => format!(
                    ", or let batch.shards be {world} or more (it is part of the recipe: a run keeps its numbers on any number of \
                     processes)"
                ),
                false => String::new(),
            };
            let help = format!("start {} processes{more}", fit.join(", "));
            return Err(Error::user(problem, help));
        }
        Ok(Self { comm: Arc::new(Watched::new(comm)), nccl: None, shards })
    }

    /// The same, whose tensors are on a GPU each.
    ///
    /// # Errors
    /// If NCCL does not join them.
    pub(crate) fn on(self, gpu: &'static Gpu) -> Result<Self> {
        let nccl = (self.world() > 1).then(|| Nccl::join(self.comm.as_ref(), gpu).map(Arc::new)).transpose()?;
        Ok(Self { nccl, ..self })
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        self.comm.world()
    }

    /// This one, 0-based.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// Whether this rank has the run's folder, and tells the others what to do.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// What moves the bytes.
    pub(crate) fn comm(&self) -> &dyn Comm {
        self.comm.as_ref()
    }

    /// What moved through the memory of processes so far, and how long that took.
    pub fn traffic(&self) -> Traffic {
        self.comm.traffic()
    }

    /// What moves the bytes, for a person.
    pub fn engine(&self) -> String {
        match &self.nccl {
            Some(nccl) => format!("{} and {}", nccl.name(), self.comm.engine()),
            None => self.comm.engine(),
        }
    }

    /// Shards of all ranks.
    pub fn shards(&self) -> usize {
        self.shards
    }

    /// Shards of this rank.
    pub fn own_shards(&self) -> usize {
        self.shards / self.world()
    }

    /// This rank's of `count` parts of a batch, which shards share evenly.
    pub fn part(&self, count: usize) -> Range<usize> {
        let own = count / self.world();
        self.rank() * own..(self.rank() + 1) * own
    }

    /// The shards of rows that come in parts, as many in each part as `rows` says.
    pub(crate) fn shards_of(&self, rows: &[usize]) -> Shards<'_> {
        let of_shard = rows.len() / self.own_shards();
        Shards::new(self, rows.chunks(of_shard.max(1)).map(|rows| rows.iter().sum()).collect())
    }

    /// Every rank's tensor, in order of rank.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn gather(&self, own: &Tensor) -> Result<Vec<Tensor>> {
        let all = self.stacked(own)?;
        Ok((0..self.world()).map(|rank| all.view(rank * own.len(), own.shape())).collect())
    }

    /// The same in one tensor, `[ranks, ..]`, where `own` is.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn stacked(&self, own: &Tensor) -> Result<Tensor> {
        let shape = [&[self.world()], own.shape()].concat();
        let mut all = own.device().with(|| Tensor::uninit(&shape, own.dtype()));
        match &self.nccl {
            Some(nccl) => nccl.all_gather(own, &all)?,
            None => self.comm.all_gather(own.as_bytes(), all.bytes_mut())?,
        }
        Ok(all)
    }

    /// The least number of all ranks.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn least(&self, own: u64) -> Result<u64> {
        Ok(self.numbers(own)?.into_iter().min().unwrap_or(own))
    }

    /// The sum of a count over all ranks.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn sum_of_all(&self, own: usize) -> Result<usize> {
        Ok(self.numbers(own as u64)?.into_iter().sum::<u64>() as usize)
    }

    /// Every rank's number, in order of rank.
    fn numbers(&self, own: u64) -> Result<Vec<u64>> {
        let mut all = vec![0u64; self.world()];
        self.comm.all_gather(bytemuck::bytes_of(&own), bytemuck::cast_slice_mut(&mut all))?;
        Ok(all)
    }

    /// The sum of all ranks' tensors in the order of the tree, on all of them. Each rank adds its share of the elements.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn sum(&self, x: &mut Tensor) -> Result<()> {
        match &self.nccl {
            _ if self.world() == 1 => Ok(()),
            Some(nccl) => self.sum_on_gpus(nccl, x),
            None => dispatch_real!("sum", x.dtype(), T => self.sum_of::<T>(x.as_mut_slice::<T>())),
        }
    }

    fn sum_on_gpus(&self, nccl: &Nccl, x: &Tensor) -> Result<()> {
        let world = self.world();
        if !x.len().is_multiple_of(world) {
            return Err(Error::shape("sum", format!("{} numbers are no equal shares of {world} ranks", x.len())));
        }
        let mut start = 0;
        while start < x.len() {
            let piece = GPU_PIECE.min((x.len() - start) / world);
            let part = x.view(start, &[piece * world]);
            let received = Tensor::uninit(part.shape(), x.dtype());
            nccl.exchange(&part, &received)?;
            let own = shards::tree((0..world).map(|rank| received.view(rank * piece, &[piece])).collect())?;
            nccl.all_gather(&own, &part)?;
            start += part.len();
        }
        Ok(())
    }

    fn sum_of<T: Real>(&self, x: &mut [T]) -> Result<()> {
        let world = self.world();
        let piece = PIECE.min(x.len().div_ceil(world));
        let mut sent = vec![T::ZERO; piece * world];
        let mut received = sent.clone();
        for x in x.chunks_mut(piece * world) {
            sent[..x.len()].copy_from_slice(x);
            self.comm.exchange(bytemuck::cast_slice(&sent), bytemuck::cast_slice_mut(&mut received))?;
            let mut stride = 1;
            while stride < world {
                for pair in received.chunks_mut(2 * stride * piece) {
                    let (left, right) = pair.split_at_mut(stride * piece);
                    left[..piece].iter_mut().zip(&right[..piece]).for_each(|(left, &right)| *left += right);
                }
                stride *= 2;
            }
            self.comm.all_gather(bytemuck::cast_slice(&received[..piece]), bytemuck::cast_slice_mut(&mut sent))?;
            x.copy_from_slice(&sent[..x.len()]);
        }
        Ok(())
    }
}
