//! Rotary tables against the reference's numbers, and the properties that a rotary embedding lives by.

use crate::golden::{Comparison, Golden};
use dinolab_core::contract::{Grid, PosContext, PosEncoding};
use dinolab_core::ops::Segment;
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Tensor};
use dinolab_plugins::rope_box::{RopeBox, RopeBoxConfig};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use serde_json::{json, Value};

/// The plugin that a recipe's table makes, for one head of width `head_dim`.
fn encoding(table: &Value, head_dim: usize) -> Box<dyn PosEncoding> {
    let mut table = table.clone();
    table["plugin"] = "rope_box".into();
    let chosen: Chosen<dyn PosEncoding> = serde_json::from_value(table).unwrap();
    let mut encoding = chosen.build(&mut ()).unwrap();
    let context = PosContext { dim: head_dim, heads: 1, grid: Grid { height: 4, width: 4 } };
    encoding.declare(&mut ParamBuilder::new(), context).unwrap();
    encoding
}

/// `(sin, cos)`, each `[P, D]`.
fn rotary(encoding: &dyn PosEncoding, grid: Grid, draw: Option<&[f64]>, dtype: DType) -> (Tensor, Tensor) {
    let layout = ParamBuilder::new().finish();
    let flat = layout.init(0, dtype).unwrap();
    let draw = draw.map(|d| Tensor::from_slice(d, &[d.len()]).unwrap());
    let tables = encoding.tables(&Params::frozen(&layout, &flat), grid, draw.as_ref(), 1, dtype).unwrap();
    tables.rotary.expect("rope_box rotates")
}

fn check(c: &mut Comparison<'_>, name: &str, (sin, cos): (Tensor, Tensor)) {
    c.check(&format!("{name}.sin"), &sin);
    c.check(&format!("{name}.cos"), &cos);
}

/// The recipe's periods for a variant of the reference's options.
fn periods(variant: &Value) -> Value {
    match variant["base"].as_f64() {
        Some(base) => json!({ "base": base }),
        None => json!({ "range": [variant["min_period"], variant["max_period"]] }),
    }
}

fn parse_grid(text: &str) -> Grid {
    let (height, width) = text.split_once('x').expect("<height>x<width>");
    Grid { height: height.parse().unwrap(), width: width.parse().unwrap() }
}

pub fn evaluation_tables(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for name in g.prefixes(".sin") {
        // <normalize>_<variant>_d<D>_<H>x<W>
        let [normalize, variant, dim, grid] = name.split('_').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let table = json!({ "normalize": normalize, "periods": periods(&g.options["variants"][variant]) });
        let encoding = encoding(&table, dim[1..].parse().unwrap());
        check(c, name, rotary(encoding.as_ref(), parse_grid(grid), None, dtype));
    }
    for name in g.names().filter(|n| n.starts_with("periods_")) {
        let [_, variant, dim] = name.split('_').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let table = json!({ "periods": periods(&g.options["variants"][variant]) });
        let config: RopeBoxConfig = serde_json::from_value(table).unwrap();
        c.check_values(name, &RopeBox::new(config).periods(dim[1..].parse().unwrap()));
    }
}

pub fn training_tables(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let grid = Grid { height: g.number("/H", None) as usize, width: g.number("/W", None) as usize };
    let table = json!({ "periods": periods(&g.options), "normalize": g.options["normalize_coords"] });
    let encoding = encoding(&table, g.number("/D_head", None) as usize);
    for name in g.prefixes(".sin") {
        let mut draw = vec![0.0, 0.0, 1.0, 1.0, 1.0];
        if g.has(&format!("{name}.shift_hw")) {
            draw[..2].copy_from_slice(g.values(&format!("{name}.shift_hw")));
        }
        for (factor, range) in [("jitter", 2..4), ("rescale", 4..5)] {
            if g.has(&format!("{name}.{factor}_log")) {
                let logs = g.values(&format!("{name}.{factor}_log")).iter();
                draw[range.clone()].iter_mut().zip(logs).for_each(|(d, log)| *d = log.exp());
                c.check_values(&format!("{name}.{factor}"), &draw[range]);
            }
        }
        check(c, name, rotary(encoding.as_ref(), grid, Some(&draw), dtype));
    }
}

