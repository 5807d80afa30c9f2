//! Matrix products, linear layers, norms, softmax, SwiGLU and rows added to others.

use dfdx::prelude::{
    Axes2, Axes3, Axis, BroadcastTo as _, MeanTo as _, PermuteTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _,
};
use proptest::prelude::*;
use serde_json::{json, Value as Json};

use crate::dfdx_loss::{constant, gelu, unit_rows, Taped};
use crate::ops::Linear;
use crate::rng::{Rng, Stream};
use crate::testing::{cases, fixed, tracked, Bound, Case, Cases, OpOracle, Statement};
use crate::{Result, Tensor};

/// Products of matrices, or of as many as a batch has.
fn product_cases(transposed: bool) -> Cases {
    let options = (0usize..3, 1usize..8, 1usize..8, 1usize..8)
        .prop_map(|(batch, m, k, n)| json!({ "batch": batch, "m": m, "k": k, "n": n }));
    cases(options, move |c| {
        let b = if transposed { [c.size("n"), c.size("k")] } else { [c.size("k"), c.size("n")] };
        [("a", [c.size("m"), c.size("k")]), ("b", b)].map(|(name, shape)| tracked(name, &batched(c, shape))).into()
    })
    .large([json!({ "batch": 2, "m": 17, "k": 24, "n": 33 }), json!({ "batch": 0, "m": 70, "k": 300, "n": 90 })])
}

/// The shape of matrices, with the axis of their batch if it is not 0.
pub(super) fn batched(c: &Case, [rows, columns]: [usize; 2]) -> Vec<usize> {
    Some(c.size("batch")).filter(|batch| *batch > 0).into_iter().chain([rows, columns]).collect()
}

inventory::submit! {
    OpOracle {
        name: "matmul",
        cases: || product_cases(false),
        engine: |c| c.tensor("a").matmul(c.tensor("b")),
        dfdx: |mut s| {
            let (batch, m, k, n) = (s.size("batch").max(1), s.size("m"), s.size("k"), s.size("n"));
            let (a, b) = (s.leaf("a", (batch, m, k)).leaky_trace(), s.leaf("b", (batch, k, n)).leaky_trace());
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
            let (batch, m, k, n) = (s.size("batch").max(1), s.size("m"), s.size("k"), s.size("n"));
            let (a, b) = (s.leaf("a", (batch, m, k)).leaky_trace(), s.leaf("b", (batch, n, k)).leaky_trace());
            Some(s.is(a.matmul(b.permute::<(usize, usize, usize), Axes3<0, 2, 1>>())))
        },
    }
}

/// What a linear layer may stand behind.
const BEFORE: [&str; 5] = ["nothing", "layer_norm", "rms_norm", "gelu", "swiglu"];

fn linear_cases() -> Cases {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let options = (1usize..20, 1usize..8, 1usize..8, proptest::sample::select(&BEFORE[..]), flags);
    let options = options.prop_map(|(rows, i, o, before, (bias, scale, onto))| {
        json!({ "rows": rows, "in": i, "out": o, "before": before, "bias": bias, "scale": scale, "onto": onto })
    });
    cases(options, |c| {
        let (rows, i, o) = (c.size("rows"), c.size("in"), c.size("out"));
        let mut slots = vec![tracked("x", &[rows, i]), tracked("weight", &[o, i])];
        match c.text("before") {
            "layer_norm" => slots.extend([tracked("norm", &[i]), tracked("norm_bias", &[i])]),
            "rms_norm" => slots.push(tracked("norm", &[i])),
            "swiglu" => slots.push(tracked("up", &[rows, i])),
            _ => {}
        }
        slots.extend(c.flag("bias").then(|| tracked("bias", &[o])));
        slots.extend(c.flag("scale").then(|| tracked("scale", &[o])));
        slots.extend(c.flag("onto").then(|| tracked("onto", &[rows, o])));
        slots
    })
    .large(large_linears())
}

/// What stands before a layer, of rows that do not fill a tile, with each of what follows; and rows too wide for the
/// kernels that keep a whole row at hand.
fn large_linears() -> Vec<Json> {
    let of = |(rows, i, o): (usize, usize, usize), before: &str, follows: &[&str]| {
        let has = |what| follows.contains(&what);
        json!({
            "rows": rows, "in": i, "out": o, "before": before, "bias": has("bias"), "scale": has("scale"), "onto": has("onto"),
        })
    };
    let (usual, wide) = ((37, 24, 40), (3, 4200, 8));
    let mut all: Vec<Json> = BEFORE.iter().map(|before| of(usual, before, &["bias"])).collect();
    all.extend(["nothing", "gelu"].map(|before| of(usual, before, &["onto"])));
    all.push(of(usual, "gelu", &["bias", "scale", "onto"]));
    all.extend(["layer_norm", "gelu"].map(|before| of(wide, before, &[])));
    all
}

