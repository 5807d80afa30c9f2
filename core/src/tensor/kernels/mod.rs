//! Kernels that tensors and their tape are made of: elements as they are written, sums over rows, the greatest element, and the
//! loops of every kernel on the CPU. Whatever has a formula of its own is an operation: see [`ops`](crate::ops).

pub(crate) mod blocks;
pub(crate) mod columns;
mod greatest;
pub mod parallel;
mod write;

pub(crate) use columns::RowSums;
pub(crate) use greatest::greatest;
pub(crate) use write::{accumulate, convert, fill};
