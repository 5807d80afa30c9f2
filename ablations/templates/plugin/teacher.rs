//! Teacher policy `my_plugin`.

use std::num::NonZeroU64;

use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A copy of the student, renewed every so many steps: the target network of deep Q-learning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Steps between copies.
    pub every: NonZeroU64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { every: NonZeroU64::new(10).expect("10 is not 0") }
    }
}

impl TeacherPolicy for MyPlugin {
    fn start(&self) -> Role {
        Role::Student
    }

    fn after_step(&self, at: At) -> Follow {
        if (at.step + 1) % self.every == 0 {
            Follow::Copy(Role::Student)
        } else {
            Follow::Keep
        }
    }
}

plugin!(TeacherPolicy, "my_plugin", MyPlugin);
