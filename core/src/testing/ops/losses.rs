//! The operations inside losses, and those that make their targets (which have no gradient).

use dfdx::prelude::{
    Axes2, Axis, BroadcastTo as _, Cpu, MeanTo as _, PermuteTo as _, SumTo as _, TensorFromVec as _, Trace as _,
    TryMatMul as _, WithEmptyTape as _,
};
use proptest::prelude::*;
use serde_json::json;

use crate::comm::Shards;
use crate::dfdx_loss::{constant, picking, unit_rows, Matrix, Taped};
use crate::ops::{NegativeRemoval, SimilarityOptions};
use crate::testing::{cases, fixed, tracked, OpOracle};
use crate::Tensor;

inventory::submit! {
    OpOracle {
        name: "soft_cross_entropy",
        cases: || {
            let options = (1usize..6, 1usize..4, 1usize..12, proptest::collection::vec((0usize..4, any::<u32>()), 6));
            let options = options.prop_map(|(rows, q, k, drawn)| {
                let (mut student, mut target) = (Vec::new(), Vec::new());
                for (row, &(count, first)) in drawn.iter().take(rows).enumerate() {
                    // Rows that meet no, one or several targets.
                    student.extend(vec![row; count]);
                    target.extend((0..count).map(|i| (first as usize + i) % q));
                }
                if student.is_empty() {
                    student.push(0);
                    target.push(0);
                }
                json!({ "rows": rows, "targets": q, "k": k, "student_rows": student, "target_rows": target })
            });
            cases(options, |c| {
                let k = c.size("k");
                // Targets need not sum to 1.
                vec![
                    tracked("logits", &[c.size("rows"), k]),
                    fixed("targets", &[c.size("targets"), k]).positive(),
                    fixed("weights", &[c.indices("student_rows").len()]).positive(),
                ]
            })
            .large([json!({
                "rows": 6, "targets": 4, "k": 520, "student_rows": [0, 0, 2, 3, 5], "target_rows": [1, 3, 0, 2, 2],
            })])
        },
        engine: |c| {
            let (student, target) = (c.case().rows("student_rows"), c.case().rows("target_rows"));
            let weights = c.tensor("weights").cast(c.tensor("logits").dtype().wide())?;
            c.tensor("logits").soft_cross_entropy(c.tensor("targets"), &student, &target, &weights, 0.1)
        },
        dfdx: |mut s| {
            let (rows, k) = (s.size("rows"), s.size("k"));
            let pairs = s.indices("student_rows").into_iter().zip(s.indices("target_rows"));
            let pairs: Vec<_> = pairs.zip(s.values("weights").iter().copied()).collect();
            // The weighted sum of each row's targets.
            let targets = s.values("targets");
            let mixed = |row: usize, column: usize| {
                let own = pairs.iter().filter(|((student, _), _)| *student == row);
                own.map(|((_, target), weight)| weight * targets[target * k + column]).sum()
            };
            let mixed = constant(rows, k, mixed);
            let logits = s.leaf("logits", (rows, k)).leaky_trace();
            let log_probs = (logits * (1.0 / 0.1)).log_softmax::<Axis<1>>();
            Some(s.is(-(log_probs * mixed).sum::<(), _>()))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "similarity_distance",
        cases: || {
            let options = (1usize..4, 1usize..5, 1usize..5, any::<bool>(), any::<bool>(), 0..3usize);
            let options = options.prop_map(|(b, n, d, normalize, image_level, remove)| {
                let remove = ["none", "both", "teacher"][remove];
                json!({ "b": b, "n": n, "d": d, "normalize": normalize, "image_level": image_level, "remove": remove })
            });
            cases(options, |c| {
                let shape = [c.size("b"), c.size("n"), c.size("d")];
                vec![tracked("student", &shape), fixed("teacher", &shape)]
            })
            .large([(true, "none"), (false, "teacher"), (true, "both")].map(|(image_level, remove)| {
                json!({ "b": 2, "n": 20, "d": 24, "normalize": true, "image_level": image_level, "remove": remove })
            }))
        },
        engine: |c| {
            let remove = serde_json::from_value(c.case().options["remove"].clone()).expect("one of its names");
            let (normalize, image_level) = (c.case().flag("normalize"), c.case().flag("image_level"));
            c.tensor("student").similarity_distance(c.tensor("teacher"), SimilarityOptions { normalize, image_level, remove })
        },
        dfdx: |mut s| {
            let (all, d) = (s.size("b") * s.size("n"), s.size("d"));
            let n = if s.flag("image_level") { s.size("n") } else { all };
            let remove: NegativeRemoval = serde_json::from_value(s.options["remove"].clone()).expect("one of its names");
            let (student, teacher) = (s.leaf("student", (all, d)), s.leaf("teacher", (all, d)));
            let mut loss = None;
            for image in 0..all / n {
                let rows: Vec<usize> = (image * n..(image + 1) * n).collect();
                let features = |x: &Matrix| {
                    let rows = picking(&rows, all).matmul(x.leaky_trace());
                    if s.flag("normalize") { unit_rows(rows) } else { rows }
                };
                let similarities = |x: &Matrix, remove: bool| -> Taped {
                    // dfdx does not multiply a tensor with itself, so the factors are made one by one.
                    let similarity = features(x).matmul(features(x).permute::<(usize, usize), Axes2<1, 0>>());
                    if remove { similarity.relu() } else { similarity }
                };
                let difference = similarities(&student, remove == NegativeRemoval::Both)
                    - similarities(&teacher, remove != NegativeRemoval::None);
                let squares = difference.square().sum::<(), _>();
                loss = Some(match loss {
                    None => squares,
                    Some(loss) => loss + squares,
                });
            }
            let loss = loss.expect("there is an image") / (all * n) as f64;
            Some(s.is(loss))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "neighbour_distance",
        cases: || {
            let options = (1usize..3, 1usize..4, 1usize..4, 2usize..6);
            let options = options.prop_map(|(groups, topk, more, d)| {
                json!({ "groups": groups, "size": topk + more, "topk": topk, "d": d })
            });
            cases(options, |c| vec![tracked("x", &[c.size("groups") * c.size("size"), c.size("d")])])
                .large([(1, 12, 1), (2, 6, 2)].map(|(groups, size, topk)| json!({ "groups": groups, "size": size, "topk": topk, "d": 40 })))
        },
        engine: |c| c.tensor("x").neighbour_distance(c.case().size("topk"), Some(c.case().size("size"))),
        dfdx: |mut s| {
            let (groups, size, topk, d) = (s.size("groups"), s.size("size"), s.size("topk"), s.size("d"));
            let n = groups * size;
            let neighbours = nearest(s.values("x"), d, size, topk)?;
            let own: Vec<usize> = (0..n * topk).map(|edge| edge / topk).collect();
            let unit = unit_rows(s.leaf("x", (n, d)).leaky_trace());
            let mates = picking(&neighbours, n).matmul(unit.with_empty_tape());
            let difference = picking(&own, n).matmul(unit) - mates + 1e-8;
            let distance = difference.square().sum::<(usize,), Axis<1>>().sqrt();
            let mean = constant(n, n * topk, |i, edge| if edge / topk == i { 1.0 / topk as f64 } else { 0.0 });
            let each = (distance + 1e-8).ln().broadcast_like::<(usize, usize), Axis<1>>(&(n * topk, 1));
            Some(s.is(-mean.matmul(each)))
        },
    }
}

/// The `topk` other rows of each row's group with the least angle, nearest first; `None` where two come so close that
/// rounding decides, or a row meets its double.
fn nearest(x: &[f64], d: usize, group: usize, topk: usize) -> Option<Vec<usize>> {
    let n = x.len() / d;
    let length = |i: usize| x[i * d..][..d].iter().map(|x| x * x).sum::<f64>().sqrt();
    let cosine =
        |i: usize, j: usize| (0..d).map(|c| x[i * d + c] * x[j * d + c]).sum::<f64>() / (length(i) * length(j));
    let mut found = Vec::new();
    for i in 0..n {
        let others = (i / group * group..(i / group + 1) * group).filter(|&j| j != i);
        let mut others: Vec<(f64, usize)> = others.map(|j| (cosine(i, j), j)).collect();
        others.sort_by(|a, b| b.0.total_cmp(&a.0));
        let tie = others.windows(2).take(topk).any(|pair| pair[0].0 - pair[1].0 < 1e-9);
        if tie || others[0].0 > 1.0 - 1e-9 {
            return None;
        }
        found.extend(others[..topk].iter().map(|(_, j)| j));
    }
    Some(found)
}

inventory::submit! {
    OpOracle {
        name: "sinkhorn_knopp",
        cases: || {
            let options = (1usize..10, 1usize..10, 1usize..5).prop_map(|(b, k, n)| json!({ "b": b, "k": k, "iterations": n }));
            cases(options, |c| vec![fixed("logits", &[c.size("b"), c.size("k")])])
                .large([(20, 65), (1026, 72)].map(|(b, k)| json!({ "b": b, "k": k, "iterations": 3 })))
        },
        engine: |c| {
            let temperature = Tensor::scalar(0.2, c.tensor("logits").dtype().wide());
            c.tensor("logits").sinkhorn_knopp(&temperature, c.case().size("iterations"), &Shards::one())
        },
        dfdx: |mut s| {
            let shape = (s.size("b"), s.size("k"));
            let q = (s.leaf("logits", shape) / 0.2).exp();
            let all: f64 = q.as_vec().iter().sum();
            let mut q = q / all;
            for _ in 0..s.size("iterations") {
                let columns = q.clone().sum::<(usize,), Axis<0>>() * shape.1 as f64;
                q = q / columns.broadcast_like::<_, Axis<0>>(&shape);
                let rows = q.clone().sum::<(usize,), Axis<1>>() * shape.0 as f64;
                q = q / rows.broadcast_like::<_, Axis<1>>(&shape);
            }
            Some(s.is_constant(q * shape.0 as f64))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "centered_softmax",
        cases: || {
            let options = (1usize..10, 1usize..10).prop_map(|(b, k)| json!({ "b": b, "k": k }));
            cases(options, |c| vec![fixed("logits", &[c.size("b"), c.size("k")]), fixed("center", &[c.size("k")])])
                .large([json!({ "b": 9, "k": 650 })])
        },
        engine: |c| {
            let (logits, wide) = (c.tensor("logits"), c.tensor("logits").dtype().wide());
            logits.centered_softmax(&c.tensor("center").cast(wide)?, &Tensor::scalar(0.2, wide))
        },
        dfdx: |mut s| {
            let shape = (s.size("b"), s.size("k"));
            let center = Cpu::default().tensor_from_vec(s.values("center").to_vec(), (shape.1,));
            let logits = s.leaf("logits", shape) - center.broadcast_like::<_, Axis<0>>(&shape);
            Some(s.is_constant((logits / 0.2).softmax::<Axis<1>>()))
        },
    }
}

inventory::submit! {
    OpOracle {
        name: "mean_row",
        cases: || {
            let options = (1usize..10, 1usize..10).prop_map(|(b, k)| json!({ "b": b, "k": k }));
            cases(options, |c| vec![fixed("logits", &[c.size("b"), c.size("k")])]).large([json!({ "b": 90, "k": 650 })])
        },
        engine: |c| c.tensor("logits").mean_row(&Shards::one()),
        dfdx: |mut s| {
            let logits = s.leaf("logits", (s.size("b"), s.size("k")));
            Some(s.is_constant(logits.mean::<(usize,), Axis<0>>()))
        },
    }
}
