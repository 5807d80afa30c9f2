//! The operations of the losses on a GPU: value and gradient against the CPU in f64, which starts from the same rounded
//! numbers. f32 to 1e-5, bf16 to 1e-2.

use dinolab_core::comm::Shards;
use dinolab_core::ops::{NegativeRemoval, SimilarityOptions};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Device, Result, Tensor};
use dinolab_tests::gpu_test;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Where a case runs, and in which type.
#[derive(Clone, Copy)]
struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    const ORACLE: Self = Self { device: Device::Cpu, dtype: DType::F64 };

    fn gpu(dtype: DType) -> Self {
        Self { device: "cuda".parse().expect("there is a GPU"), dtype }
    }

    /// Features there.
    fn features(self, x: &Tensor) -> Tensor {
        x.cast(self.dtype).unwrap().to(self.device)
    }

    /// Scalars, weights of rows and statistics there: f32 beside bf16.
    fn scalars(self, x: &Tensor) -> Tensor {
        let dtype = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        x.cast(dtype).unwrap().to(self.device)
    }

    fn rows(self, rows: &[u32]) -> Tensor {
        Tensor::from_slice(rows, &[rows.len()]).unwrap().to(self.device)
    }

    /// `f`, and its gradient given a random gradient of the result.
    fn run(self, x: &Tensor, f: &impl Fn(&Tensor, Self) -> Result<Tensor>) -> [Vec<f64>; 2] {
        let tape = Tape::new();
        let x = tape.leaf(&self.features(x));
        let y = f(&x, self).unwrap();
        let dy = rounded(&normal(99, 99, y.shape()));
        let dy = if y.dtype() == self.dtype { self.features(&dy) } else { self.scalars(&dy) };
        let loss = y.mul(&dy).unwrap().sum().unwrap();
        let grads = tape.backward(&loss, 1.0, None).unwrap();
        [y.to_f64_vec(), grads.of(&x).expect("the input is used").to_f64_vec()]
    }
}

const TYPES: [(DType, f64); 2] = [(DType::F32, 1e-5), (DType::BF16, 1e-2)];

fn normal(seed: u64, index: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(seed, Stream::Plugin, 0, index);
    let data: Vec<f64> = (0..shape.iter().product::<usize>()).map(|_| rng.normal()).collect();
    Tensor::from_slice(&data, shape).unwrap()
}

/// Numbers that bf16 holds, so that all places start from the same.
fn rounded(x: &Tensor) -> Tensor {
    x.cast(DType::BF16).unwrap().cast(DType::F64).unwrap()
}

