//! Sums over the whole batch, whoever has its rows.

use std::ops::Range;

use super::Ranks;
use crate::{dispatch_real, Error, Result, Tensor};

/// How the rows of a tensor are those of a batch: this rank's rows, in shards, and the ranks that have the others.
///
/// A loss that looks across the batch gives what each of its own shards has to a sum or a maximum, and gets that of all
/// shards of all ranks. The sum's order is that of the shards, however they are spread.
#[derive(Clone, Debug)]
pub struct Shards<'a> {
    /// `None`: there are no others.
    ranks: Option<&'a Ranks>,
    /// Rows of each own shard; `None`: all rows are one shard.
    rows: Option<Vec<usize>>,
}

impl Shards<'static> {
    /// One rank with one shard, of however many rows.
    pub fn one() -> Self {
        Self { ranks: None, rows: None }
    }
}

impl<'a> Shards<'a> {
    /// This rank's shards of so many rows.
    pub(super) fn new(ranks: &'a Ranks, rows: Vec<usize>) -> Self {
        Self { ranks: Some(ranks).filter(|ranks| ranks.world() > 1), rows: Some(rows) }
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
        self.ranks.map_or(Ok(rows), |ranks| ranks.sum_of_all(rows))
    }

    /// The sum over all shards of all ranks; `parts` are those of the own shards, of one shape.
    ///
    /// # Errors
    /// If shapes differ, or a rank has failed.
    pub fn sum(&self, parts: Vec<Tensor>) -> Result<Tensor> {
        let own = tree(parts)?;
        match self.ranks {
            None => Ok(own),
            Some(ranks) => tree(ranks.gather(&own)?),
        }
    }

    /// The greatest of every element over all ranks, where this one has `own`, in host memory.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn max(&self, own: Tensor) -> Result<Tensor> {
        let Some(ranks) = self.ranks else { return Ok(own) };
        let mut all = ranks.gather(&own)?.into_iter();
        let mut most = all.next().expect("there is a rank").to_owned();
        for other in all {
            dispatch_real!("shards", own.dtype(), T => {
                let most = most.as_mut_slice::<T>();
                most.iter_mut().zip(other.as_slice::<T>()).for_each(|(most, &x)| *most = most.max(x));
                Ok(())
            })?;
        }
        Ok(most)
    }

    /// What every rank has, `[ranks, ..]`; nothing where there are no others.
    ///
    /// # Errors
    /// If a rank has failed.
    pub(crate) fn stacked(&self, own: &Tensor) -> Result<Option<Tensor>> {
        self.ranks.map(|ranks| ranks.stacked(own)).transpose()
    }
}

/// `((0 + 1) + (2 + 3)) + ...`: neighbours first, then neighbours of those.
pub(super) fn tree(mut parts: Vec<Tensor>) -> Result<Tensor> {
    while parts.len() > 1 {
        let pair = |pair: &[Tensor]| match pair {
            [left, right] => left.add(right),
            _ => Ok(pair[0].clone()),
        };
        parts = parts.chunks(2).map(pair).collect::<Result<_>>()?;
    }
    parts.pop().ok_or_else(|| Error::shape("shards", "no shard"))
}
