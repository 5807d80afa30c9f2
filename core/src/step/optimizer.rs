//! The optimizer of a run with the reference's parameter groups, clipping by sub-model, and EMA in the same pass.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::comm::Ranks;
use crate::contract::{At, Direction, Optimizer, ParamUpdate};
use crate::ops::{
    adamw_part, adamw_part_8bit, descend, square_sums, write_range, AdamW, FromElement, Group, MixedMoments, Moments,
    PartMoments, Place, NORM_BLOCK,
};
use crate::params::{Layout, ParamRole, ParamSpec};
use crate::recipe::{MomentStorage, OptimizerConfig, OptimizerEntry};
use crate::{DType, Error, Result, Tensor};

use super::bounds::Reach;
use super::flat::Flat;
use super::layers::Layers;
use super::moments::Storage;
use super::parts::{Parts, Share};
use super::Weights;

/// Added to a gradient's norm before it divides, as in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

/// The optimizer and its groups.
pub(crate) struct Groups {
    config: OptimizerConfig,
    optimizer: Box<dyn Optimizer>,
    layout: Arc<Layout>,
    pub(super) rules: Vec<ParamRule>,
    modules: Vec<(String, Range<usize>)>,
    /// AdamW's numbers, and the parameters that are left to it.
    pub(super) adamw: Vec<(AdamW, Cohort)>,
    /// The parameters that the optimizer directs.
    pub(super) directed: Vec<Cohort>,
    began: Began,
    /// What each rank updates.
    pub(super) parts: Arc<Parts>,
    /// Where the moments of this rank's part are.
    pub(crate) storage: Arc<Storage>,
    /// What becomes of gradients.
    pub(super) gradients: Gradients,
}

/// Sub-models whose moments began at zero after so many updates of the run: those that were new, or had another optimizer, where it
/// went on from another run. Others had theirs from the start.
pub(crate) type Began = BTreeMap<String, u64>;

/// All had.
pub(crate) fn from_the_start(_: &Layout, _: &[&str]) -> Result<Began> {
    Ok(Began::new())
}

/// Parameters whose moments have seen the same updates, by their places in the layout.
pub(super) struct Cohort {
    /// Updates of the run before.
    began: u64,
    pub(super) places: Vec<usize>,
}

impl Cohort {
    /// Updates that their moments have seen after `updates` of the run.
    pub(super) fn updates(&self, updates: u64) -> u64 {
        updates - self.began
    }
}

/// What becomes of the gradients of a step.
pub(super) enum Gradients {
    /// All are added up before the update.
    Kept,
    /// Each layer's are summed over the ranks while the backward pass runs.
    Summed(Layers),
    /// Each layer is updated while the backward pass runs.
    Used(Layers),
}

/// A range in blocks of `len` elements.
pub(super) fn blocks_of(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(len).map(move |start| start..end.min(start + len))
}

/// How the optimizer treats one parameter.
#[derive(Clone, Debug)]
pub struct ParamRule {
    /// Its full name.
    pub name: String,
    /// What the learning rate is multiplied by.
    pub lr_multiplier: f64,
    /// Whether weight decay acts on it.
    pub decays: bool,
    /// Whether it is held still for `freeze_last_layer_steps`.
    pub last_layer: bool,
    /// Index of its sub-model.
    pub(super) module: usize,
}

/// Learning-rate multiplier of the reference: `decay^(depth + 1 - layer)`, and the patch embedding's own.
fn lr_multiplier(spec: &ParamSpec, depth: usize, config: &OptimizerConfig) -> f64 {
    let decay = spec.layer.map_or(1.0, |layer| config.layerwise_decay.powi((depth + 1 - layer) as i32));
    let embed = if spec.role == Some(ParamRole::PatchEmbed) { config.patch_embed_lr_mult } else { 1.0 };
    decay * embed
}

