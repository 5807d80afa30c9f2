//! Stages: runs that go on from each other, as one file and one command: pretraining, Gram anchoring, high resolution.
//!
//! Each stage is a run in a folder of its own, in which it says by hash from which weights it started (`parents.json`,
//! `run.json`). What is done is kept, what was interrupted goes on.

mod execute;
mod file;
mod page;

pub use execute::{execute, plan, stale, PlannedStage};
pub use file::{Stage, StageEntry, Stages, StagesFile, FILE};
pub use page::write;
