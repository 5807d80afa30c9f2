//! Training on several processes: who they are, how bytes get from one to another, and sums whose order nothing changes.
//!
//! A step's images are split into `batch.shards` shards, a number of the recipe. All sums over the batch (Sinkhorn-Knopp,
//! centres, gradients) are taken inside a shard first, in order, and then over shards in a fixed tree:
//! `((s0 + s1) + (s2 + s3)) + ...`. A rank is a process; every rank has a block of shards, all blocks of the same size. So
//! 1, 2, 4, ... ranks give the same bits, and the number of ranks does not affect the results of a run. (EasyScale, Li et
//! al., SC'23, arXiv:2208.14228, has fixed logical workers on any number of GPUs in the same sense.)
//!
//! A rank sums the gradients of its part of the model alone, and updates it: see [`Learner`](crate::step::Learner).
//!
//! An engine ([`Comm`]) moves bytes, and only that: [`Mpi`] or [`Store`] between processes, [`threads()`] between threads of one;
//! what GPUs have goes through NCCL. The sums are taken here, unless the engine is asked for those of gradients ([`Reduction`]).

mod launch;
mod mpi;
mod nccl;
mod ranks;
mod shards;
mod store;
mod text;
mod threads;
mod watch;

pub use launch::{host, Launch, Launcher};
pub use mpi::Mpi;
pub use ranks::Ranks;
pub use shards::Shards;
pub use store::Store;
pub use threads::{threads, Threads};
pub use watch::Traffic;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::{DType, Error, Result};

/// Who adds the gradients of ranks. All other sums are taken here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Each rank those of its part, in the order of the shards.
    #[default]
    Ordered,
    /// MPI or NCCL, by its algorithm for the network: bits depend on the engine and on the number of ranks.
    Engine,
}

/// Moves bytes between the ranks of a run. All ranks call the same methods in the same order with the same lengths.
pub trait Comm: Send + Sync + std::fmt::Debug {
    /// How many ranks there are.
    fn world(&self) -> usize;

    /// This rank, 0-based.
    fn rank(&self) -> usize;

    /// Every rank's bytes, in order of rank: `all` is `world` times as long as `own`.
    ///
    /// # Errors
    /// If a rank has failed.
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()>;

    /// All-gather of unequal lengths: of `all`, range r of `ranges` is what rank r has, and is the same on all ranks afterwards.
    ///
    /// # Errors
    /// If a rank has failed.
    fn gather_ranges(&self, all: &mut [u8], ranges: &[Range<usize>]) -> Result<()>;

    /// All-to-all: of `world` pieces of equal length, piece r goes to rank r; `received` has the pieces for this rank, in order
    /// of rank.
    ///
    /// # Errors
    /// If a rank has failed.
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()>;

    /// Rank 0's bytes, on all ranks. A rank may wait long, and does so without load.
    ///
    /// # Errors
    /// If a rank has failed.
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()>;

    /// Who adds gradients.
    fn reduction(&self) -> Reduction {
        Reduction::Ordered
    }

    /// Reduce-scatter of numbers in host memory by the engine's own sums: of `world` pieces of equal length, `sum` is that of the
    /// pieces for this rank.
    ///
    /// # Errors
    /// If the engine has no sums, or a rank has failed.
    fn reduce_scatter(&self, _pieces: &[u8], _dtype: DType, _sum: &mut [u8]) -> Result<()> {
        let problem = format!("{} moves bytes and adds no numbers", self.engine());
        Err(Error::user(problem, "leave out --reduce engine, or start the processes with MPI"))
    }

    /// Ends all ranks, because this one cannot go on; what is wrong was said.
    fn abort(&self);

    /// Takes leave of the other ranks: the last call of all of them.
    fn leave(&self) {}

    /// What moves the bytes, for a person.
    fn engine(&self) -> String;

    /// This rank begins something that other ranks have to do as well, which ends with [`leave_call`](Self::leave_call).
    fn enter(&self, _what: &'static str) {}

    /// It is done.
    fn leave_call(&self) {}

    /// What this rank waits for in a call that should not take long, and since when.
    fn waits(&self) -> Option<(&'static str, Duration)> {
        None
    }
}

/// Joins the processes of a launch, by what their launcher has for it.
///
/// # Errors
/// If they cannot be joined.
pub fn join(launch: &Launch, reduction: Reduction) -> Result<Arc<dyn Comm>> {
    Ok(match launch.launcher {
        Launcher::Torchrun => Arc::new(Store::join(launch, reduction)?),
        Launcher::OpenMpi | Launcher::Mpich | Launcher::Slurm => Arc::new(Mpi::join(launch, reduction)?),
    })
}

/// One rank: nothing moves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Comm for Single {
    fn world(&self) -> usize {
        1
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        all.copy_from_slice(own);
        Ok(())
    }
    fn gather_ranges(&self, _: &mut [u8], _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()> {
        received.copy_from_slice(pieces);
        Ok(())
    }
    fn broadcast(&self, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn abort(&self) {}
    fn engine(&self) -> String {
        "one process".into()
    }
}
