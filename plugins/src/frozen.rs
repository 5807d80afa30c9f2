//! Teacher policy `frozen`: a trained model that stays as it is.

use std::path::{Path, PathBuf};

use dinolab_core::contract::{At, Follow, Role, Schedule, TeacherPolicy};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ema::Ema;

/// A trained model that stays as it is and gives the targets: distillation, the way DINOv3's smaller models came about
/// (arXiv:2508.10104, section 5.2).
///
/// The teacher's backbone and heads are built from the recipe of its own run, so a small student can learn from a large
/// teacher; patch size and number of prototypes must be the same. Weights without heads, as they are published, teach by
/// `feature_distillation`. What is evaluated is the exponential moving average of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// A run folder (its newest checkpoint), a checkpoint folder inside one, or a folder that `dinolab import` wrote.
    #[schemars(extend("format" = "path"))]
    pub checkpoint: PathBuf,
    /// Share of the student's average that is kept each step.
    #[serde(default = "momentum")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub momentum: Schedule,
}

fn momentum() -> Schedule {
    Ema::default().momentum
}

impl TeacherPolicy for Frozen {
    fn start(&self) -> Role {
        Role::Student
    }

    fn distils(&self) -> Option<&Path> {
        Some(&self.checkpoint)
    }

    fn after_step(&self, at: At) -> Follow {
        Follow::Ema { momentum: self.momentum.at(at) }
    }
}

plugin!(TeacherPolicy, "frozen", Frozen);