/// Which part of attention's packed input is rotated.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Query,
    Key,
}

/// Rows `[.., tokens, D]` rotated by attention, or by the transpose of its rotation.
///
/// The rotation is inside attention, and shows in its gradients. Where all queries or all keys are zero, the weights of
/// n tokens are 1/n. Let token i have the value e, a further token 0, which is not rotated, zero, and the gradient of the
/// output of token 0 be e. Then that score has the gradient `c = (1 - 1/n) / n`, so that the gradient of the query of
/// token 0 is `c R(k_i) / sqrt(D)`, and that of key i is `c R^T(q_0) / sqrt(D)`; for queries with the parts exchanged.
fn rotated(x: &Tensor, part: Part, back: bool, tables: &(Tensor, Tensor), dtype: DType) -> Vec<f64> {
    let (d, rows) = (x.last_dim(), x.len() / x.last_dim());
    let n = x.dim(x.rank() - 2) + 1;
    let (mut qkv, mut dy) = (vec![0.0; rows * n * 3 * d], vec![0.0; rows * n * d]);
    let other = if part == Part::Query { Part::Key } else { Part::Query };
    let place = |row: usize, token: usize, part: usize| ((row * n + token) * 3 + part) * d;
    // One image a row: where its x goes, and where its result comes from.
    let ends = |row: usize| {
        let mine = place(row, row % (n - 1) + 1, part as usize);
        let token_0 = place(row, 0, other as usize);
        if back {
            (token_0, mine)
        } else {
            (mine, token_0)
        }
    };
    for (row, x) in x.to_f64_vec().chunks(d).enumerate() {
        qkv[ends(row).0..][..d].copy_from_slice(x);
        let (query, key) = if part == Part::Query { (row % (n - 1) + 1, 0) } else { (0, row % (n - 1) + 1) };
        qkv[place(row, key, 2)] = 1.0;
        dy[(row * n + query) * d] = 1.0;
    }
    let tape = Tape::new();
    let qkv = tape.leaf(&Tensor::from_f64(&qkv, &[rows * n, 3 * d], dtype).unwrap());
    let segment = Segment { images: rows, tokens: n, rotary: Some(tables.clone()), bias: None };
    let y = qkv.clone().attention(1, &[segment]).unwrap();
    let dy = Tensor::from_f64(&dy, y.shape(), dtype).unwrap();
    let grads = tape.backward(&y.mul(&dy).unwrap().sum().unwrap(), 1.0, None).unwrap();
    let grads = grads.of(&qkv).unwrap().to_f64_vec();
    let n = n as f64;
    let scale = n * n / (n - 1.0) * (d as f64).sqrt();
    (0..rows).flat_map(|row| grads[ends(row).1..][..d].iter().map(|g| g * scale)).collect()
}

pub fn rotation(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let table = json!({ "periods": periods(&g.options), "normalize": g.options["normalize_coords"] });
    let encoding = encoding(&table, g.number("/D_head", None) as usize);
    let grid = Grid { height: g.number("/H", None) as usize, width: g.number("/W", None) as usize };
    let tables = rotary(encoding.as_ref(), grid, None, dtype);
    c.check("sin", &tables.0);
    c.check("cos", &tables.1);
    for (name, part) in [("q", Part::Query), ("k", Part::Key)] {
        let x = g.tensor(name, dtype);
        c.check_values(&format!("{name}_out"), &rotated(&x, part, false, &tables, dtype));
        let upstream = g.tensor(&format!("w{name}"), dtype);
        c.check_values(&format!("grad_{name}"), &rotated(&upstream, part, true, &tables, dtype));
        let (patches, tokens) = (grid.patches(), x.dim(2));
        assert_eq!(tokens - patches, g.number("/prefix", None) as usize);
        if g.has(&format!("{name}_patches_out")) {
            let heads = x.reshape(&[x.dim(0) * x.dim(1), tokens, x.dim(3)]).unwrap();
            let only = heads.narrow_axis(1, tokens - patches, patches).unwrap();
            c.check_values(&format!("{name}_patches_out"), &rotated(&only, part, false, &tables, dtype));
        }
    }
}

