//! Matrix products, norms, softmax, SwiGLU and residual connections.

use std::ops::Add as _;

use dfdx::prelude::{
    Axes2, Axis, BroadcastTo as _, Cpu, MeanTo as _, PermuteTo as _, TensorFromVec as _, Trace as _, TryMatMul as _,
    WithEmptyTape as _,
};
use proptest::prelude::*;
use serde_json::json;

use crate::dfdx_loss::{constant, unit_rows, Taped};
use crate::rng::{Rng, Stream};
use crate::testing::{cases, fixed, tracked, Case, OpOracle, Statement};

fn product_cases(transposed: bool) -> BoxedStrategy<Case> {
    let options = (1usize..8, 1usize..8, 1usize..8).prop_map(|(m, k, n)| json!({ "m": m, "k": k, "n": n }));
    cases(options, move |c| {
        let b = if transposed { [c.size("n"), c.size("k")] } else { [c.size("k"), c.size("n")] };
        vec![tracked("a", &[c.size("m"), c.size("k")]), tracked("b", &b)]
    })
}

inventory::submit! {
    OpOracle {
        name: "matmul",
        cases: || product_cases(false),
        engine: |c| c.tensor("a").matmul(c.tensor("b")),
        dfdx: |mut s| {
            let (m, k, n) = (s.size("m"), s.size("k"), s.size("n"));
            let (a, b) = (s.leaf("a", (m, k)).leaky_trace(), s.leaf("b", (k, n)).leaky_trace());
            Some(s.is(a.matmul(b)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "matmul_t",
        cases: || product_cases(true),
        engine: |c| c.tensor("a").matmul_t(c.tensor("b")),
        dfdx: |mut s| {
            let (m, k, n) = (s.size("m"), s.size("k"), s.size("n"));
            let (a, b) = (s.leaf("a", (m, k)).leaky_trace(), s.leaf("b", (n, k)).leaky_trace());
            Some(s.is(a.matmul(b.permute::<(usize, usize), Axes2<1, 0>>())))
        },
    }
}

fn linear_cases() -> BoxedStrategy<Case> {
    let options = (1usize..20, 1usize..8, 1usize..8, any::<bool>());
    let options = options.prop_map(|(rows, i, o, bias)| json!({ "rows": rows, "in": i, "out": o, "bias": bias }));
    cases(options, |c| {
        let (i, o) = (c.size("in"), c.size("out"));
        let mut slots = vec![tracked("x", &[c.size("rows"), i]), tracked("weight", &[o, i])];
        slots.extend(c.flag("bias").then(|| tracked("bias", &[o])));
        slots
    })
}

/// `x W^T + b`.
fn linear(s: &mut Statement<'_>) -> Taped {
    let (rows, i, o) = (s.size("rows"), s.size("in"), s.size("out"));
    let (x, w) = (s.leaf("x", (rows, i)).leaky_trace(), s.leaf("weight", (o, i)).leaky_trace());
    let y = x.matmul(w.permute::<(usize, usize), Axes2<1, 0>>());
    if s.flag("bias") {
        y + s.leaf("bias", (o,)).leaky_trace().broadcast_like::<_, Axis<0>>(&(rows, o))
    } else {
        y
    }
}

inventory::submit! {
    OpOracle {
        name: "linear",
        cases: linear_cases,
        engine: |c| c.tensor("x").linear(c.tensor("weight"), c.get("bias")),
        dfdx: |mut s| {
            let y = linear(&mut s);
            Some(s.is(y))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "linear_gelu",
        cases: linear_cases,
        engine: |c| c.tensor("x").linear_gelu(c.tensor("weight"), c.get("bias")),
        dfdx: |mut s| {
            let z = linear(&mut s);
            // The slope by differences: see the oracle of `gelu`.
            let (shape, values) = ((s.size("rows"), s.size("out")), z.as_vec());
            let here = Cpu::default().tensor_from_vec(values, shape);
            let at = |by: f64| here.clone().add(by).accurate_gelu();
            let h = 1e-3;
            let slope = ((at(h) - at(-h)) * 8.0 - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            Some(s.is((z - here.clone()) * slope + at(0.0)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "swiglu",
        cases: || {
            let options = (1usize..40).prop_map(|n| json!({ "n": n }));
            cases(options, |c| vec![tracked("gate", &[c.size("n")]), tracked("up", &[c.size("n")])])
        },
        engine: |c| c.tensor("gate").swiglu(c.tensor("up")),
        dfdx: |mut s| {
            let n = s.size("n");
            let (gate, up) = (s.leaf("gate", (n,)).leaky_trace(), s.leaf("up", (n,)).leaky_trace());
            Some(s.is(gate.with_empty_tape().sigmoid() * gate * up))
        },
    }
}

fn rows() -> BoxedStrategy<Case> {
    let options = (1usize..12, 1usize..12).prop_map(|(rows, d)| json!({ "rows": rows, "d": d }));
    cases(options, |c| vec![tracked("x", &[c.size("rows"), c.size("d")])])
}

inventory::submit! {
    OpOracle {
        name: "softmax",
        cases: rows,
        engine: |c| c.tensor("x").softmax(),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("rows"), s.size("d"))).leaky_trace();
            Some(s.is(x.softmax::<Axis<1>>()))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "log_softmax",
        cases: rows,
        engine: |c| c.tensor("x").log_softmax(),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("rows"), s.size("d"))).leaky_trace();
            Some(s.is(x.log_softmax::<Axis<1>>()))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "l2_normalize",
        cases: rows,
        engine: |c| c.tensor("x").l2_normalize(1e-12),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("rows"), s.size("d"))).leaky_trace();
            Some(s.is(unit_rows(x)))
        },
    }
}

fn norm_cases(bias: bool) -> BoxedStrategy<Case> {
    let eps = proptest::sample::select(vec![1e-1, 1e-3, 1e-6]);
    let options = (1usize..12, 1usize..12, eps).prop_map(|(rows, d, eps)| json!({ "rows": rows, "d": d, "eps": eps }));
    cases(options, move |c| {
        let d = c.size("d");
        let mut slots = vec![tracked("x", &[c.size("rows"), d]), tracked("weight", &[d])];
        slots.extend(bias.then(|| tracked("bias", &[d])));
        slots
    })
}

inventory::submit! {
    OpOracle {
        name: "layer_norm",
        cases: || norm_cases(true),
        engine: |c| c.tensor("x").layer_norm(c.tensor("weight"), c.tensor("bias"), c.case().number("eps")),
        dfdx: |mut s| {
            let (shape, eps) = ((s.size("rows"), s.size("d")), s.number("eps"));
            // Of one number a row, variance is rounding alone.
            if shape.1 == 1 {
                return None;
            }
            let x = s.leaf("x", shape).leaky_trace();
            let mean = x.with_empty_tape().mean::<(usize,), Axis<1>>();
            let centred = x - mean.broadcast_like::<_, Axis<1>>(&shape);
            let variance = centred.with_empty_tape().square().mean::<(usize,), Axis<1>>();
            let unit = centred / (variance + eps).sqrt().broadcast_like::<_, Axis<1>>(&shape);
            let weight = s.leaf("weight", (shape.1,)).leaky_trace().broadcast_like::<_, Axis<0>>(&shape);
            let bias = s.leaf("bias", (shape.1,)).leaky_trace().broadcast_like::<_, Axis<0>>(&shape);
            Some(s.is(unit * weight + bias))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "rms_norm",
        cases: || norm_cases(false),
        engine: |c| c.tensor("x").rms_norm(c.tensor("weight"), c.case().number("eps")),
        dfdx: |mut s| {
            let (shape, eps) = ((s.size("rows"), s.size("d")), s.number("eps"));
            let x = s.leaf("x", shape).leaky_trace();
            let square = x.with_empty_tape().square().mean::<(usize,), Axis<1>>();
            let unit = x / (square + eps).sqrt().broadcast_like::<_, Axis<1>>(&shape);
            let weight = s.leaf("weight", (shape.1,)).leaky_trace().broadcast_like::<_, Axis<0>>(&shape);
            Some(s.is(unit * weight))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "residual",
        cases: || {
            let options = (1usize..10, 1usize..6, any::<bool>(), any::<u64>()).prop_map(|(rows, d, gamma, order)| {
                let mut kept = Rng::new(order, Stream::Plugin, 1, 0).permutation(rows);
                kept.truncate(1 + order as usize % rows);
                json!({ "rows": rows, "d": d, "gamma": gamma, "kept": kept })
            });
            cases(options, |c| {
                let (d, kept) = (c.size("d"), c.indices("kept").len());
                let mut slots = vec![tracked("x", &[c.size("rows"), d]), tracked("y", &[kept, d]), fixed("scale", &[kept])];
                slots.extend(c.flag("gamma").then(|| tracked("gamma", &[d])));
                slots
            })
        },
        engine: |c| {
            let rows = c.case().rows("kept");
            c.tensor("x").residual(c.tensor("y"), c.get("gamma"), Some((&rows, c.tensor("scale"))))
        },
        dfdx: |mut s| {
            let (rows, d, kept) = (s.size("rows"), s.size("d"), s.indices("kept"));
            let place = constant(rows, kept.len(), |i, j| if kept[j] == i { s.values("scale")[j] } else { 0.0 });
            let (x, y) = (s.leaf("x", (rows, d)).leaky_trace(), s.leaf("y", (kept.len(), d)).leaky_trace());
            let branch = if s.flag("gamma") {
                y * s.leaf("gamma", (d,)).leaky_trace().broadcast_like::<_, Axis<0>>(&(kept.len(), d))
            } else {
                y
            };
            Some(s.is(x + place.matmul(branch)))
        },
    }
}
