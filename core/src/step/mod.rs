//! The training step: teacher, student, losses, backward, clipping, the optimizer, teachers' policies.
//!
//! ```text
//! for every micro-batch: the teacher on the global crops; what each loss's layers make of its tokens
//! over the whole batch:  each loss turns that into targets
//! for every micro-batch: further teachers, on crops of their own size; student on all crops, packed; losses; backward
//! once:                  gradient norms, optimizer + EMA over flat memory, the further teachers' policies
//! ```

mod bounds;
mod buckets;
mod continued;
mod declare;
mod distillation;
mod flat;
mod following;
mod fused;
mod gpu;
mod health;
mod layers;
mod moments;
mod optimizer;
mod outputs;
mod parts;
mod refusal;
mod saved;
mod shared;
mod sources;
mod spikes;
mod sums;
mod update;
mod updates;
mod views;
mod weights;

pub(crate) use declare::{build_backbone, build_loss};
pub use declare::{declare, Declared, DeclaredLoss, GLOBALS};
pub(crate) use distillation::distilled_model;
pub use flat::Flat;
pub use health::Health;
pub(crate) use layers::Layers;
pub use optimizer::ParamRule;
pub use parts::Share;
pub(crate) use saved::Stored;
pub use shared::SharedTeacher;
pub use sources::{adaptations, check_sources, check_sources_of, sources_of};
pub(crate) use sources::{frozen_sources, no_step_left};
pub use updates::Updates;
pub use weights::Weights;

pub(crate) use continued::new_teacher;
pub(crate) use views::check_views;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::comm::{Comm, Ranks, Shards};
use crate::contract::{At, Crops, Draws, Features, Follow, Mode, State, StepContext, TeacherPolicy};
use crate::data::Batch;
use crate::params::Params;
use crate::profile;
use crate::recipe::{Precision, Recipe};
use crate::registry::Chosen;
use crate::rng::{Rng, Stream};
use crate::scope;
use crate::tensor::{catch_out_of_memory, Tape};
use crate::{cuda, DType, Device, Error, Result, Tensor};

use bounds::Reach;
use buckets::Buckets;
use distillation::TeacherModel;
use following::follow;
use fused::{ByLayer, Fused, Updated};
use gpu::{GpuStep, Kernels};
pub(crate) use moments::Storage;
use optimizer::Gradients;
pub(crate) use optimizer::Groups;
use outputs::{next_state, StudentPass, TeacherPass};
use refusal::{Limits, Refusal};
use spikes::Spikes;
use update::DeviceUpdate;

/// With whom a learner learns; alone, if not said.
#[derive(Clone, Copy, Default)]
pub struct Peers<'a> {
    /// Which of the ranks of a run it is.
    pub share: Share,
    /// What it shares with other students of a frozen teacher.
    pub teacher: Option<&'a Arc<SharedTeacher>>,
}

impl Peers<'_> {
    /// The other ranks that `comm` joins: the learner then has to [join](Learner::join) them.
    pub fn of(comm: &dyn Comm) -> Self {
        Self { share: Share::of(comm), teacher: None }
    }
}

/// A model in training: weights, optimizer, losses and the teachers' policies.
pub struct Learner {
    model: Declared,
    weights: Weights,
    optimizer: Groups,
    teacher: Box<dyn TeacherPolicy>,
    distilled: Option<TeacherModel>,
    /// That model for several students.
    shared: Option<Arc<SharedTeacher>>,
    /// Those of `[teachers]` that a loss asks for.
    named: Vec<Teacher>,
    ranks: Ranks,
    seed: u64,
    total: u64,
    locals: usize,
    device: Device,
    kernels: Kernels,
    /// Whether products on a GPU drop bits of f32.
    tf32: bool,
    spikes: Option<Spikes>,
    /// Of the last step that was taken, as in [`Report::grad_norms`].
    last_norms: BTreeMap<String, f64>,
    gpu_step: Option<GpuStep>,
}

/// A teacher of `[teachers.<name>]`.
pub(crate) struct Teacher {
    pub(crate) name: String,
    pub(crate) policy: Box<dyn TeacherPolicy>,
}

/// What a forward and backward pass gave, where it ran.
struct Pass {
    /// As in [`Report`], rank 0.
    losses: BTreeMap<String, Tensor>,
    health: Option<Health>,
    /// The losses' next state.
    state: Vec<State>,
    /// Of every loss with a state: 0, or not finite where that state is not.
    marks: Vec<(String, Tensor)>,
    /// What an update leaves that went with the backward pass.
    updated: Option<Updated>,
}

/// An update that goes with the backward pass, and whether the teacher follows in it.
type Update<'a> = Option<(&'a DeviceUpdate, bool)>;

