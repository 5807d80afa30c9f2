//! The losses' operations and the optimizer against the reference's numbers, in f32 and f64.

use crate::golden::{Comparison, Golden};
use dinolab_core::comm::Shards;
use dinolab_core::ops::{adamw_step, ema_update, l2_norm, AdamW, Group, Moments, NegativeRemoval, SimilarityOptions};
use dinolab_core::params::{Init, ParamBuilder};
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Tensor};

/// A pair of rows with its weight, as `soft_cross_entropy` takes them.
type Pair = (usize, usize, f64);

/// Value and gradient of the weighted cross-entropy of pairs, compared with `value` and `gradient`.
fn check_cross_entropy(
    c: &mut Comparison<'_>,
    (student, teacher): (Tensor, Tensor),
    pairs: &[Pair],
    temperature: f64,
    (value, gradient): (&str, &str),
) {
    let matrix = |x: &Tensor| x.reshape(&[x.len() / x.last_dim(), x.last_dim()]).unwrap();
    let rows = |of: fn(&Pair) -> usize| {
        let rows: Vec<u32> = pairs.iter().map(|p| of(p) as u32).collect();
        Tensor::from_slice(&rows, &[rows.len()]).unwrap()
    };
    let weights: Vec<f64> = pairs.iter().map(|p| p.2).collect();
    let weights = Tensor::from_f64(&weights, &[weights.len()], student.dtype()).unwrap();
    let tape = Tape::new();
    let x = tape.leaf(&matrix(&student));
    let loss = x.soft_cross_entropy(&matrix(&teacher), &rows(|p| p.0), &rows(|p| p.1), &weights, temperature).unwrap();
    c.check(value, &loss);
    c.check(gradient, tape.backward(&loss, 1.0, None).unwrap().of(&x).unwrap());
}

pub fn dino_loss(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.options["cases"].as_object().unwrap().keys() {
        let inputs = || {
            let at = |name| g.tensor(&format!("{case}.{name}"), dtype);
            (at("student_logits"), at("teacher_probs"))
        };
        let (s, t) = (inputs().0.dim(0), inputs().1.dim(0));
        let b = inputs().0.dim(1);
        for ignore_diagonal in [false, true] {
            let terms = if ignore_diagonal { s * t - s.min(t) } else { s * t };
            let mut pairs = Vec::new();
            for (i, image) in (0..s).flat_map(|i| (0..b).map(move |image| (i, image))) {
                let targets = (0..t).filter(|&j| !(ignore_diagonal && i == j));
                pairs.extend(targets.map(|j| (i * b + image, j * b + image, 1.0 / (b * terms) as f64)));
            }
            let suffix = if ignore_diagonal { "_ignore_diagonal" } else { "" };
            let names = (format!("{case}.loss{suffix}"), format!("{case}.grad{suffix}"));
            let temperature = g.number(&format!("/cases/{case}/student_temp"), None);
            check_cross_entropy(c, inputs(), &pairs, temperature, (&names.0, &names.1));
        }
    }
}

/// The temperature in a name such as `probs_t007_padded`.
fn temperature_of(name: &str) -> f64 {
    let tag = name.split("probs_t").nth(1).expect("the name of a Sinkhorn output");
    let digits: String = tag.chars().take_while(char::is_ascii_digit).collect();
    format!("{}.{}", &digits[..1], &digits[1..]).parse().unwrap()
}

/// Softmax centring call by call: the mean of a call moves the centre before the next.
fn check_centring(g: &Golden, dtype: DType, c: &mut Comparison<'_>, temperature: impl Fn(usize, usize) -> f64) {
    let momentum = g.number("/center_momentum", Some(0.9));
    let calls = (0..).take_while(|i| g.has(&format!("center.logits{i}"))).count();
    let mut center = Tensor::zeros(&[g.shape("center.logits0").last().copied().unwrap()], dtype);
    for i in 0..calls {
        let logits = g.tensor(&format!("center.logits{i}"), dtype);
        if g.has(&format!("center.center{i}")) {
            c.check(&format!("center.center{i}"), &center);
        }
        let t = Tensor::scalar(temperature(i, calls), dtype);
        c.check(&format!("center.probs{i}"), &logits.centered_softmax(&center, &t).unwrap());
        ema_update(&mut center, &logits.mean_row(&Shards::one()).unwrap(), momentum).unwrap();
    }
    c.check("center.center_final", &center);
}