impl Groups {
    /// The groups of a layout whose backbone has `depth` blocks, for one of the ranks that share it. `began` is told the layout and
    /// the names of the moments.
    ///
    /// # Errors
    /// If the plugin refuses its keys, or leaves parameters to AdamW without its moments.
    pub(crate) fn new(
        entry: &OptimizerEntry,
        layout: &Arc<Layout>,
        depth: usize,
        share: Share,
        began: impl FnOnce(&Layout, &[&str]) -> Result<Began>,
    ) -> Result<Self> {
        let (config, optimizer) = (entry.own.clone(), entry.plugin.build(&mut ())?);
        let began = began(layout, optimizer.moments())?;
        let names = layout.modules();
        let modules: Vec<_> = names.iter().map(|m| (m.clone(), layout.range_of(&format!("{m}.")))).collect();
        let rule = |spec: &ParamSpec| ParamRule {
            name: spec.name.clone(),
            lr_multiplier: lr_multiplier(spec, depth, &config),
            decays: spec.decays,
            last_layer: spec.role == Some(ParamRole::LastLayer),
            module: modules.iter().position(|(m, _)| m == spec.module()).expect("a parameter is in a module"),
        };
        let rules = layout.specs().iter().map(rule).collect();
        let (mut adamw, mut directed): (Vec<(AdamW, Cohort)>, Vec<Cohort>) = Default::default();
        for (i, spec) in layout.specs().iter().enumerate() {
            let began = began.get(spec.module()).copied().unwrap_or(0);
            let cohort = || Cohort { began, places: vec![i] };
            match optimizer.adamw(spec) {
                None => match directed.iter_mut().find(|known| known.began == began) {
                    Some(known) => known.places.push(i),
                    None => directed.push(cohort()),
                },
                Some(own) => match adamw.iter_mut().find(|(of, known)| *of == own && known.began == began) {
                    Some((_, known)) => known.places.push(i),
                    None => adamw.push((own, cohort())),
                },
            }
        }
        if !adamw.is_empty() && optimizer.moments().len() < 2 {
            let (name, kept) = (entry.plugin.name(), optimizer.moments());
            let problem = format!("the optimizer `{name}` leaves parameters to AdamW and keeps the moments {kept:?}");
            return Err(Error::user(problem, "AdamW needs two: let `moments` name them first"));
        }
        let moments = config.moments.unwrap_or_default();
        if moments == MomentStorage::EightBit && (!directed.is_empty() || optimizer.moments().len() != 2) {
            let problem = format!("moments in eight bits are AdamW's, and the optimizer is `{}`", entry.plugin.name());
            return Err(Error::user(problem, "set optimizer.moments = \"f32\", or optimizer.plugin = \"adamw\""));
        }
        // What an optimizer directs may look at a whole parameter.
        let parts = Parts::new(layout, share, |i| optimizer.adamw(&layout.specs()[i]).is_none());
        let storage = Arc::new(Storage::new(layout, moments, parts.own()));
        if config.is_fused() && !directed.is_empty() {
            let name = entry.plugin.name();
            let problem = format!("the optimizer `{name}` needs all gradients before it updates a weight");
            return Err(Error::user(problem, "set optimizer.update = \"whole\", or optimizer.plugin = \"adamw\""));
        }
        let (layout, parts, gradients) = (layout.clone(), Arc::new(parts), Gradients::Kept);
        Ok(Self { config, optimizer, layout, rules, modules, adamw, directed, began, parts, storage, gradients })
    }

    /// Has the gradients of each layer summed over the ranks as soon as they are known.
    pub(super) fn sum_by_layer(&mut self) {
        self.gradients = Gradients::Summed(Layers::of(&self.layout));
    }

    /// Has each layer updated as soon as its gradients are known.
    pub(super) fn update_by_layer(&mut self) {
        self.gradients = Gradients::Used(Layers::of(&self.layout));
    }

    /// The gradients that this rank has after a step: all, those of its window, or none.
    pub(super) fn gradients(&self) -> Range<usize> {
        match &self.gradients {
            Gradients::Kept => 0..self.layout.len(),
            Gradients::Summed(_) => self.parts.window(self.parts.own(), self.layout.len()),
            Gradients::Used(_) => 0..0,
        }
    }

    /// Of every rank its part, and the rest of a block of the norm that begins there.
    pub(super) fn windows(&self) -> Vec<Range<usize>> {
        self.parts.ranges().iter().map(|part| self.parts.window(part, self.layout.len())).collect()
    }

    /// The keys of every optimizer.
    pub(super) fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// The names of the moments.
    pub(crate) fn moments(&self) -> &[&'static str] {
        self.optimizer.moments()
    }

    /// The optimizer's numbers after `updates` of the run, for each of the cohorts that it directs.
    pub(super) fn numbers(&self, at: At, updates: u64) -> Vec<Vec<f64>> {
        self.directed.iter().map(|cohort| self.optimizer.numbers(at, cohort.updates(updates))).collect()
    }

    /// How many each of them has.
    pub(super) fn number_count(&self) -> usize {
        self.optimizer.numbers(At { step: 0, total: 1 }, 1).len()
    }

    /// The sub-models whose moments began late.
    pub(super) fn began(&self) -> &Began {
        &self.began
    }

