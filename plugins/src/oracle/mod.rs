//! The losses once more, in dfdx, from their papers' formulas: what `dinolab check` holds the fast ones to.

mod gram;
mod koleo;
mod prototypes;

use dfdx::prelude::{
    Axis, BroadcastTo as _, Cpu, OwnedTape, SumTo as _, TensorFromVec as _, Trace as _, WithEmptyTape as _,
};
use dinolab_core::dfdx::{self, prelude::HasShape as _};
use dinolab_core::dfdx_loss::Matrix;

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
    let shape = *x.shape();
    let length = x.with_empty_tape().square().sum::<(usize,), Axis<1>>().sqrt();
    x / length.broadcast_like::<_, Axis<1>>(&shape)
}
