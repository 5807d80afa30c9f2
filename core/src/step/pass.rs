//! A forward and backward pass: teachers, student, losses and gradients of the micro-batches of a step.

use std::collections::BTreeMap;

use super::buckets::Buckets;
use super::fused::{ByLayer, Fused, Updated};
use super::optimizer::Gradients;
use super::outputs::{next_state, StudentPass, TeacherPass};
use super::update::DeviceUpdate;
use super::{sums, views, DeclaredLoss, Health, Learner, GLOBALS};
use crate::comm::Shards;
use crate::contract::{At, Draws, State, StepContext};
use crate::data::Batch;
use crate::params::Params;
use crate::rng::{Rng, Stream};
use crate::scope;
use crate::tensor::Tape;
use crate::{DType, Error, Result, Tensor};

/// What a forward and backward pass gave, where it ran.
pub(super) struct Pass {
    /// As in [`Report`](super::Report), rank 0.
    pub(super) losses: BTreeMap<String, Tensor>,
    pub(super) health: Option<Health>,
    /// The losses' next state.
    pub(super) state: Vec<State>,
    /// Of every loss with a state: 0, or not finite where that state is not.
    pub(super) marks: Vec<(String, Tensor)>,
    /// What an update leaves that went with the backward pass.
    pub(super) updated: Option<Updated>,
}

/// An update that goes with the backward pass, and whether the teacher follows in it.
type Update<'a> = Option<(&'a DeviceUpdate, bool)>;

/// Added to the indices of what the backbone draws for views: a view more changes nothing that is drawn for other crops.
const OF_VIEWS: u64 = 1 << 24;

impl Learner {
    /// The random numbers of the student's forward on each of this rank's micro-batches.
    pub(super) fn draws(&self, step: u64, batches: &[Batch]) -> Result<Vec<Draws>> {
        let first = self.ranks.rank() * batches.len();
        (first..).zip(batches).map(|(micro, batch)| self.draw(step, batch, micro)).collect()
    }

    /// The random numbers of the student's forward on micro-batch `micro` of all.
    fn draw(&self, step: u64, batch: &Batch, micro: usize) -> Result<Draws> {
        let images = batch.images();
        let sides = [(true, GLOBALS), (self.locals > 0, self.locals)];
        let kinds: Vec<usize> = sides.iter().filter(|(any, _)| *any).map(|(_, crops)| crops * images).collect();
        // What is drawn for a whole batch is the same in its parts. Dropped paths cannot be: a part keeps a number of
        // images that is known before, so that every step has the same shapes.
        let of_part = |stream| if stream == Stream::DropPath { (micro as u64) << 32 } else { 0 };
        let rng = |stream, index| Rng::new(self.seed, stream, step, of_part(stream) | index);
        // Of all kinds, those that no loss reads as well: what one sees does not depend on what another loss needs.
        let mut draws = self.model.backbone.draw(&rng, &kinds);
        draws.keep_kinds(&self.model.student_sees());
        let global_size = batch.global.dim(2);
        let sizes = (global_size, self.model.backbone.patch_size());
        let mut kinds = Vec::new();
        for declared in &self.model.losses {
            // By name, so that a loss more or less changes no other's draws.
            draws.losses.push(declared.loss.draw(&mut Rng::named(self.seed, Stream::Loss, step, &declared.name)));
            let (numbers, tiles) = views::draw_images(declared, (self.seed, step), &batch.sources, sizes)?;
            draws.images.push(numbers);
            draws.tiles.push(tiles);
            let views = declared.loss.views(global_size)?;
            kinds.extend(views.iter().filter(|view| view.for_student()).map(|view| view.crops * images));
        }
        let of_views = |stream, index| rng(stream, index | OF_VIEWS);
        Ok(if kinds.is_empty() { draws } else { draws.with_kinds(self.model.backbone.draw(&of_views, &kinds)) })
    }

    /// What a loss reads about the step.
    pub(super) fn context<'a>(&'a self, at: At, state: &'a State, shards: &'a Shards<'a>) -> StepContext<'a> {
        StepContext { at, seed: self.seed, shards, dtype: self.dtype(), state }
    }

