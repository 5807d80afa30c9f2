//! Activation checkpointing (Chen et al., arXiv:1604.06174): a part of a model keeps its inputs alone, and is computed
//! again when its gradient is asked for.

use std::sync::Arc;

use crate::params::{Layout, Params, Uses};
use crate::scope;
use crate::tensor::{Grads, Op, Slot, Tape};
use crate::{Result, Tensor};

/// A part of a model: parameters and inputs to one result.
type Part = Box<dyn Fn(&Params<'_>, &[Tensor]) -> Result<Tensor> + Send>;

struct Recompute {
    part: Part,
    layout: Arc<Layout>,
    flat: Tensor,
    uses: Uses,
    scope: String,
    inputs: Vec<Tensor>,
}

impl Params<'_> {
    /// `part` of these parameters and `inputs`, of which nothing but the inputs is kept for the backward pass. Where
    /// nothing is followed it is simply run. The result has the same bits as without; the first input is one that is
    /// followed when parameters are.
    ///
    /// # Errors
    /// Those of `part`.
    pub fn recomputed(
        &self,
        inputs: &[&Tensor],
        part: impl Fn(&Params<'_>, &[Tensor]) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        if self.tape().is_none() {
            let inputs: Vec<Tensor> = inputs.iter().map(|x| (*x).clone()).collect();
            return part(self, &inputs);
        }
        let (layout, flat) = (self.layout().clone(), self.flat().clone());
        let (uses, scope) = (self.uses(), scope::current());
        Recompute { part: Box::new(part), layout, flat, uses, scope, inputs: Vec::new() }.apply(inputs)
    }
}

impl Op for Recompute {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
        let out = (self.part)(&Params::noted(&self.layout, &self.flat, self.uses.clone()), &inputs)?;
        if save {
            self.inputs = inputs;
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Self { part, layout, flat, scope, inputs, .. } = *self;
        let _scope = scope::enter(scope);
        let tape = Tape::new();
        let follow = |(i, x): (usize, Tensor)| if grads.needs(i) { tape.leaf(&x) } else { x };
        let inputs: Vec<Tensor> = inputs.into_iter().enumerate().map(follow).collect();
        let out = part(&Params::tracked(&layout, &flat, &tape), &inputs)?;
        let dy = Slot { grad: dy, row_sums: grads.row_sums_of_dy() };
        let mut leaves = tape.backward_from_slot(&out, dy, grads.params())?;
        for (i, x) in inputs.iter().enumerate() {
            if let Some(slot) = leaves.take(x) {
                grads.add_slot(i, slot)?;
            }
        }
        Ok(())
    }
}
