//! Sums over the whole batch, whoever has its rows.

use std::ops::Range;

use super::{Comm, Ranks, Single};
use crate::{dispatch_real, Device, Error, Result, Tensor};

/// How the rows of a tensor are those of a batch: this rank's rows, in shards, and the ranks that have the others.
///
/// A loss that looks across the batch gives what each of its own shards has to a sum or a maximum, and gets that of all
/// shards of all ranks. The sum's order is that of the shards, however they are spread.
#[derive(Clone, Debug)]
pub struct Shards<'a> {
    comm: &'a dyn Comm,
    /// Rows of each own shard; `None`: all rows are one shard.
    rows: Option<Vec<usize>>,
}

impl Shards<'static> {
    /// One rank with one shard, of however many rows.
    pub fn one() -> Self {
        Self { comm: &Single, rows: None }
    }
}

impl<'a> Shards<'a> {
    /// This rank's shards of so many rows.
    pub(crate) fn new(ranks: &'a Ranks, rows: Vec<usize>) -> Self {
        Self { comm: ranks.comm(), rows: Some(rows) }
    }

    /// Where the shards lie in a tensor of `rows` rows.
    ///
    /// # Errors
    /// If those are not the rows of the batch.
    pub fn ranges(&self, rows: usize) -> Result<Vec<Range<usize>>> {
        let all = [rows];
        let own = self.rows.as_deref().unwrap_or(&all);
        let total: usize = own.iter().sum();
        if total != rows {
            let problem = format!("{rows} rows, and this process has {total} rows of the batch");
            return Err(Error::shape("shards", problem));
        }
        let mut end = 0;
        let range = |&rows: &usize| {
            end += rows;
            end - rows..end
        };
        Ok(own.iter().map(range).collect())
    }

    /// The rows of all ranks, where this one has `rows`.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn all_rows(&self, rows: usize) -> Result<usize> {
        if self.comm.world() == 1 {
            return Ok(rows);
        }
        let mut all = vec![0u64; self.comm.world()];
        self.comm.all_gather(bytemuck::bytes_of(&(rows as u64)), bytemuck::cast_slice_mut(&mut all))?;
        Ok(all.iter().sum::<u64>() as usize)
    }

    /// The sum over all shards of all ranks; `parts` are those of the own shards, of one shape.
    ///
    /// # Errors
    /// If shapes differ, or a rank has failed.
    pub fn sum(&self, parts: Vec<Tensor>) -> Result<Tensor> {
        let own = tree(parts)?;
        match self.comm.world() {
            1 => Ok(own),
            _ => tree(gathered(self.comm, &own)?),
        }
    }

    /// The greatest of every element over all ranks, where this one has `own`.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn max(&self, own: Tensor) -> Result<Tensor> {
        if self.comm.world() == 1 {
            return Ok(own);
        }
        let device = own.device();
        let mut most = own.to(Device::Cpu).to_owned();
        let dtype = most.dtype();
        for other in gathered(self.comm, &own)? {
            let other = other.to(Device::Cpu);
            dispatch_real!("shards", dtype, T => {
                let most = most.as_mut_slice::<T>();
                most.iter_mut().zip(other.as_slice::<T>()).for_each(|(most, &x)| *most = most.max(x));
                Ok(())
            })?;
        }
        Ok(most.to(device))
    }
}

/// Every rank's tensor of this shape, in order of rank.
pub(super) fn gathered(comm: &dyn Comm, own: &Tensor) -> Result<Vec<Tensor>> {
    let host = own.to(Device::Cpu);
    let bytes = host.as_bytes();
    let mut all = vec![0u8; bytes.len() * comm.world()];
    comm.all_gather(bytes, &mut all)?;
    let of_rank = |rank: usize| {
        let mut tensor = Device::Cpu.with(|| Tensor::uninit(own.shape(), own.dtype()));
        tensor.bytes_mut().copy_from_slice(&all[rank * bytes.len()..][..bytes.len()]);
        tensor.to(own.device())
    };
    Ok((0..comm.world()).map(of_rank).collect())
}

/// `((0 + 1) + (2 + 3)) + ...`: neighbours first, then neighbours of those.
fn tree(mut parts: Vec<Tensor>) -> Result<Tensor> {
    while parts.len() > 1 {
        let pair = |pair: &[Tensor]| match pair {
            [left, right] => left.add(right),
            _ => Ok(pair[0].clone()),
        };
        parts = parts.chunks(2).map(pair).collect::<Result<_>>()?;
    }
    parts.pop().ok_or_else(|| Error::shape("shards", "no shard"))
}
