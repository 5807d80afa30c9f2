//! The operations of a transformer: gradients against central differences, values and gradients against independent
//! statements in dfdx (f64, on its own tape), and properties that hold for every shape.

use dfdx::prelude::{
    Axes2, Axis, Backward as _, BroadcastTo as _, Cpu, MeanTo as _, OwnedTape, PermuteTo as _, Shape, SumTo as _,
    Tensor as Dfdx, TensorFromVec as _, Trace as _, TryMatMul as _, WithEmptyTape as _,
};
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

/// A result, the gradient it is given, and the gradients of the inputs.
struct Run {
    out: Vec<f64>,
    dout: Vec<f64>,
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
    Run { out: out.to_f64_vec(), dout: dout.to_f64_vec(), grads }
}

/// Holds the gradient of every input to central differences, in at most 60 directions of one coordinate each.
fn gradients_are_right(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let Run { dout, grads, .. } = run(inputs, &f);
    let loss =
        |inputs: &[Tensor]| -> f64 { f(inputs).unwrap().to_f64_vec().iter().zip(&dout).map(|(y, d)| y * d).sum() };
    for (i, (x, grad)) in inputs.iter().zip(&grads).enumerate() {
        let size = grad.iter().fold(1.0, |m: f64, g| m.max(g.abs()));
        for j in (0..x.len()).step_by(x.len().div_ceil(60)) {
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
            assert!(error < 1e-8, "input {i}, element {j}: {} but differences give {want}", grad[j]);
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

/// A dfdx tensor of the same values.
fn oracle<S: Shape>(data: &[f64], shape: S) -> Dfdx<S, f64, Cpu> {
    Cpu::default().tensor_from_vec(data.to_vec(), shape)
}

fn token_bias(seed: u64, heads: usize, patches: usize) -> Tensor {
    normal(seed, 7, &[heads, patches, patches])
}

/// Sines and cosines of random angles, `[patches, d]`, each half of `d` with angles of its own.
fn rotary(seed: u64, patches: usize, d: usize) -> (Tensor, Tensor) {
    let angles = normal(seed, 8, &[patches, d]).to_f64_vec();
    let table = |f: fn(f64) -> f64| {
        Tensor::from_slice(&angles.iter().map(|&a| f(a)).collect::<Vec<_>>(), &[patches, d]).unwrap()
    };
    (table(f64::sin), table(f64::cos))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn norms_have_the_right_gradients(rows in 1usize..150, d in 1usize..40, seed: u64) {
        let inputs = [normal(seed, 0, &[rows, d]), normal(seed, 1, &[d]), normal(seed, 2, &[d])];
        gradients_are_right(&inputs, |x| x[0].layer_norm(&x[1], &x[2], 0.1));
        gradients_are_right(&inputs[..2], |x| x[0].rms_norm(&x[1], 0.1));
    }

    #[test]
    fn depthwise_conv_is_its_definition_and_has_the_right_gradients(
        images in 1usize..3, h in 1usize..20, w in 1usize..11, c in 1usize..20, reach in 0usize..3, seed: u64,
    ) {
        let k = 2 * reach + 1;
        let inputs = [normal(seed, 0, &[images, h * w, c]), normal(seed, 1, &[c, 1, k, k]), normal(seed, 2, &[c])];
        let conv = |x: &[Tensor]| x[0].depthwise_conv((h, w), &x[1], &x[2]);
        let [x, weight, bias] = [0, 1, 2].map(|i| inputs[i].as_slice::<f64>());
        let value = |i: usize| {
            let (image, y, column, channel) = (i / (h * w * c), i / (w * c) % h, i / c % w, i % c);
            let tap = |t: usize| {
                let (y, column) = ((y + t / k).checked_sub(reach)?, (column + t % k).checked_sub(reach)?);
                let inside = y < h && column < w;
                inside.then(|| weight[channel * k * k + t] * x[((image * h + y) * w + column) * c + channel])
            };
            bias[channel] + (0..k * k).filter_map(tap).sum::<f64>()
        };
        let want: Vec<f64> = (0..images * h * w * c).map(value).collect();
        close("value", &conv(&inputs).unwrap().to_f64_vec(), &want);
        gradients_are_right(&inputs, conv);
    }

    #[test]
    fn layer_norm_equals_dfdx(rows in 1usize..150, d in 1usize..70, seed: u64) {
        let inputs = [normal(seed, 0, &[rows, d]), normal(seed, 1, &[d]), normal(seed, 2, &[d])];
        let ours = run(&inputs, &|x: &[Tensor]| x[0].layer_norm(&x[1], &x[2], 1e-3));
        let shape = (rows, d);
        let (x, w, b) =
            (oracle(inputs[0].as_slice(), shape), oracle(inputs[1].as_slice(), (d,)), oracle(inputs[2].as_slice(), (d,)));
        let wide = |t: &Dfdx<(usize,), f64, Cpu>| t.leaky_trace().broadcast_like::<_, Axis<0>>(&shape);
        let traced = x.leaky_trace();
        let mean = traced.with_empty_tape().mean::<(usize,), Axis<1>>();
        let centred = traced - mean.broadcast_like::<_, Axis<1>>(&shape);
        let variance = centred.with_empty_tape().square().mean::<(usize,), Axis<1>>();
        let y = centred / (variance + 1e-3).sqrt().broadcast_like::<_, Axis<1>>(&shape) * wide(&w) + wide(&b);
        close("value", &ours.out, &y.as_vec());
        let grads = (y * oracle(&ours.dout, shape)).sum::<(), _>().backward();
        close("dx", &ours.grads[0], &grads.get(&x).as_vec());
        close("dweight", &ours.grads[1], &grads.get(&w).as_vec());
        close("dbias", &ours.grads[2], &grads.get(&b).as_vec());
    }

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
    fn softmax_equals_dfdx(rows in 1usize..60, d in 1usize..400, log: bool, seed: u64) {
        let inputs = [normal(seed, 0, &[rows, d])];
        let ours = run(&inputs, &|x: &[Tensor]| if log { x[0].log_softmax() } else { x[0].softmax() });
        let x = oracle(inputs[0].as_slice(), (rows, d));
        let traced: Dfdx<_, _, _, OwnedTape<_, _>> = x.leaky_trace();
        let y = if log { traced.log_softmax::<Axis<1>>() } else { traced.softmax::<Axis<1>>() };
        close("value", &ours.out, &y.as_vec());
        let grads = (y * oracle(&ours.dout, (rows, d))).sum::<(), _>().backward();
        close("dx", &ours.grads[0], &grads.get(&x).as_vec());
    }

    #[test]
    fn attention_equals_dfdx_in_every_image_and_head(
        global in 1usize..3, local in 0usize..4, n in 1usize..90, m in 1usize..20, heads in 1usize..4, d in 1usize..18,
        seed: u64,
    ) {
        let width = heads * d;
        let segments = [(global, n), (local, m)]
            .map(|(images, tokens)| Segment { images, tokens, rotary: None, bias: None });
        let qkv = normal(seed, 0, &[global * n + local * m, 3 * width]);
        let ours = run(std::slice::from_ref(&qkv), &|x: &[Tensor]| x[0].clone().attention(heads, &segments));
        let starts = (0..global).map(|i| (i * n, n)).chain((0..local).map(|i| (global * n + i * m, m)));
        for (start, tokens) in starts {
            for head in 0..heads {
                // Columns of this head in a packed row of `row` numbers.
                let strip = |data: &[f64], row: usize, column: usize| -> Vec<f64> {
                    (start..start + tokens).flat_map(|r| data[r * row + column + head * d..][..d].to_vec()).collect()
                };
                let shape = (tokens, d);
                let [q, k, v] =
                    [0, 1, 2].map(|i| oracle(&strip(qkv.as_slice(), 3 * width, i * width), shape));
                let scores = q.leaky_trace().matmul(k.leaky_trace().permute::<(usize, usize), Axes2<1, 0>>());
                let y = (scores / (d as f64).sqrt()).softmax::<Axis<1>>().matmul(v.leaky_trace());
                close("value", &strip(&ours.out, width, 0), &y.as_vec());
                let grads = (y * oracle(&strip(&ours.dout, width, 0), shape)).sum::<(), _>().backward();
                for (i, x) in [q, k, v].iter().enumerate() {
                    let what = ["dq", "dk", "dv"][i];
                    close(what, &strip(&ours.grads[0], 3 * width, i * width), &grads.get(x).as_vec());
                }
            }
        }
    }

    #[test]
    fn attention_with_positions_has_the_right_gradients(
        images in 1usize..10, patches in 1usize..12, prefix in 0usize..4, heads in 1usize..4, half in 1usize..6, seed: u64,
    ) {
        let (d, tokens) = (2 * half, prefix + patches);
        let inputs = [normal(seed, 0, &[images * tokens, 3 * heads * d]), token_bias(seed, heads, patches)];
        let segment = |rotary, bias: Option<&Tensor>| Segment { images, tokens, rotary, bias: bias.cloned() };
        let tables = rotary(seed, patches, d);
        gradients_are_right(&inputs, |x| x[0].clone().attention(heads, &[segment(Some(tables.clone()), Some(&x[1]))]));
        gradients_are_right(&inputs[..1], |x| x[0].clone().attention(heads, &[segment(Some(tables.clone()), None)]));
    }

    #[test]
    fn attention_in_blocks_of_queries_equals_dfdx(n in 900usize..1200, d in 1usize..4, seed: u64) {
        let qkv = normal(seed, 0, &[n, 3 * d]);
        let segments = [Segment { images: 1, tokens: n, rotary: None, bias: None }];
        let ours = run(std::slice::from_ref(&qkv), &|x: &[Tensor]| x[0].clone().attention(1, &segments));
        let strip = |data: &[f64], i: usize| -> Vec<f64> {
            (0..n).flat_map(|r| data[r * 3 * d + i * d..][..d].to_vec()).collect()
        };
        let [q, k, v] = [0, 1, 2].map(|i| oracle(&strip(qkv.as_slice(), i), (n, d)));
        let scores = q.leaky_trace().matmul(k.leaky_trace().permute::<(usize, usize), Axes2<1, 0>>());
        let y = (scores / (d as f64).sqrt()).softmax::<Axis<1>>().matmul(v.leaky_trace());
        close("value", &ours.out, &y.as_vec());
        let grads = (y * oracle(&ours.dout, (n, d))).sum::<(), _>().backward();
        for (i, x) in [q, k, v].iter().enumerate() {
            close(["dq", "dk", "dv"][i], &strip(&ours.grads[0], i), &grads.get(x).as_vec());
        }
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

    #[test]
    fn index_add_has_the_right_gradients(rows in 1usize..150, d in 1usize..6, kept in 0.1f64..1.0, seed: u64) {
        let n = ((rows as f64 * kept) as usize).max(1);
        let mut order = Rng::new(seed, Stream::Plugin, 1, 0).permutation(rows);
        order.truncate(n);
        let (order, scale) = (Tensor::from_slice(&order, &[n]).unwrap(), normal(seed, 3, &[n]));
        let inputs = [normal(seed, 0, &[rows, d]), normal(seed, 1, &[n, d])];
        gradients_are_right(&inputs, |x| x[0].index_add(&order, &x[1], &scale));
    }

    #[test]
    fn patches_and_tokens_have_the_right_gradients(
        images in 1usize..4, channels in 1usize..4, h in 2usize..9, w in 2usize..9, registers in 0usize..3, seed: u64,
    ) {
        let p = 2;
        let pixels = normal(seed, 0, &[images, channels, h, w]);
        gradients_are_right(&[pixels], |x| x[0].patchify(p));
        let (patches, d) = ((h / p) * (w / p), 3);
        let inputs = [
            normal(seed, 1, &[images * patches, d]), normal(seed, 2, &[1 + registers, d]), normal(seed, 3, &[1, d]),
        ];
        gradients_are_right(&inputs[..2], |x| x[0].assemble_tokens(&x[1], images, None));
        let mut rng = Rng::new(seed, Stream::Plugin, 2, 0);
        let mask: Vec<u32> = (0..images * patches).map(|_| rng.u32() & 1).collect();
        let mask = Tensor::from_slice(&mask, &[images * patches]).unwrap();
        gradients_are_right(&inputs, |x| {
            let (prefix, patches) =
                x[0].assemble_tokens(&x[1], images, Some((&x[2], &mask)))?.split_tokens(images, 1 + registers)?;
            Tensor::cat(&[&prefix.square()?.reshape(&[prefix.len()])?, &patches.reshape(&[patches.len()])?])
        });
    }

    #[test]
    fn narrow_axis_has_the_right_gradients(a in 1usize..4, b in 1usize..6, c in 1usize..4, seed: u64) {
        let x = [normal(seed, 0, &[a, b, c])];
        let start = seed as usize % b;
        for (axis, start, len) in [(0, a - 1, 1), (1, start, b - start), (1, 0, start.max(1)), (2, 0, c)] {
            // Added to itself, so that a second gradient meets a first.
            gradients_are_right(&x, |x| x[0].narrow_axis(axis, start, len)?.square()?.add(&x[0].narrow_axis(axis, start, len)?));
        }
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
