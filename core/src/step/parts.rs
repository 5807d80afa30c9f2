//! Which part of a model's flat memory each of several ranks updates, and keeps alone.
//!
//! Every rank has all weights that a step computes with. What only the update needs is spread over the ranks: the
//! optimizer's moments, and the lower halves of weights and teachers ([`flat`](super::flat)). A rank adds up the gradients of its
//! part, updates its part, and gives the new weights to the others: stage 1 of ZeRO (Rajbhandari et al., arXiv:1910.02054).

use std::fmt;
use std::ops::Range;

use crate::comm::Comm;
use crate::ops::{EIGHT_BIT_BLOCK, NORM_BLOCK};
use crate::params::Layout;

use super::update::NUMBERS_OF_BLOCK;

/// No block in which squares of gradients are summed is longer, on any device.
const LONGEST_BLOCK: usize = if NORM_BLOCK > NUMBERS_OF_BLOCK { NORM_BLOCK } else { NUMBERS_OF_BLOCK };

/// One of the ranks that share a model's optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    rank: usize,
    world: usize,
}

impl Default for Share {
    /// That of a rank that has all.
    fn default() -> Self {
        Self { rank: 0, world: 1 }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.world)
    }
}

impl Share {
    /// That of this rank.
    pub fn of(comm: &dyn Comm) -> Self {
        Self { rank: comm.rank(), world: comm.world() }
    }

    /// How many there are.
    pub(super) fn world(self) -> usize {
        self.world
    }
}

/// The parts of all ranks: ranges of flat memory, one behind the other.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    share: Share,
    ranges: Vec<Range<usize>>,
}

impl Parts {
    /// Parts as equal as can be. Parameters for which `is_whole` says so, by their places in the layout, are in one part; others
    /// are cut where a block of moments in eight bits may begin.
    pub(crate) fn new(layout: &Layout, share: Share, is_whole: impl Fn(usize) -> bool) -> Self {
        let specs = layout.specs();
        let cut = |rank: usize| {
            let even = (rank as u128 * layout.len() as u128 / share.world as u128) as usize;
            let Some(i) = specs.partition_point(|spec| spec.offset <= even).checked_sub(1) else { return 0 };
            let (begin, end) = (specs[i].offset, specs.get(i + 1).map_or(layout.len(), |next| next.offset));
            let inside = begin + (even - begin) / EIGHT_BIT_BLOCK * EIGHT_BIT_BLOCK;
            match is_whole(i) {
                true if even - begin < end - even => begin,
                true => end,
                false if inside >= specs[i].range().end => end,
                false => inside,
            }
        };
        let ends = (1..share.world).map(cut).chain([layout.len()]);
        let mut start = 0;
        let ranges = ends.map(|end| std::mem::replace(&mut start, end)..end).collect();
        Self { share, ranges }
    }

    /// Whose parts they are.
    pub(super) fn share(&self) -> Share {
        self.share
    }

    /// Those of all ranks.
    pub(super) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// That of this rank.
    pub(crate) fn own(&self) -> &Range<usize> {
        &self.ranges[self.share.rank]
    }

    /// That of this rank, of the first `len` elements.
    pub(super) fn own_of(&self, len: usize) -> Range<usize> {
        let own = self.own();
        own.start.min(len)..own.end.min(len)
    }

    /// Those of all ranks, of the first `len` elements.
    pub(super) fn ranges_of(&self, len: usize) -> Vec<Range<usize>> {
        self.ranges.iter().map(|range| range.start.min(len)..range.end.min(len)).collect()
    }

    /// Of `blocks` of flat memory in order, those that begin in the part of each rank.
    pub(super) fn blocks(&self, blocks: &[Range<usize>]) -> Vec<Range<usize>> {
        let first = |at: usize| blocks.partition_point(|block| block.start < at);
        self.ranges.iter().map(|range| first(range.start)..first(range.end)).collect()
    }

    /// The beginning of each part: all that a block of a norm that begins before it may need of it.
    pub(super) fn heads(&self) -> Vec<Range<usize>> {
        self.ranges.iter().map(|range| range.start..range.end.min(range.start + LONGEST_BLOCK)).collect()
    }

    /// A part with what a block of a norm that begins in it may need behind it, of `len` elements in all.
    pub(super) fn window(&self, part: &Range<usize>, len: usize) -> Range<usize> {
        part.start..len.min(part.end + LONGEST_BLOCK)
    }
}

/// What of `range` is in `part`; empty if nothing is.
pub(super) fn within(range: &Range<usize>, part: &Range<usize>) -> Range<usize> {
    let start = range.start.max(part.start);
    start..range.end.min(part.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Init, ParamBuilder};
    use proptest::prelude::*;

    proptest! {
        /// However large parameters are, and however many ranks there are: the parts are all of the memory in order, none is cut that
        /// has to be whole, and every block of a norm is in the part that it begins in and the heads of those behind.
        #[test]
        fn parts_are_all_of_the_memory(sizes in proptest::collection::vec((1usize..5000, any::<bool>()), 1..12), world in 1usize..9) {
            let mut params = ParamBuilder::new();
            for (i, (size, _)) in sizes.iter().enumerate() {
                params.add(&i.to_string(), &[*size], Init::Zeros);
            }
            let layout = params.finish();
            let parts = Parts::new(&layout, Share { rank: 0, world }, |i| sizes[i].1);
            let mut end = 0;
            for range in parts.ranges() {
                prop_assert!(range.start == end && range.end >= end);
                end = range.end;
                let inside = layout.specs().iter().position(|spec| spec.offset < end && end < spec.range().end);
                if let Some(i) = inside {
                    prop_assert!(!sizes[i].1 && (end - layout.specs()[i].offset).is_multiple_of(EIGHT_BIT_BLOCK));
                }
            }
            prop_assert_eq!(end, layout.len());
            let blocks: Vec<Range<usize>> = (0..layout.len()).step_by(700).map(|at| at..(at + 700).min(layout.len())).collect();
            let (of_ranks, heads) = (parts.blocks(&blocks), parts.heads());
            prop_assert_eq!(of_ranks.iter().map(Range::len).sum::<usize>(), blocks.len());
            for (rank, of) in of_ranks.into_iter().enumerate() {
                let has = |i: usize| parts.ranges()[rank].contains(&i) || heads.iter().any(|head| head.contains(&i));
                prop_assert!(blocks[of].iter().all(|block| block.clone().all(has)));
            }
            // No rank has much more than another, where nothing has to be whole.
            if sizes.iter().all(|(_, whole)| !whole) {
                let even = layout.len() / world;
                prop_assert!(parts.ranges().iter().all(|range| range.len() <= even + 2 * EIGHT_BIT_BLOCK));
            }
        }
    }
}