pub fn sinkhorn_and_centring(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let temps: Vec<f64> = g.options["temps"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
    for (case, iterations) in g.options["n_iterations"].as_object().unwrap() {
        let logits = g.tensor(&format!("{case}.logits"), dtype);
        for name in g.names().filter(|n| n.starts_with(&format!("{case}.probs_t"))) {
            let tag = temperature_of(name);
            let nearest = temps.iter().copied().min_by(|a, b| (a - tag).abs().total_cmp(&(b - tag).abs()));
            let temperature = Tensor::scalar(nearest.unwrap(), dtype);
            let n = iterations.as_u64().unwrap() as usize;
            c.check(name, &logits.sinkhorn_knopp(&temperature, n, &Shards::one()).unwrap());
        }
    }
    // From the first temperature to the last in even steps.
    let (first, last) = (temps[0], temps[temps.len() - 1]);
    check_centring(g, dtype, c, |i, n| first + (last - first) * i as f64 / (n - 1) as f64);
}

pub fn ibot_loss(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let temperature = g.number("/student_temp", None);
    let (rows, patches) = (g.shape("masks")[0], g.shape("masks")[1]);
    let masked: Vec<usize> = (0..rows * patches).filter(|&i| g.values("masks")[i] != 0.0).collect();
    let listed: Vec<usize> = g.values("mask_indices_list").iter().map(|&i| i as usize).collect();
    assert_eq!(listed, masked);
    let in_row = |i: usize| masked.iter().filter(|&&j| j / patches == i / patches).count();
    let share = |i: usize| 1.0 / (in_row(i) * rows) as f64;
    let given = g.values("masks_weight").iter().enumerate().map(|(i, w)| (i, i, w / rows as f64)).collect::<Vec<_>>();
    let counted: Vec<Pair> = masked.iter().enumerate().map(|(i, &at)| (i, i, share(at))).collect();
    let dense: Vec<Pair> = masked.iter().map(|&at| (at, at, share(at))).collect();
    for (prefix, pairs, value, gradient) in [
        ("", &given, "loss", "grad"),
        ("", &counted, "loss_default_weight", "grad_default_weight"),
        ("padded.", &counted, "padded.loss", "padded.grad"),
        ("dense.", &dense, "dense.loss", "dense.grad"),
    ] {
        let inputs = ["student", "teacher"].map(|name| g.tensor(&format!("{prefix}{name}"), dtype));
        let [student, teacher] = inputs;
        check_cross_entropy(c, (student, teacher), pairs, temperature, (value, gradient));
    }
    let logits = g.tensor("sk.logits", dtype);
    let iterations = g.number("/n_iterations", Some(3.0)) as usize;
    for name in g.names().filter(|n| n.starts_with("sk.probs_t")) {
        // Padding is rows of zeros.
        let padding = Tensor::zeros(&[g.shape(name)[0] - logits.dim(0), logits.dim(1)], dtype);
        let logits = Tensor::cat(&[&logits, &padding]).unwrap();
        let t = Tensor::scalar(temperature_of(name), dtype);
        c.check(name, &logits.sinkhorn_knopp(&t, iterations, &Shards::one()).unwrap());
    }
    check_centring(g, dtype, c, |_, _| g.number("/center_temp", Some(0.06)));
}

/// The number at the end of a name such as `dist_top3`.
fn topk_of(name: &str) -> usize {
    name.rsplit("top").next().and_then(|k| k.parse().ok()).unwrap_or(1)
}

pub fn koleo(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".x") {
        let x = g.tensor(&format!("{case}.x"), dtype);
        for form in g.names().filter_map(|n| n.strip_prefix(&format!("{case}.loss_"))) {
            let tape = Tape::new();
            let leaf = tape.leaf(&x);
            let loss = leaf.neighbour_distance(topk_of(form), None).unwrap().mean().unwrap();
            c.check(&format!("{case}.loss_{form}"), &loss);
            let grads = tape.backward(&loss, 1.0, None).unwrap();
            if g.has(&format!("{case}.grad_{form}")) {
                c.check(&format!("{case}.grad_{form}"), grads.of(&leaf).unwrap());
            }
            assert!(grads.of(&leaf).unwrap().to_f64_vec().iter().all(|g| g.is_finite()), "{case} {form}");
        }
        for k in g.names().filter_map(|n| n.strip_prefix(&format!("{case}.nn"))) {
            let found = x.nearest_neighbours(k.parse().unwrap_or(1), None).unwrap();
            c.check(&format!("{case}.nn{k}"), &found);
        }
    }
}

