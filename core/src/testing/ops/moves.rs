//! Operations that move numbers or mix them linearly: each is the product with the matrix that its definition gives.

use dfdx::prelude::{Axes3, Cpu, PermuteTo as _, TensorFromVec as _, Trace as _, TryMatMul as _};
use proptest::prelude::*;
use serde_json::json;

use super::layers::batched;
use crate::dfdx_loss::{constant, picking, Taped};
use crate::testing::{cases, fixed, tracked, OpOracle};
use crate::Tensor;

inventory::submit! {
    OpOracle {
        name: "narrow_axis",
        cases: || {
            let options = (1usize..5, 1usize..5, 1usize..5, 0usize..3, any::<u32>(), any::<u32>());
            let options = options.prop_map(|(a, b, c, axis, start, len)| {
                let full = [a, b, c][axis];
                let start = start as usize % full;
                json!({ "a": a, "b": b, "c": c, "axis": axis, "start": start, "len": 1 + len as usize % (full - start) })
            });
            cases(options, |c| vec![tracked("x", &[c.size("a"), c.size("b"), c.size("c")])])
                .large((0..3).map(|axis| json!({ "a": 9, "b": 6, "c": 80, "axis": axis, "start": 2, "len": 3 })))
        },
        engine: |c| c.tensor("x").narrow_axis(c.case().size("axis"), c.case().size("start"), c.case().size("len")),
        dfdx: |mut s| {
            let shape = [s.size("a"), s.size("b"), s.size("c")];
            let (axis, start, len) = (s.size("axis"), s.size("start"), s.size("len"));
            let inside = |flat: &usize| {
                let at = [flat / (shape[1] * shape[2]), flat / shape[2] % shape[1], flat % shape[2]][axis];
                (start..start + len).contains(&at)
            };
            let n = shape.iter().product();
            let kept: Vec<usize> = (0..n).filter(inside).collect();
            let x = s.leaf("x", (n, 1usize)).leaky_trace();
            Some(s.is(picking(&kept, n).matmul(x)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "gather_rows",
        cases: || {
            let options = (1usize..8, 1usize..6, proptest::collection::vec(any::<u32>(), 1..10));
            let options = options.prop_map(|(n, d, rows)| {
                json!({ "n": n, "d": d, "rows": rows.iter().map(|r| *r as usize % n).collect::<Vec<_>>() })
            });
            cases(options, |c| vec![tracked("x", &[c.size("n"), c.size("d")])])
                .large([json!({ "n": 300, "d": 24, "rows": [8, 1, 1, 299, 5] })])
        },
        engine: |c| c.tensor("x").gather_rows(&c.case().rows("rows")),
        dfdx: |mut s| {
            let (n, d) = (s.size("n"), s.size("d"));
            let x = s.leaf("x", (n, d)).leaky_trace();
            let rows = s.indices("rows");
            Some(s.is(picking(&rows, n).matmul(x)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "cat",
        cases: || {
            let options = (1usize..6, 1usize..6, 1usize..5).prop_map(|(a, b, d)| json!({ "a": a, "b": b, "d": d }));
            cases(options, |c| vec![tracked("a", &[c.size("a"), c.size("d")]), tracked("b", &[c.size("b"), c.size("d")])])
                .large([json!({ "a": 90, "b": 4, "d": 24 })])
        },
        engine: |c| Tensor::cat(&[c.tensor("a"), c.tensor("b")]),
        dfdx: |mut s| {
            let (a, b, d) = (s.size("a"), s.size("b"), s.size("d"));
            let (x, y) = (s.leaf("a", (a, d)).leaky_trace(), s.leaf("b", (b, d)).leaky_trace());
            let place = |from: usize, n: usize| constant(a + b, n, move |i, j| f64::from(u8::from(i == from + j)));
            Some(s.is(place(0, a).matmul(x) + place(a, b).matmul(y)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "transpose",
        cases: || {
            let options = (0usize..3, 1usize..9, 1usize..9);
            let options = options.prop_map(|(batch, m, n)| json!({ "batch": batch, "m": m, "n": n }));
            cases(options, |c| vec![tracked("x", &batched(c, [c.size("m"), c.size("n")]))])
                .large([json!({ "batch": 2, "m": 70, "n": 24 })])
        },
        engine: |c| c.tensor("x").transpose(),
        dfdx: |mut s| {
            let x = s.leaf("x", (s.size("batch").max(1), s.size("m"), s.size("n"))).leaky_trace();
            Some(s.is(x.permute::<(usize, usize, usize), Axes3<0, 2, 1>>()))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "patchify",
        cases: || {
            let options = (1usize..3, 1usize..3, 1usize..4, 2usize..9, 2usize..9).prop_map(|(b, c, p, h, w)| {
                let p = p.min(h).min(w);
                json!({ "images": b, "channels": c, "patch": p, "height": h, "width": w })
            });
            cases(options, |c| {
                vec![tracked("pixels", &[c.size("images"), c.size("channels"), c.size("height"), c.size("width")])]
            })
            .large([(4, 12, 8), (8, 19, 24)].map(|(patch, height, width)| {
                json!({ "images": 2, "channels": 3, "patch": patch, "height": height, "width": width })
            }))
        },
        engine: |c| c.tensor("pixels").patchify(c.case().size("patch")),
        dfdx: |mut s| {
            let [b, c, p, h, w] = ["images", "channels", "patch", "height", "width"].map(|key| s.size(key));
            let mut order = Vec::new();
            for image in 0..b {
                for (row, column) in (0..h / p).flat_map(|r| (0..w / p).map(move |c| (r, c))) {
                    for (channel, y, x) in (0..c).flat_map(|c| (0..p).flat_map(move |y| (0..p).map(move |x| (c, y, x)))) {
                        order.push(((image * c + channel) * h + row * p + y) * w + column * p + x);
                    }
                }
            }
            let n = b * c * h * w;
            let pixels = s.leaf("pixels", (n, 1usize)).leaky_trace();
            Some(s.is(picking(&order, n).matmul(pixels)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "assemble_tokens",
        cases: || {
            let options = (1usize..3, 1usize..6, 1usize..4, 1usize..4, proptest::collection::vec(0u32..2, 16));
            let options = options.prop_map(|(b, p, prefix, d, bits)| {
                let mask: Vec<u32> = (0..b * p).map(|i| bits[i % bits.len()]).collect();
                json!({ "images": b, "patches": p, "prefix": prefix, "d": d, "mask": mask })
            });
            cases(options, |c| {
                let d = c.size("d");
                let patches = tracked("patches", &[c.size("images") * c.size("patches"), d]);
                vec![patches, tracked("prefix", &[c.size("prefix"), d]), tracked("mask_token", &[1, d])]
            })
            .large([json!({
                "images": 2, "patches": 6, "prefix": 3, "d": 240, "mask": [0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1],
            })])
        },
        engine: |c| {
            let mask = c.case().rows("mask");
            let masked = Some((c.tensor("mask_token"), &mask));
            c.tensor("patches").assemble_tokens(c.tensor("prefix"), c.case().size("images"), masked)
        },
        dfdx: |mut s| {
            let [b, p, prefix, d] = ["images", "patches", "prefix", "d"].map(|key| s.size(key));
            let mask = s.indices("mask");
            let tokens = prefix + p;
            let rows = b * tokens;
            // The patch in a row of the result, if there is one.
            let patch = move |row: usize| (row % tokens).checked_sub(prefix).map(|at| row / tokens * p + at);
            let one = |is: bool| f64::from(u8::from(is));
            let from_patches = constant(rows, b * p, |i, j| one(patch(i) == Some(j) && mask[j] == 0));
            let from_prefix = constant(rows, prefix, |i, j| one(i % tokens == j));
            let from_mask = constant(rows, 1, |i, _| one(patch(i).is_some_and(|at| mask[at] == 1)));
            let patches = s.leaf("patches", (b * p, d)).leaky_trace();
            let front = s.leaf("prefix", (prefix, d)).leaky_trace();
            let token = s.leaf("mask_token", (1usize, d)).leaky_trace();
            Some(s.is(from_patches.matmul(patches) + from_prefix.matmul(front) + from_mask.matmul(token)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "split_tokens",
        cases: || {
            let options = (1usize..4, 1usize..6, 1usize..4, 1usize..4)
                .prop_map(|(b, p, prefix, d)| json!({ "images": b, "patches": p, "prefix": prefix, "d": d }));
            cases(options, |c| {
                vec![tracked("tokens", &[c.size("images") * (c.size("prefix") + c.size("patches")), c.size("d")])]
            })
            .large([json!({ "images": 2, "patches": 40, "prefix": 3, "d": 24 })])
        },
        // Both results, one after the other.
        engine: |c| {
            let (prefix, patches) = c.tensor("tokens").split_tokens(c.case().size("images"), c.case().size("prefix"))?;
            Tensor::cat(&[&prefix.reshape(&[prefix.len()])?, &patches.reshape(&[patches.len()])?])
        },
        dfdx: |mut s| {
            let [b, p, prefix, d] = ["images", "patches", "prefix", "d"].map(|key| s.size(key));
            let tokens = prefix + p;
            let front = (0..b * tokens).filter(|row| row % tokens < prefix);
            let order: Vec<usize> = front.chain((0..b * tokens).filter(|row| row % tokens >= prefix)).collect();
            let x = s.leaf("tokens", (b * tokens, d)).leaky_trace();
            Some(s.is(picking(&order, b * tokens).matmul(x)))
        },
    }
}

/// The map of images of `from` rows and columns to images of `to`, by the share of an input in an output along one axis.
fn resizing(
    images: usize,
    (from, to): (&[usize], &[usize]),
    share: impl Fn(usize, usize, usize, usize) -> f64,
) -> Taped {
    let (n, m) = (from[0] * from[1], to[0] * to[1]);
    constant(images * m, images * n, |o, i| {
        if o / m != i / n {
            return 0.0;
        }
        let (o, i) = (o % m, i % n);
        share(o / to[1], i / from[1], from[0], to[0]) * share(o % to[1], i % from[1], from[1], to[1])
    })
}

/// The share of input `i` in output `o` along one axis, as PyTorch's bicubic `interpolate` has it.
fn bicubic(o: usize, i: usize, from: usize, to: usize, antialias: bool) -> f64 {
    let keys = |x: f64, a: f64| match x.abs() {
        x if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
        _ => 0.0,
    };
    let scale = from as f64 / to as f64;
    let center = scale * (o as f64 + 0.5);
    if antialias {
        let wide = scale.max(1.0);
        let (first, last) = ((center - 2.0 * wide + 0.5).max(0.0) as usize, (center + 2.0 * wide + 0.5) as usize);
        let weight = |i: usize| keys((i as f64 - center + 0.5) / wide, -0.5);
        let inside = first..last.min(from);
        if inside.contains(&i) {
            weight(i) / inside.map(weight).sum::<f64>()
        } else {
            0.0
        }
    } else {
        let first = (center - 0.5).floor();
        let taps = (-1..3).map(|tap| first + f64::from(tap));
        let mine = taps.filter(|tap| tap.clamp(0.0, (from - 1) as f64) as usize == i);
        mine.map(|tap| keys(center - 0.5 - tap, -0.75)).sum()
    }
}

inventory::submit! {
    OpOracle {
        name: "resize_bicubic",
        cases: || {
            let options = (1usize..3, 1usize..7, 1usize..7, 1usize..7, 1usize..7, 1usize..3, any::<bool>());
            let options = options.prop_map(|(images, h, w, h2, w2, d, antialias)| {
                json!({ "images": images, "from": [h, w], "to": [h2, w2], "d": d, "antialias": antialias })
            });
            cases(options, |c| vec![tracked("x", &[c.size("images"), c.indices("from").iter().product(), c.size("d")])]).large(
                [([4, 5], false), ([3, 4], true)]
                    .map(|(to, antialias)| json!({ "images": 2, "from": [8, 8], "to": to, "d": 24, "antialias": antialias })),
            )
        },
        engine: |c| {
            let side = |key| c.case().indices(key);
            let (from, to) = (side("from"), side("to"));
            c.tensor("x").resize_bicubic((from[0], from[1]), (to[0], to[1]), c.case().flag("antialias"))
        },
        dfdx: |mut s| {
            let (from, to, d, antialias) = (s.indices("from"), s.indices("to"), s.size("d"), s.flag("antialias"));
            let map = resizing(s.size("images"), (&from, &to), |o, i, from, to| bicubic(o, i, from, to, antialias));
            let x = s.leaf("x", (s.size("images") * from[0] * from[1], d)).leaky_trace();
            Some(s.is(map.matmul(x)))
        },
    }
}

/// The share of input `i` in output `o` along one axis, as PyTorch's antialiased bilinear `interpolate` has it.
fn triangle(o: usize, i: usize, from: usize, to: usize) -> f64 {
    let scale = from as f64 / to as f64;
    let (center, wide) = (scale * (o as f64 + 0.5), scale.max(1.0));
    let weight = |i: usize| (1.0 - ((i as f64 - center + 0.5) / wide).abs()).max(0.0);
    weight(i) / (0..from).map(weight).sum::<f64>()
}

inventory::submit! {
    OpOracle {
        name: "resize_bilinear",
        cases: || {
            let options = (1usize..3, 1usize..7, 1usize..7, 1usize..7, 1usize..7, 1usize..3).prop_map(
                |(images, h, w, h2, w2, d)| json!({ "images": images, "from": [h, w], "to": [h2, w2], "d": d }),
            );
            cases(options, |c| vec![tracked("x", &[c.size("images"), c.indices("from").iter().product(), c.size("d")])])
                .large([json!({ "images": 2, "from": [8, 8], "to": [3, 4], "d": 24 })])
        },
        engine: |c| {
            let side = |key| c.case().indices(key);
            let (from, to) = (side("from"), side("to"));
            c.tensor("x").resize_bilinear((from[0], from[1]), (to[0], to[1]))
        },
        dfdx: |mut s| {
            let (from, to, d) = (s.indices("from"), s.indices("to"), s.size("d"));
            let map = resizing(s.size("images"), (&from, &to), triangle);
            let x = s.leaf("x", (s.size("images") * from[0] * from[1], d)).leaky_trace();
            Some(s.is(map.matmul(x)))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "tiles",
        cases: || {
            let sides = (1usize..4, 1usize..3, 1usize..5, 0usize..4, 0usize..4);
            let options = (sides, 1usize..3, 1usize..3, proptest::collection::vec(any::<[u16; 4]>(), 8));
            let options = options.prop_map(|((images, channels, tile, more, most), made, tiles, drawn)| {
                let (height, width) = (tile + more, tile + most);
                let within = [images, width - tile + 1, height - tile + 1, 4];
                let rows = drawn.iter().take(made * tiles * tiles);
                let plan: Vec<usize> = rows.flat_map(|row| (0..4).map(|i| usize::from(row[i]) % within[i])).collect();
                json!({
                    "images": images, "channels": channels, "height": height, "width": width, "tile": tile,
                    "tiles": tiles, "plan": plan,
                })
            });
            cases(options, |c| {
                vec![fixed("pixels", &[c.size("images"), c.size("channels"), c.size("height"), c.size("width")])]
            })
            .large([json!({
                "images": 3, "channels": 3, "height": 12, "width": 19, "tile": 8, "tiles": 2,
                "plan": [2, 3, 1, 0, 0, 0, 0, 1, 1, 11, 4, 2, 2, 9, 3, 3, 0, 5, 2, 1, 1, 0, 0, 0, 1, 2, 2, 2, 0, 1, 1, 3],
            })])
        },
        engine: |c| {
            let plan = c.case().rows("plan");
            let plan = plan.reshape(&[plan.len() / 4, 4])?;
            c.tensor("pixels").tiles(&plan, c.case().size("tiles"), c.case().size("tile"))
        },
        dfdx: |s| {
            let [channels, height, width, tile, tiles] =
                ["channels", "height", "width", "tile", "tiles"].map(|key| s.size(key));
            let (plan, pixels, side) = (s.indices("plan"), s.values("pixels"), tile * tiles);
            let images = plan.len() / (4 * tiles * tiles);
            let value = |i: usize| {
                let (image, channel, row, column) =
                    (i / (channels * side * side), i / (side * side) % channels, i / side % side, i % side);
                let place = (image * tiles + row / tile) * tiles + column / tile;
                let [from, x, y, turns] = [0, 1, 2, 3].map(|part| plan[4 * place + part]);
                // A quarter turn counter-clockwise: what is at row r, column c was at row c, the column r from the right.
                let turned = |(r, c): (usize, usize), _| (c, tile - 1 - r);
                let (r, c) = (0..turns).fold((row % tile, column % tile), turned);
                pixels[((from * channels + channel) * height + y + r) * width + x + c]
            };
            let values: Vec<f64> = (0..images * channels * side * side).map(value).collect();
            Some(s.is_constant(Cpu::default().tensor_from_vec(values, (images * channels, side * side))))
        },
    }
}
