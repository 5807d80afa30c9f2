//! What the student is taught.

use std::fmt;

use super::pos_encoding::Grid;
use super::scheduler::{At, Schedule};
use crate::comm::Comm;
use crate::head::HeadConfig;
use crate::{DType, Result, Tensor};

/// Which vectors go through a loss's projection head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadInput {
    /// CLS tokens: of the teacher's global crops, of all the student's crops.
    Cls,
    /// Patches that the student saw masked.
    MaskedPatches,
}

/// What a loss asks of a step; the step computes nothing that no loss asked for.
#[derive(Clone, Debug)]
pub struct Needs {
    /// A projection head of its own, `<loss>_head`, on these vectors.
    pub head: Option<(HeadInput, HeadConfig)>,
    /// Masked patches in the student's global crops.
    pub masks: bool,
    /// The teacher's features, as by default. A loss with a head has its targets without.
    pub teacher: bool,
    /// A Gram teacher.
    pub gram_teacher: bool,
    /// Fewest images of a (micro-)batch on which it is defined.
    pub min_batch: usize,
}

impl Default for Needs {
    fn default() -> Self {
        Self { head: None, masks: false, teacher: true, gram_teacher: false, min_batch: 0 }
    }
}

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
    /// Sums and gathers over devices.
    pub comm: &'a dyn Comm,
    /// The type of scalars, losses and factors: that of the features, or f32 beside bf16 features.
    pub dtype: DType,
    /// The loss's own state, in the order of [`Loss::state`], as the last call that gave one left it.
    pub state: &'a [Tensor],
}

impl StepContext<'_> {
    /// A schedule's value now, as a rank-0 tensor: operations take numbers that change over time as tensors, so that a
    /// recorded step can be replayed with other values.
    pub fn scalar(&self, schedule: &Schedule) -> Tensor {
        crate::step::scalar(schedule, self.at, self.dtype)
    }
}

/// What the Gram teacher gave.
#[derive(Clone, Debug)]
pub struct GramTarget {
    /// Its normalised patches on the student's grid: `[G*B, P, D]`.
    pub patches: Tensor,
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
    /// Student CLS of the global crops, before the head: `[G*B, D]`.
    pub student_cls: &'a Tensor,
    /// Student CLS of the local crops, before the head: `[L*B, D]` (`None` if L = 0).
    pub student_local_cls: Option<&'a Tensor>,
    /// Student patches of the (masked) global crops, before the head: `[G*B, P, D]`.
    pub student_patches: &'a Tensor,
    /// Student logits of this loss's head. For [`HeadInput::Cls`]: `[(G+L)*B, K]`, globals first; for
    /// [`HeadInput::MaskedPatches`]: `[M, K]`.
    pub student_logits: Option<&'a Tensor>,
    /// Teacher CLS of the global crops, before the head: `[G*B, D]`; no rows without [`Needs::teacher`].
    pub teacher_cls: &'a Tensor,
    /// Teacher patches of the global crops, before the head: `[G*B, P, D]`; no crops without [`Needs::teacher`].
    pub teacher_patches: &'a Tensor,
    /// What this loss's [`targets`](Loss::targets) gave for this (micro-)batch: `[G*B, K]` or `[M, K]`.
    pub targets: Option<&'a Tensor>,
    /// Flat indices of the masked patches in `[G*B*P]`: `[M]`, u32.
    pub mask_indices: &'a Tensor,
    /// Flat indices of the other patches: `[G*B*P - M]`, u32.
    pub unmasked_indices: &'a Tensor,
    /// 1 / (masked patches of that crop) for every masked patch: `[M]`.
    pub mask_weights: &'a Tensor,
    /// The Gram teacher's patches, where a loss asked for them.
    pub gram: Option<&'a GramTarget>,
}

/// The teacher's outputs over the whole effective batch (all micro-batches), for targets that look across it.
pub struct TeacherBatch<'a> {
    /// Teacher logits of this loss's head: `[rows, K]`.
    pub logits: &'a Tensor,
}

/// A loss and what is worth logging about it.
pub struct LossValue {
    /// The unweighted loss: a rank-0 tensor on the tape.
    pub loss: Tensor,
    /// Parts for the log, `loss/<name>/<part>`: rank-0 tensors, detached.
    pub parts: Vec<(&'static str, Tensor)>,
    /// The loss's new state, in the order of [`Loss::state`]; empty: it stays as it is. The next part of the batch and
    /// the next step see it.
    pub state: Vec<Tensor>,
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
}

/// What the student is taught: a scalar from named student and teacher outputs.
///
/// The weight (a schedule) and whether a loss is enabled are the recipe's business, the same for every loss.
///
/// ```
/// use dinolab_core::contract::{Loss, LossValue, Needs, Outputs, StepContext};
/// use dinolab_core::Result;
///
/// /// Mean squared distance of student and teacher CLS.
/// #[derive(Debug)]
/// struct ClsDistance;
///
/// impl Loss for ClsDistance {
///     fn needs(&self) -> Needs {
///         Needs::default()
///     }
///     fn compute(&self, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
///         Ok(LossValue::of(out.student_cls.sub(out.teacher_cls)?.square()?.mean()?))
///     }
/// }
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

    /// Turns teacher logits over the whole effective batch into targets, row for row, without a tape; also gives the
    /// new state (in the order of [`state`](Self::state); empty: it stays as it is). Called when the loss has a head; the
    /// default gives the logits as they are.
    fn targets(&self, teacher: &TeacherBatch<'_>, context: &StepContext<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let _ = context;
        Ok((teacher.logits.clone(), Vec::new()))
    }

    /// The loss of one (micro-)batch.
    fn compute(&self, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue>;
}
