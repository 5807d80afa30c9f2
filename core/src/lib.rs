//! The core library of dinolab: every plugin and every program is built on it.
//!
//! Data flows one way: a [`recipe`] names plugins, the [`registry`] builds them, [`resolved`] checks the recipe against the
//! model that it declares, [`data`] makes a batch, the [`step`] runs teacher, student and losses, the [`tensor`] tape computes
//! the gradients, the optimizer updates flat [`params`], teacher policies update the teachers, and [`train`] writes logs and
//! checkpoints.
//!
//! No two of these modules depend on each other; a workspace test enforces this.
//!
//! This crate knows no plugin by name: backbones, position encodings, losses, schedulers, teacher policies,
//! datasets, augmentations, maskings, probes and optimizers are implementations of the traits in [`contract`], registered with
//! [`plugin!`].

#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod checkpoint;
pub mod comm;
pub mod contract;
pub mod cuda;
pub mod data;
pub mod dfdx_loss;
mod dtype;
mod error;
pub mod files;
pub mod nn;
pub mod ops;
pub mod params;
pub mod problem;
pub mod profile;
pub mod recipe;
pub mod registry;
pub mod resolved;
pub mod rng;
pub mod scope;
pub mod step;
pub mod tensor;
pub mod testing;
pub mod text;
pub mod train;
pub mod weights;

pub use cuda::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use tensor::Tensor;

// Re-exported for plugin crates, so that a plugin needs one dependency and `plugin!` can name them.
pub use dfdx;
pub use inventory;
pub use proptest;
pub use schemars;
pub use serde;
pub use serde_json;
