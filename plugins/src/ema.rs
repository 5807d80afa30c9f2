//! Teacher policy `ema`: the exponential moving average of the student.

use dinolab_core::contract::{At, Follow, Role, Schedule, TeacherPolicy};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The exponential moving average of the student's weights.
///
/// `teacher = momentum * teacher + (1 - momentum) * student` after every optimizer update (Tarvainen and Valpola,
/// arXiv:1703.01780); it starts as a copy of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ema {
    /// Share of the teacher that is kept each step.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub momentum: Schedule,
}

impl Default for Ema {
    fn default() -> Self {
        Self { momentum: Schedule::constant(0.994) }
    }
}

impl TeacherPolicy for Ema {
    fn start(&self) -> Role {
        Role::Student
    }

    fn after_step(&self, at: At) -> Follow {
        Follow::Ema { momentum: self.momentum.at(at) }
    }
}

plugin!(TeacherPolicy, "ema", Ema);
