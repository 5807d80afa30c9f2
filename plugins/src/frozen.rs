//! Teacher policy `frozen`: fixed weights from a file.

use std::path::PathBuf;

use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Fixed weights from a checkpoint: distillation, or a Gram teacher that is never refreshed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// A run folder, a checkpoint folder or a safetensors file.
    pub checkpoint: PathBuf,
}

impl TeacherPolicy for Frozen {
    fn start(&self) -> Role {
        Role::Checkpoint(self.checkpoint.clone())
    }

    fn after_step(&self, _: At) -> Follow {
        Follow::Keep
    }
}

plugin!(TeacherPolicy, "frozen", Frozen);
