//! Attention on a GPU, forward and backward, held to the CPU in f64 on the same inputs.

use dinolab_core::ops::Segment;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Device, Tensor};
use dinolab_tests::gpu_test;

/// A run of images: how many, tokens each, how many of these come before the patches, and what positions the patches have.
#[derive(Clone, Copy)]
struct Images {
    images: usize,
    tokens: usize,
    prefix: usize,
    rotary: bool,
    bias: bool,
}

const fn images(images: usize, tokens: usize, prefix: usize) -> Images {
    Images { images, tokens, prefix, rotary: true, bias: false }
}

/// Values that bf16 holds exactly, so that every type starts from the same.
fn rounded(values: impl Iterator<Item = f64>, shape: &[usize]) -> Tensor {
    let values: Vec<f64> = values.take(shape.iter().product()).collect();
    let rounded = Tensor::from_slice(&values, shape).unwrap().cast(DType::BF16).unwrap();
    Tensor::from_slice(&rounded.to_f64_vec(), shape).unwrap()
}

fn normal(index: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(5, Stream::Plugin, 0, index);
    rounded(std::iter::repeat_with(|| rng.normal()), shape)
}

/// Sines and cosines of random angles: what is held to the CPU must not depend on halves that repeat.
fn rotary(index: u64, shape: &[usize]) -> (Tensor, Tensor) {
    let angles = normal(index, shape).to_f64_vec();
    (rounded(angles.iter().map(|a| a.sin()), shape), rounded(angles.iter().map(|a| a.cos()), shape))
}

/// What a run gives: the result, then the gradients of qkv and of each bias.
fn run(heads: usize, d: usize, images: &[Images], device: Device, dtype: DType) -> Vec<Vec<f64>> {
    let rows = images.iter().map(|s| s.images * s.tokens).sum();
    let here = |x: &Tensor| x.cast(dtype).unwrap().to(device);
    let tape = Tape::new();
    let qkv = tape.leaf(&here(&normal(0, &[rows, 3 * heads * d])));
    let mut leaves = vec![qkv.clone()];
    let mut segment = |(i, s): (usize, &Images)| {
        let (patches, index) = (s.tokens - s.prefix, 10 * (i as u64 + 1));
        let bias = s.bias.then(|| tape.leaf(&here(&normal(index, &[heads, patches, patches]))));
        leaves.extend(bias.clone());
        let rotary = s.rotary.then(|| rotary(index + 1, &[patches, d]));
        Segment { images: s.images, tokens: s.tokens, rotary: rotary.map(|(sin, cos)| (here(&sin), here(&cos))), bias }
    };
    let segments: Vec<Segment> = images.iter().enumerate().map(&mut segment).collect();
    let out = qkv.clone().attention(heads, &segments).unwrap();
    let loss = out.mul(&here(&normal(1, out.shape()))).unwrap().sum().unwrap();
    let grads = tape.backward(&loss, 1.0, None).unwrap();
    let grads = leaves.iter().map(|x| grads.of(x).expect("every leaf is used"));
    [&out].into_iter().chain(grads).map(Tensor::to_f64_vec).collect()
}

/// Holds a GPU's results to the CPU's by the norm of the difference over the norm, each matrix of dqkv on its own.
#[track_caller]
fn equals_the_cpu(heads: usize, d: usize, images: &[Images], dtype: DType) {
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    let device: Device = "cuda".parse().unwrap();
    let (want, got) = (run(heads, d, images, Device::Cpu, DType::F64), run(heads, d, images, device, dtype));
    let width = heads * d;
    for (i, (want, got)) in want.iter().zip(&got).enumerate() {
        let matrices = if i == 1 { 3 } else { 1 };
        for part in 0..matrices {
            let chunks = |x: &[f64]| -> Vec<f64> {
                x.chunks(width * matrices)
                    .flat_map(|row| row[part * row.len() / matrices..][..row.len() / matrices].to_vec())
                    .collect()
            };
            let (want, got) = (chunks(want), chunks(got));
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let size = norm(&mut want.iter().copied()).max(1e-3);
            let error = norm(&mut want.iter().zip(&got).map(|(a, b)| a - b)) / size;
            assert!(error < tolerance, "result {i}, matrix {part}, d {d}, {dtype:?}: relative error {error:e}");
        }
    }
}

gpu_test!(attention_in_f32_equals_the_cpu, {
    equals_the_cpu(2, 12, &[images(2, 70, 5), images(3, 20, 5), images(1, 1, 0)], DType::F32);
    equals_the_cpu(3, 64, &[Images { rotary: false, ..images(2, 33, 0) }], DType::F32);
});

gpu_test!(attention_on_tensor_cores_is_within_a_hundredth_of_the_cpu, {
    for tokens in [2, 16, 17, 54, 65] {
        equals_the_cpu(3, 64, &[images(2, tokens, 1)], DType::BF16);
    }
    for d in [32, 80, 128] {
        equals_the_cpu(2, d, &[images(1, 49, 0), Images { rotary: false, ..images(2, 30, 3) }], DType::BF16);
    }
});

gpu_test!(images_of_five_lengths_equal_the_cpu, {
    // Heads do not divide evenly.
    let crops = [images(1, 20, 5), images(2, 261, 5), images(5, 54, 5), images(1, 1, 0), images(2, 7, 2)];
    equals_the_cpu(5, 64, &crops, DType::BF16);
});

gpu_test!(sequences_that_shared_memory_cannot_hold_are_swept_in_chunks, {
    equals_the_cpu(1, 64, &[images(1, 1029, 5)], DType::BF16);
});

gpu_test!(bf16_heads_of_odd_sizes_need_no_tensor_cores, {
    equals_the_cpu(2, 20, &[Images { bias: true, ..images(2, 40, 3) }], DType::BF16);
});

gpu_test!(a_score_bias_and_its_gradient_equal_the_cpu, {
    // More images than parts of the sum, of which the last is shorter.
    let crops =
        [Images { bias: true, ..images(10, 30, 3) }, images(2, 20, 3), Images { bias: true, ..images(1, 50, 0) }];
    equals_the_cpu(2, 64, &crops, DType::BF16);
    equals_the_cpu(2, 16, &crops, DType::F32);
});

gpu_test!(attention_twice_gives_the_same_bits, {
    let crops = [Images { bias: true, ..images(9, 40, 5) }, images(3, 90, 5)];
    let device: Device = "cuda".parse().unwrap();
    for dtype in [DType::F32, DType::BF16] {
        assert_eq!(run(2, 64, &crops, device, dtype), run(2, 64, &crops, device, dtype));
    }
});
