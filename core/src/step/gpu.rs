//! The step on a GPU: inputs at fixed addresses, the whole step recorded once and replayed, one answer read at its end.
//!
//! A step of new shapes runs eagerly first, which makes plans and constants, and is recorded when it comes again. What
//! cannot be recorded (an operation on the host, numbers that the host computes from step to step) goes on eagerly, and
//! [`Learner::eager_reason`] says why. Steps whose health is measured run eagerly as well, with the same kernels and bits.

use std::collections::{HashMap, HashSet};

use crate::contract::{At, Backbone, Draws, Feed, Follow};
use crate::cuda::{self, Gpu, Graph, Source};
use crate::data::{Batch, DeviceBatches};
use crate::profile::Profile;
use crate::tensor::{catch_out_of_memory, recording};
use crate::{ops, DType, Device, Error, Result, Tensor};

use super::fused::Updated;
use super::pass::Pass;
use super::update::DeviceUpdate;
use super::{follow, Health, Learner, Refusal, Report};

/// What a learner on a GPU has beside its weights.
pub(super) struct GpuStep {
    gpu: &'static Gpu,
    batches: DeviceBatches,
    draws: Vec<PlacedDraws>,
    feed: Feed,
    update: DeviceUpdate,
    /// Kinds of steps that ran eagerly once.
    met: HashSet<Kind>,
    recorded: HashMap<Kind, Recorded>,
    /// Why steps are not recorded.
    reason: Option<String>,
    /// Whether the next step runs eagerly although it was recorded.
    eager: bool,
}

/// What makes two steps the same work on other numbers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    shapes: Vec<Vec<usize>>,
    /// Where the batches are, and what a shared teacher made of them: a recorded step knows them by their addresses.
    places: Vec<u64>,
    /// [`Masks::share`](crate::data::Masks::share) of every batch.
    shares: Vec<u64>,
    draws: Vec<(usize, usize)>,
    /// Which teachers of `[teachers]` are active.
    active: Vec<bool>,
    follows: bool,
}

/// How a step is done; of several ways that ranks could go, the first is for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Eager,
    Record,
    Replay,
}

impl Way {
    const ALL: [Self; 3] = [Self::Eager, Self::Record, Self::Replay];
}

struct Recorded {
    graph: Graph,
    answer: Answer,
    /// Numbers that the graph reads at their addresses.
    _constants: Vec<Tensor>,
}

/// What the host reads at the end of a step, one f32 each: losses, norms, marks of the losses' states, whether the step was
/// taken, and for each layer that is updated by itself whether it was.
struct Answer {
    losses: Vec<String>,
    marks: Vec<String>,
    values: Tensor,
}

/// Recorded steps that are kept: each holds memory.
const MOST_RECORDED: usize = 16;

/// Kinds of steps that are remembered before all of them are forgotten: where batches have other shapes in every step, none comes
/// again.
const MOST_MET: usize = 1024;

/// The draws of one micro-batch, at their fixed address.
struct PlacedDraws {
    lens: (usize, usize),
    micro: usize,
    position: Tensor,
    kept: Tensor,
}

/// The kernels of a run that are worth compiling before they are asked for.
pub(super) struct Kernels {
    gpu: Option<&'static Gpu>,
    sources: Vec<&'static Source>,
}

impl Kernels {
    /// All but variants, and the attention of these backbones with features in `dtype`.
    pub(super) fn of<'a>(device: Device, dtype: DType, backbones: impl Iterator<Item = &'a dyn Backbone>) -> Self {
        let mut sources = cuda::sources();
        sources.retain(|source| !source.variant);
        for attention in backbones.filter_map(|b| b.head_dim()).map(|d| ops::attention_kernels(d, dtype)) {
            if !sources.iter().any(|source| source.name == attention.name) {
                sources.push(attention);
            }
        }
        Self { gpu: device.gpu(), sources }
    }

    /// Compiles those that are not in the cache, and loads all. On a CPU there are none.
    pub(super) fn load(&self) -> Result<()> {
        self.gpu.map_or(Ok(()), |gpu| gpu.load_all(&self.sources).map(drop))
    }
}