pub fn koleo_over_ranks(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let (ranks, b) = (g.shape("x")[0], g.shape("x")[1]);
    for (case, options) in g.options["combos"].as_object().unwrap() {
        let tape = Tape::new();
        let x = tape.leaf(&g.tensor("x", dtype));
        let gathered = x.reshape(&[ranks * b, g.shape("x")[2]]).unwrap();
        let group = options["loss_group_size"].as_u64().map(|n| n as usize);
        let values = gathered.neighbour_distance(options["topk"].as_u64().unwrap() as usize, group).unwrap();
        let losses = values.reshape(&[ranks, b]).unwrap().mean_axis(1).unwrap();
        c.check(&format!("{case}.loss"), &losses);
        let grads = tape.backward(&losses.sum().unwrap(), 1.0, None).unwrap();
        c.check(&format!("{case}.grad"), grads.of(&x).unwrap());
    }
}

pub fn gram_loss(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".loss") {
        let (inputs, options) = match case {
            "flat" => ("flat.", SimilarityOptions { image_level: false, ..Default::default() }),
            _ => {
                let remove = match case.rsplit('_').next() {
                    Some("none") => NegativeRemoval::None,
                    Some("neg") => NegativeRemoval::Both,
                    Some("tneg") => NegativeRemoval::Teacher,
                    other => panic!("removal {other:?} of {case}"),
                };
                let (image_level, normalize) = (case.contains("img1"), case.contains("norm1"));
                ("", SimilarityOptions { normalize, image_level, remove })
            }
        };
        let tape = Tape::new();
        let student = tape.leaf(&g.tensor(&format!("{inputs}student"), dtype));
        let loss = student.similarity_distance(&g.tensor(&format!("{inputs}teacher"), dtype), options).unwrap();
        c.check(&format!("{case}.loss"), &loss);
        c.check(&format!("{case}.grad"), tape.backward(&loss, 1.0, None).unwrap().of(&student).unwrap());
    }
}

pub fn bicubic(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".x") {
        let name = format!("{case}.x");
        let &[n, d, h, w] = g.shape(&name) else { panic!("{name} is [N, D, h, w]") };
        let tokens = g.tensor(&name, dtype).reshape(&[n, d, h * w]).unwrap().transpose().unwrap();
        for output in ["y", "y_antialias"].map(|y| format!("{case}.{y}")) {
            let to = (g.shape(&output)[2], g.shape(&output)[3]);
            let resized = tokens.resize_bicubic((h, w), to, output.ends_with("antialias")).unwrap();
            c.check(&output, &resized.transpose().unwrap());
        }
    }
}

pub fn adamw(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let names: Vec<&str> = g.prefixes(".init").collect();
    let mut builder = ParamBuilder::new();
    names.iter().for_each(|name| {
        builder.add(name, g.shape(&format!("{name}.init")), Init::Zeros);
    });
    let layout = builder.finish();
    // Every parameter in its place, zeros between.
    let flat = |tensor: &dyn Fn(&str) -> String| {
        let mut flat = vec![0.0; layout.len()];
        layout.specs().iter().for_each(|s| flat[s.range()].copy_from_slice(g.values(&tensor(&s.name))));
        Tensor::from_f64(&flat, &[layout.len()], dtype).unwrap()
    };
    let check = |c: &mut Comparison<'_>, flat: &Tensor, tensor: &dyn Fn(&str) -> String| {
        layout.specs().iter().for_each(|s| c.check_values(&tensor(&s.name), &flat.to_f64_vec()[s.range()]));
    };
    let (lr, max_norm) = (g.number("/lr", None), g.number("/max_norm", None));
    let config =
        AdamW { beta1: g.number("/betas/0", None), beta2: g.number("/betas/1", None), eps: g.number("/eps", None) };
    let mut params = flat(&|name| format!("{name}.init"));
    let mut moments = [(); 2].map(|()| Tensor::zeros(&[layout.len()], dtype));
    let steps = (0..).take_while(|i| g.has(&format!("step{i}.norm"))).count();
    for i in 0..steps {
        let grads = flat(&|name| format!("step{i}.{}", name.replace('p', "g")));
        let norm = l2_norm(&grads, 0..layout.len()).unwrap();
        c.check_values(&format!("step{i}.norm"), &[norm]);
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        let group = |s: &dinolab_core::params::ParamSpec| Group {
            range: s.range(),
            lr: lr * g.number(&format!("/groups/{}/lr_mult", s.name), None),
            weight_decay: g.number(&format!("/groups/{}/wd", s.name), None),
            clip,
        };
        let groups: Vec<Group> = layout.specs().iter().map(group).collect();
        let [mean, square] = &mut moments;
        adamw_step(&mut params, &grads, Moments { mean, square }, None, &groups, config, i as u64 + 1).unwrap();
        check(c, &params, &|name| format!("step{i}.{name}"));
    }
    check(c, &moments[0], &|name| format!("final.{}", name.replace('p', "m")));
    check(c, &moments[1], &|name| format!("final.{}", name.replace('p', "v")));
}
