//! Independent statements in dfdx of every operation of the engine, written from their definitions, not from the kernels.
//!
//! An operation that only moves numbers, or mixes them linearly, is stated as the product with the matrix that its
//! definition gives.

mod attention;
mod elementwise;
mod layers;
mod losses;
mod moves;
