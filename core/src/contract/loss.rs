//! What the student is taught.

use std::fmt;

use super::backbone::Features;
use super::pos_encoding::Grid;
use super::scheduler::{At, Schedule};
use super::view::{ImageContext, ImageDraws, View};
use crate::comm::Shards;
use crate::params::{ParamBuilder, Params};
use crate::rng::Rng;
use crate::{DType, Error, Result, Tensor};

/// What a loss asks of a step; the step computes nothing that no loss asked for.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Targets over the whole batch, made of what the teacher's copy of the loss's layers gives: see [`Loss::targets`].
    pub targets: Option<TargetSpec>,
    /// The student's features of the global crops, as by default.
    pub globals: bool,
    /// The student's features of the local crops, as by default.
    pub locals: bool,
    /// Registers, patches of local crops, and tokens before the final norm.
    pub tokens: bool,
    /// Masked patches in the student's global crops.
    pub masks: bool,
    /// The teacher's features in [`Loss::compute`], as by default. Targets do not need this flag.
    pub teacher: bool,
    /// Further teachers, by their names in `[teachers.<name>]`: see [`Outputs::teacher`]. In steps in which one of them is
    /// not [active](super::TeacherPolicy::active) the loss is left out.
    pub teachers: Vec<String>,
    /// Tokens after so many blocks of the backbone, student's and teacher's: see [`ModelOutputs::layers`].
    pub layers: Vec<usize>,
    /// The pixels of the global crops.
    pub pixels: bool,
    /// The images' labels, of so many classes.
    pub classes: Option<usize>,
    /// Fields that the dataset adds to its samples, by name.
    pub fields: Vec<String>,
    /// The whole batch at once, because its statistics run over the batch: a recipe that splits it is refused.
    pub whole_batch: bool,
    /// Fewest images of a (micro-)batch on which it is defined.
    pub min_batch: usize,
}

impl Default for Needs {
    fn default() -> Self {
        Self {
            targets: None,
            globals: true,
            locals: true,
            tokens: false,
            masks: false,
            teacher: true,
            teachers: Vec::new(),
            layers: Vec::new(),
            pixels: false,
            classes: None,
            fields: Vec::new(),
            whole_batch: false,
            min_batch: 0,
        }
    }
}

impl Needs {
    /// Whether the teacher has to run.
    pub(crate) fn runs_teacher(&self) -> bool {
        self.teacher || self.targets.is_some()
    }
}

/// What the targets of a loss are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetSpec {
    /// Numbers K of one target.
    pub width: usize,
    /// Whether a target is a distribution over K prototypes. The log then has the entropy of the targets, and a
    /// collapse is reported.
    pub distribution: bool,
    /// Whether a target is the teacher's features as they are: [`Loss::project`] uses no layers of the loss, so that any model
    /// can teach, also one without heads. K is the teacher's width, which is the loss's key `teacher_dim`.
    pub features: bool,
}

/// A loss's buffers by name.
pub type State = Vec<(&'static str, Tensor)>;

/// A buffer that a loss carries from step to step (a centre); saved in checkpoints.
#[derive(Clone, Debug)]
pub struct StateSpec {
    /// Its name within the loss.
    pub name: &'static str,
    /// Its shape; it starts at zero.
    pub shape: Vec<usize>,
}

/// Everything a loss may read about the step it runs in.
pub struct StepContext<'a> {
    /// When.
    pub at: At,
    /// The run's seed.
    pub seed: u64,
    /// Computes sums over the whole batch, for [`Loss::targets`]: it knows this process's rows and the processes that have
    /// the other rows. A loss's [`compute`](Loss::compute) sees a micro-batch alone.
    pub shards: &'a Shards<'a>,
    /// The type of scalars, losses and factors: that of the features, or f32 beside bf16 features.
    pub dtype: DType,
    /// The loss's own state: see [`state`](Self::state).
    pub state: &'a [(&'static str, Tensor)],
}

impl StepContext<'_> {
    /// A buffer that the loss carries from step to step, as the last call that gave it left it.
    ///
    /// # Errors
    /// If [`Loss::state`] does not declare it.
    pub fn state(&self, name: &str) -> Result<&Tensor> {
        let found = self.state.iter().find(|(declared, _)| *declared == name);
        let missing = || Error::shape("loss", format!("there is no state `{name}`: `Loss::state` has to declare it"));
        found.map(|(_, tensor)| tensor).ok_or_else(missing)
    }

    /// A schedule's value now, as a rank-0 tensor: operations take numbers that change over time as tensors, so that a
    /// recorded step can be replayed with other values.
    pub fn scalar(&self, schedule: &Schedule) -> Tensor {
        super::scalars::scalar(schedule, self.at, self.dtype)
    }
}

