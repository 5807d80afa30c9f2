//! Position encoding `none`: patches do not know where they are.

use dinolab_core::contract::PosEncoding;
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// No position encoding: the control of an ablation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoPosition {}

impl PosEncoding for NoPosition {}

plugin!(PosEncoding, "none", NoPosition);
