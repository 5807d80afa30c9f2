//! Attention, image by image and head by head.

use dfdx::prelude::{Axes2, Axis, PermuteTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _};
use proptest::prelude::*;
use serde_json::json;

use crate::dfdx_loss::{constant, picking, Taped};
use crate::ops::Segment;
use crate::testing::{cases, fixed, tracked, OpOracle};
use crate::Tensor;

inventory::submit! {
    OpOracle {
        name: "attention",
        cases: || {
            let patches = prop_oneof![7 => 1usize..6, 1 => 20usize..60];
            let options = (1usize..3, 0usize..3, patches, 1usize..3, 1usize..3, any::<bool>(), any::<bool>());
            let options = options.prop_map(|(images, prefix, patches, heads, half, rotary, bias)| {
                json!({
                    "images": images, "prefix": prefix, "patches": patches, "heads": heads, "head_dim": 2 * half,
                    "rotary": rotary, "bias": bias,
                })
            });
            cases(options, |c| {
                let (patches, heads, d) = (c.size("patches"), c.size("heads"), c.size("head_dim"));
                let tokens = c.size("images") * (c.size("prefix") + patches);
                let mut slots = vec![tracked("qkv", &[tokens, 3 * heads * d])];
                slots.extend(c.flag("rotary").then(|| fixed("angles", &[patches, d])));
                slots.extend(c.flag("bias").then(|| tracked("bias", &[heads, patches, patches])));
                slots
            })
        },
        engine: |c| {
            let case = c.case();
            let table = |f: fn(f64) -> f64| {
                let angles = c.tensor("angles");
                let values: Vec<f64> = angles.to_f64_vec().into_iter().map(f).collect();
                Tensor::from_f64(&values, angles.shape(), angles.dtype())
            };
            let rotary = if case.flag("rotary") { Some((table(f64::sin)?, table(f64::cos)?)) } else { None };
            let tokens = case.size("prefix") + case.size("patches");
            let segment = Segment { images: case.size("images"), tokens, rotary, bias: c.get("bias").cloned() };
            c.tensor("qkv").clone().attention(case.size("heads"), &[segment])
        },
        dfdx: |mut s| {
            let [images, prefix, patches, heads, d] =
                ["images", "prefix", "patches", "heads", "head_dim"].map(|key| s.size(key));
            let (tokens, width) = (prefix + patches, heads * d);
            let all = images * tokens;
            let qkv = s.leaf("qkv", (all, 3 * width));
            let bias = s.flag("bias").then(|| s.leaf("bias", (heads * patches, patches)));
            // Turns patch tokens: x cos + rotate_half(x) sin; the tokens before them stay.
            let turned = |x: Taped| -> Taped {
                if !s.flag("rotary") {
                    return x;
                }
                let angles = s.values("angles");
                let of = |f: fn(f64) -> f64, rest: f64| {
                    constant(tokens, d, move |i, j| i.checked_sub(prefix).map_or(rest, |p| f(angles[p * d + j])))
                };
                let half = constant(d, d, |i, j| match (i + d / 2 == j, j + d / 2 == i) {
                    (true, _) => 1.0,
                    (_, true) => -1.0,
                    _ => 0.0,
                });
                x.with_empty_tape() * of(f64::cos, 1.0) + x.matmul(half) * of(f64::sin, 0.0)
            };
            let mut out: Option<Taped> = None;
            for (image, head) in (0..images).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                let own: Vec<usize> = (image * tokens..(image + 1) * tokens).collect();
                let part = |which: usize| {
                    let columns = constant(3 * width, d, |i, j| f64::from(u8::from(i == which * width + head * d + j)));
                    picking(&own, all).matmul(qkv.leaky_trace()).matmul(columns)
                };
                let (q, k, v) = (turned(part(0)), turned(part(1)), part(2));
                let mut scores = q.matmul(k.permute::<(usize, usize), Axes2<1, 0>>()) / (d as f64).sqrt();
                if let Some(bias) = &bias {
                    let own: Vec<usize> = (head * patches..(head + 1) * patches).collect();
                    let place = |transposed: bool| {
                        let (rows, columns) = if transposed { (patches, tokens) } else { (tokens, patches) };
                        constant(rows, columns, move |i, j| {
                            f64::from(u8::from(if transposed { j == i + prefix } else { i == j + prefix }))
                        })
                    };
                    let bias = picking(&own, heads * patches).matmul(bias.leaky_trace());
                    scores = scores + place(false).matmul(bias).matmul(place(true));
                }
                let y = scores.softmax::<Axis<1>>().matmul(v);
                let rows = constant(all, tokens, |i, j| f64::from(u8::from(i == image * tokens + j)));
                let columns = constant(d, width, |i, j| f64::from(u8::from(j == head * d + i)));
                let placed = rows.matmul(y).matmul(columns);
                out = Some(match out {
                    Some(out) => out + placed,
                    None => placed,
                });
            }
            let out = out.expect("there is an image and a head");
            Some(s.is(out))
        },
    }
}
