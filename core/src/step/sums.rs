//! Sums over the micro-batches of a step, in an order that the number of ranks does not change.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::comm::Ranks;
use crate::{Error, Result, Tensor};

/// The gradients of this rank's shards: summed inside a shard in the order of its micro-batches, then as a tree. At most
/// `log2(shards) + 1` buffers are held at a time.
pub(super) struct OfShards<'a> {
    first: &'a mut Tensor,
    /// Those that wait for a sibling, after the first.
    others: Vec<Tensor>,
    /// Of all that wait, how many times it was summed with a sibling.
    levels: Vec<u32>,
    free: Vec<Tensor>,
}

impl<'a> OfShards<'a> {
    /// The sum will be in `sum`, which is overwritten.
    pub(super) fn new(sum: &'a mut Tensor) -> Self {
        Self { first: sum, others: Vec::new(), levels: Vec::new(), free: Vec::new() }
    }

    /// The gradients of the next shard, all zero.
    pub(super) fn begin(&mut self) -> &mut Tensor {
        let own = match self.levels.is_empty() {
            true => &mut *self.first,
            false => {
                let (shape, dtype) = (self.first.shape(), self.first.dtype());
                let new = || self.first.device().with(|| Tensor::uninit(shape, dtype));
                self.others.push(self.free.pop().unwrap_or_else(new));
                self.others.last_mut().expect("pushed just above")
            }
        };
        own.fill_zero();
        own
    }

    /// The shard is done.
    pub(super) fn end(&mut self) -> Result<()> {
        self.levels.push(0);
        while let [.., left, right] = self.levels[..] {
            if left != right {
                break;
            }
            self.levels.pop();
            *self.levels.last_mut().expect("it has a sibling") += 1;
            let right = self.others.pop().expect("a second one is among the others");
            let left = self.others.last_mut().unwrap_or(self.first);
            let sum = left.add(&right)?;
            left.copy_from(&sum)?;
            self.free.push(right);
        }
        Ok(())
    }
}

/// This rank's micro-batches, shard by shard.
///
/// # Errors
/// If shards cannot share them evenly.
pub(super) fn shards_of(micro_batches: usize, ranks: &Ranks) -> Result<impl Iterator<Item = Range<usize>>> {
    let shards = ranks.own_shards();
    if !micro_batches.is_multiple_of(shards) {
        let problem = format!("{micro_batches} micro-batches cannot be those of {shards} shards");
        return Err(Error::user(problem, "let batch.shards divide batch.micro_batches"));
    }
    let own = micro_batches / shards;
    Ok((0..shards).map(move |shard| shard * own..(shard + 1) * own))
}

/// The mean of every value over the micro-batches of all ranks, where `own` are this rank's, in their order.
pub(super) fn means(ranks: &Ranks, own: Vec<BTreeMap<String, Tensor>>) -> Result<BTreeMap<String, Tensor>> {
    let count = own.len() * ranks.world();
    let all = if ranks.world() == 1 { own } else { gathered(ranks, &own)? };
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, value) in all.into_iter().flatten() {
        let sum = match sums.get(&name) {
            Some(sum) => sum.add(&value)?,
            None => value,
        };
        sums.insert(name, sum);
    }
    sums.into_iter().map(|(name, sum)| Ok((name, sum.scale(1.0 / count as f64)?))).collect()
}

/// The values of the micro-batches of all ranks, which have the same names.
fn gathered(ranks: &Ranks, own: &[BTreeMap<String, Tensor>]) -> Result<Vec<BTreeMap<String, Tensor>>> {
    let flat: Vec<Tensor> = own.iter().flat_map(BTreeMap::values).map(|x| x.reshape(&[1])).collect::<Result<_>>()?;
    if flat.is_empty() {
        return Ok(Vec::new());
    }
    let all = ranks.gather(&Tensor::cat(&flat.iter().collect::<Vec<_>>())?)?;
    let of_rank = |all: Tensor| {
        let mut at = 0..all.len();
        own.iter()
            .map(|of_micro| {
                let names = of_micro.keys().cloned();
                names.zip(at.by_ref()).map(|(name, at)| (name, all.view(at, &[]))).collect()
            })
            .collect::<Vec<_>>()
    };
    Ok(all.into_iter().flat_map(of_rank).collect())
}