impl GpuStep {
    pub(super) fn new(gpu: &'static Gpu, dtype: DType, update: DeviceUpdate) -> Result<Self> {
        Ok(Self {
            gpu,
            batches: DeviceBatches::new(gpu, dtype)?,
            draws: Vec::new(),
            feed: Feed::new(Device::Cuda(gpu.ordinal())),
            update,
            met: HashSet::new(),
            recorded: HashMap::new(),
            reason: gpu.waits_for_every_launch().then(|| "DINOLAB_CUDA_SYNC waits for every launch".into()),
            eager: false,
        })
    }

    /// Copies a micro-batch's draws to where steps of their kind look for them.
    fn place(&mut self, micro: usize, draws: &mut Draws) -> Result<()> {
        let (position, kept) = draws.flat();
        let lens = (position.len(), kept.len());
        let known = self.draws.iter().position(|p| p.micro == micro && p.lens == lens);
        let placed = match known {
            Some(i) => &self.draws[i],
            None => {
                let here = Device::Cuda(self.gpu.ordinal());
                let room = |len, dtype| here.with(|| Tensor::zeros(&[len], dtype));
                let (position, kept) = (room(lens.0, DType::F64), room(lens.1, DType::U32));
                self.draws.push(PlacedDraws { lens, micro, position, kept });
                self.draws.last().expect("pushed just above")
            }
        };
        self.gpu.upload(placed.position.device_address(), bytemuck::cast_slice(&position))?;
        self.gpu.upload(placed.kept.device_address(), bytemuck::cast_slice(&kept))?;
        draws.place(placed.position.clone(), placed.kept.clone());
        Ok(())
    }
}

impl Learner {
    /// Launches, copies and fills of the steps that were recorded on a GPU, one number a kind of step.
    pub fn recorded_nodes(&self) -> Vec<usize> {
        self.gpu_step.iter().flat_map(|g| g.recorded.values()).map(|r| r.graph.nodes).collect()
    }

    /// Why steps on a GPU are not recorded and replayed, if they are not.
    pub fn eager_reason(&self) -> Option<&str> {
        self.gpu_step.as_ref().and_then(|g| g.reason.as_deref())
    }

    /// Runs a step as [`Learner::step`] does, each operation timed, on a GPU launch by launch: where the time goes.
    ///
    /// # Errors
    /// Those of the step.
    pub fn profile(&mut self, step: u64, batches: &[Batch]) -> Result<Profile> {
        let Some(own) = self.gpu_step.as_mut() else {
            let (profile, done) = Profile::on_cpu(|| self.step(step, batches, false));
            return done.map(|_| profile);
        };
        own.eager = true;
        let profiled = Profile::of(own.gpu, || self.step(step, batches, false));
        self.gpu_step.as_mut().expect("as above").eager = false;
        profiled.map(|(profile, _)| profile)
    }

    /// [`Learner::step`] on a GPU, after the policies have acted.
    pub(super) fn step_on_gpu(&mut self, at: At, batches: &[Batch], health: bool) -> Result<Report> {
        let mut own = self.gpu_step.take().expect("called for a learner on a GPU");
        let inside = self.ranks.enter("a step on the GPUs");
        let result = self.run_on_gpu(&mut own, at, batches, health);
        drop(inside);
        self.gpu_step = Some(own);
        result
    }

