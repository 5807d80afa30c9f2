//! Independent statements in dfdx of every operation of the engine, written from their definitions, not from the kernels.
//!
//! An operation that only moves numbers, or mixes them linearly, is stated as the product with the matrix that its
//! definition gives.

mod attention;
mod elementwise;
mod layers;
mod losses;
mod moves;

use dfdx::prelude::{
    Axis, BroadcastTo as _, Cpu, OwnedTape, SumTo as _, TensorFromVec as _, Trace as _, WithEmptyTape as _,
};

use crate::dfdx_loss::Matrix;

/// A matrix on the tape.
type Taped = Matrix<OwnedTape<f64, Cpu>>;

/// A constant matrix with these elements, ready to be multiplied with taped ones.
fn constant(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f64) -> Taped {
    let values = (0..rows * columns).map(|i| f(i / columns, i % columns)).collect();
    Cpu::default().tensor_from_vec::<(usize, usize)>(values, (rows, columns)).leaky_traced()
}

/// The matrix whose product with `n` rows picks `rows` of them.
fn picking(rows: &[usize], n: usize) -> Taped {
    constant(rows.len(), n, |i, j| f64::from(u8::from(rows[i] == j)))
}

/// Rows divided by their length.
fn unit_rows(x: Taped) -> Taped {
    let shape = *dfdx::prelude::HasShape::shape(&x);
    let length = x.with_empty_tape().square().sum::<(usize,), Axis<1>>().sqrt();
    x / length.broadcast_like::<_, Axis<1>>(&shape)
}
