//! Functions of one number, arithmetic, vectors met with rows, and sums.

use std::ops::Neg as _;

use dfdx::prelude::{Axis, BroadcastTo as _, Cpu, MeanTo as _, OwnedTape, SumTo as _, Tensor as Dfdx, Trace as _};
use proptest::prelude::*;
use serde_json::json;

use crate::testing::{cases, tracked, Cases, OpOracle, Slot, Stated, Statement};

/// More numbers than a block has threads.
const MANY: usize = 1000;

fn vector() -> Cases {
    cases((1usize..40).prop_map(|n| json!({ "n": n })), |c| vec![tracked("x", &[c.size("n")])])
        .large([json!({ "n": MANY })])
}

fn positive_vector() -> Cases {
    cases((1usize..40).prop_map(|n| json!({ "n": n })), |c| vec![tracked("x", &[c.size("n")]).positive()])
        .large([json!({ "n": MANY })])
}

/// A function of one number: name, random cases, the same in dfdx.
macro_rules! unary {
    ($($name:ident, $cases:expr, |$x:ident| $dfdx:expr;)*) => {$(
        inventory::submit! {
            OpOracle {
                name: stringify!($name),
                cases: $cases,
                engine: |c| c.tensor("x").$name(),
                dfdx: |mut s| {
                    let $x = s.leaf("x", (s.size("n"),)).leaky_trace();
                    Some(s.is($dfdx))
                },
            }
        }
    )*};
}

unary! {
    exp, vector, |x| x.exp();
    ln, positive_vector, |x| x.ln();
    sqrt, positive_vector, |x| x.sqrt();
    sin, vector, |x| x.sin();
    cos, vector, |x| x.cos();
    tanh, vector, |x| x.tanh();
    square, vector, |x| x.square();
    relu, vector, |x| x.relu();
    recip, positive_vector, |x| x.recip();
    abs, vector, |x| x.abs();
    gelu, vector, |x| crate::dfdx_loss::gelu(x);
    sigmoid, vector, |x| x.sigmoid();
    neg, vector, |x| x.neg();
    sum, vector, |x| x.sum::<(), _>();
    mean, vector, |x| x.mean::<(), _>();
}

inventory::submit! {
    OpOracle {
        name: "scale",
        cases: || cases((1usize..40, -3.0..3.0).prop_map(|(n, by)| json!({ "n": n, "by": by })), |c| {
            vec![tracked("x", &[c.size("n")])]
        })
        .large([json!({ "n": MANY, "by": -1.7 })]),
        engine: |c| c.tensor("x").scale(c.case().number("by")),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("n"),)).leaky_trace();
            let by = s.number("by");
            Some(s.is(x * by))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "shift",
        cases: || cases((1usize..40, -3.0..3.0).prop_map(|(n, by)| json!({ "n": n, "by": by })), |c| {
            vec![tracked("x", &[c.size("n")])]
        })
        .large([json!({ "n": MANY, "by": -1.7 })]),
        engine: |c| c.tensor("x").shift(c.case().number("by")),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("n"),)).leaky_trace();
            let by = s.number("by");
            Some(s.is(x + by))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "clamp_min",
        cases: vector,
        engine: |c| c.tensor("x").clamp_min(0.7503),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("n"),)).leaky_trace();
            Some(s.is(x.clamp(0.7503, 1e9)))
        },
    }
}

/// Two operands of one shape, or the second of one element.
fn pair(positive: bool) -> Cases {
    let options = (1usize..20, any::<bool>()).prop_map(|(n, scalar)| json!({ "n": n, "scalar": scalar }));
    cases(options, move |c| {
        let b: Slot = tracked("b", &[if c.flag("scalar") { 1 } else { c.size("n") }]);
        vec![tracked("a", &[c.size("n")]), if positive { b.positive() } else { b }]
    })
    .large([false, true].map(|scalar| json!({ "n": MANY, "scalar": scalar })))
}

type Operand = Dfdx<(usize,), f64, Cpu, OwnedTape<f64, Cpu>>;

