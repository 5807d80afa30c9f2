//! The layers of a model, and gradients that are known layer by layer.

use std::ops::Range;

use crate::params::Layout;
use crate::{DType, Device, Error, Result, Tensor};

/// The layers of a model, as ranges of its flat memory: neighbouring parameters of one layer of one sub-model, with the padding
/// behind them.
#[derive(Clone, Debug)]
pub(crate) struct Layers {
    ranges: Vec<Range<usize>>,
    /// The layer of each parameter, in the order of the layout.
    of_param: Vec<usize>,
    /// Where each parameter begins.
    begins: Vec<usize>,
}

impl Layers {
    /// Whether so many ranks sum gradients layer by layer: if each has one of the micro-batches. With more, gradients are those
    /// of all of them, added up before they are summed over the ranks.
    pub(crate) fn are_summed(micro_batches: usize, ranks: usize) -> bool {
        ranks > 1 && micro_batches == ranks
    }

    pub(crate) fn of(layout: &Layout) -> Self {
        let specs = layout.specs();
        let (mut ranges, mut of_param): (Vec<Range<usize>>, Vec<usize>) = Default::default();
        for (i, spec) in specs.iter().enumerate() {
            let same = i > 0 && (specs[i - 1].module(), specs[i - 1].layer) == (spec.module(), spec.layer);
            let end = specs.get(i + 1).map_or(layout.len(), |next| next.offset);
            match ranges.last_mut().filter(|_| same) {
                Some(last) => last.end = end,
                None => ranges.push(spec.offset..end),
            }
            of_param.push(ranges.len() - 1);
        }
        Self { ranges, of_param, begins: specs.iter().map(|spec| spec.offset).collect() }
    }

    /// Numbers of the largest layers, as many as are asked for.
    pub(crate) fn largest(&self, count: usize) -> usize {
        let mut lens: Vec<usize> = self.ranges.iter().map(Range::len).collect();
        lens.sort_unstable();
        lens.iter().rev().take(count).sum()
    }

    /// In the order of the layout.
    pub(super) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// The layer of a parameter, by its place in the layout.
    pub(super) fn of_param(&self, param: usize) -> usize {
        self.of_param[param]
    }

    fn of_range(&self, range: &Range<usize>) -> usize {
        self.of_param[self.begins.partition_point(|begin| *begin <= range.start) - 1]
    }
}

/// The gradients of the layers that a backward pass is in.
pub(super) struct Open<'a> {
    layers: &'a Layers,
    /// Of each layer, what was added up so far.
    open: Vec<Option<Tensor>>,
    /// Of each layer, how often a tape still adds to a parameter's gradient; nothing once it is closed.
    left: Vec<Option<usize>>,
    device: Device,
    dtype: DType,
}

impl<'a> Open<'a> {
    /// So many tapes add to the gradient of each parameter.
    pub(super) fn new(layers: &'a Layers, uses: &[usize], device: Device, dtype: DType) -> Self {
        let mut left = vec![Some(0); layers.ranges.len()];
        for (layer, uses) in layers.of_param.iter().zip(uses) {
            left[*layer] = left[*layer].map(|left| left + uses);
        }
        Self { layers, open: left.iter().map(|_| None).collect(), left, device, dtype }
    }

    /// The gradients of a parameter's layer, and the element that they begin at.
    pub(super) fn buffer(&mut self, range: &Range<usize>) -> Result<(&mut Tensor, usize)> {
        let layer = self.layers.of_range(range);
        if self.left[layer].is_none() {
            let problem = "a parameter's gradient is added to after that of its layer was taken for known";
            let help =
                "this is a fault of a plugin that uses a parameter in a part that is computed again inside another";
            return Err(Error::user(problem, help));
        }
        if self.open[layer].is_none() {
            self.open[layer] = Some(self.zeros(layer));
        }
        Ok((self.open[layer].as_mut().expect("opened just above"), self.layers.ranges[layer].start))
    }

    /// After the last addition of a tape to a parameter's gradient: its layer, if that is done.
    pub(super) fn done(&mut self, range: &Range<usize>) -> Option<usize> {
        let layer = self.layers.of_range(range);
        match &mut self.left[layer] {
            Some(left @ 2..) => {
                *left -= 1;
                None
            }
            Some(_) => Some(layer),
            None => None,
        }
    }

    /// The gradients of a layer, once.
    pub(super) fn close(&mut self, layer: usize) -> Option<Tensor> {
        self.left[layer].take()?;
        Some(self.open[layer].take().unwrap_or_else(|| self.zeros(layer)))
    }

    fn zeros(&self, layer: usize) -> Tensor {
        self.device.with(|| Tensor::zeros(&[self.layers.ranges[layer].len()], self.dtype))
    }
}
