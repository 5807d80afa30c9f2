//! The operations of the losses: gradients against central differences, values and gradients against independent
//! statements in dfdx (f64, on its own tape), and laws that hold for every shape.

use dfdx::prelude::{
    AsArray as _, Axis, Backward as _, BroadcastTo as _, Cpu, OwnedTape, PermuteTo as _, Shape, SumTo as _,
    Tensor as Dfdx, TensorFromVec as _, Trace as _, TryMatMul as _, WithEmptyTape as _,
};
use dinolab_core::comm::Single;
use dinolab_core::ops::{ema_update, GramOptions, NegativeRemoval};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Result, Tensor};
use proptest::prelude::*;

/// Standard normal numbers; `index` tells the operands of a case apart.
fn normal(seed: u64, index: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(seed, Stream::Plugin, 0, index);
    let data: Vec<f64> = (0..shape.iter().product::<usize>()).map(|_| rng.normal()).collect();
    Tensor::from_slice(&data, shape).unwrap()
}

/// A result, and the gradients of the inputs, given a random gradient of the result.
fn run(inputs: &[Tensor], f: &impl Fn(&[Tensor]) -> Result<Tensor>) -> (Tensor, Vec<Vec<f64>>) {
    let tape = Tape::new();
    let leaves: Vec<Tensor> = inputs.iter().map(|x| tape.leaf(x)).collect();
    let out = f(&leaves).unwrap();
    let loss = out.mul(&normal(99, 99, out.shape())).unwrap().sum().unwrap();
    let grads = tape.backward(&loss, 1.0, None).unwrap();
    (out.detach(), leaves.iter().map(|x| grads.of(x).expect("every input is used").to_f64_vec()).collect())
}