/// What a teacher of `[teachers.<name>]` gives of the global crops, after the final norm.
#[derive(Clone, Debug)]
pub struct NamedTeacher {
    /// CLS: `[G*B, D]`.
    pub cls: Tensor,
    /// Patches: `[G*B, P, D]`. Those of larger crops of its own were resized to the student's grid.
    pub patches: Tensor,
}

/// Tokens that the student or a teacher gives, after the final norm. Rows are crop-major: crop 0 of every image, then crop 1.
#[derive(Clone, Copy, Debug)]
pub struct ModelOutputs<'a> {
    /// CLS of the global crops: `[G*B, D]`.
    pub cls: &'a Tensor,
    /// Patches of the global crops, which the student sees masked: `[G*B, P, D]`.
    pub patches: &'a Tensor,
    /// CLS of the local crops: `[L*B, D]`; `None` for a teacher, and if L = 0.
    pub local_cls: Option<&'a Tensor>,
    /// Patches of the local crops: `[L*B, p, D]`; `None` without [`Needs::tokens`], for a teacher, and if L = 0.
    pub local_patches: Option<&'a Tensor>,
    /// Register tokens of the global crops: `[G*B, R, D]`; `None` without [`Needs::tokens`].
    pub registers: Option<&'a Tensor>,
    /// All tokens of the global crops before the final norm: `[G*B, 1 + R + P, D]`; `None` without [`Needs::tokens`].
    pub prenorm: Option<&'a Tensor>,
    /// All tokens of the global crops after each of [`Needs::layers`], before any norm: `[G*B, 1 + R + P, D]`, in their
    /// order.
    pub layers: &'a [Tensor],
    /// Flat indices of the masked patches in `[G*B*P]`: `[M]`, u32.
    pub mask_indices: &'a Tensor,
}

impl ModelOutputs<'_> {
    /// CLS of all crops, global ones first: `[(G+L)*B, D]`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn all_cls(&self) -> Result<Tensor> {
        match self.local_cls {
            Some(local) => Tensor::cat(&[self.cls, local]),
            None => Ok(self.cls.clone()),
        }
    }

    /// The masked patches: `[M, D]`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn masked_patches(&self) -> Result<Tensor> {
        let (b, p, d) = (self.patches.dim(0), self.patches.dim(1), self.patches.dim(2));
        self.patches.reshape(&[b * p, d])?.gather_rows(self.mask_indices)
    }
}

/// What a step computed, as a loss sees it. Rows are crop-major: crop 0 of every image, then crop 1.
pub struct Outputs<'a> {
    /// Images `B`.
    pub images: usize,
    /// Global crops an image, `G`.
    pub globals: usize,
    /// Local crops an image, `L`.
    pub locals: usize,
    /// Patch grid of a global crop.
    pub grid: Grid,
    /// What the student gives.
    pub student: ModelOutputs<'a>,
    /// What the teacher gives of the global crops; no rows without [`Needs::teacher`].
    pub teacher: ModelOutputs<'a>,
    /// What this loss's [`targets`](Loss::targets) gave for this (micro-)batch: a row for every row of its
    /// [`project`](Loss::project).
    pub targets: Option<&'a Tensor>,
    /// Flat indices of the patches that are not masked: `[G*B*P - M]`, u32.
    pub unmasked_indices: &'a Tensor,
    /// 1 / (masked patches of that crop) for every masked patch: `[M]`.
    pub mask_weights: &'a Tensor,
    /// The masked patches of the whole batch over the number of its micro-batches, on all ranks: what a sum over the masked patches of
    /// this one is divided by for a mean over those of the batch, since micro-batches may have other numbers of them.
    pub mask_share: f64,
    /// What the teachers of [`Needs::teachers`] give, by name: see [`teacher`](Self::teacher).
    pub teachers: &'a [(String, NamedTeacher)],
    /// Pixels of the global crops, normalised: `[G*B, C, height, width]`; `None` without [`Needs::pixels`].
    pub pixels: Option<&'a Tensor>,
    /// Class of each image: `[B]`, u32; the number of classes where an image has none. `None` without
    /// [`Needs::classes`].
    pub labels: Option<&'a Tensor>,
    /// What [`Loss::draw`] drew for this step, f64, where the step runs; `None` if that is nothing.
    pub draws: Option<&'a Tensor>,
    /// What [`Loss::draw_image`] drew for each image: `[B, numbers]`, f64, where the step runs; `None` if that is nothing.
    pub image_draws: Option<&'a Tensor>,
    /// The student's features of this loss's [`views`](Loss::views), for the views that the student sees.
    pub views: &'a [Features],
    /// The teacher's features of the views that it sees.
    pub teacher_views: &'a [Features],
    /// What the dataset adds to its samples: `[B, ..]`, f32, by name. See [`field`](Self::field).
    pub fields: &'a [(String, Tensor)],
}