    /// Teachers, student, losses and gradients of one step; `grads` is overwritten, and has the sums of all ranks in this one's
    /// part, unless layers are updated at once: without `update` their gradients are thrown away. What is of the whole batch is the
    /// same on all ranks.
    pub(super) fn forward_backward(
        &self,
        at: At,
        batches: &[Batch],
        draws: &[Draws],
        (grads, update): (&mut Tensor, Update<'_>),
        health: bool,
    ) -> Result<Pass> {
        // A teacher that is sharded runs on all ranks or on none; one of them is asked for its health.
        let runs = || self.model.losses.iter().any(|declared| declared.needs.runs_teacher());
        let health = health && (!self.is_sharded() || runs());
        let teacher = TeacherPass::run(self, batches, draws, at, health)?;
        let mut states = teacher.state.clone();
        let (mut values, mut updated) = (Vec::with_capacity(batches.len()), None);
        let mut shards = sums::OfShards::new(grads);
        for shard in sums::shards_of(batches.len(), &self.ranks)? {
            let grads = shards.begin();
            for micro in shard {
                let batch = (micro, &batches[micro], &draws[micro]);
                let (of_batch, update) =
                    self.micro_batch(at, batch, batches.len(), &teacher, &mut states, (grads, update))?;
                values.push(of_batch);
                updated = update;
            }
            shards.end()?;
        }
        self.optimizer.sum_gradients(grads, &self.ranks)?;
        let measured = match batches.first() {
            Some(batch) if health && self.ranks.leads() => {
                Some(Health::measure(&teacher.of(0), &self.model, &batch.indices().collect::<Vec<_>>())?)
            }
            _ => None,
        };
        let losses = sums::means(&self.ranks, values)?;
        let marks = self.marks(&states)?;
        Ok(Pass { losses, health: measured, state: states, marks, updated })
    }

    /// Of every loss with a state: 0, or not finite where that state is not.
    fn marks(&self, states: &[State]) -> Result<Vec<(String, Tensor)>> {
        let all =
            self.model.losses.iter().zip(states).flat_map(|(declared, state)| state.iter().map(move |s| (declared, s)));
        // Nothing times what is not finite is not finite.
        let mark = |(declared, (name, tensor)): (&DeclaredLoss, &(&str, Tensor))| {
            Ok((format!("the state {name} of {}", declared.name), tensor.scale(0.0)?.sum()?))
        };
        all.map(mark).collect()
    }

    /// Student, losses and gradients, which are added to `grads` or used at once, of one of this rank's `count` micro-batches: the
    /// values of [`Report::losses`].
    fn micro_batch(
        &self,
        at: At,
        (micro, batch, draws): (usize, &Batch, &Draws),
        count: usize,
        teacher: &TeacherPass,
        states: &mut [State],
        (grads, update): (&mut Tensor, Update<'_>),
    ) -> Result<(BTreeMap<String, Tensor>, Option<Updated>)> {
        let dtype = self.dtype();
        let tape = Tape::new();
        let params = Params::tracked(&self.model.layout, self.weights.student(), &tape);
        let named = self.named_teachers(batch, at)?;
        let student = StudentPass::run(self, &params, batch, draws)?;
        let mut values = BTreeMap::new();
        let mut total: Option<Tensor> = None;
        let shards = Shards::one();
        for (i, declared) in self.model.losses.iter().enumerate() {
            let active = |name: &String| named.iter().any(|(active, _)| active == name);
            if !declared.needs.teachers.iter().all(active) {
                continue;
            }
            let _scope = scope::enter(format!("losses.{}", declared.name));
            let outputs = student.outputs(self, batch, (i, micro), teacher, &named);
            let context = self.context(at, &states[i], &shards);
            let value = declared.loss.compute(&params, &outputs, &context)?;
            if value.loss.len() != 1 {
                let problem = format!("loss `{}` gave shape {:?}, not a scalar", declared.name, value.loss.shape());
                return Err(Error::shape("loss", problem));
            }
            if self.ranks.shards() > 1 && !value.state.is_empty() {
                let problem = format!("the loss `{}` hands on state from one micro-batch to the next", declared.name);
                return Err(Error::user(problem, "set batch.shards = 1: shards do not wait for each other"));
            }
            values.insert(format!("loss/{}", declared.name), value.loss.detach().cast(dtype)?);
            for (part, value) in &value.parts {
                values.insert(format!("loss/{}/{part}", declared.name), value.detach().cast(dtype)?);
            }
            let weighted = value.loss.cast(dtype)?.mul(&context.scalar(&declared.weight))?;
            states[i] = next_state(declared, &states[i], value.state)?;
            total = Some(match total {
                Some(total) => total.add(&weighted)?,
                None => weighted,
            });
        }
        // Before its loss begins, a run may have nothing to learn from.
        if let Some(total) = &total {
            values.insert("loss/total".into(), total.detach());
        }
        let learned = total.filter(Tensor::is_tracked);
        let seed = 1.0 / (count * self.ranks.world()) as f64;
        match (&self.optimizer.gradients, learned) {
            (Gradients::Kept, Some(total)) => drop(tape.backward(&total, seed, Some(grads))?),
            (Gradients::Summed(layers), Some(total)) => {
                let mut buckets = Buckets::new(&self.ranks, layers, &params.uses().counts(), grads);
                tape.backward_into(&total, seed, &mut buckets)?;
                buckets.finish(grads, &self.optimizer.windows())?;
            }
            (Gradients::Used(layers), learned) => {
                let updates = update.map(|update| self.updates(update, &values, states)).transpose()?;
                let mut fused = Fused::new(layers, &params.uses().counts(), &self.weights, updates);
                if let Some(total) = learned {
                    tape.backward_into(&total, seed, &mut fused)?;
                }
                return Ok((values, fused.finish()?));
            }
            (Gradients::Kept | Gradients::Summed(_), None) => {}
        }
        Ok((values, None))
    }

    /// What updates layers of a step with these losses and states, if it is taken.
    fn updates<'a>(
        &'a self,
        (update, follows): (&'a DeviceUpdate, bool),
        losses: &BTreeMap<String, Tensor>,
        states: &[State],
    ) -> Result<ByLayer<'a>> {
        let marks = self.marks(states)?;
        let values: Vec<Tensor> = losses
            .values()
            .chain(marks.iter().map(|(_, mark)| mark))
            .map(|x| x.reshape(&[1]))
            .collect::<Result<_>>()?;
        let total = losses.keys().position(|name| name == "loss/total");
        let taken = match values.is_empty() {
            true => Tensor::full(&[], DType::F32, 1.0)?,
            false => update.verdict(&Tensor::cat(&values.iter().collect::<Vec<_>>())?, 0..0, total)?,
        };

        Ok(ByLayer { update, weights: &self.weights, follows, taken, squares: update.squares(), flags: update.flags() })
    }
}
