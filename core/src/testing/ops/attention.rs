//! Attention, image by image and head by head.

use dfdx::prelude::{Axes2, Axis, PermuteTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _};
use proptest::prelude::*;
use serde_json::{json, Value as Json};

use crate::dfdx_loss::{constant, picking, Taped};
use crate::ops::Segment;
use crate::testing::{cases, fixed, tracked, Case, OpOracle};
use crate::Tensor;

/// Segments of images, and of patches in each of their images.
fn segments(c: &Case) -> impl Iterator<Item = (usize, usize)> {
    c.indices("images").into_iter().zip(c.indices("patches"))
}

inventory::submit! {
    OpOracle {
        name: "attention",
        cases: || {
            let patches = prop_oneof![7 => 1usize..6, 1 => 20usize..60];
            let drawn = proptest::collection::vec((1usize..3, patches), 1..3);
            let options = (drawn, 0usize..3, 1usize..3, 1usize..3, any::<bool>(), any::<bool>());
            let options = options.prop_map(|(drawn, prefix, heads, half, rotary, bias)| {
                let (images, patches): (Vec<_>, Vec<_>) = drawn.into_iter().unzip();
                json!({
                    "images": images, "prefix": prefix, "patches": patches, "heads": heads, "head_dim": 2 * half,
                    "rotary": rotary, "bias": bias,
                })
            });
            let large = |rotary: bool, bias: bool| -> Json {
                json!({
                    "images": [2, 1], "prefix": 1, "patches": [70, 3], "heads": 2, "head_dim": 16, "rotary": rotary, "bias": bias,
                })
            };
            cases(options, |c| {
                let (heads, d) = (c.size("heads"), c.size("head_dim"));
                let tokens = segments(c).map(|(images, patches)| images * (c.size("prefix") + patches)).sum();
                let mut slots = vec![tracked("qkv", &[tokens, 3 * heads * d])];
                for (i, (_, patches)) in segments(c).enumerate() {
                    slots.extend(c.flag("rotary").then(|| fixed(format!("angles_{i}"), &[patches, d])));
                    slots.extend(c.flag("bias").then(|| tracked(format!("bias_{i}"), &[heads, patches, patches])));
                }
                slots
            })
            .large([large(false, false), large(true, false), large(false, true)])
        },
        engine: |c| {
            let segment = |(i, (images, patches)): (usize, (usize, usize))| {
                let table = |f: fn(f64) -> f64| {
                    let angles = c.tensor(&format!("angles_{i}"));
                    let values: Vec<f64> = angles.to_f64_vec().into_iter().map(f).collect();
                    Tensor::from_f64(&values, angles.shape(), angles.dtype())
                };
                let rotary = if c.case().flag("rotary") { Some((table(f64::sin)?, table(f64::cos)?)) } else { None };
                let bias = c.get(&format!("bias_{i}")).cloned();
                Ok(Segment { images, tokens: c.case().size("prefix") + patches, rotary, bias })
            };
            let segments: Vec<Segment> = segments(c.case()).enumerate().map(segment).collect::<crate::Result<_>>()?;
            c.tensor("qkv").clone().attention(c.case().size("heads"), &segments)
        },
        dfdx: |mut s| {
            let [prefix, heads, d] = ["prefix", "heads", "head_dim"].map(|key| s.size(key));
            let width = heads * d;
            let segments: Vec<_> = segments(&s).collect();
            let all = segments.iter().map(|(images, patches)| images * (prefix + patches)).sum();
            let qkv = s.leaf("qkv", (all, 3 * width));
            let (mut out, mut first): (Option<Taped>, usize) = (None, 0);
            for (i, (images, patches)) in segments.into_iter().enumerate() {
                let tokens = prefix + patches;
                let bias = s.flag("bias").then(|| s.leaf(&format!("bias_{i}"), (heads * patches, patches)));
                // Turns patch tokens: x cos + rotate_half(x) sin; the tokens before them stay.
                let turned = |x: Taped| -> Taped {
                    if !s.flag("rotary") {
                        return x;
                    }
                    let angles = s.values(&format!("angles_{i}"));
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
                for (image, head) in (0..images).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    let begin = first + image * tokens;
                    let own: Vec<usize> = (begin..begin + tokens).collect();
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
                    let rows = constant(all, tokens, |i, j| f64::from(u8::from(i == begin + j)));
                    let columns = constant(d, width, |i, j| f64::from(u8::from(j == head * d + i)));
                    let placed = rows.matmul(y).matmul(columns);
                    out = Some(match out {
                        Some(out) => out + placed,
                        None => placed,
                    });
                }
                first += images * tokens;
            }
            let out = out.expect("there is an image and a head");
            Some(s.is(out))
        },
    }
}