fn linear_layer(c: &Bound<'_>) -> Result<Tensor> {
    let mut layer = Linear::new(c.tensor("weight"), c.get("bias"));
    layer = match c.case().text("before") {
        "layer_norm" => layer.after_layer_norm(c.tensor("norm"), c.tensor("norm_bias"), 1e-3),
        "rms_norm" => layer.after_rms_norm(c.tensor("norm"), 1e-3),
        "gelu" => layer.after_gelu(),
        "swiglu" => layer.after_swiglu(c.tensor("up")),
        _ => layer,
    };
    if let Some(scale) = c.get("scale") {
        layer = layer.scale(scale);
    }
    if let Some(onto) = c.get("onto") {
        layer = layer.onto(onto);
    }
    layer.of(c.tensor("x"))
}

inventory::submit! {
    OpOracle {
        name: "linear",
        cases: linear_cases,
        engine: linear_layer,
        dfdx: |mut s| {
            let (rows, i, o) = (s.size("rows"), s.size("in"), s.size("out"));
            let before = s.text("before").to_string();
            // Of one number a row, variance is rounding alone.
            if before == "layer_norm" && i == 1 {
                return None;
            }
            let x = s.leaf("x", (rows, i)).leaky_trace();
            let x = match before.as_str() {
                "layer_norm" => layer_norm(&mut s, x, (rows, i), ["norm", "norm_bias"], 1e-3),
                "rms_norm" => rms_norm(&mut s, x, (rows, i), "norm", 1e-3),
                "gelu" => gelu(x),
                "swiglu" => swiglu(x, s.leaf("up", (rows, i)).leaky_trace()),
                _ => x,
            };
            let w = s.leaf("weight", (o, i)).leaky_trace();
            let mut y = x.matmul(w.permute::<(usize, usize), Axes2<1, 0>>());
            let shape = (rows, o);
            if s.flag("bias") {
                y = y + row(&mut s, "bias", shape);
            }
            if s.flag("scale") {
                y = y * row(&mut s, "scale", shape);
            }
            if s.flag("onto") {
                y = y + s.leaf("onto", shape).leaky_trace();
            }
            Some(s.is(y))
        },
    }
}

inventory::submit! {
    // The branch of a block: sums of the gradients' rows pass from layer to layer. Not of fewer numbers: in bf16, what two layers
    // round does not average out in one.
    OpOracle {
        name: "mlp",
        cases: || {
            let options = (4usize..12, 4usize..9, 4usize..9).prop_map(|(rows, d, h)| json!({ "rows": rows, "d": d, "hidden": h }));
            cases(options, |c| {
                let (rows, d, h) = (c.size("rows"), c.size("d"), c.size("hidden"));
                let first = [tracked("norm", &[d]), tracked("norm_bias", &[d]), tracked("up", &[h, d]), tracked("up_bias", &[h])];
                let second = [tracked("down", &[d, h]), tracked("down_bias", &[d]), tracked("scale", &[d])];
                [tracked("x", &[rows, d])].into_iter().chain(first).chain(second).collect()
            })
            .large([json!({ "rows": 37, "d": 24, "hidden": 40 })])
        },
        engine: |c| {
            let up = Linear::new(c.tensor("up"), c.get("up_bias"));
            let h = up.after_layer_norm(c.tensor("norm"), c.tensor("norm_bias"), 1e-3).of(c.tensor("x"))?;
            let down = Linear::new(c.tensor("down"), c.get("down_bias")).after_gelu();
            down.scale(c.tensor("scale")).onto(c.tensor("x")).of(&h)
        },
        dfdx: |mut s| {
            let (rows, d, hidden) = (s.size("rows"), s.size("d"), s.size("hidden"));
            let x = s.leaf("x", (rows, d));
            let h = layer_norm(&mut s, x.leaky_trace(), (rows, d), ["norm", "norm_bias"], 1e-3);
            let h = gelu(affine(&mut s, h, (rows, d, hidden), ["up", "up_bias"]));
            let y = affine(&mut s, h, (rows, hidden, d), ["down", "down_bias"]);
            let scaled = y * row(&mut s, "scale", (rows, d));
            Some(s.is(scaled + x.leaky_trace()))
        },
    }
}

