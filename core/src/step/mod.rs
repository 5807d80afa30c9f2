//! One training step.

mod declare;

pub use declare::{declare, loss_context, Declared, DeclaredLoss, CHANNELS, GLOBALS};
