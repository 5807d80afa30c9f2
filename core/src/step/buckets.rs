//! Gradients that are summed over the ranks while the backward pass runs, layer by layer: stage 2 of ZeRO (Rajbhandari et al.,
//! arXiv:1910.02054).
//!
//! A rank holds the gradients of a layer from the first number that is added to them until the last. Then each rank sums a share
//! of them, the same of every layer, so that all are busy. At the end every rank gets the sums of its part of the model. So that
//! they are those of one process, a rank has one micro-batch.

use std::ops::Range;

use crate::comm::Ranks;
use crate::tensor::{copy_elements, ParamGrads};
use crate::{Result, Tensor};

use super::layers::{Layers, Open};
use super::parts::within;

/// The gradients of a backward pass.
pub(super) struct Buckets<'a> {
    ranks: &'a Ranks,
    layers: &'a Layers,
    open: Open<'a>,
    /// This rank's share of the sums of each layer, one behind the other, and where that of each begins.
    shares: Tensor,
    begins: Vec<usize>,
}

impl<'a> Buckets<'a> {
    /// So many tapes add to the gradient of each parameter; gradients are like `grads`.
    pub(super) fn new(ranks: &'a Ranks, layers: &'a Layers, uses: &[usize], grads: &Tensor) -> Self {
        let open = Open::new(layers, uses, grads.device(), grads.dtype());
        let mut len = 0;
        let begin = |range: &Range<usize>| {
            let begin = len;
            len += ranks.shares(range.len())[ranks.rank()].len();
            begin
        };
        let begins = layers.ranges().iter().map(begin).collect();
        let shares = grads.device().with(|| Tensor::zeros(&[len], grads.dtype()));
        Self { ranks, layers, open, shares, begins }
    }

    /// Gives the sums to those whose they are: each rank has the elements of its window, in order of rank.
    pub(super) fn finish(mut self, own: &mut Tensor, windows: &[Range<usize>]) -> Result<()> {
        // Where nothing was learned.
        (0..self.layers.ranges().len()).try_for_each(|layer| self.close(layer))?;
        let (world, rank) = (self.ranks.world(), self.ranks.rank());
        let shares: Vec<Vec<Range<usize>>> = (0..world).map(|rank| self.shares_of(rank)).collect();
        let len = |from: usize, to: usize| shares[from].iter().map(|share| within(share, &windows[to]).len()).sum();
        let longest: usize = (0..world * world).map(|i| len(i / world, i % world)).max().unwrap_or(0);
        let most = self.ranks.at_once(own);
        let buffer = || own.device().with(|| Tensor::zeros(&[world * most.min(longest)], own.dtype()));
        let (mut sent, mut received) = (buffer(), buffer());
        for start in (0..longest).step_by(most) {
            let round = start..longest.min(start + most);
            let piece = most.min(longest);
            for (to, window) in windows.iter().enumerate() {
                for Moved { share, at, len, .. } in moved(&shares[rank], window, &round) {
                    copy_elements(&mut sent, to * piece + at, &self.shares, share..share + len)?;
                }
            }
            self.ranks.exchange(&sent, &mut received)?;
            for (from, shares) in shares.iter().enumerate() {
                for Moved { flat, at, len, .. } in moved(shares, &windows[rank], &round) {
                    let at = from * piece + at;
                    copy_elements(own, flat - windows[rank].start, &received, at..at + len)?;
                }
            }
        }
        Ok(())
    }

    /// A rank's shares of the layers, in flat memory.
    fn shares_of(&self, rank: usize) -> Vec<Range<usize>> {
        let share = |layer: &Range<usize>| {
            let share = self.ranks.shares(layer.len()).swap_remove(rank);
            layer.start + share.start..layer.start + share.end
        };
        self.layers.ranges().iter().map(share).collect()
    }

    /// Sums a layer's gradients over the ranks, once: this one takes its share.
    fn close(&mut self, layer: usize) -> Result<()> {
        let Some(mut sum) = self.open.close(layer) else { return Ok(()) };
        let shares = self.ranks.shares(sum.len());
        self.ranks.sum_to(&mut sum, &shares)?;
        copy_elements(&mut self.shares, self.begins[layer], &sum, shares[self.ranks.rank()].clone())
    }
}

/// Neighbouring numbers that go from a rank to another.
struct Moved {
    /// Where they begin in flat memory, and among the shares of the rank that they come from.
    flat: usize,
    share: usize,
    /// Their place in what moves in a round.
    at: usize,
    len: usize,
}

/// What of a rank's shares is in a window, as far as it moves in this round: those numbers of it, counted one share after the other.
fn moved(shares: &[Range<usize>], window: &Range<usize>, round: &Range<usize>) -> Vec<Moved> {
    let (mut before, mut counted) = (0, 0);
    let part = |share: &Range<usize>| {
        let part = within(share, window);
        let now = within(&(counted..counted + part.len()), round);
        let skipped = part.start.saturating_sub(share.start) + now.start.saturating_sub(counted);
        let moved =
            Moved { flat: share.start + skipped, share: before + skipped, at: now.start - round.start, len: now.len() };
        (before, counted) = (before + share.len(), counted + part.len());
        (moved.len > 0).then_some(moved)
    };
    shares.iter().filter_map(part).collect()
}

impl ParamGrads for Buckets<'_> {
    fn buffer(&mut self, range: &Range<usize>) -> Result<(&mut Tensor, usize)> {
        self.open.buffer(range)
    }

    fn done(&mut self, range: &Range<usize>) -> Result<()> {
        self.open.done(range).map_or(Ok(()), |layer| self.close(layer))
    }
}