/// The features, moved by about a rounding to bf16: what is nearly cancelled in a result is lost to that.
fn nudged(x: &Tensor) -> Tensor {
    let noise = normal(98, 98, x.shape()).scale(2f64.powi(-9)).unwrap();
    x.add(&x.mul(&noise).unwrap()).unwrap()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[track_caller]
fn close(what: &str, ours: &[f64], oracle: &[f64], tolerance: f64) {
    close_within(what, ours, oracle, tolerance, 0.0);
}

/// The length of the difference is at most `tolerance` of the oracle's, and `slack`.
#[track_caller]
fn close_within(what: &str, ours: &[f64], oracle: &[f64], tolerance: f64, slack: f64) {
    assert_eq!(ours.len(), oracle.len(), "{what}");
    let norm = oracle.iter().map(|b| b * b).sum::<f64>().sqrt().max(1e-3);
    let error = distance(ours, oracle);
    assert!(error <= tolerance * norm + slack, "{what}: error {error:e} of {norm:e}, slack {slack:e}");
}

/// Holds value and gradient in both types to the oracle.
#[track_caller]
fn equals_the_oracle(x: &Tensor, f: impl Fn(&Tensor, Place) -> Result<Tensor>) {
    let x = rounded(x);
    let [value, grad] = Place::ORACLE.run(&x, &f);
    let [other, other_grad] = Place::ORACLE.run(&nudged(&x), &f);
    for (dtype, tolerance) in TYPES {
        let [ours, ours_grad] = Place::gpu(dtype).run(&x, &f);
        let slack =
            if dtype == DType::BF16 { [distance(&other, &value), distance(&other_grad, &grad)] } else { [0.0; 2] };
        close_within(&format!("value in {dtype:?}"), &ours, &value, tolerance, slack[0]);
        close_within(&format!("gradient in {dtype:?}"), &ours_grad, &grad, tolerance, slack[1]);
    }
}

/// Holds an operation without gradient to the oracle in both types.
#[track_caller]
fn value_equals_the_oracle(x: &Tensor, f: impl Fn(&Tensor, Place) -> Result<Tensor>) {
    let x = rounded(x);
    let [value, other] = [&x, &nudged(&x)].map(|x| f(x, Place::ORACLE).unwrap().to_f64_vec());
    for (dtype, tolerance) in TYPES {
        let place = Place::gpu(dtype);
        let ours = f(&place.features(&x), place).unwrap();
        assert_eq!(ours.device(), place.device);
        let slack = if dtype == DType::BF16 { distance(&other, &value) } else { 0.0 };
        close_within(&format!("value in {dtype:?}"), &ours.to_f64_vec(), &value, tolerance, slack);
    }
}

/// Random shapes of `N` axes below `most`, and a seed: a few, because the emulator is slow.
fn shapes<const N: usize>(most: [usize; N], check: impl Fn([usize; N], u64)) {
    let config = Config { cases: 6, failure_persistence: None, ..Config::default() };
    let shape = most.map(|most| 1..most + 1);
    let checked = TestRunner::new(config).run(&(shape.to_vec(), 0..u64::MAX), |(shape, seed)| {
        check(shape.try_into().expect("as many axes as asked for"), seed);
        Ok::<(), TestCaseError>(())
    });
    checked.unwrap_or_else(|e| panic!("{e}"));
}

/// Weighted pairs of rows: student rows ascend, some have no entry, some several.
fn pairs(seed: u64, rows: usize, targets: usize) -> Vec<(u32, u32, f64)> {
    let mut rng = Rng::new(seed, Stream::Plugin, 1, 0);
    let mut list = Vec::new();
    for row in 0..rows as u32 {
        for _ in 0..rng.below(4) {
            list.push((row, rng.below(targets) as u32, rng.uniform(0.1, 2.0)));
        }
    }
    list
}

fn cross_entropy(logits: &Tensor, targets: &Tensor, list: &[(u32, u32, f64)], place: Place) -> Result<Tensor> {
    let rows = |of: fn(&(u32, u32, f64)) -> u32| place.rows(&list.iter().map(of).collect::<Vec<_>>());
    let weights = Tensor::from_slice(&list.iter().map(|p| p.2).collect::<Vec<_>>(), &[list.len()])?;
    let (targets, weights) = (place.features(targets), place.scalars(&weights));
    logits.soft_cross_entropy(&targets, &rows(|p| p.0), &rows(|p| p.1), &weights, 0.3)
}

gpu_test!(what_is_not_a_number_is_not_made_one_on_a_gpu, {
    for dtype in [DType::F32, DType::BF16] {
        let x = Tensor::from_f64(&[f64::NAN, -1.0, 2.0], &[3], DType::F64).unwrap();
        let made = Place::gpu(dtype).features(&x).relu().unwrap().to(Device::Cpu).to_f64_vec();
        assert!(made[0].is_nan() && made[1..] == [0.0, 2.0], "{made:?}");
    }
});

gpu_test!(soft_cross_entropy_equals_the_cpu, {
    shapes([7, 5, 1300], |[rows, q, k], seed| {
        let targets = rounded(&normal(seed, 1, &[q, k]).softmax().unwrap());
        let list = pairs(seed, rows, q);
        equals_the_oracle(&normal(seed, 0, &[rows, k]), |x, place| cross_entropy(x, &targets, &list, place));
    });
});

gpu_test!(soft_cross_entropy_reads_packs_of_a_wide_row, {
    let targets = rounded(&normal(0, 1, &[2, 8192]).scale(4.0).unwrap().softmax().unwrap());
    let list = [(0, 1, 0.5), (1, 0, 2.0), (1, 1, 1.0)];
    equals_the_oracle(&normal(0, 0, &[3, 8192]), |x, place| cross_entropy(x, &targets, &list, place));
});

gpu_test!(soft_cross_entropy_adds_to_a_gradient_that_is_there, {
    let targets = rounded(&normal(0, 1, &[3, 40]).softmax().unwrap());
    // Row 1 is in no pair of the second list.
    let lists = [vec![(0, 0, 1.0), (1, 1, 1.0), (2, 2, 1.0)], vec![(0, 2, 0.5), (2, 0, 0.25)]];
    equals_the_oracle(&normal(0, 0, &[3, 40]), |x, place| {
        cross_entropy(x, &targets, &lists[0], place)?.add(&cross_entropy(x, &targets, &lists[1], place)?)
    });
});

gpu_test!(an_offset_of_all_logits_costs_the_cross_entropy_no_digits, {
    let targets = rounded(&normal(0, 1, &[1, 24]).softmax().unwrap());
    let x = normal(0, 0, &[1, 24]).scale(64.0).unwrap().shift(8192.0).unwrap();
    equals_the_oracle(&x, |x, place| cross_entropy(x, &targets, &[(0, 0, 1.0)], place));
});

gpu_test!(sinkhorn_knopp_equals_the_cpu, {
    shapes([60, 70, 4], |[rows, k, iterations], seed| {
        let temperature = Tensor::scalar(0.07, DType::F64);
        let x = normal(seed, 0, &[rows, k]).scale(0.3).unwrap();
        value_equals_the_oracle(&x, |x, place| {
            x.sinkhorn_knopp(&place.scalars(&temperature), iterations, &Shards::one())
        });
    });
});

gpu_test!(sinkhorn_knopp_sums_over_runs_of_rows_and_takes_four_rows_at_a_time, {
    let temperature = Tensor::scalar(0.1, DType::F64);
    for k in [8, 13] {
        // One row is left over from the blocks of four, and the last run of rows is short.
        let x = normal(0, 0, &[1025, k]).scale(0.3).unwrap();
        value_equals_the_oracle(&x, |x, place| x.sinkhorn_knopp(&place.scalars(&temperature), 3, &Shards::one()));
    }
});

gpu_test!(sinkhorn_knopp_gives_no_nan_however_far_apart_the_logits_are, {
    for dtype in [DType::F32, DType::BF16] {
        let place = Place::gpu(dtype);
        let mut x = normal(0, 0, &[20, 16]).scale(300.0).unwrap().to_f64_vec();
        x.iter_mut().step_by(16).for_each(|x| *x = -1e4);
        let x = place.features(&Tensor::from_slice(&x, &[20, 16]).unwrap());
        let temperature = place.scalars(&Tensor::scalar(0.04, DType::F64));
        let q = x.sinkhorn_knopp(&temperature, 3, &Shards::one()).unwrap().to_f64_vec();
        for row in q.chunks(16) {
            let sum: f64 = row.iter().sum();
            assert!((sum - 1.0).abs() < 5e-3, "{dtype:?}: {row:?}");
        }
    }
});

gpu_test!(softmax_and_its_logarithm_equal_the_cpu, {
    shapes([6, 400], |[rows, d], seed| {
        // Not near one-hot: a gradient there is what the rounding of a probability near 1 leaves of it.
        let x = normal(seed, 0, &[rows, d]);
        equals_the_oracle(&x, |x, _| x.softmax());
        equals_the_oracle(&x, |x, _| x.log_softmax());
    });
    // Rows wider than a block, and an offset.
    let x = normal(0, 0, &[2, 5000]).scale(16.0).unwrap().shift(2048.0).unwrap();
    equals_the_oracle(&x, |x, _| x.log_softmax());
});

gpu_test!(centered_softmax_and_the_mean_row_equal_the_cpu, {
    shapes([9, 300], |[rows, k], seed| {
        let (x, center) = (normal(seed, 0, &[rows, k]), normal(seed, 1, &[k]));
        let temperature = Tensor::scalar(0.3, DType::F64);
        value_equals_the_oracle(&x, |x, place| {
            x.centered_softmax(&place.scalars(&center), &place.scalars(&temperature))
        });
        value_equals_the_oracle(&x, |x, _| x.mean_row(&Shards::one()));
    });
});

gpu_test!(l2_normalize_equals_the_cpu, {
    shapes([9, 300], |[rows, d], seed| {
        equals_the_oracle(&normal(seed, 0, &[rows, d + 2]), |x, _| x.l2_normalize(1e-12))
    });
    // Row 1 is shorter than eps: there the map is linear.
    let x = Tensor::from_slice(&[3.0, 4.0, 1e-3, -2e-3], &[2, 2]).unwrap();
    equals_the_oracle(&x, |x, _| x.l2_normalize(0.5));
});

gpu_test!(koleo_equals_the_cpu, {
    shapes([3, 40, 3, 300], |[groups, size, topk, d], seed| {
        let (size, d) = (size + topk, d + 1);
        let x = normal(seed, 0, &[groups * size, d]);
        equals_the_oracle(&x, |x, _| x.neighbour_distance(topk, Some(size)));
        value_equals_the_oracle(&x, |x, _| x.nearest_neighbours(topk, Some(size)));
    });
});

gpu_test!(koleo_of_equal_rows_takes_the_first_and_is_finite, {
    let x: Vec<f64> = normal(0, 0, &[2, 20]).to_f64_vec();
    let x = rounded(&Tensor::from_slice(&[x.clone(), x].concat(), &[4, 20]).unwrap());
    let place = Place::gpu(DType::F32);
    let on_gpu = place.features(&x);
    assert_eq!(on_gpu.nearest_neighbours(1, None).unwrap().to_f64_vec(), [2.0, 3.0, 0.0, 1.0]);
    let zeros = place.features(&Tensor::full(&[40, 3], DType::F64, 1.0).unwrap());
    let firsts: Vec<f64> =
        (0..40).flat_map(|i| if i == 0 { [1.0, 2.0] } else { [0.0, if i == 1 { 2.0 } else { 1.0 }] }).collect();
    assert_eq!(zeros.nearest_neighbours(2, None).unwrap().to_f64_vec(), firsts);
    let [value, grad] = place.run(&x, &|x: &Tensor, _| x.neighbour_distance(1, None));
    close("value", &value, &Place::ORACLE.run(&x, &|x: &Tensor, _| x.neighbour_distance(1, None))[0], 1e-5);
    assert!(grad.iter().all(|g| g.is_finite()), "{grad:?}");
});

const REMOVALS: [NegativeRemoval; 3] = [NegativeRemoval::None, NegativeRemoval::Both, NegativeRemoval::Teacher];

gpu_test!(gram_loss_equals_the_cpu_in_all_variants, {
    shapes([3, 40, 50], |[images, n, d], seed| {
        // Of a few similarities all may hang on the rounding of one.
        let (n, d) = (n + 4, d + 4);
        let (x, teacher) = (normal(seed, 0, &[images, n, d]), rounded(&normal(seed, 1, &[images, n, d])));
        for variant in 0..12 {
            let (normalize, image_level, remove) = (variant % 2 == 0, variant % 4 < 2, REMOVALS[variant / 4]);
            let options = SimilarityOptions { normalize, image_level, remove };
            let loss = |x: &Tensor, place: Place| x.similarity_distance(&place.features(&teacher), options);
            if normalize && remove == NegativeRemoval::Both {
                // Normalised features are rounded once more in bf16; an entry that thereby changes its sign changes the
                // gradient by a jump.
                value_equals_the_oracle(&x, loss);
            } else {
                equals_the_oracle(&x, loss);
            }
        }
    });
});

gpu_test!(gram_loss_of_chosen_patches_is_over_all_of_them, {
    let (x, teacher) = (normal(0, 0, &[37, 10]), rounded(&normal(0, 1, &[37, 10])));
    equals_the_oracle(&x, |x, place| x.similarity_distance(&place.features(&teacher), SimilarityOptions::default()));
});

gpu_test!(gram_loss_at_batch_level_is_made_in_tiles, {
    // More similarities than a tile has.
    let (n, place) = (4200, Place::gpu(DType::F32));
    let (x, teacher) = (rounded(&normal(0, 0, &[n, 2])), rounded(&normal(0, 1, &[n, 2])));
    let loss =
        |x: &Tensor, place: Place| x.similarity_distance(&place.features(&teacher), SimilarityOptions::default());
    let ([value, grad], [ours, ours_grad]) = (Place::ORACLE.run(&x, &loss), place.run(&x, &loss));
    close("value", &ours, &value, 1e-5);
    close("gradient", &ours_grad, &grad, 1e-5);
});

gpu_test!(operands_of_a_wrong_type_are_an_error, {
    let place = Place::gpu(DType::BF16);
    let x = place.features(&normal(0, 0, &[4, 8]));
    let temperature = place.features(&Tensor::scalar(0.1, DType::F64));
    let error = x.sinkhorn_knopp(&temperature, 3, &Shards::one()).unwrap_err().to_string();
    assert!(error.contains("expected F32"), "{error}");
});