    /// The names of the sub-models.
    pub(super) fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|(name, _)| name.as_str())
    }

    /// The sub-models' ranges in the flat buffers.
    pub(super) fn module_ranges(&self) -> impl Iterator<Item = &Range<usize>> {
        self.modules.iter().map(|(_, range)| range)
    }

    pub(super) fn lr(&self, at: At) -> f64 {
        self.config.lr.at(at)
    }

    /// That of the last layers, which stay where they are at first.
    pub(super) fn last_layer_lr(&self, at: At) -> f64 {
        match at.step < self.config.freeze_last_layer_steps {
            true => 0.0,
            false => self.config.last_layer_lr.as_ref().unwrap_or(&self.config.lr).at(at),
        }
    }

    pub(super) fn weight_decay(&self, at: At) -> f64 {
        self.config.weight_decay.at(at)
    }

    /// What the gradient of a sub-model is multiplied by, given its length.
    pub(super) fn clip(&self, norm: f64) -> f64 {
        match self.config.clip_grad {
            most if most > 0.0 => (most / (norm + CLIP_EPS)).min(1.0),
            _ => 1.0,
        }
    }

    /// What the update at `at`, number `updates` of the run, does to a number, at most.
    pub(super) fn reach(&self, at: At, updates: u64) -> Reach {
        let (lr, last_layer_lr, weight_decay) = (self.lr(at), self.last_layer_lr(at), self.weight_decay(at));
        let rate = |i: &usize| {
            let rule = &self.rules[*i];
            let lr = if rule.last_layer { last_layer_lr } else { lr } * rule.lr_multiplier;
            (lr, if rule.decays { weight_decay } else { 0.0 })
        };
        let mut all = Reach::default();
        for (adamw, cohort) in &self.adamw {
            let own = crate::contract::Reach::adamw(*adamw, cohort.updates(updates));
            cohort.places.iter().map(rate).for_each(|(lr, decay)| all.include(own, lr, lr * decay));
        }
        for cohort in &self.directed {
            for i in &cohort.places {
                let (lr, decay) = rate(i);
                let own = self.optimizer.reach(&self.layout.specs()[*i], at, cohort.updates(updates));
                // A direction is a number itself, before a small rate makes it smaller.
                all.include(own, lr.max(1.0), lr * decay);
            }
        }
        all
    }

    /// The blocks of `len` elements in which squares of gradients are summed, sub-model by sub-model, and how many each
    /// sub-model has.
    pub(super) fn norm_blocks(&self, len: usize) -> (Vec<Range<usize>>, Vec<usize>) {
        let blocks: Vec<Vec<Range<usize>>> =
            self.module_ranges().map(|range| blocks_of(range, len).collect()).collect();
        let counts = blocks.iter().map(Vec::len).collect();
        (blocks.concat(), counts)
    }

    /// Sums the gradients of this rank's part over all ranks, with the rest of the block of the norm that its end is in, where
    /// that was not done layer by layer.
    pub(super) fn sum_gradients(&self, grads: &mut Tensor, ranks: &Ranks) -> Result<()> {
        match self.gradients {
            Gradients::Kept => {
                ranks.sum_to(grads, self.parts.ranges())?;
                ranks.spread(grads, &self.parts.heads())
            }
            Gradients::Summed(_) | Gradients::Used(_) => Ok(()),
        }
    }

    /// L2 norm of every sub-model's gradient, of which this rank has its part.
    pub(super) fn grad_norms(&self, grads: &Tensor, ranks: &Ranks) -> Result<BTreeMap<String, f64>> {
        let (blocks, counts) = self.norm_blocks(NORM_BLOCK);
        let of_ranks = self.parts.blocks(&blocks);
        let own = of_ranks[ranks.rank()].clone();
        let start = self.gradients().start;
        let of_own: Vec<Range<usize>> = blocks[own.clone()].iter().map(|b| b.start - start..b.end - start).collect();
        let mut squares = Tensor::zeros(&[blocks.len()], DType::F64);
        squares.as_mut_slice::<f64>()[own].copy_from_slice(&square_sums(grads, &of_own)?);
        ranks.spread(&mut squares, &of_ranks)?;
        let mut squares = squares.as_slice::<f64>().iter();
        let norm = |((name, _), count): (&(String, _), usize)| {
            (name.clone(), squares.by_ref().take(count).sum::<f64>().sqrt())
        };
        Ok(self.modules.iter().zip(counts).map(norm).collect())
    }

    /// One update of this rank's part of all weights, clipped by these norms; with `momentum`, the teacher follows the updated student
    /// in the same pass.
    pub(super) fn update(
        &self,
        at: At,
        weights: &mut Weights,
        norms: &BTreeMap<String, f64>,
        momentum: Option<f64>,
    ) -> Result<()> {
        let (lr, last_layer_lr, weight_decay) = (self.lr(at), self.last_layer_lr(at), self.weight_decay(at));
        let clip: Vec<f64> =
            self.modules.iter().map(|(name, _)| self.clip(norms.get(name).copied().unwrap_or(0.0))).collect();
        let group = |i: &usize| {
            let rule = &self.rules[*i];
            Group {
                range: self.storage.places[*i].range.clone(),
                lr: if rule.last_layer { last_layer_lr } else { lr } * rule.lr_multiplier,
                weight_decay: if rule.decays { weight_decay } else { 0.0 },
                clip: clip[rule.module],
            }
        };
        let updates = weights.updates(at);
        let own = self.parts.own();
        let Weights { student, teacher, moments, eight, grads, .. } = weights;
        let gradients = FromElement { tensor: grads, start: self.gradients().start };
        for (adamw, cohort) in &self.adamw {
            let updates = cohort.updates(updates);
            let [mean, square, ..] = &mut moments[..] else { unreachable!("checked when the groups were made") };
            let whole = Moments { mean, square };
            let ema = momentum.zip(teacher.as_mut()).map(|(momentum, flat)| flat.ema(momentum));
            if let [mean, square] = &mut eight[..] {
                let placed = |i: usize| (group(&i), self.storage.places[i].place);
                let groups: Vec<(Group, Place)> = self.own(&cohort.places).map(placed).collect();
                let moments = MixedMoments { whole, mean, square };
                adamw_part_8bit(student.wide_mut(), gradients, moments, ema, &groups, *adamw, updates)?;
            } else {
                let groups: Vec<Group> = self.own(&cohort.places).map(|i| group(&i)).collect();
                let part = PartMoments { moments: whole, start: own.start };
                adamw_part(student.wide_mut(), gradients, part, ema, &groups, *adamw, updates)?;
            }
        }
        let dtype = grads.dtype();
        let scalars = |numbers: Vec<f64>| numbers.into_iter().map(|x| Tensor::scalar(x, dtype)).collect();
        let numbers: Vec<Vec<Tensor>> = self.numbers(at, updates).into_iter().map(scalars).collect();
        for (cohort, i) in self.own_directed() {
            let group = group(&i);
            let gradient = self.gradient(i, grads).scale(group.clip)?;
            let new = self.direction(i, gradient, (student, moments), numbers[cohort].clone(), dtype)?;
            let ema = momentum.zip(teacher.as_mut()).map(|(momentum, flat)| flat.ema(momentum));
            descend(student.wide_mut(), &new.direction, ema, &group)?;
            for (flat, new) in moments.iter_mut().zip(&new.moments) {
                write_range(flat, group.range.start - own.start..group.range.end - own.start, new)?;
            }
        }
        Ok(())
    }

    /// Those of parameters `places` of which something is in this rank's part.
    pub(super) fn own<'a>(&'a self, places: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        places.iter().copied().filter(|i| !self.storage.places[*i].range.is_empty())
    }

    /// The parameters that the optimizer directs of which something is in this rank's part, with their cohorts, one cohort after
    /// the other.
    pub(super) fn own_directed(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let cohorts = self.directed.iter().enumerate();
        cohorts.flat_map(|(cohort, of)| self.own(&of.places).map(move |i| (cohort, i)))
    }

    /// The gradient of parameter `i` in its own shape.
    pub(super) fn gradient(&self, i: usize, grads: &Tensor) -> Tensor {
        let spec = &self.layout.specs()[i];
        grads.view(spec.offset - self.gradients().start, &spec.shape)
    }

    /// Where the optimizer directs parameter `i`, in tensors of the weights' type that are nobody else's.
    pub(super) fn direction(
        &self,
        i: usize,
        gradient: Tensor,
        (student, moments): (&Flat, &[Tensor]),
        numbers: Vec<Tensor>,
        products: DType,
    ) -> Result<Direction> {
        let spec = &self.layout.specs()[i];
        let view = |flat: &Tensor| flat.view(spec.offset - self.parts.own().start, &spec.shape);
        let moments: Vec<Tensor> = moments.iter().map(view).collect();
        let count = moments.len();
        let weight = student.view(spec.offset, &spec.shape)?;
        let param = ParamUpdate { spec, weight, gradient, moments, numbers, products };
        let Direction { direction, moments } = self.optimizer.direction(&param)?;
        drop(param);
        let fits = |tensor: &Tensor| tensor.len() == spec.range().len();
        if moments.len() > count || !fits(&direction) || !moments.iter().all(fits) {
            let shapes: Vec<&[usize]> = moments.iter().map(Tensor::shape).collect();
            let problem = format!(
                "of {} {:?} it gives a direction {:?} and the moments {shapes:?}, of {count} at most",
                spec.name,
                spec.shape,
                direction.shape()
            );
            return Err(Error::shape("optimizer", problem));
        }
        let own = |tensor: Tensor| Ok(tensor.detach().cast(student.dtype())?.into_unique());
        Ok(Direction { direction: own(direction)?, moments: moments.into_iter().map(own).collect::<Result<_>>()? })
    }
}