fn arithmetic(mut s: Statement<'_>, f: impl FnOnce(Operand, Operand) -> Operand) -> Option<Stated> {
    let n = s.size("n");
    let a = s.leaf("a", (n,)).leaky_trace();
    let b = if s.flag("scalar") {
        // One element a row of a column, so that it meets every element.
        let one = s.leaf("b", (1usize,)).leaky_trace();
        one.broadcast_like::<(usize, usize), Axis<0>>(&(n, 1)).sum::<(usize,), Axis<1>>()
    } else {
        s.leaf("b", (n,)).leaky_trace()
    };
    Some(s.is(f(a, b)))
}

macro_rules! binary {
    ($($name:ident, $cases:expr, $f:expr;)*) => {$(
        inventory::submit! {
            OpOracle {
                name: stringify!($name),
                cases: $cases,
                engine: |c| c.tensor("a").$name(c.tensor("b")),
                dfdx: |s| arithmetic(s, $f),
            }
        }
    )*};
}

binary! {
    add, || pair(false), |a, b| a + b;
    sub, || pair(false), |a, b| a - b;
    mul, || pair(false), |a, b| a * b;
    div, || pair(true), |a, b| a / b;
}

/// Rows and a vector as long as a row, or as there are rows.
fn rows_and(name: &'static str, a_row: bool) -> Cases {
    cases((1usize..12, 1usize..12).prop_map(|(rows, d)| json!({ "rows": rows, "d": d })), move |c| {
        let length = if a_row { c.size("d") } else { c.size("rows") };
        vec![tracked("x", &[c.size("rows"), c.size("d")]), tracked(name, &[length])]
    })
    .large([json!({ "rows": 37, "d": 300 })])
}

macro_rules! broadcast {
    ($($name:ident, $vector:literal, $a_row:literal, $axis:literal, |$x:ident, $v:ident| $f:expr;)*) => {$(
        inventory::submit! {
            OpOracle {
                name: stringify!($name),
                cases: || rows_and($vector, $a_row),
                engine: |c| c.tensor("x").$name(c.tensor($vector)),
                dfdx: |mut s| {
                    let shape = (s.size("rows"), s.size("d"));
                    let $x = s.leaf("x", shape).leaky_trace();
                    let v = s.leaf($vector, (if $a_row { shape.1 } else { shape.0 },)).leaky_trace();
                    let $v = v.broadcast_like::<(usize, usize), Axis<$axis>>(&shape);
                    Some(s.is($f))
                },
            }
        }
    )*};
}

broadcast! {
    add_row, "row", true, 0, |x, v| x + v;
    mul_row, "row", true, 0, |x, v| x * v;
    scale_rows, "factors", false, 1, |x, v| x * v;
}

/// A sum or mean over one axis of three.
fn axis_cases() -> Cases {
    let options = (1usize..6, 1usize..6, 1usize..6, 0usize..3);
    let options = options.prop_map(|(a, b, c, axis)| json!({ "a": a, "b": b, "c": c, "axis": axis }));
    cases(options, |c| vec![tracked("x", &[c.size("a"), c.size("b"), c.size("c")])])
        .large((0..3).map(|axis| json!({ "a": 30, "b": 20, "c": 8, "axis": axis })))
}

macro_rules! over_axis {
    ($($name:ident, $method:ident;)*) => {$(
        inventory::submit! {
            OpOracle {
                name: stringify!($name),
                cases: axis_cases,
                engine: |c| c.tensor("x").$name(c.case().size("axis")),
                dfdx: |mut s| {
                    let x = s.leaf("x", (s.size("a"), s.size("b"), s.size("c"))).leaky_trace();
                    Some(match s.size("axis") {
                        0 => s.is(x.$method::<(usize, usize), Axis<0>>()),
                        1 => s.is(x.$method::<(usize, usize), Axis<1>>()),
                        _ => s.is(x.$method::<(usize, usize), Axis<2>>()),
                    })
                },
            }
        }
    )*};
}

over_axis! {
    sum_axis, sum;
    mean_axis, mean;
}
