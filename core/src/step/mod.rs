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
mod gathered;
mod gpu;
mod health;
mod layers;
mod moments;
mod optimizer;
mod outputs;
mod parts;
mod pass;
mod refusal;
mod report;
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
pub use report::Report;
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
use crate::comm::{Comm, Ranks};
use crate::contract::{At, Crops, Features, Follow, Mode, TeacherPolicy};
use crate::data::Batch;
use crate::params::{Layout, Params};
use crate::profile;
use crate::recipe::{Precision, Recipe};
use crate::registry::Chosen;
use crate::tensor::catch_out_of_memory;
use crate::{cuda, DType, Device, Error, Result, Tensor};

use bounds::Reach;
use distillation::TeacherModel;
use following::follow;
use gpu::{GpuStep, Kernels};
pub(crate) use moments::Storage;
pub(crate) use optimizer::{from_the_start, Groups};
use pass::Pass;
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
    /// What is evaluated, if it is gathered for that.
    evaluated: Option<Tensor>,
    /// Of the last step that was taken, as in [`Report::grad_norms`].
    last_norms: BTreeMap<String, f64>,
    gpu_step: Option<GpuStep>,
}

/// A teacher of `[teachers.<name>]`.
pub(crate) struct Teacher {
    pub(crate) name: String,
    pub(crate) policy: Box<dyn TeacherPolicy>,
}

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
        let mut learner = Self::unstarted(recipe, peers, from_the_start)?;
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
        let mut learner = Self::unstarted(recipe, peers, |_, _| saved::began(&checkpoint.optimizer))?;
        let Self { model, weights, kernels, ranks, .. } = &mut learner;
        kernels.load()?;
        weights.restore(checkpoint, model)?;
        weights.bounds(model, ranks)?;
        learner.restore_rest(&checkpoint.optimizer)?;
        Ok(learner)
    }

    /// All zero; `began` as in [`Groups::new`].
    fn unstarted(
        recipe: &Recipe,
        peers: Peers<'_>,
        began: impl FnOnce(&Layout, &[&str]) -> Result<optimizer::Began>,
    ) -> Result<Self> {
        let model = declare(recipe)?;
        let teacher = recipe.teacher.build(&mut ())?;
        let distilled = TeacherModel::of(teacher.as_ref(), &model, recipe)?;
        let named = named_teachers(recipe, &model)?;
        let device = recipe.device()?;
        let dtype = recipe.dtype(device);
        let mut optimizer = Groups::new(&recipe.optimizer, &model.layout, model.backbone.depth(), peers.share, began)?;
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
            evaluated: None,
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
    /// no weight, moment or state is changed and the report says what it was: the run may go on after
    /// [`pass_over`](Self::pass_over).
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

    /// Whether what is evaluated has to be [gathered](Self::gather_evaluated) for it.
    pub(crate) fn is_sharded(&self) -> bool {
        self.weights.evaluated().is_sharded()
    }

    /// The rank that leads gets all weights of what is evaluated; all ranks have to ask for it.
    ///
    /// # Errors
    /// If a rank fails, or there is no room for them.
    pub(crate) fn gather_evaluated(&mut self) -> Result<()> {
        let keep = self.ranks.leads();
        let _on = self.device.enter();
        self.evaluated = catch_out_of_memory(|| self.weights.gather_evaluated(&self.ranks, keep))?;
        Ok(())
    }

    /// Lets them go.
    pub(crate) fn forget_evaluated(&mut self) {
        self.evaluated = None;
    }

    /// What the teacher, or without one the student, gives of normalised pixels `[B, 3, h, w]`, in evaluation, in host memory: what probes and
    /// pictures see.
    pub fn teacher_features(&self, pixels: &Tensor) -> Result<Features> {
        let _products = cuda::with_tf32(self.tf32);
        let features = self.device.with(|| {
            catch_out_of_memory(|| {
                // Between steps their memory is free.
                let _step = cuda::step_scope();
                let flat = self.evaluated.as_ref().unwrap_or_else(|| self.weights.evaluated().rounded());
                let params = Params::frozen(&self.model.layout, flat);
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
