//! The ranks of a run, and what each has of a step.

use std::ops::Range;
use std::sync::Arc;

use super::nccl::Nccl;
use super::watch::{Traffic, Watched};
use super::{shards, Comm, Reduction, Shards, Single};
use crate::cuda::Gpu;
use crate::params::ALIGN;
use crate::tensor::copy_elements;
use crate::{DType, Device, Error, Result, Tensor};

/// Elements of all ranks together that are moved at a time: 2 MiB in f32.
const PIECES: usize = 1 << 19;
/// The same on GPUs: 64 MiB in f32.
const GPU_PIECES: usize = 1 << 24;

/// The ranks of a run, and how a batch's shards are spread over them: rank r has the r-th of equal blocks.
#[derive(Clone, Debug)]
pub struct Ranks {
    comm: Arc<Watched>,
    /// What joins their GPUs, if they are on GPUs.
    nccl: Option<Arc<Nccl>>,
    shards: usize,
}

/// What a rank is in, with others.
pub(crate) struct Entered(Arc<Watched>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.leave_call();
    }
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
    pub fn on(self, gpu: &'static Gpu) -> Result<Self> {
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

    /// All ranks begin something on their GPUs, which ends when what is given is dropped: the engine does not see what moves there.
    pub(crate) fn enter(&self, what: &'static str) -> Entered {
        self.comm.enter(what);
        Entered(self.comm.clone())
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
        let moves = match &self.nccl {
            Some(nccl) => format!("{} and {}", nccl.name(), self.comm.engine()),
            None => self.comm.engine(),
        };
        match self.comm.reduction() {
            Reduction::Ordered => moves,
            Reduction::Engine => format!("{moves}, which adds gradients"),
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
        Ok(self.numbers("least", own)?.into_iter().min().unwrap_or(own))
    }

    /// The sum of a count over all ranks.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn sum_of_all(&self, own: usize) -> Result<usize> {
        Ok(self.numbers("sum", own as u64)?.into_iter().sum::<u64>() as usize)
    }

    /// Every rank's number, in order of rank. All have to ask for the same of them, in at most eight letters: a rank that failed in a
    /// step and does it in another way would take other numbers for those it asked for.
    fn numbers(&self, what: &str, own: u64) -> Result<Vec<u64>> {
        let mut name = [0u8; 8];
        name[..what.len()].copy_from_slice(what.as_bytes());
        let name = u64::from_le_bytes(name);
        let mut all = vec![[0u64; 2]; self.world()];
        self.comm.all_gather(bytemuck::bytes_of(&[name, own]), bytemuck::cast_slice_mut(&mut all))?;
        if let Some(rank) = all.iter().position(|other| other[0] != name) {
            let problem = format!("rank {} and rank {rank} are in different places of a step", self.rank());
            return Err(Error::user(problem, "one of them has failed, such as for want of memory: see its messages"));
        }
        Ok(all.into_iter().map(|[_, number]| number).collect())
    }

    /// The greatest number, none of which is below zero, of all ranks.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn greatest(&self, own: f64) -> Result<f64> {
        // The bits of such numbers are in their order.
        Ok(f64::from_bits(self.numbers("most", own.to_bits())?.into_iter().max().unwrap_or_default()))
    }

    /// The sum of all ranks' tensors in the order of the tree, on all of them. Each rank adds its share of the elements.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn sum(&self, x: &mut Tensor) -> Result<()> {
        let shares = self.shares(x.len());
        self.sum_to(x, &shares)?;
        self.spread(x, &shares)
    }

    /// `len` elements in equal shares, one a rank.
    pub(crate) fn shares(&self, len: usize) -> Vec<Range<usize>> {
        let cut = |rank: usize| if rank == self.world() { len } else { rank * len / self.world() / ALIGN * ALIGN };
        (0..self.world()).map(|rank| cut(rank)..cut(rank + 1)).collect()
    }

    /// Elements of all ranks together that are moved at a time.
    pub(crate) fn at_once_on(device: Device) -> usize {
        match device {
            Device::Cpu => PIECES,
            Device::Cuda(_) => GPU_PIECES,
        }
    }

    /// Elements of one rank that are moved at a time, where such a tensor is.
    pub(crate) fn at_once(&self, x: &Tensor) -> usize {
        (Self::at_once_on(x.device()) / self.world()).max(ALIGN)
    }

    /// What every rank sends to each, in order of rank: pieces of equal length, of which `received` are those for this one.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn exchange(&self, pieces: &Tensor, received: &mut Tensor) -> Result<()> {
        match &self.nccl {
            Some(nccl) => nccl.exchange(pieces, received),
            None => self.comm.exchange(pieces.as_bytes(), received.bytes_mut()),
        }
    }

    /// The sum of all ranks' flat tensors in the order of the tree, or in the engine's if it adds gradients, of which each rank gets the
    /// elements of its range. The others of its own tensor are left as they are. (A reduce-scatter; no two ranges overlap.)
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn sum_to(&self, x: &mut Tensor, ranges: &[Range<usize>]) -> Result<()> {
        self.in_pieces(x, ranges, |x, pieces, longest| {
            let world = self.world();
            let own = &pieces[self.rank()];
            let mut sent = x.device().with(|| Tensor::zeros(&[world * longest], x.dtype()));
            for (rank, piece) in pieces.iter().enumerate() {
                copy_elements(&mut sent, rank * longest, x, piece.clone())?;
            }
            if self.comm.reduction() == Reduction::Engine {
                let sum = self.reduce_scatter(&sent)?;
                return copy_elements(x, own.start, &sum, 0..own.len());
            }
            let mut received = x.device().with(|| Tensor::uninit(sent.shape(), x.dtype()));
            self.exchange(&sent, &mut received)?;
            if own.is_empty() {
                return Ok(());
            }
            let parts = (0..world).map(|rank| received.view(rank * longest, &[own.len()])).collect();
            copy_elements(x, own.start, &shards::tree(parts)?, 0..own.len())
        })
    }

    /// Of pieces of equal length, the engine's sum over ranks of those for this one.
    pub(crate) fn reduce_scatter(&self, pieces: &Tensor) -> Result<Tensor> {
        let mut sum = pieces.device().with(|| Tensor::uninit(&[pieces.len() / self.world()], pieces.dtype()));
        match &self.nccl {
            Some(nccl) => nccl.reduce_scatter(pieces, &sum)?,
            None => self.comm.reduce_scatter(pieces.as_bytes(), pieces.dtype(), sum.bytes_mut())?,
        }
        Ok(sum)
    }

    /// Fails unless all ranks agree on who adds gradients, and whoever it is can.
    ///
    /// # Errors
    /// As it says.
    pub(crate) fn check_reduction(&self, device: Device) -> Result<()> {
        self.comm().hold_same("--reduce", &format!("{:?}", self.comm.reduction()))?;
        match self.comm.reduction() {
            Reduction::Ordered => Ok(()),
            Reduction::Engine => {
                self.reduce_scatter(&device.with(|| Tensor::zeros(&[self.world()], DType::F32))).map(drop)
            }
        }
    }

    /// Gives every rank's range of a flat tensor to all others.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn spread(&self, x: &mut Tensor, ranges: &[Range<usize>]) -> Result<()> {
        self.in_pieces(x, ranges, |x, pieces, longest| {
            let mut own = x.device().with(|| Tensor::zeros(&[longest], x.dtype()));
            copy_elements(&mut own, 0, x, pieces[self.rank()].clone())?;
            place(x, pieces, &self.stacked(&own)?)
        })
    }

    /// The same of ranges of any lengths, each moved once: no bytes stand in for what a rank has not.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn gather_ranges(&self, x: &mut Tensor, ranges: &[Range<usize>]) -> Result<()> {
        let size = x.dtype().size();
        match &self.nccl {
            Some(nccl) => nccl.gather_ranges(x, ranges),
            None => {
                let bytes: Vec<Range<usize>> = ranges.iter().map(|r| r.start * size..r.end * size).collect();
                self.comm.gather_ranges(x.bytes_mut(), &bytes)
            }
        }
    }

    /// The same in host memory, where `x` is, by way of the GPUs if ranks are on some.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn spread_on_host(&self, x: &mut Tensor, ranges: &[Range<usize>], device: Device) -> Result<()> {
        self.in_pieces(x, ranges, |x, pieces, longest| {
            let mut own = Device::Cpu.with(|| Tensor::zeros(&[longest], x.dtype()));
            copy_elements(&mut own, 0, x, pieces[self.rank()].clone())?;
            place(x, pieces, &self.stacked(&own.to(device))?.to(Device::Cpu))
        })
    }

    /// Moves the ranges of all ranks a piece of each at a time, so that little memory is needed beside `x`. `move_pieces` is
    /// given the length of the longest of the pieces.
    fn in_pieces(
        &self,
        x: &mut Tensor,
        ranges: &[Range<usize>],
        move_pieces: impl Fn(&mut Tensor, &[Range<usize>], usize) -> Result<()>,
    ) -> Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        let most = self.at_once(x);
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        for start in (0..longest).step_by(most) {
            let piece = |range: &Range<usize>| {
                let at = |offset: usize| (range.start + offset).min(range.end);
                at(start)..at(start + most)
            };
            let pieces: Vec<Range<usize>> = ranges.iter().map(piece).collect();
            // Kernels read from every rank's piece on, in vectors.
            move_pieces(x, &pieces, pieces.iter().map(Range::len).max().unwrap_or(0).next_multiple_of(ALIGN))?;
        }
        Ok(())
    }
}

