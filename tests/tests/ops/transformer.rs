//! The operations of a transformer: what is computed together equals its parts, and properties that hold for every shape. What each
//! is by itself is stated in `dinolab_core::testing::ops`.

use dinolab_core::ops::{Linear, Segment};
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

/// A result, and the gradients of the inputs for a random one of it.
struct Run {
    out: Vec<f64>,
    grads: Vec<Vec<f64>>,
}

/// Runs `f` forward and, with a random gradient of its result, backward.
fn run(inputs: &[Tensor], f: &impl Fn(&[Tensor]) -> Result<Tensor>) -> Run {
    let tape = Tape::new();
    let leaves: Vec<Tensor> = inputs.iter().map(|x| tape.leaf(x)).collect();
    let out = f(&leaves).unwrap();
    let dout = normal(99, 99, out.shape());
    let loss = out.mul(&dout).unwrap().sum().unwrap();
    let grads = tape.backward(&loss, 1.0, None).unwrap();
    let grads = leaves.iter().map(|x| grads.of(x).expect("every input is used").to_f64_vec()).collect();
    Run { out: out.to_f64_vec(), grads }
}

#[track_caller]
fn close(what: &str, a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let norm = b.iter().map(|b| b * b).sum::<f64>().sqrt().max(1.0);
    let error = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / norm;
    assert!(error < 1e-11, "{what}: relative error {error:e}");
}

/// Holds one statement's value and gradients to those of another; the gradient of what is not used is 0.
fn same(inputs: &[Tensor], ours: impl Fn(&[Tensor]) -> Result<Tensor>, theirs: impl Fn(&[Tensor]) -> Result<Tensor>) {
    // Every input is used.
    let with_all = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>, x: &[Tensor]| {
        x.iter().try_fold(f(x)?, |y, x| y.add(&x.sum()?.scale(0.0)?))
    };
    let (ours, theirs) =
        (run(inputs, &|x: &[Tensor]| with_all(&ours, x)), run(inputs, &|x: &[Tensor]| with_all(&theirs, x)));
    close("value", &ours.out, &theirs.out);
    for (i, (ours, theirs)) in ours.grads.iter().zip(&theirs.grads).enumerate() {
        close(&format!("gradient of input {i}"), ours, theirs);
    }
}