/// `x w^T + b`, with the names of weight and bias.
fn affine(s: &mut Statement<'_>, x: Taped, (rows, i, o): (usize, usize, usize), [weight, bias]: [&str; 2]) -> Taped {
    let w = s.leaf(weight, (o, i)).leaky_trace().permute::<(usize, usize), Axes2<1, 0>>();
    x.matmul(w) + row(s, bias, (rows, o))
}

/// A vector as every row of a matrix.
fn row(s: &mut Statement<'_>, name: &str, shape: (usize, usize)) -> Taped {
    s.leaf(name, (shape.1,)).leaky_trace().broadcast_like::<_, Axis<0>>(&shape)
}

/// `silu(gate) up`.
fn swiglu(gate: Taped, up: Taped) -> Taped {
    gate.with_empty_tape().sigmoid() * gate * up
}

inventory::submit! {
    OpOracle {
        name: "swiglu",
        cases: || {
            let options = (1usize..40).prop_map(|n| json!({ "n": n }));
            cases(options, |c| vec![tracked("gate", &[1, c.size("n")]), tracked("up", &[1, c.size("n")])])
                .large([json!({ "n": 1000 })])
        },
        engine: |c| c.tensor("gate").swiglu(c.tensor("up")),
        dfdx: |mut s| {
            let shape = (1, s.size("n"));
            let (gate, up) = (s.leaf("gate", shape).leaky_trace(), s.leaf("up", shape).leaky_trace());
            Some(s.is(swiglu(gate, up)))
        },
    }
}

/// A number of rows: mostly a few, now and then more than one task handles.
fn some_rows() -> impl Strategy<Value = usize> {
    prop_oneof![7 => 1usize..12, 1 => 100usize..300]
}

