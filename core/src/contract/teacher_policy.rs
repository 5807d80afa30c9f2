//! How a teacher's weights follow the student's.

use std::fmt;

use super::scheduler::At;

/// A set of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The trained model.
    Student,
    /// The model that gives targets.
    Teacher,
    /// Weights in a file: a checkpoint folder, a run folder or a safetensors file.
    Checkpoint(std::path::PathBuf),
}

/// What happens to a teacher's weights.
#[derive(Clone, Debug, PartialEq)]
pub enum Follow {
    /// Nothing.
    Keep,
    /// `teacher = momentum * teacher + (1 - momentum) * student`.
    Ema {
        /// In [0, 1].
        momentum: f64,
    },
    /// All weights are replaced.
    Copy(Role),
}

/// How a teacher's weights follow the student: exponential moving average, frozen, or a snapshot refreshed at times.
///
/// A policy is a pure function of the step, so that a resumed run does the same and a timeline can be drawn before.
///
/// ```
/// use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
///
/// /// A copy of the student every `every` steps.
/// #[derive(Debug)]
/// struct Periodic {
///     every: u64,
/// }
///
/// impl TeacherPolicy for Periodic {
///     fn start(&self) -> Role {
///         Role::Student
///     }
///     fn after_step(&self, at: At) -> Follow {
///         if (at.step + 1) % self.every == 0 { Follow::Copy(Role::Student) } else { Follow::Keep }
///     }
/// }
///
/// let policy = Periodic { every: 2 };
/// assert_eq!(policy.after_step(At { step: 0, total: 10 }), Follow::Keep);
/// assert_eq!(policy.after_step(At { step: 1, total: 10 }), Follow::Copy(Role::Student));
/// ```
pub trait TeacherPolicy: fmt::Debug + Send + Sync {
    /// Whether there is a teacher at all. Without one no weights are kept for it, losses that learn from it are refused, and
    /// what is evaluated is the student.
    fn exists(&self) -> bool {
        true
    }

    /// Where the weights come from at the start of a run.
    fn start(&self) -> Role;

    /// What happens before the step `at.step` (0-based) is computed.
    fn before_step(&self, at: At) -> Follow {
        let _ = at;
        Follow::Keep
    }

    /// What happens after the step's optimizer update. `[teacher]` acts first, then those of `[teachers]`.
    fn after_step(&self, at: At) -> Follow;

    /// Whether the step needs this teacher's outputs: one whose loss has not begun yet costs nothing.
    fn active(&self, at: At) -> bool {
        let _ = at;
        true
    }

    /// A trained model that gives the targets in place of this teacher: distillation. A run folder, or a checkpoint folder
    /// inside one, whose recipe says what backbone and heads it has. This teacher is then only the student's moving
    /// average, which is used for evaluation.
    fn distils(&self) -> Option<&std::path::Path> {
        None
    }

    /// Side in pixels of this teacher's own, larger crops; `None`: it sees the student's global crops.
    fn crop_size(&self) -> Option<usize> {
        None
    }

    /// Whether the bicubic resize of those crops' patch grid to the student's is anti-aliased (the reference's is not).
    fn antialias(&self) -> bool {
        false
    }

    /// Events worth marking on a timeline: (step, what happens).
    fn events(&self, total: u64) -> Vec<(u64, String)> {
        let _ = total;
        Vec::new()
    }
}
