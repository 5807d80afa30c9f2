//! For authors of plugins: random inputs, laws, and checks of values and gradients.
//!
//! - [`strategies`]: feature batches (collapsed, orthogonal, duplicated, huge, tiny, non-finite), masks and crops, for
//!   crate `proptest`;
//! - [`laws`]: what may hold for a function (invariance to rotation, order and scale; a right gradient; finite where
//!   features have collapsed), one line in a test each;
//! - [`contracts`]: what holds for every plugin of a kind;
//! - [`check()`]: what `dinolab check` does: operations against [`OpOracle`]s, losses against
//!   [`LossOracle`](loss_oracle::LossOracle)s, central differences and laws, on random [`Case`]s; a failure is shrunk to
//!   the smallest case and printed as code.
//!
//! It is part of the library, not a Cargo feature: the program's `check` needs it, and every plugin crate links the
//! program.

mod case;
mod check;
pub mod contracts;
mod gradient;
pub mod laws;
pub mod loss_oracle;
mod on_device;
mod op_oracle;
mod ops;
mod step_case;
pub mod strategies;

pub use case::{cases, fixed, normal, tracked, Bound, Case, Cases, Slot};
pub use check::{check, hold, names, Failure, Outcome};
pub use on_device::{tolerance, OnDevice};
pub use op_oracle::{OpOracle, Stated, Statement};