/// `x cos + rotate_half(x) sin` for the last P of the tokens `[.., N, D]`; `round` after every operation, and on all
/// tokens at the beginning.
fn rotate(x: &[f64], (sin, cos): (&[f64], &[f64]), tokens: usize, d: usize, round: impl Fn(f64) -> f64) -> Vec<f64> {
    let prefix = tokens - sin.len() / d;
    let mut out: Vec<f64> = x.iter().map(|&x| round(x)).collect();
    for (i, row) in out.chunks_mut(d).enumerate().filter(|(i, _)| i % tokens >= prefix) {
        let at = (i % tokens - prefix) * d;
        let x = row.to_vec();
        for (k, y) in row.iter_mut().enumerate() {
            let turned = if k < d / 2 { -x[k + d / 2] } else { x[k - d / 2] };
            *y = round(round(x[k] * cos[at + k]) + round(turned * sin[at + k]));
        }
    }
    out
}

/// The stored values are bf16 numbers, so following every rounding gives them exactly.
pub fn bf16_tables(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let bf16 = |x: f64| Tensor::scalar(x, DType::F32).cast(DType::BF16).unwrap().item();
    let d = g.number("/D_head", None) as usize;
    let table = json!({ "dtype": "bf16", "periods": periods(&g.options), "normalize": g.options["normalize_coords"] });
    let config: RopeBoxConfig = serde_json::from_value(table.clone()).unwrap();
    c.check_values("periods", &RopeBox::new(config).periods(d));
    let encoding = encoding(&table, d);
    for name in g.prefixes(".sin") {
        check(c, name, rotary(encoding.as_ref(), parse_grid(name), None, dtype));
    }
    let grid = &g.options["grids"][0];
    let [height, width] = [0, 1].map(|i| grid[i].as_u64().expect("a grid is two numbers") as usize);
    let (sin, cos) = rotary(encoding.as_ref(), Grid { height, width }, None, DType::F64);
    for (x, out) in [("q", "q_out"), ("k", "k_out")] {
        let tables = (sin.as_slice(), cos.as_slice());
        c.check_values(out, &rotate(g.values(x), tables, g.shape(x)[2], d, bf16));
    }
}

#[test]
fn a_head_that_cannot_hold_both_axes_is_refused() {
    let chosen: Chosen<dyn PosEncoding> = serde_json::from_value(json!({ "plugin": "rope_box" })).unwrap();
    let context = PosContext { dim: 36, heads: 6, grid: Grid { height: 4, width: 4 } };
    let error = chosen.build(&mut ()).unwrap().declare(&mut ParamBuilder::new(), context).unwrap_err();
    assert!(error.to_string().contains("36 channels in 6 heads are not a multiple of 4 a head"), "{error}");
}

#[test]
fn a_rescale_that_is_no_range_is_refused() {
    let table = json!({ "plugin": "rope_box", "rescale": "twice" });
    let error = serde_json::from_value::<Chosen<dyn PosEncoding>>(table).unwrap_err().to_string();
    assert!(error.contains("log-uniform in [1/s, s]"), "{error}");
}

#[test]
fn without_augmentation_nothing_is_drawn() {
    let mut rng = Rng::new(0, Stream::Position, 0, 0);
    let plain = encoding(&json!({}), 8);
    assert!(plain.draw(&mut rng).is_empty() && !plain.draws_per_block());
    assert!(encoding(&json!({ "jitter": 1.05 }), 8).draws_per_block());
    assert!(!encoding(&json!({ "jitter": 1.05, "draw_per": "step" }), 8).draws_per_block());
}

fn grids() -> impl Strategy<Value = Grid> {
    (1..7usize, 1..7usize).prop_map(|(height, width)| Grid { height, width })
}