fn token_bias(seed: u64, heads: usize, patches: usize) -> Tensor {
    normal(seed, 7, &[heads, patches, patches])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn a_linear_layer_with_its_surroundings_is_its_parts(
        rows in 1usize..300, i in 2usize..20, o in 1usize..20, before in 0usize..5,
        (bias, scale, onto) in (any::<bool>(), any::<bool>(), any::<bool>()), seed: u64,
    ) {
        let inputs = [
            normal(seed, 0, &[rows, i]), normal(seed, 1, &[o, i]), normal(seed, 2, &[o]), normal(seed, 3, &[o]),
            normal(seed, 4, &[rows, o]), normal(seed, 5, &[i]), normal(seed, 6, &[i]), normal(seed, 7, &[rows, i]),
        ];
        let fused = |x: &[Tensor]| {
            let layer = Linear::new(&x[1], bias.then_some(&x[2])).scale(scale.then_some(&x[3])).onto(onto.then_some(&x[4]));
            match before {
                0 => layer.of(&x[0]),
                1 => layer.after_layer_norm(&x[5], &x[6], 0.1).of(&x[0]),
                2 => layer.after_rms_norm(&x[5], 0.1).of(&x[0]),
                3 => layer.after_gelu().of(&x[0]),
                _ => layer.after_swiglu(&x[7]).of(&x[0]),
            }
        };
        let parts = |x: &[Tensor]| {
            let f = match before {
                0 => x[0].clone(),
                1 => x[0].layer_norm(&x[5], &x[6], 0.1)?,
                2 => x[0].rms_norm(&x[5], 0.1)?,
                3 => x[0].gelu()?,
                _ => x[0].swiglu(&x[7])?,
            };
            let mut y = f.matmul_t(&x[1])?;
            if bias {
                y = y.add_row(&x[2])?;
            }
            if scale {
                y = y.mul_row(&x[3])?;
            }
            if onto { x[4].add(&y) } else { Ok(y) }
        };
        same(&inputs, fused, parts);
    }

    #[test]
    fn sums_of_rows_that_pass_from_layer_to_layer_are_those_of_the_whole_gradient(
        rows in 1usize..300, d in 2usize..12, again: bool, seed: u64,
    ) {
        let shapes: [&[usize]; 9] = [&[rows, d], &[d], &[d], &[5, d], &[5], &[d, 5], &[d], &[d], &[rows, 5]];
        let inputs: Vec<Tensor> = (0..).zip(shapes).map(|(k, shape)| normal(seed, k, shape)).collect();
        // A hidden tensor that is used again gets a gradient whose rows nobody has summed.
        let used_again = |y: Tensor, h: &Tensor, x: &[Tensor]| match again {
            true => y.add(&h.mul(&x[8])?.matmul_t(&x[5])?),
            false => Ok(y),
        };
        let fused = |x: &[Tensor]| {
            let first = Linear::new(&x[3], Some(&x[4])).after_layer_norm(&x[1], &x[2], 0.1).of(&x[0])?;
            let y = Linear::new(&x[5], Some(&x[6])).after_gelu().scale(&x[7]).onto(&x[0]).of(&first)?;
            let second = Linear::new(&x[3], Some(&x[4])).after_layer_norm(&x[1], &x[2], 0.1).of(&y)?;
            used_again(Linear::new(&x[5], Some(&x[6])).after_gelu().scale(&x[7]).onto(&y).of(&second)?, &first, x)
        };
        let parts = |x: &[Tensor]| {
            let hidden = |y: &Tensor| y.layer_norm(&x[1], &x[2], 0.1)?.matmul_t(&x[3])?.add_row(&x[4]);
            let branch = |h: &Tensor| h.gelu()?.matmul_t(&x[5])?.add_row(&x[6])?.mul_row(&x[7]);
            let first = hidden(&x[0])?;
            let y = x[0].add(&branch(&first)?)?;
            used_again(y.add(&branch(&hidden(&y)?)?)?, &first, x)
        };
        same(&inputs, fused, parts);
    }

    #[test]
    fn attention_of_several_kinds_of_crops_is_that_of_each(
        global in 1usize..3, local in 1usize..4, n in 1usize..90, m in 1usize..20, heads in 1usize..4, d in 1usize..18,
        seed: u64,
    ) {
        let qkv = normal(seed, 0, &[global * n + local * m, 3 * heads * d]);
        let kinds = [(global, n), (local, m)].map(|(images, tokens)| Segment { images, tokens, rotary: None, bias: None });
        let parts = |x: &[Tensor]| {
            let part = |start: usize, kind: &Segment| {
                x[0].narrow(start, kind.images * kind.tokens)?.attention(heads, std::slice::from_ref(kind))
            };
            Tensor::cat(&[&part(0, &kinds[0])?, &part(global * n, &kinds[1])?])
        };
        same(std::slice::from_ref(&qkv), |x| x[0].clone().attention(heads, &kinds), parts);
    }

    #[test]
    fn attention_in_blocks_of_queries_is_its_parts(n in 900usize..1200, d in 1usize..4, seed: u64) {
        let qkv = normal(seed, 0, &[n, 3 * d]);
        let segments = [Segment { images: 1, tokens: n, rotary: None, bias: None }];
        let parts = |x: &[Tensor]| {
            let part = |which: usize| x[0].narrow_axis(1, which * d, d);
            part(0)?.matmul_t(&part(1)?)?.scale(1.0 / (d as f64).sqrt())?.softmax()?.matmul(&part(2)?)
        };
        same(std::slice::from_ref(&qkv), |x| x[0].clone().attention(1, &segments), parts);
    }

    #[test]
    fn turning_all_patches_together_changes_no_attention(patches in 1usize..12, prefix in 0usize..3, seed: u64) {
        // Scores between patches depend on differences of angles alone, if no token is outside the rotation.
        let (d, tokens) = (6, patches);
        let qkv = normal(seed, prefix as u64, &[tokens, 3 * d]);
        let angles = normal(seed, 8, &[patches, d / 2]).to_f64_vec();
        let out = |turn: f64| {
            let table = |f: fn(f64) -> f64| {
                let rows = angles.chunks(d / 2).flat_map(|a| [a, a].concat());
                Tensor::from_slice(&rows.map(|a| f(a + turn)).collect::<Vec<_>>(), &[patches, d]).unwrap()
            };
            let rotary = Some((table(f64::sin), table(f64::cos)));
            qkv.clone().attention(1, &[Segment { images: 1, tokens, rotary, bias: None }]).unwrap().to_f64_vec()
        };
        close("out", &out(0.0), &out(1.3));
    }

}

/// Enough rows for many tasks, so that a dependence on scheduling would show.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (images, tokens, heads, d) = (24, 37, 3, 16);
    let width = heads * d;
    let cast = |x: Tensor| x.cast(DType::F32).unwrap();
    let inputs = [
        cast(normal(1, 0, &[images * tokens, width])),
        cast(normal(1, 1, &[width])),
        cast(normal(1, 2, &[width])),
        cast(normal(1, 3, &[3 * width, width])),
        cast(token_bias(1, heads, tokens - 1)),
        cast(normal(1, 4, &[width, 1, 7, 7])),
    ];
    let block = |x: &[Tensor]| {
        let segment = Segment { images, tokens, rotary: None, bias: Some(x[4].clone()) };
        let qkv = Linear::new(&x[3], None).after_layer_norm(&x[1], &x[2], 1e-6).of(&x[0])?;
        let last = x[3].narrow(0, width)?;
        let y = Linear::new(&last, Some(&x[2])).scale(&x[1]).onto(&x[0]).of(&qkv.attention(heads, &[segment])?)?;
        let y = Linear::new(&last, Some(&x[2])).after_gelu().onto(&y).of(&y)?;
        y.reshape(&[images, tokens, width])?.depthwise_conv((tokens, 1), &x[5], &x[2])
    };
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let tape = Tape::new();
            let leaves: Vec<Tensor> = inputs.iter().map(|x| tape.leaf(x)).collect();
            let y = block(&leaves).unwrap();
            let grads = tape.backward(&y.square().unwrap().sum().unwrap(), 1.0, None).unwrap();
            let grads = leaves.iter().flat_map(|x| grads.of(x).unwrap().as_slice::<f32>().to_vec());
            y.as_slice::<f32>().iter().copied().chain(grads).map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    assert!(bits(1) == bits(2) && bits(1) == bits(5));
}