    fn run_on_gpu(&mut self, own: &mut GpuStep, at: At, batches: &[Batch], health: bool) -> Result<Report> {
        let mut draws = self.draws(at.step, batches)?;
        for (micro, draws) in draws.iter_mut().enumerate() {
            own.place(micro, draws)?;
        }
        // The loader makes them on the device; batches of another origin are copied there.
        let batches = match batches.iter().all(|b| b.global.gpu().is_some()) {
            true => batches.to_vec(),
            false => own.batches.upload(batches)?.to_vec(),
        };
        self.teach(at, &batches)?;
        let follow = follow(self.teacher.after_step(at), at)?;
        let momentum = if let Follow::Ema { momentum } = follow { Some(momentum) } else { None };
        let (limits, reach) = self.limits(at)?;
        own.update.write(at, &self.optimizer, self.weights.updates(at), limits, momentum, &self.last_norms)?;
        let of_batches = batches.iter().flat_map(Batch::tensors).map(Tensor::device_address);
        let kind = Kind {
            shapes: batches.iter().flat_map(Batch::tensors).map(|t| t.shape().to_vec()).collect(),
            places: of_batches.chain(self.places_of_teacher()).collect(),
            shares: batches.iter().map(|batch| batch.masks.share.to_bits()).collect(),
            draws: draws.iter().map(|d| (d.flat().0.len(), d.flat().1.len())).collect(),
            active: self.named.iter().map(|teacher| teacher.policy.active(at)).collect(),
            follows: momentum.is_some(),
        };
        let fresh = !own.recorded.contains_key(&kind) && own.recorded.len() < MOST_RECORDED;
        let way = match own.recorded.contains_key(&kind) {
            _ if health || own.eager => Way::Eager,
            true => Way::Replay,
            false if own.reason.is_none() && fresh && own.met.contains(&kind) => Way::Record,
            false => Way::Eager,
        };
        // All ranks go the same way, or they would wait for each other in different places: one that has recorded its kind of step
        // does so again where another has not.
        let way = Way::ALL[self.ranks.least(way as u64)? as usize];
        let mut eager = way == Way::Eager;
        if way == Way::Record {
            self.record(own, &kind, at, &batches, &draws)?;
            eager = self.ranks.least(u64::from(own.recorded.contains_key(&kind)))? == 0;
        }
        let mut measured = None;
        let (losses, marks, values) = match own.recorded.get(&kind).filter(|_| !eager) {
            Some(recorded) => {
                own.feed.fill(at)?;
                recorded.graph.launch()?;
                let Answer { losses, marks, values } = &recorded.answer;
                (losses.clone(), marks.clone(), values.to_f64_vec())
            }
            None => {
                let GpuStep { feed, update, .. } = own;
                let (answer, health) =
                    feed.during(at, || self.whole_step(update, at, &batches, &draws, health, momentum.is_some()))?;
                measured = health;
                if own.met.len() == MOST_MET {
                    own.met.clear();
                }
                own.met.insert(kind);
                (answer.losses, answer.marks, answer.values.to_f64_vec())
            }
        };
        let (losses_of, rest) = values.split_at(losses.len());
        let modules: Vec<String> = self.optimizer.modules().map(String::from).collect();
        let (norms_of, rest) = rest.split_at(modules.len());
        let (marks_of, taken) = rest.split_at(marks.len());
        let marks: Vec<(String, f64)> = marks.into_iter().zip(marks_of.iter().copied()).collect();
        let report = Report {
            losses: losses.into_iter().zip(losses_of.iter().copied()).collect(),
            grad_norms: modules.into_iter().zip(norms_of.iter().copied()).collect(),
            lr: self.optimizer.lr(at),
            weight_decay: self.optimizer.weight_decay(at),
            health: measured,
            ..Report::default()
        };
        let (taken, flags) = (taken[0] != 0.0, &taken[1..]);
        if taken && flags.contains(&0.0) {
            let bad = report.grad_norms.iter().find(|(_, norm)| !norm.is_finite());
            let what = bad.map_or("is too large for the weights to stay finite".into(), |(name, _)| {
                format!("of {name} is not finite")
            });
            let problem = format!("step {}: the gradient {what}, and some layers are updated already", at.step + 1);
            let help = "go on from the newest checkpoint with --resume; optimizer.update = \"whole\" sees it before an update, says where \
                it began, and can skip the step";
            return Err(Error::user(problem, help));
        }
        let refusal = match taken {
            true => None,
            false => own.feed.during(at, || self.refusal(at, &batches, &draws, &report, &marks, limits))?,
        };
        // At the very limit the device may round to the other side.
        let otherwise = || Refusal::NonFinite("the update of the weights".into());
        let refusal = if taken { None } else { Some(refusal.unwrap_or_else(otherwise)) };
        self.after_step(at, report, refusal, reach, follow)
    }