/// What one step gave.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// `loss/total`, `loss/<name>` (unweighted), `loss/<name>/<part>`; the mean over micro-batches.
    pub losses: BTreeMap<String, f64>,
    /// L2 norm of every sub-model's gradient before clipping, by sub-model.
    pub grad_norms: BTreeMap<String, f64>,
    /// Learning rate and weight decay of this step.
    pub lr: f64,
    /// Weight decay of this step.
    pub weight_decay: f64,
    /// Known ways in which features and targets degenerate, measured when asked for.
    pub health: Option<Health>,
    /// What was not finite, if anything: then no weight, no moment and no state was changed.
    pub non_finite: Option<String>,
    /// What the total loss jumped above, if it did: then nothing was changed either.
    pub spike: Option<f64>,
}

impl Report {
    /// Every number by the name that logs have for it.
    pub fn numbers(&self) -> Vec<(String, f64)> {
        let mut numbers: Vec<(String, f64)> = self.losses.iter().map(|(k, v)| (logged_as(k), *v)).collect();
        numbers.push(("lr".into(), self.lr));
        numbers.push(("weight_decay".into(), self.weight_decay));
        numbers.extend(self.grad_norms.iter().map(|(m, v)| (format!("grad_norm/{m}"), *v)));
        if let Some(health) = &self.health {
            numbers.push(("health/feature_std".into(), health.feature_std));
            numbers.push(("health/effective_rank".into(), health.effective_rank));
            numbers.push(("health/cls_patch_cosine".into(), health.cls_patch_cosine));
            for (loss, marginal, sharpness) in &health.targets {
                numbers.push((format!("health/{loss}/marginal_entropy"), *marginal));
                numbers.push((format!("health/{loss}/target_entropy"), *sharpness));
            }
        }
        numbers
    }
}

/// The name under which a part of a loss is logged: `health/<loss>/<what>` if the loss calls it `health/<what>`.
fn logged_as(name: &str) -> String {
    let health = name.strip_prefix("loss/").and_then(|rest| rest.split_once("/health/"));
    health.map_or_else(|| name.into(), |(loss, what)| format!("health/{loss}/{what}"))
}

/// Added to the indices of what the backbone draws for views: a view more changes nothing that is drawn for other crops.
const OF_VIEWS: u64 = 1 << 24;

impl Learner {
    /// A model as the recipe says, with weights at their start.
    ///
    /// # Errors
    /// If a plugin refuses to be built, or weights to start from cannot be read.
    pub fn new(recipe: &Recipe) -> Result<Self> {
        Self::new_with(recipe, Peers::default())
    }

    /// The same for one of several ranks, or students.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if it cannot share the teacher.
    pub fn new_with(recipe: &Recipe, peers: Peers<'_>) -> Result<Self> {
        let mut learner = Self::unstarted(recipe, peers)?;
        let Self { model, weights, teacher, named, kernels, ranks, .. } = &mut learner;
        // Each has parts that only one core can do; together they fill them all.
        let (compiled, drawn) = rayon::join(|| kernels.load(), || weights.student.draw(&model.layout, recipe.seed));
        compiled?;
        drawn?;
        weights.start(recipe, model, teacher.as_ref(), named)?;
        weights.bounds(model, ranks)?;
        Ok(learner)
    }