/// Copies to each of `ranges` what `all`, `[ranks, ..]`, has of it.
fn place(x: &mut Tensor, ranges: &[Range<usize>], all: &Tensor) -> Result<()> {
    for (rank, range) in ranges.iter().enumerate() {
        let start = rank * all.dim(1);
        copy_elements(x, range.start, all, start..start + range.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{threads, Comm};

    #[test]
    fn sums_are_those_of_the_tree_and_given_to_all_however_many_pieces_they_are() {
        let (world, len) = (4, 3 * PIECES + 77);
        let starts = [0, len / 4 + 5, len / 2, len / 2 + 9, len];
        let ranges: Vec<Range<usize>> = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let of_rank =
            |rank: usize| -> Vec<f32> { (0..len).map(|i| ((i * 7 + rank * 13) % 1000) as f32 * 1.1).collect() };
        let all: Vec<Vec<f32>> = (0..world).map(of_rank).collect();
        let sum = |i: usize| (all[0][i] + all[1][i]) + (all[2][i] + all[3][i]);
        let work = |comm: Arc<dyn Comm>| {
            let ranks = Ranks::new(comm, world).unwrap();
            let (own, rank) = (&ranges[ranks.rank()], ranks.rank());
            let mut x = Tensor::from_slice(&all[rank], &[len]).unwrap();
            ranks.sum_to(&mut x, &ranges).unwrap();
            let expected = |i: usize| if own.contains(&i) { sum(i) } else { all[rank][i] };
            assert!((0..len).all(|i| x.as_slice::<f32>()[i] == expected(i)), "rank {rank}");
            ranks.spread(&mut x, &ranges).unwrap();
            assert!((0..len).all(|i| x.as_slice::<f32>()[i] == sum(i)), "rank {rank}");
            // Fewer than there are ranks.
            ranks.sum(&mut Tensor::zeros(&[3], DType::F32)).unwrap();
        };
        std::thread::scope(|scope| {
            let started: Vec<_> = threads(world).into_iter().map(|comm| scope.spawn(|| work(Arc::new(comm)))).collect();
            started.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }
}