    /// Forward, losses, backward, norms and the update, all given to the device; gives where its answer will be.
    fn whole_step(
        &mut self,
        update: &DeviceUpdate,
        at: At,
        batches: &[Batch],
        draws: &[Draws],
        health: bool,
        follows: bool,
    ) -> Result<(Answer, Option<Health>)> {
        let _step = cuda::step_scope();
        let mut grads = self.weights.take_grads();
        // However it ends, the gradients are put back: a recording that fails is followed by an eager step.
        let done = catch_out_of_memory(|| {
            let into = (&mut grads, Some((update, follows)));
            let Pass { losses, health, state, marks, updated } =
                self.forward_backward(at, batches, draws, into, health)?;
            let norms = match &updated {
                Some(updated) => updated.norms.clone(),
                None => update.norms(&grads, &self.ranks)?,
            };
            let one = |t: &Tensor| t.reshape(&[1]);
            let of_losses: Vec<Tensor> = losses.values().map(one).collect::<Result<_>>()?;
            let of_states: Vec<Tensor> = marks.iter().map(|(_, mark)| one(mark)).collect::<Result<_>>()?;
            let values = Tensor::cat(&of_losses.iter().chain([&norms]).chain(&of_states).collect::<Vec<_>>())?;
            let total = losses.keys().position(|name| name == "loss/total");
            let (taken, flags) = match updated {
                Some(Updated { taken, flags, .. }) => (taken, Some(flags)),
                None => {
                    let of_norms = losses.len()..losses.len() + norms.len();
                    let taken = update.verdict(&values, of_norms, total)?;
                    update.apply(&self.optimizer, &mut self.weights, &grads, &norms, &taken, follows)?;
                    self.weights.spread(follows, &self.ranks)?;
                    (taken, None)
                }
            };
            for ((_, old), (_, new)) in self.weights.loss_state.iter_mut().flatten().zip(state.iter().flatten()) {
                if old.device_address() != new.device_address() {
                    ops::copy_if(old, new, &taken)?;
                }
            }
            let taken = one(&taken)?;
            let values = Tensor::cat(&[&values, &taken].into_iter().chain(&flags).collect::<Vec<_>>())?;
            let marks = marks.into_iter().map(|(name, _)| name).collect();
            Ok((Answer { losses: losses.into_keys().collect(), marks, values }, health))
        });
        self.weights.grads = grads;
        done
    }

    /// Records a step of this kind, or notes why that cannot be done.
    fn record(&mut self, own: &mut GpuStep, kind: &Kind, at: At, batches: &[Batch], draws: &[Draws]) -> Result<()> {
        let GpuStep { gpu, feed, update, .. } = own;
        let gpu: &'static Gpu = gpu;
        let (recorded, constants) = recording(|| {
            feed.during(at, || Graph::record(gpu, || self.whole_step(update, at, batches, draws, false, kind.follows)))
        });
        match (recorded, constants) {
            (_, Err(reason)) => own.reason = Some(reason),
            (Ok((graph, (answer, _))), Ok(constants)) => {
                own.recorded.insert(kind.clone(), Recorded { graph, answer, _constants: constants });
            }
            (Err(error), Ok(_)) => own.reason = Some(error.problem()),
        }
        Ok(())
    }
}