    /// The model of a checkpoint of this recipe; files that the recipe starts from are not read.
    ///
    /// # Errors
    /// If a plugin refuses to be built, or a tensor is missing or has another shape.
    pub fn from_checkpoint(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Self> {
        Self::from_checkpoint_with(recipe, checkpoint, Peers::default())
    }

    /// The same for one of several ranks, or students.
    ///
    /// # Errors
    /// As [`from_checkpoint`](Self::from_checkpoint), and if it cannot share the teacher.
    pub fn from_checkpoint_with(recipe: &Recipe, checkpoint: &Checkpoint, peers: Peers<'_>) -> Result<Self> {
        let mut learner = Self::unstarted(recipe, peers)?;
        let Self { model, weights, kernels, ranks, .. } = &mut learner;
        kernels.load()?;
        weights.restore(checkpoint, model)?;
        weights.bounds(model, ranks)?;
        learner.restore_rest(&checkpoint.optimizer)?;
        Ok(learner)
    }

    fn unstarted(recipe: &Recipe, peers: Peers<'_>) -> Result<Self> {
        let model = declare(recipe)?;
        let teacher = recipe.teacher.build(&mut ())?;
        let distilled = TeacherModel::of(teacher.as_ref(), &model, recipe)?;
        let named = named_teachers(recipe, &model)?;
        let device = recipe.device()?;
        let dtype = recipe.dtype(device);
        let mut optimizer = Groups::new(&recipe.optimizer, &model.layout, model.backbone.depth(), peers.share)?;
        if Layers::are_summed(recipe.batch.micro_batches, peers.share.world()) {
            optimizer.sum_by_layer();
        } else if recipe.optimizer.is_fused() && device != Device::Cpu {
            optimizer.update_by_layer();
        }
        let names = named.iter().map(|teacher| teacher.name.as_str());
        let new = || Weights::new(&model, &optimizer, teacher.exists(), names, dtype);
        let weights = catch_out_of_memory(|| device.with(new))?;
        let backbones = [&model].into_iter().chain(distilled.as_ref().map(|d| &d.model)).map(|m| m.backbone.as_ref());
        let kernels = Kernels::of(device, dtype, backbones);
        let gpu_step = device.gpu().map(|gpu| GpuStep::new(gpu, dtype, DeviceUpdate::new(gpu, &optimizer)?));
        let mut learner = Self {
            model,
            weights,
            optimizer,
            teacher,
            distilled,
            shared: None,
            named,
            ranks: Ranks::one(recipe.batch.shards),
            seed: recipe.seed,
            total: recipe.steps,
            locals: recipe.crops.local_count,
            device,
            kernels,
            tf32: recipe.precision == Precision::Tf32,
            spikes: recipe.on_spike.as_ref().map(Spikes::new),
            last_norms: BTreeMap::new(),
            gpu_step: gpu_step.transpose()?,
        };
        if let Some(shared) = peers.teacher {
            learner.share(shared, recipe.crops.global_size)?;
        }
        learner.distilled.as_ref().map_or(Ok(()), |teacher| teacher.read_once())?;
        Ok(learner)
    }

    /// Joins the other ranks of a run, all of which have the same weights.
    ///
    /// # Errors
    /// If they cannot share the shards, have other weights, or are on GPUs that NCCL does not join, or if this learner was made
    /// for another rank.
    pub fn join(&mut self, comm: Arc<dyn Comm>) -> Result<()> {
        let (share, own) = (Share::of(comm.as_ref()), self.optimizer.parts.share());
        if share != own {
            let problem = format!("a learner made for {own} is to be {share}");
            return Err(Error::user(problem, "this is a fault of the program: make it with that `Share`"));
        }
        let ranks = Ranks::new(comm, self.ranks.shards())?;
        let ranks = match self.device.gpu() {
            Some(gpu) => ranks.on(gpu)?,
            None => ranks,
        };
        if ranks.world() > 1 {
            ranks.check_reduction(self.device)?;
            // What all of them compute with.
            let hash = blake3::hash(self.weights.student().to(Device::Cpu).as_bytes()).to_hex();
            ranks.comm().hold_same("the hash of the weights", &hash)?;
        }
        self.ranks = ranks;
        self.weights.agree(&self.model, &self.ranks)
    }

    /// The ranks of the run, of which this is one.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Backbone, heads and losses.
    pub fn model(&self) -> &Declared {
        &self.model
    }

    /// All weights and the losses' state.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// All weights, to be replaced by those of a checkpoint or another implementation.
    pub fn weights_mut(&mut self) -> &mut Weights {
        self.weights.forget_bounds();
        &mut self.weights
    }

    /// How the optimizer treats every parameter, in the order of the layout.
    pub fn param_rules(&self) -> &[ParamRule] {
        &self.optimizer.rules
    }

    /// Side of the crops that teachers of `[teachers]` have of their own, if one has: all that have are of one size.
    pub fn teacher_crop_size(&self) -> Option<usize> {
        self.named.iter().find_map(|teacher| teacher.policy.crop_size())
    }

    /// The type of weights and losses; features may be narrower.
    pub fn dtype(&self) -> DType {
        self.weights.student.dtype()
    }

    /// The type of features and crops.
    pub fn features_dtype(&self) -> DType {
        self.weights.student().dtype()
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Steps whose update was skipped.
    pub fn skipped(&self) -> u64 {
        self.weights.skipped
    }

    /// Those of them that were skipped because the loss jumped.
    pub fn spikes(&self) -> u64 {
        self.spikes.as_ref().map_or(0, Spikes::skipped)
    }

    /// Runs step `step` (0-based) on its micro-batches. When something is not finite, or would not be after the update,
    /// no weight, moment or state is changed and the report says what it was.
    ///
    /// # Errors
    /// If shapes do not fit, a policy's weights cannot be read, or the device fails or is full.
    pub fn step(&mut self, step: u64, batches: &[Batch], health: bool) -> Result<Report> {
        let at = At { step, total: self.total };
        let _on = self.device.enter();
        let _products = cuda::with_tf32(self.tf32);
        catch_out_of_memory(|| {
            self.before_step(at)?;
            match self.device {
                Device::Cpu => self.step_on_cpu(at, batches, health),
                Device::Cuda(_) => self.step_on_gpu(at, batches, health),
            }
        })
    }

    fn step_on_cpu(&mut self, at: At, batches: &[Batch], health: bool) -> Result<Report> {
        self.teach(at, batches)?;
        let draws = self.draws(at.step, batches)?;
        let (limits, reach) = self.limits(at)?;
        let mut grads = self.weights.take_grads();
        let pass = self.forward_backward(at, batches, &draws, (&mut grads, None), health);
        let norms = {
            let _part = profile::part("norms of gradients");
            self.optimizer.grad_norms(&grads, &self.ranks)
        };
        self.weights.grads = grads;
        let Pass { losses, health, state, marks, .. } = pass?;
        let report = Report {
            losses: losses.into_iter().map(|(name, loss)| (name, loss.item())).collect(),
            grad_norms: norms?,
            lr: self.optimizer.lr(at),
            weight_decay: self.optimizer.weight_decay(at),
            health,
            ..Report::default()
        };
        let marks: Vec<(String, f64)> = marks.into_iter().map(|(name, mark)| (name, mark.item())).collect();
        let refusal = self.refusal(at, batches, &draws, &report, &marks, limits)?;
        let follow = follow(self.teacher.after_step(at), at)?;
        if refusal.is_none() {
            self.weights.loss_state = state;
            let momentum = if let Follow::Ema { momentum } = follow { Some(momentum) } else { None };
            let _part = profile::part("optimizer and EMA");
            let norms = self.clipped_by(&report.grad_norms).clone();
            self.optimizer.update(at, &mut self.weights, &norms, momentum)?;
            self.weights.spread(momentum.is_some(), &self.ranks)?;
        }
        self.after_step(at, report, refusal, reach, follow)
    }

    /// Ends a step that was taken, or refused: counts it, and lets the teachers follow.
    fn after_step(
        &mut self,
        at: At,
        mut report: Report,
        refusal: Option<Refusal>,
        reach: Reach,
        follow: Follow,
    ) -> Result<Report> {
        if let (Some(spikes), Some(&loss)) = (&mut self.spikes, report.losses.get("loss/total")) {
            spikes.seen(loss, matches!(refusal, Some(Refusal::Spike(_))));
        }
        match refusal {
            None => {
                self.weights.moved(reach, self.clipped(&report));
                self.last_norms.clone_from(&report.grad_norms);
                self.follow_after(at, follow)?;
                return Ok(report);
            }
            Some(Refusal::NonFinite(what)) => report.non_finite = Some(what),
            Some(Refusal::Spike(limit)) => report.spike = Some(limit),
        }
        self.weights.skipped += 1;
        Ok(report)
    }

    /// The random numbers of the student's forward on each of this rank's micro-batches.
    fn draws(&self, step: u64, batches: &[Batch]) -> Result<Vec<Draws>> {
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
    fn context<'a>(&'a self, at: At, state: &'a State, shards: &'a Shards<'a>) -> StepContext<'a> {
        StepContext { at, seed: self.seed, shards, dtype: self.dtype(), state }
    }

    /// Teachers, student, losses and gradients of one step; `grads` is overwritten, and has the sums of all ranks in this one's
    /// part, unless layers are updated at once: without `update` their gradients are thrown away. What is of the whole batch is the
    /// same on all ranks.
    fn forward_backward(
        &self,
        at: At,
        batches: &[Batch],
        draws: &[Draws],
        (grads, update): (&mut Tensor, Update<'_>),
        health: bool,
    ) -> Result<Pass> {
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

    /// What the teacher, or without one the student, gives of normalised pixels `[B, 3, h, w]`, in evaluation, in host memory: what probes and
    /// pictures see.
    pub fn teacher_features(&self, pixels: &Tensor) -> Result<Features> {
        let _products = cuda::with_tf32(self.tf32);
        let features = self.device.with(|| {
            catch_out_of_memory(|| {
                // Between steps their memory is free.
                let _step = cuda::step_scope();
                let params = Params::frozen(&self.model.layout, self.weights.evaluated());
                let crops = Crops::global(pixels.to(self.device));
                let mut features = self.model.backbone.forward(&params, &[crops], Mode::Eval)?;
                features.pop().ok_or_else(|| Error::shape("backbone", "no features"))?.to_host()
            })
        })?;
        Ok(features)
    }
}

/// The teachers of `[teachers]` that losses ask for, in the order of their names.
pub(crate) fn named_teachers(recipe: &Recipe, model: &Declared) -> Result<Vec<Teacher>> {
    let wanted = model.teachers();
    let entries = recipe.teachers.0.iter().filter(|(name, _)| wanted.contains(name.as_str()));
    let built = |(name, entry): (&String, &Chosen<dyn TeacherPolicy>)| {
        Ok(Teacher { name: name.clone(), policy: entry.build(&mut ())? })
    };
    entries.map(built).collect()
}