impl Outputs<'_> {
    /// What the teacher `[teachers.<name>]` gives.
    ///
    /// # Errors
    /// If [`Needs::teachers`] does not ask for it.
    pub fn teacher(&self, name: &str) -> Result<&NamedTeacher> {
        let found = self.teachers.iter().find(|(teacher, _)| teacher == name);
        let missing = || Error::shape("loss", format!("there is no teacher `{name}`: `needs` has to ask for it"));
        found.map(|(_, given)| given).ok_or_else(missing)
    }

    /// A field that the dataset adds to its samples, of every image: `[B, ..]`, f32.
    ///
    /// # Errors
    /// If [`Needs::fields`] does not ask for it.
    pub fn field(&self, name: &str) -> Result<&Tensor> {
        let found = self.fields.iter().find(|(field, _)| field == name);
        let missing = || Error::shape("loss", format!("the batch has no field `{name}`: `needs` has to ask for it"));
        found.map(|(_, tensor)| tensor).ok_or_else(missing)
    }
}

/// The rows of a loss's layers in one image.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossRows {
    /// Global crops.
    pub globals: f64,
    /// Local crops.
    pub locals: f64,
    /// Patches of all global crops.
    pub patches: f64,
    /// Those of them that are masked, on average.
    pub masked: f64,
}

/// What a loss's own layers cost for one image.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossCost {
    /// Floating-point operations of the student's forward.
    pub forward_flops: f64,
    /// Floating-point operations of the teacher's [`project`](Loss::project).
    pub project_flops: f64,
    /// Numbers kept from forward to backward.
    pub activations: f64,
    /// Numbers that the last layer gives; there are as many of their gradient.
    pub outputs: f64,
    /// Numbers of the targets.
    pub targets: f64,
    /// Numbers of products over the images of a (micro-)batch, such as a covariance, in the type of losses: those of all its images
    /// together that are kept from forward to backward. There are as many of their gradient.
    pub of_batch: f64,
}

/// A loss and what is worth logging about it.
pub struct LossValue {
    /// The unweighted loss: a rank-0 tensor on the tape.
    pub loss: Tensor,
    /// Parts for the log, `loss/<name>/<part>`: rank-0 tensors, detached.
    pub parts: Vec<(&'static str, Tensor)>,
    /// New state by name; what is not given stays as it is. The next part of the batch and the next step see it.
    pub state: State,
}

impl LossValue {
    /// A loss without parts, that leaves its state as it is.
    pub fn of(loss: Tensor) -> Self {
        Self { loss, parts: Vec::new(), state: Vec::new() }
    }

