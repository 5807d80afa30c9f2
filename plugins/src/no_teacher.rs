//! Teacher policy `none`: there is no teacher.

use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// No teacher, as a recipe without a `[teacher]` table means: no weights are kept for one, and probes see the student. Losses that
/// learn from a teacher are refused; VICReg, Barlow Twins, InfoNCE, SIGReg and the pretext tasks need none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoTeacher {}

impl TeacherPolicy for NoTeacher {
    fn exists(&self) -> bool {
        false
    }

    fn start(&self) -> Role {
        Role::Student
    }

    fn after_step(&self, _: At) -> Follow {
        Follow::Keep
    }
}

plugin!(default TeacherPolicy, "none", NoTeacher);