fn config() -> ProptestConfig {
    // Failures are kept beside this file.
    let failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("regressions")) as _);
    ProptestConfig { cases: 64, failure_persistence, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn draws_stay_inside_their_ranges(seed: u64, shift in 0.0..1.0, jitter in 1.0..3.0, rescale in 1.0..4.0, a in 0.1..1.0) {
        let mut rng = Rng::new(seed, Stream::Position, 0, 0);
        let log = encoding(&json!({ "shift": shift, "jitter": jitter, "rescale": rescale }), 8).draw(&mut rng);
        let uniform = encoding(&json!({ "rescale": { "uniform": [a, 2.0] } }), 8).draw(&mut rng);
        prop_assert!(log[..2].iter().all(|x| x.abs() <= shift), "{log:?}");
        let within = |x: f64, s: f64| (1.0 / s - 1e-12..=s + 1e-12).contains(&x);
        prop_assert!(log[2..4].iter().all(|&x| within(x, jitter)) && within(log[4], rescale), "{log:?}");
        prop_assert_eq!(&uniform[..4], &[0.0, 0.0, 1.0, 1.0][..]);
        prop_assert!((a..=2.0).contains(&uniform[4]), "{uniform:?}");
    }

    #[test]
    fn a_patch_in_the_middle_of_the_box_is_not_rotated(seed: u64, half in (0..4usize, 0..4usize)) {
        let grid = Grid { height: 2 * half.0 + 1, width: 2 * half.1 + 1 };
        let mut rng = Rng::new(seed, Stream::Position, 0, 0);
        let scaled = encoding(&json!({ "jitter": 1.4, "rescale": 2.0 }), 8);
        let draw = scaled.draw(&mut rng);
        for draw in [None, Some(draw.as_slice())] {
            let (sin, cos) = rotary(scaled.as_ref(), grid, draw, DType::F64);
            let x: Vec<f64> = (0..grid.patches() * 8).map(|_| rng.normal()).collect();
            let y = rotate(&x, (sin.as_slice(), cos.as_slice()), grid.patches(), 8, |x| x);
            let middle = grid.patches() / 2 * 8;
            prop_assert_eq!(&x[middle..middle + 8], &y[middle..middle + 8]);
        }
    }

    #[test]
    fn rotation_keeps_lengths(seed: u64, grid in grids()) {
        let encoding = encoding(&json!({ "shift": 0.3, "jitter": 1.4, "rescale": 2.0 }), 8);
        let mut rng = Rng::new(seed, Stream::Position, 0, 0);
        let draw = encoding.draw(&mut rng);
        let (sin, cos) = rotary(encoding.as_ref(), grid, Some(&draw), DType::F64);
        let x: Vec<f64> = (0..grid.patches() * 8).map(|_| rng.normal()).collect();
        let y = rotate(&x, (sin.as_slice(), cos.as_slice()), grid.patches(), 8, |x| x);
        let length = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        for (x, y) in x.chunks(8).zip(y.chunks(8)) {
            prop_assert!((length(x) - length(y)).abs() < 1e-12 * length(x));
        }
    }

    /// The score of a query and a key is the same for every pair of patches at the same distance; a shift of the box
    /// changes none.
    #[test]
    fn scores_depend_on_relative_position_only(seed: u64, grid in grids(), shift in -0.5..0.5f64) {
        let encoding = encoding(&json!({ "shift": 0.5 }), 16);
        let mut rng = Rng::new(seed, Stream::Position, 0, 0);
        let [q, k] = [0, 1].map(|_| (0..16).map(|_| rng.normal()).collect::<Vec<_>>());
        let p = grid.patches();
        let scores = |draw: Option<&[f64]>| -> Vec<f64> {
            let (sin, cos) = rotary(encoding.as_ref(), grid, draw, DType::F64);
            let turn = |x: &[f64]| rotate(&x.repeat(p), (sin.as_slice(), cos.as_slice()), p, 16, |x| x);
            let (q, k) = (turn(&q), turn(&k));
            let dot = |i: usize, j: usize| q[i * 16..][..16].iter().zip(&k[j * 16..][..16]).map(|(a, b)| a * b).sum();
            (0..p * p).map(|at| dot(at / p, at % p)).collect()
        };
        let (still, moved) = (scores(None), scores(Some(&[shift, -shift, 1.0, 1.0, 1.0])));
        let distance = |at: usize| {
            let (i, j, w) = (at / p, at % p, grid.width);
            ((j / w) as isize - (i / w) as isize, (j % w) as isize - (i % w) as isize)
        };
        let mut known = std::collections::BTreeMap::new();
        for at in 0..p * p {
            let score = *known.entry(distance(at)).or_insert(still[at]);
            prop_assert!((still[at] - score).abs() < 1e-10 && (moved[at] - score).abs() < 1e-10);
        }
    }
}