    /// With parts for the log.
    pub fn with_parts(self, parts: Vec<(&'static str, Tensor)>) -> Self {
        Self { parts, ..self }
    }

    /// With new state by name.
    pub fn with_state(self, state: State) -> Self {
        Self { state, ..self }
    }
}

/// What a loss is to learn from the teacher.
pub struct Targets {
    /// `[rows, K]`: a row for every row of [`Loss::project`].
    pub rows: Tensor,
    /// New state by name, as in [`LossValue::state`].
    pub state: State,
}

impl Targets {
    /// Targets that leave the state as it is.
    pub fn of(rows: Tensor) -> Self {
        Self { rows, state: Vec::new() }
    }
}

/// What a loss is built with.
pub struct LossContext<'a> {
    /// Where it declares its parameters.
    pub params: &'a mut ParamBuilder,
    /// Width of the student's features.
    pub dim: usize,
    /// Images of a micro-batch.
    pub images: usize,
    /// Global crops an image.
    pub globals: usize,
    /// Local crops an image.
    pub locals: usize,
    /// Patches of a global crop.
    pub patches: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Channels of the images.
    pub channels: usize,
}

/// What the student is taught: a scalar from named student and teacher outputs.
///
/// The weight (a schedule) and whether a loss is enabled are the recipe's business, the same for every loss.
///
/// A loss may own parameters: layers of [`nn`](crate::nn) that it declares when it is built, in [`LossContext::params`]. The
/// student's are trained with the rest; the teacher has a copy that follows as its backbone does. Both are named
/// `<loss>_head.*`.
///
/// ```
/// use dinolab_core::contract::{Loss, LossContext, LossValue, Needs, Outputs, StepContext};
/// use dinolab_core::nn::Linear;
/// use dinolab_core::params::Params;
/// use dinolab_core::{plugin, Result};
///
/// /// Mean squared distance of the teacher's CLS and what a linear layer makes of the student's.
/// #[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
/// #[serde(deny_unknown_fields)]
/// struct Config {}
///
/// #[derive(Debug)]
/// struct Predicted {
///     predictor: Linear,
/// }
///
/// impl Predicted {
///     fn build(_: Config, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
///         let (params, dim) = (&mut *context.params, context.dim);
///         Ok(Box::new(Self { predictor: params.scope("predictor", |p| Linear::declare(p, dim, dim, true)) }))
///     }
/// }
///
/// impl Loss for Predicted {
///     fn needs(&self) -> Needs {
///         Needs::default()
///     }
///     fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
///         let predicted = self.predictor.forward(params, out.student.cls)?;
///         Ok(LossValue::of(predicted.sub(out.teacher.cls)?.square()?.mean()?))
///     }
/// }
///
/// plugin!(Loss, "predicted", Config, Predicted::build);
/// ```
pub trait Loss: fmt::Debug + Send + Sync {
    /// What the step has to compute for this loss.
    fn needs(&self) -> Needs;

    /// Something to warn the user of when a run with this loss begins.
    fn note(&self) -> Option<&'static str> {
        None
    }

    /// Buffers carried from step to step: what [`targets`](Self::targets) and [`compute`](Self::compute) give replaces
    /// them, unless the step is not taken because something is not finite.
    fn state(&self) -> Vec<StateSpec> {
        Vec::new()
    }

    /// Random numbers of one step, the same in every part of a batch; `rng` is a function of seed, step and loss. The loss
    /// finds them in [`Outputs::draws`].
    fn draw(&self, rng: &mut Rng) -> Vec<f64> {
        let _ = rng;
        Vec::new()
    }

    /// Further crops for student or teacher, made of global crops of `global_size` pixels a side; [`draw_image`](Self::draw_image)
    /// says how. The loss finds what they give of them in [`Outputs::views`] and [`Outputs::teacher_views`].
    ///
    /// # Errors
    /// If they cannot be made of crops of that size.
    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        let _ = global_size;
        Ok(Vec::new())
    }

    /// Draws numbers and the tiles of all views for one image: a pure function of its context, so that they are the same
    /// however a batch is split.
    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let _ = context;
        ImageDraws::default()
    }

    /// What the loss's own layers make of a model's tokens: `[rows, K]`. Called on the teacher's, with the teacher's
    /// parameters, when [`Needs::targets`] asks for targets; a loss may call it on the student's. In distillation, it
    /// is the method of the distilled model's loss. The default gives the CLS tokens as they are.
    fn project(&self, params: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        let _ = params;
        Ok(outputs.cls.clone())
    }

    /// Turns what [`project`](Self::project) gave of the teacher over all micro-batches into targets, row for row, without a
    /// tape. In a run on several processes, `projected` has only this process's rows: sums over the batch go through
    /// [`StepContext::shards`]. Called when [`Needs::targets`] asks for targets; the default gives the rows as they are.
    fn targets(&self, projected: &Tensor, context: &StepContext<'_>) -> Result<Targets> {
        let _ = context;
        Ok(Targets::of(projected.clone()))
    }

    /// The loss of one (micro-)batch, with the student's parameters.
    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue>;

    /// What the loss's own layers cost for one image; by default nothing.
    fn cost(&self, rows: &LossRows) -> LossCost {
        let _ = rows;
        LossCost::default()
    }
}