/// The value and gradient of a scalar function.
fn value_and_gradient(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> (f64, Vec<f64>) {
    let tape = Tape::new();
    let x = tape.leaf(x);
    let loss = f(&x).unwrap();
    (loss.item(), tape.backward(&loss, 1.0, None).unwrap().of(&x).unwrap().to_f64_vec())
}

/// Holds the gradient of every input to central differences, in at most 40 directions of one coordinate each.
fn gradients_are_right(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let (_, grads) = run(inputs, &f);
    let loss = |inputs: &[Tensor]| {
        let out = f(inputs).unwrap();
        out.mul(&normal(99, 99, out.shape())).unwrap().sum().unwrap().item()
    };
    for (i, (x, grad)) in inputs.iter().zip(&grads).enumerate() {
        let size = grad.iter().fold(1.0, |m: f64, g| m.max(g.abs()));
        for j in (0..x.len()).step_by(x.len().div_ceil(40)) {
            let moved = |by: f64| {
                let mut inputs = inputs.to_vec();
                let mut data = x.to_f64_vec();
                data[j] += by;
                inputs[i] = Tensor::from_slice(&data, x.shape()).unwrap();
                loss(&inputs)
            };
            let h = 1e-4;
            // Fourth order, so that h can be large and rounding small.
            let want = (8.0 * (moved(h) - moved(-h)) - (moved(2.0 * h) - moved(-2.0 * h))) / (12.0 * h);
            let error = (grad[j] - want).abs() / size;
            assert!(error < 1e-7, "input {i}, element {j}: {} but differences give {want}", grad[j]);
        }
    }
}

#[track_caller]
fn close(what: &str, a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let norm = b.iter().map(|b| b * b).sum::<f64>().sqrt().max(1.0);
    let error = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / norm;
    assert!(error < 1e-11, "{what}: relative error {error:e}");
}

type Matrix<T = dfdx::prelude::NoneTape> = Dfdx<(usize, usize), f64, Cpu, T>;
type Taped = Matrix<OwnedTape<f64, Cpu>>;

/// A dfdx tensor of the same values.
fn oracle<S: Shape>(data: &[f64], shape: S) -> Dfdx<S, f64, Cpu> {
    Cpu::default().tensor_from_vec(data.to_vec(), shape)
}

/// A matrix whose product picks `rows` of `n`.
fn picking(rows: &[usize], n: usize) -> Taped {
    let mut pick = vec![0.0; rows.len() * n];
    rows.iter().enumerate().for_each(|(i, &row)| pick[i * n + row] = 1.0);
    oracle(&pick, (rows.len(), n)).leaky_traced()
}

/// Rows divided by their length.
fn unit_rows(x: Taped, shape: (usize, usize)) -> Taped {
    let norm = x.with_empty_tape().square().sum::<(usize,), Axis<1>>().sqrt();
    x / norm.broadcast_like::<_, Axis<1>>(&shape)
}

/// Every vector of the last axis mapped by one random orthogonal matrix: a product of reflections.
fn rotated(x: &Tensor, seed: u64) -> Tensor {
    let d = x.last_dim();
    let mut data = x.to_f64_vec();
    for axis in normal(seed, 50, &[3, d]).to_f64_vec().chunks(d) {
        let square: f64 = axis.iter().map(|a| a * a).sum();
        for row in data.chunks_mut(d) {
            let along: f64 = row.iter().zip(axis).map(|(x, a)| x * a).sum();
            row.iter_mut().zip(axis).for_each(|(x, a)| *x -= 2.0 * along / square * a);
        }
    }
    Tensor::from_slice(&data, x.shape()).unwrap()
}

/// A random cross-entropy: logits, targets, and weighted pairs with zero to three entries a row.
struct Pairs {
    logits: Tensor,
    targets: Tensor,
    list: Vec<(u32, u32, f64)>,
}

impl Pairs {
    fn random(seed: u64, rows: usize, targets: usize, k: usize) -> Self {
        let mut rng = Rng::new(seed, Stream::Plugin, 1, 0);
        let mut list = Vec::new();
        for row in rng.permutation(rows) {
            let count = rng.below(4);
            list.extend((0..count).map(|_| (row, rng.below(targets) as u32, rng.uniform(0.1, 2.0))));
        }
        // Not divided by the sum: targets that do not sum to 1 count with the sum they have.
        let targets = normal(seed, 1, &[targets, k]).exp().unwrap();
        Self { logits: normal(seed, 0, &[rows, k]), targets, list }
    }

    fn loss(&self, logits: &Tensor, temperature: f64) -> Result<Tensor> {
        let n = self.list.len();
        let rows = |of: fn(&(u32, u32, f64)) -> u32| {
            Tensor::from_slice(&self.list.iter().map(of).collect::<Vec<_>>(), &[n]).unwrap()
        };
        let weights: Vec<f64> = self.list.iter().map(|p| p.2).collect();
        let weights = Tensor::from_slice(&weights, &[n])?;
        logits.soft_cross_entropy(&self.targets, &rows(|p| p.0), &rows(|p| p.1), &weights, temperature)
    }
}

/// Similarities of every row to the others of its group, nearest first.
fn similarities(x: &Tensor, group: usize) -> Vec<Vec<(f64, usize)>> {
    let (n, d) = (x.dim(0), x.dim(1));
    let x = x.l2_normalize(1e-8).unwrap().to_f64_vec();
    let dot = |i: usize, j: usize| (0..d).map(|c| x[i * d + c] * x[j * d + c]).sum::<f64>();
    let row = |i: usize| {
        let others = (i / group * group..(i / group + 1) * group).filter(|&j| j != i);
        let mut row: Vec<_> = others.map(|j| (dot(i, j), j)).collect();
        row.sort_by(|a, b| b.0.total_cmp(&a.0));
        row
    };
    (0..n).map(row).collect()
}

const REMOVALS: [NegativeRemoval; 3] = [NegativeRemoval::None, NegativeRemoval::Both, NegativeRemoval::Teacher];

/// All ways to compare Gram matrices.
fn gram_options() -> impl Strategy<Value = GramOptions> {
    (any::<bool>(), any::<bool>(), 0..3usize).prop_map(|(normalize, image_level, removal)| GramOptions {
        normalize,
        image_level,
        remove: REMOVALS[removal],
    })
}

/// The Gram loss in dfdx: value and gradient.
fn gram_in_dfdx(student: &Tensor, teacher: &Tensor, options: GramOptions) -> (f64, Vec<f64>) {
    let (all, d) = (student.dim(0) * student.dim(1), student.dim(2));
    let n = if options.image_level { student.dim(1) } else { all };
    let (s, t) = (oracle(student.as_slice(), (all, d)), oracle(teacher.as_slice(), (all, d)));
    let mut loss: Option<Dfdx<(), f64, Cpu, OwnedTape<f64, Cpu>>> = None;
    for image in 0..all / n {
        let rows: Vec<usize> = (image * n..(image + 1) * n).collect();
        let features = |x: &Matrix| {
            let rows = picking(&rows, all).matmul(x.leaky_trace());
            if options.normalize {
                unit_rows(rows, (n, d))
            } else {
                rows
            }
        };
        let similarity = |x: &Matrix, remove: bool| {
            // dfdx does not multiply a tensor with itself, so the factors are made one by one.
            let similarity = features(x).matmul(features(x).permute::<(usize, usize), _>());
            if remove {
                similarity.relu()
            } else {
                similarity
            }
        };
        let difference = similarity(&s, options.remove == NegativeRemoval::Both)
            - similarity(&t, options.remove != NegativeRemoval::None);
        let squares = difference.square().sum::<(), _>();
        loss = Some(match loss {
            None => squares,
            Some(loss) => loss + squares,
        });
    }
    let loss = loss.expect("there is an image") / (all * n) as f64;
    let value = loss.array();
    (value, loss.backward().get(&s).as_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(28))]

    #[test]
    fn soft_cross_entropy_has_the_right_gradient(rows in 1usize..7, q in 1usize..5, k in 1usize..60, seed: u64) {
        let pairs = Pairs::random(seed, rows, q, k);
        gradients_are_right(std::slice::from_ref(&pairs.logits), |x| pairs.loss(&x[0], 0.5));
    }

    #[test]
    fn soft_cross_entropy_equals_dfdx(rows in 1usize..9, q in 1usize..5, k in 1usize..5000, seed: u64) {
        let pairs = Pairs::random(seed, rows, q, k);
        let (value, grad) = value_and_gradient(&pairs.logits, |x| pairs.loss(x, 0.1));
        // The weighted sum of each row's targets.
        let mut mixed = vec![0.0; rows * k];
        for &(row, target, weight) in &pairs.list {
            let target = &pairs.targets.as_slice::<f64>()[target as usize * k..][..k];
            mixed[row as usize * k..][..k].iter_mut().zip(target).for_each(|(m, q)| *m += weight * q);
        }
        let x = oracle(pairs.logits.as_slice(), (rows, k));
        let log_probs = (x.leaky_trace() * (1.0 / 0.1)).log_softmax::<Axis<1>>();
        let loss = -(log_probs * oracle(&mixed, (rows, k))).sum::<(), _>();
        close("value", &[value], &[loss.array()]);
        close("gradient", &grad, &loss.backward().get(&x).as_vec());
    }

    #[test]
    fn cross_entropy_is_least_when_the_student_equals_the_teacher(k in 2usize..50, seed: u64) {
        let teacher = normal(seed, 0, &[1, k]);
        let center = Tensor::zeros(&[k], DType::F64);
        let targets = teacher.centered_softmax(&center, &Tensor::scalar(0.1, DType::F64)).unwrap();
        let pairs = Pairs { logits: teacher.clone(), targets, list: vec![(0, 0, 1.0)] };
        let (least, grad) = value_and_gradient(&teacher, |x| pairs.loss(x, 0.1));
        prop_assert!(grad.iter().all(|g| g.abs() < 1e-12));
        let other = teacher.add(&normal(seed, 1, &[1, k]).scale(0.1).unwrap()).unwrap();
        prop_assert!(pairs.loss(&other, 0.1).unwrap().item() >= least);
    }

    #[test]
    fn sinkhorn_equals_the_plain_iteration(b in 1usize..40, k in 1usize..60, n in 1usize..5, spread in 0.01..3.0, seed: u64) {
        let logits = normal(seed, 0, &[b, k]).scale(spread).unwrap();
        let temperature = 0.07;
        let ours = logits.sinkhorn_knopp(&Tensor::scalar(temperature, DType::F64), n, &Single).unwrap();
        let mut q: Vec<f64> = logits.to_f64_vec().iter().map(|x| (x / temperature).exp()).collect();
        let total: f64 = q.iter().sum();
        q.iter_mut().for_each(|q| *q /= total);
        for _ in 0..n {
            for column in 0..k {
                let sum: f64 = q.iter().skip(column).step_by(k).sum();
                q.iter_mut().skip(column).step_by(k).for_each(|q| *q /= sum * k as f64);
            }
            for row in q.chunks_mut(k) {
                let sum: f64 = row.iter().sum();
                row.iter_mut().for_each(|q| *q /= sum * b as f64);
            }
        }
        q.iter_mut().for_each(|q| *q *= b as f64);
        close("assignments", ours.as_slice(), &q);
    }

    #[test]
    fn sinkhorn_does_not_see_what_is_added_to_a_prototype(b in 1usize..20, k in 1usize..30, seed: u64) {
        let (logits, shift) = (normal(seed, 0, &[b, k]), normal(seed, 1, &[k]));
        let t = Tensor::scalar(0.2, DType::F64);
        let assigned = |x: &Tensor| x.sinkhorn_knopp(&t, 3, &Single).unwrap().to_f64_vec();
        close("assignments", &assigned(&logits.add_row(&shift).unwrap()), &assigned(&logits));
    }

    #[test]
    fn koleo_finds_the_nearest_and_has_the_right_gradient(groups in 1usize..3, size in 4usize..8, topk in 1usize..4, seed: u64) {
        let x = normal(seed, 0, &[groups * size, 5]);
        let nearest = similarities(&x, size);
        let expected: Vec<u32> = nearest.iter().flat_map(|row| row[..topk].iter().map(|&(_, j)| j as u32)).collect();
        let found = x.koleo_neighbours(topk, Some(size)).unwrap();
        prop_assert_eq!(found.as_slice::<u32>(), expected);
        // Differences say nothing where a step changes the neighbours, or is not small beside a distance.
        let apart = nearest.iter().all(|row| row[0].0 < 0.99 && row.get(topk).is_none_or(|r| row[topk - 1].0 - r.0 > 1e-2));
        prop_assume!(apart);
        gradients_are_right(&[x], |x| x[0].koleo(topk, Some(size)));
    }

    #[test]
    fn koleo_equals_dfdx(groups in 1usize..4, size in 4usize..40, topk in 1usize..4, d in 2usize..30, seed: u64) {
        let n = groups * size;
        let (x, share) = (normal(seed, 0, &[n, d]), normal(seed, 1, &[n]));
        let (value, grad) = value_and_gradient(&x, |x| x.koleo(topk, Some(size))?.mul(&share)?.sum());
        let neighbours = x.koleo_neighbours(topk, Some(size)).unwrap();
        let neighbours: Vec<usize> = neighbours.as_slice::<u32>().iter().map(|&j| j as usize).collect();
        let own: Vec<usize> = (0..n * topk).map(|edge| edge / topk).collect();
        let weights: Vec<f64> = own.iter().map(|&i| share.as_slice::<f64>()[i] / topk as f64).collect();
        let leaf = oracle(x.as_slice(), (n, d));
        let unit = unit_rows(leaf.leaky_trace(), (n, d));
        let mates = picking(&neighbours, n).matmul(unit.with_empty_tape());
        let difference = picking(&own, n).matmul(unit) - mates + 1e-8;
        let distance = difference.square().sum::<(usize,), Axis<1>>().sqrt();
        let loss = -((distance + 1e-8).ln() * oracle(&weights, (n * topk,))).sum::<(), _>();
        close("value", &[value], &[loss.array()]);
        close("gradient", &grad, &loss.backward().get(&leaf).as_vec());
    }

    #[test]
    fn koleo_is_invariant_to_rotation_length_and_order(n in 3usize..30, d in 2usize..20, seed: u64) {
        let x = normal(seed, 0, &[n, d]);
        let value = |x: &Tensor| x.koleo(1, None).unwrap().mean().unwrap().item();
        let order = Tensor::from_slice(&Rng::new(seed, Stream::Plugin, 2, 0).permutation(n), &[n]).unwrap();
        let lengths = normal(seed, 1, &[n]).exp().unwrap();
        // The eps in the difference, 1e-8 along one direction, is not rotated.
        for other in [rotated(&x, seed), x.gather_rows(&order).unwrap(), x.scale_rows(&lengths).unwrap()] {
            prop_assert!((value(&x) - value(&other)).abs() < 1e-5);
        }
    }

    #[test]
    fn gram_loss_has_the_right_gradient(b in 1usize..4, n in 1usize..6, d in 1usize..6, options in gram_options(), seed: u64) {
        let (s, t) = (normal(seed, 0, &[b, n, d]), normal(seed, 1, &[b, n, d]));
        let rows = s.reshape(&[b * n, d]).unwrap();
        let norms = rows.square().unwrap().sum_axis(1).unwrap().to_f64_vec();
        // Differences say nothing at the kink of a removed entry, or where a step turns a short row.
        let at_kink = rows.matmul_t(&rows).unwrap().to_f64_vec().iter().any(|s| s.abs() < 2e-3);
        prop_assume!(!at_kink && norms.iter().all(|&n| n > 0.05));
        gradients_are_right(&[s], |x| x[0].gram_loss(&t, options));
    }

    #[test]
    fn gram_loss_equals_dfdx(b in 1usize..4, n in 1usize..20, d in 1usize..12, options in gram_options(), seed: u64) {
        let (s, t) = (normal(seed, 0, &[b, n, d]), normal(seed, 1, &[b, n, d]));
        let (value, grad) = value_and_gradient(&s, |s| s.gram_loss(&t, options));
        let (want, want_grad) = gram_in_dfdx(&s, &t, options);
        close("value", &[value], &[want]);
        close("gradient", &grad, &want_grad);
    }

    #[test]
    fn gram_loss_is_invariant_to_an_orthogonal_map_of_the_features(b in 1usize..4, n in 1usize..20, d in 1usize..12, options in gram_options(), seed: u64) {
        let (s, t) = (normal(seed, 0, &[b, n, d]), normal(seed, 1, &[b, n, d]));
        let value = |s: &Tensor, t: &Tensor| s.gram_loss(t, options).unwrap().item();
        let (turned_student, turned_teacher) = (rotated(&s, seed), rotated(&t, seed + 1));
        close("loss", &[value(&turned_student, &turned_teacher)], &[value(&s, &t)]);
        if options.remove != NegativeRemoval::Teacher {
            prop_assert!(value(&turned_student, &s) < 1e-20);
        }
    }

    #[test]
    fn resizes_have_the_right_gradients(from in (1usize..7, 1usize..7), to in (1usize..7, 1usize..7), antialias: bool, seed: u64) {
        let x = normal(seed, 0, &[2, from.0 * from.1, 2]);
        gradients_are_right(std::slice::from_ref(&x), |x| x[0].resize_bicubic(from, to, antialias));
        gradients_are_right(&[x], |x| x[0].resize_bilinear(from, to));
    }

    #[test]
    fn bicubic_resize_of_an_image_upside_down_is_upside_down(from in (1usize..12, 1usize..12), to in (1usize..12, 1usize..12), antialias: bool, seed: u64) {
        // Turned by half: the patches in reverse order.
        let turned = |x: &Tensor| {
            let (n, d) = (x.dim(1), x.dim(2));
            let order: Vec<u32> = (0..n as u32).rev().collect();
            let order = Tensor::from_slice(&order, &[n]).unwrap();
            x.reshape(&[n, d]).unwrap().gather_rows(&order).unwrap().reshape(&[1, n, d]).unwrap()
        };
        let x = normal(seed, 0, &[1, from.0 * from.1, 3]);
        let resized = |x: &Tensor| x.resize_bicubic(from, to, antialias).unwrap();
        close("resized", resized(&turned(&x)).as_slice(), turned(&resized(&x)).as_slice());
    }

    #[test]
    fn broadcasts_and_transpose_have_the_right_gradients(rows in 1usize..80, d in 1usize..40, seed: u64) {
        let (x, row, factors) = (normal(seed, 0, &[2, rows, d]), normal(seed, 1, &[d]), normal(seed, 2, &[2 * rows]));
        gradients_are_right(&[x.clone(), row.clone()], |x| x[0].add_row(&x[1]));
        gradients_are_right(&[x.clone(), row], |x| x[0].mul_row(&x[1]));
        gradients_are_right(&[x.clone(), factors], |x| x[0].scale_rows(&x[1]));
        gradients_are_right(&[x], |x| x[0].transpose());
    }

    #[test]
    fn ema_is_a_contraction(n in 1usize..200, momentum in 0.0..1.0, seed: u64) {
        let student = normal(seed, 2, &[n]);
        let (mut a, mut b) = (normal(seed, 0, &[n]), normal(seed, 1, &[n]));
        let distance = |a: &Tensor, b: &Tensor| a.sub(b).unwrap().square().unwrap().sum().unwrap().item().sqrt();
        let (before, to_student) = (distance(&a, &b), distance(&a, &student));
        ema_update(&mut a, &student, momentum).unwrap();
        ema_update(&mut b, &student, momentum).unwrap();
        prop_assert!((distance(&a, &b) - momentum * before).abs() < 1e-12 * before.max(1.0));
        prop_assert!((distance(&a, &student) - momentum * to_student).abs() < 1e-12 * to_student.max(1.0));
    }
}