fn rows() -> Cases {
    let options = (some_rows(), 1usize..12).prop_map(|(rows, d)| json!({ "rows": rows, "d": d }));
    cases(options, |c| vec![tracked("x", &[c.size("rows"), c.size("d")])])
        .large([json!({ "rows": 5, "d": 300 }), json!({ "rows": 300, "d": 72 })])
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

fn norm_cases(bias: bool) -> Cases {
    let eps = proptest::sample::select(vec![1e-1, 1e-3, 1e-6]);
    let options = (some_rows(), 1usize..12, eps, any::<bool>());
    let options =
        options.prop_map(|(rows, d, eps, residual)| json!({ "rows": rows, "d": d, "eps": eps, "residual": residual }));
    let large =
        |rows: usize, d: usize, residual: bool| json!({ "rows": rows, "d": d, "eps": 1e-6, "residual": residual });
    cases(options, move |c| {
        let d = c.size("d");
        let mut slots = vec![tracked("x", &[c.size("rows"), d]), tracked("weight", &[d])];
        slots.extend(bias.then(|| tracked("bias", &[d])));
        slots
    })
    .large([large(9, 72, false), large(40, 1000, false), large(if bias { 1000 } else { 100 }, 2040, true)])
}

/// The norm, onto its input where the case says so: its gradient is then added to one that is there.
fn residual(c: &Bound<'_>, y: Tensor) -> Result<Tensor> {
    if c.case().flag("residual") {
        y.add(c.tensor("x"))
    } else {
        Ok(y)
    }
}

/// LayerNorm of rows, with the names of its weight and bias.
fn layer_norm(s: &mut Statement<'_>, x: Taped, shape: (usize, usize), [weight, bias]: [&str; 2], eps: f64) -> Taped {
    let mean = x.with_empty_tape().mean::<(usize,), Axis<1>>();
    let centred = x - mean.broadcast_like::<_, Axis<1>>(&shape);
    let variance = centred.with_empty_tape().square().mean::<(usize,), Axis<1>>();
    let unit = centred / (variance + eps).sqrt().broadcast_like::<_, Axis<1>>(&shape);
    unit * row(s, weight, shape) + row(s, bias, shape)
}

fn rms_norm(s: &mut Statement<'_>, x: Taped, shape: (usize, usize), weight: &str, eps: f64) -> Taped {
    let square = x.with_empty_tape().square().mean::<(usize,), Axis<1>>();
    let unit = x / (square + eps).sqrt().broadcast_like::<_, Axis<1>>(&shape);
    unit * row(s, weight, shape)
}

inventory::submit! {
    OpOracle {
        name: "layer_norm",
        cases: || norm_cases(true),
        engine: |c| residual(c, c.tensor("x").layer_norm(c.tensor("weight"), c.tensor("bias"), c.case().number("eps"))?),
        dfdx: |mut s| {
            let (shape, eps) = ((s.size("rows"), s.size("d")), s.number("eps"));
            // Of one number a row, variance is rounding alone.
            if shape.1 == 1 {
                return None;
            }
            let x = s.leaf("x", shape);
            let y = layer_norm(&mut s, x.leaky_trace(), shape, ["weight", "bias"], eps);
            Some(if s.flag("residual") { s.is(y + x.leaky_trace()) } else { s.is(y) })
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "rms_norm",
        cases: || norm_cases(false),
        engine: |c| residual(c, c.tensor("x").rms_norm(c.tensor("weight"), c.case().number("eps"))?),
        dfdx: |mut s| {
            let (shape, eps) = ((s.size("rows"), s.size("d")), s.number("eps"));
            let x = s.leaf("x", shape);
            let y = rms_norm(&mut s, x.leaky_trace(), shape, "weight", eps);
            Some(if s.flag("residual") { s.is(y + x.leaky_trace()) } else { s.is(y) })
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "index_add",
        cases: || {
            let options = (some_rows(), 1usize..6, any::<u64>()).prop_map(|(rows, d, order)| {
                let mut kept = Rng::new(order, Stream::Plugin, 1, 0).permutation(rows);
                kept.truncate(1 + order as usize % rows);
                json!({ "rows": rows, "d": d, "kept": kept })
            });
            cases(options, |c| {
                let (d, kept) = (c.size("d"), c.indices("kept").len());
                vec![tracked("x", &[c.size("rows"), d]), tracked("y", &[kept, d]), fixed("scale", &[kept])]
            })
            .large([json!({ "rows": 300, "d": 24, "kept": [7, 0, 299, 4] })])
        },
        engine: |c| c.tensor("x").index_add(&c.case().rows("kept"), c.tensor("y"), c.tensor("scale")),
        dfdx: |mut s| {
            let (rows, d, kept) = (s.size("rows"), s.size("d"), s.indices("kept"));
            let place = constant(rows, kept.len(), |i, j| if kept[j] == i { s.values("scale")[j] } else { 0.0 });
            let (x, y) = (s.leaf("x", (rows, d)).leaky_trace(), s.leaf("y", (kept.len(), d)).leaky_trace());
            Some(s.is(x + place.matmul(y)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "depthwise_conv",
        cases: || {
            let options = (1usize..3, 1usize..12, 1usize..6, 1usize..5, 0usize..3).prop_map(|(images, h, w, c, reach)| {
                json!({ "images": images, "height": h, "width": w, "channels": c, "kernel": 2 * reach + 1 })
            });
            cases(options, |c| {
                let (channels, k) = (c.size("channels"), c.size("kernel"));
                let x = tracked("x", &[c.size("images"), c.size("height") * c.size("width"), channels]);
                vec![x, tracked("weight", &[channels, 1, k, k]), tracked("bias", &[channels])]
            })
            .large([json!({ "images": 2, "height": 6, "width": 5, "channels": 24, "kernel": 3 })])
        },
        engine: |c| {
            let grid = (c.case().size("height"), c.case().size("width"));
            c.tensor("x").depthwise_conv(grid, c.tensor("weight"), c.tensor("bias"))
        },
        dfdx: |mut s| {
            let [images, h, w, c, k] = ["images", "height", "width", "channels", "kernel"].map(|key| s.size(key));
            let (rows, reach) = (images * h * w, k / 2);
            let (x, weight, bias) = (s.leaf("x", (rows, c)), s.leaf("weight", (c, k * k)), s.leaf("bias", (c,)));
            let mut y = bias.leaky_trace().broadcast_like::<_, Axis<0>>(&(rows, c));
            // Tap by tap: the maps moved by its offset, times its weight of every channel.
            for tap in 0..k * k {
                let moved = constant(rows, rows, move |o, i| {
                    let at = |row: usize| [row / (h * w), row / w % h, row % w];
                    let ([image, row, column], [of, above, left]) = (at(o), at(i));
                    let here = image == of && row + tap / k == above + reach && column + tap % k == left + reach;
                    f64::from(u8::from(here))
                });
                let of_tap = constant(rows, k * k, move |_, t| f64::from(u8::from(t == tap)));
                let weights = of_tap.matmul(weight.leaky_trace().permute::<(usize, usize), Axes2<1, 0>>());
                y = y + moved.matmul(x.leaky_trace()) * weights;
            }
            Some(s.is(y))
        },
    }
}
