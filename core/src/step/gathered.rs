//! Teachers of which each of several ranks has a part: a layer is gathered when a forward pass comes to it, and let go behind it
//! (stage 3 of ZeRO for models that are not trained, Rajbhandari et al., arXiv:1910.02054).
//!
//! All ranks run the same passes over as many micro-batches, so they ask for the same layers in the same order. The last two that were
//! asked for are kept: a model may come back to parameters that its blocks share.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use crate::comm::Ranks;
use crate::params::{Elsewhere, Layout, ParamSpec, Params};
use crate::tensor::copy_elements;
use crate::{cuda, Error, Result, Tensor};

use super::flat::Flat;
use super::layers::Layers;
use super::parts::{within, Parts};
use super::weights::Weights;

/// Layers that are kept.
const KEPT: usize = 2;

/// A model whose layers come one after the other.
struct Gathered<'a> {
    flat: &'a Flat,
    layers: &'a Layers,
    parts: &'a Parts,
    ranks: &'a Ranks,
    /// The last ones, the newest last.
    here: RefCell<Vec<(usize, Tensor)>>,
    failed: Cell<Option<Error>>,
}

impl Gathered<'_> {
    /// All of a layer, on all ranks.
    fn layer(&self, layer: usize) -> Result<Tensor> {
        let range = &self.layers.ranges()[layer];
        let (here, held) = (self.flat.here(), self.flat.held());
        let mut whole = here.device().with(|| Tensor::uninit(&[range.len()], here.dtype()));
        let inside = |part: &Range<usize>| {
            let part = within(range, part);
            if part.is_empty() {
                0..0
            } else {
                part.start - range.start..part.end - range.start
            }
        };
        let ranges: Vec<Range<usize>> = self.parts.ranges_of(self.flat.len()).iter().map(inside).collect();
        let own = &ranges[self.ranks.rank()];
        if !own.is_empty() {
            let from = range.start + own.start - held.start;
            copy_elements(&mut whole, own.start, here, from..from + own.len())?;
        }
        self.ranks.gather_ranges(&mut whole, &ranges)?;
        Ok(whole)
    }

    fn param(&self, param: usize, spec: &ParamSpec) -> Result<Tensor> {
        let layer = self.layers.of_param(param);
        let view = |whole: &Tensor| whole.view(spec.offset - self.layers.ranges()[layer].start, &spec.shape);
        let mut here = self.here.borrow_mut();
        let known = here.iter().position(|(known, _)| *known == layer).map(|at| here.remove(at));
        let (_, whole) = match known {
            Some(known) => known,
            None => {
                // Its memory is free before more is taken.
                let older = here.len().saturating_sub(KEPT - 1);
                here.drain(..older);
                (layer, self.layer(layer)?)
            }
        };
        let param = view(&whole);
        here.push((layer, whole));
        Ok(param)
    }
}

impl Elsewhere for Gathered<'_> {
    fn get(&self, param: usize, spec: &ParamSpec) -> Tensor {
        self.param(param, spec).unwrap_or_else(|error| {
            // A pass cannot be ended here; it is not taken for one.
            let before = self.failed.take();
            self.failed.set(Some(before.unwrap_or(error)));
            let here = self.flat.here();
            here.device().with(|| Tensor::zeros(&spec.shape, here.dtype()))
        })
    }
}

impl Weights {
    /// A model of which each rank has a part; nothing if all have all of it.
    fn gathered<'a>(&'a self, flat: &'a Flat, ranks: &'a Ranks) -> Option<Gathered<'a>> {
        let layers = self.gather.as_ref().filter(|_| flat.is_sharded())?;
        let (here, failed) = Default::default();
        Some(Gathered { flat, layers, parts: &self.parts, ranks, here, failed })
    }

    /// What `work` makes of a model's weights, which are followed by no tape: one of the teachers, or the student.
    ///
    /// # Errors
    /// That of `work`, or if a rank fails that has a part of them.
    pub(super) fn with_frozen<R>(
        &self,
        layout: &Arc<Layout>,
        flat: &Flat,
        ranks: &Ranks,
        work: impl FnOnce(&Params<'_>) -> Result<R>,
    ) -> Result<R> {
        let Some(gathered) = self.gathered(flat, ranks) else {
            return work(&Params::frozen(layout, flat.rounded()));
        };
        let done = work(&Params::gathered(layout, flat.here(), &gathered));
        gathered.failed.into_inner().map_or(done, Err)
    }

    /// All weights of what is evaluated, if they are not on every rank: all ranks have to ask for them, and those that `keep` them get
    /// them.
    ///
    /// # Errors
    /// If a rank fails.
    pub(super) fn gather_evaluated(&self, ranks: &Ranks, keep: bool) -> Result<Option<Tensor>> {
        let flat = self.evaluated();
        let Some(gathered) = self.gathered(flat, ranks) else { return Ok(None) };
        let mut all = keep.then(|| flat.here().device().with(|| Tensor::zeros(&[flat.len()], flat.here().dtype())));
        for (i, range) in gathered.layers.ranges().iter().enumerate() {
            let _step = cuda::step_scope();
            let layer = gathered.layer(i)?;
            if let Some(all) = &mut all {
                copy_elements(all, range.start, &layer, 0..layer.len())?;
            }
        }
        Ok(all)
    }
}
