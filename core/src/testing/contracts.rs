//! What holds for every plugin of a kind, whatever it computes: one call in a plugin's test.
//!
//! Losses have more of their own: [`check`](super::check()).

use crate::contract::{
    At, Augmentation, Backbone, BackboneContext, CropContext, Crops, Dataset, Follow, Grid, Masking, Mode, Optimizer,
    PosContext, PosEncoding, Scheduler, TeacherPolicy,
};
use crate::params::{Init, Layout, ParamBuilder, ParamRole, Params};
use crate::recipe::OptimizerEntry;
use crate::registry::{self, Chosen, Kind};
use crate::rng::{Rng, Stream};
use crate::step::Updates;
use crate::tensor::Tape;
use crate::testing::normal;
use crate::{DType, Device, Error, Result, Tensor};

/// What holds, or what does not.
pub type Held = Result<(), String>;

fn ensure(holds: bool, otherwise: impl Into<String>) -> Held {
    if holds {
        Ok(())
    } else {
        Err(otherwise.into())
    }
}

/// The plugin that a recipe's table (`plugin = "..."` and its keys, as TOML) chooses.
///
/// # Errors
/// As a recipe: an unknown name, a wrong key, a config that is refused.
pub fn plugin<K: ?Sized + Kind>(table: &str, context: &mut K::Context<'_>) -> Result<Box<K>> {
    chosen::<K>(table)?.build(context)
}

/// The choice of such a table, which is not built yet.
///
/// # Errors
/// As a recipe: an unknown name or a wrong key.
pub fn chosen<K: ?Sized + Kind>(table: &str) -> Result<Chosen<K>> {
    let table: toml::Table =
        toml::from_str(table).map_err(|e| Error::user(e.to_string(), "write it as in a recipe"))?;
    let table = figment::value::Value::serialize(table).expect("a table is plain data");
    let refused = |e: crate::problem::Nested| Error::user(e.encode(), "see `dinolab plugins`");
    Chosen::<K>::from_value(&table, registry::default_of::<K>()).map_err(refused)
}

/// A scheduler is finite at every step of a run, and pure.
pub fn scheduler(scheduler: &dyn Scheduler) -> Held {
    let values = || (0..100).map(|step| scheduler.value(At { step, total: 100 })).collect::<Vec<_>>();
    let first = values();
    ensure(first.iter().all(|x| x.is_finite()), format!("a value is not finite: {first:?}"))?;
    ensure(first == values(), "the same step gives another value the second time")
}

/// A teacher policy is pure, and its momentum lies in [0, 1].
pub fn teacher(policy: &dyn TeacherPolicy) -> Held {
    let all = || {
        let at = |step| At { step, total: 100 };
        (0..100).flat_map(|s| [policy.before_step(at(s)), policy.after_step(at(s))]).collect::<Vec<_>>()
    };
    let first = all();
    let outside = first.iter().find(|f| matches!(f, Follow::Ema { momentum } if !(0.0..=1.0).contains(momentum)));
    ensure(outside.is_none(), format!("a momentum is not in [0, 1]: {outside:?}"))?;
    ensure(first == all(), "the same step does something else the second time")
}

/// A position encoding gives tables of the right shapes on grids that are square and not, in evaluation and in
/// training; equal draws give equal tables; a rotation keeps lengths (`sin^2 + cos^2 = 1`).
pub fn pos_encoding(mut encoding: Box<dyn PosEncoding>) -> Held {
    let (dim, heads) = (24, 3);
    let text = |e: Error| e.to_string();
    let mut builder = ParamBuilder::new();
    let grid = Grid { height: 4, width: 4 };
    encoding.declare(&mut builder, PosContext { dim, heads, grid }).map_err(text)?;
    let layout = builder.finish();
    let flat = layout.init(0, DType::F64).map_err(text)?;
    let params = Params::frozen(&layout, &flat);
    let draw = || encoding.draw(&mut Rng::new(1, Stream::Position, 2, 3));
    ensure(draw() == draw(), "equal generators draw differently: everything random comes from `rng`")?;
    for (grid, draw) in [(grid, None), (grid, Some(draw())), (Grid { height: 2, width: 5 }, Some(draw()))] {
        let p = grid.patches();
        let draw = draw.filter(|d| !d.is_empty()).map(|d| Tensor::from_slice(&d, &[d.len()]));
        let draw = draw.transpose().map_err(text)?;
        let tables = || encoding.tables(&params, grid, draw.as_ref(), heads, DType::F64);
        let (first, second) = (tables().map_err(text)?, tables().map_err(text)?);
        if let (Some((sin, cos)), Some((sin2, _))) = (&first.rotary, &second.rotary) {
            let shape = [p, dim / heads];
            ensure(sin.shape() == shape && cos.shape() == shape, format!("sin and cos are not [P, D/H] = {shape:?}"))?;
            ensure(sin.to_f64_vec() == sin2.to_f64_vec(), "equal draws give other tables")?;
            let lengths = sin.to_f64_vec().into_iter().zip(cos.to_f64_vec()).map(|(s, c)| s * s + c * c);
            // Loose enough for tables that were rounded to bf16.
            let kept = lengths.into_iter().all(|l| (l - 1.0).abs() < 2e-2);
            ensure(kept, "sin^2 + cos^2 is not 1: the rotation changes lengths")?;
        }
        if let Some(bias) = &first.bias {
            ensure(bias.shape() == [heads, p, p], format!("the bias is {:?}, not [H, P, P]", bias.shape()))?;
            ensure(bias.to_f64_vec().iter().all(|x| x.is_finite()), "the bias is not finite")?;
        }
        if let Some(added) = encoding.absolute(&params, grid).map_err(text)? {
            ensure(added.shape() == [p, dim], format!("what is added is {:?}, not [P, D]", added.shape()))?;
        }
    }
    Ok(())
}

/// A dataset gives whole samples, the same ones every time, with labels and masks as it says.
pub fn dataset(data: &dyn Dataset) -> Held {
    ensure(!data.is_empty(), "it has no sample")?;
    for index in [0, data.len() / 2, data.len() - 1] {
        let get = || data.get(index).map_err(|e| e.to_string());
        let sample = get()?;
        let pixels = sample.width * sample.height;
        ensure(
            pixels > 0 && sample.pixels.len() == data.channels() * pixels,
            format!("sample {index} has not {} values a pixel", data.channels()),
        )?;
        ensure(sample == get()?, format!("sample {index} is another the second time"))?;
        let fits = sample.label.is_none_or(|label| (label as usize) < data.classes());
        ensure(fits, format!("sample {index} has label {:?} of {} classes", sample.label, data.classes()))?;
        if let Some(depth) = &sample.depth {
            ensure(data.has_depth(), "a sample has a depth, and the dataset says that there is none")?;
            ensure(depth.len() == pixels, format!("the depth of sample {index} has not a number a pixel"))?;
        }
        if let Some(mask) = &sample.mask {
            let known = mask.iter().all(|&class| class == 255 || usize::from(class) < data.mask_classes());
            ensure(mask.len() == pixels && known, format!("the mask of sample {index} has not a known class a pixel"))?;
        }
    }
    Ok(())
}

/// An augmentation draws plans that can be applied to images of every size, and the same from equal generators.
///
/// # Errors
/// What does not hold.
pub fn augmentation(table: &str) -> Held {
    for local_count in [0, 1, 6] {
        let mut context = CropContext { global_size: 64, local_size: 32, local_count, patch_size: 8, channels: 3 };
        let plugin = plugin::<dyn Augmentation>(table, &mut context).map_err(|e| e.to_string())?;
        for (i, size) in [(8, 8), (9, 500), (300, 11), (64, 64), (640, 480)].into_iter().enumerate() {
            for image in 0..100 {
                let rng = |crop: u64| Rng::new(1, Stream::Augment, i as u64, image << 16 | crop);
                let plan = plugin.plan(size, &rng);
                if let Some(fault) = plan.fault(size, &context) {
                    return Err(format!("a plan for an image of {}x{} pixels {fault}", size.0, size.1));
                }
                let same = plan == plugin.plan(size, &rng);
                ensure(same, "equal generators draw differently: everything random comes from `rng`")?;
            }
        }
    }
    Ok(())
}

/// A masking masks as many patches as it says, whatever it draws, and draws the same from equal generators; its average
/// share is what it masks of many crops, and it says why it masks none.
pub fn masking(masking: &dyn Masking) -> Held {
    for (crops, height, width) in [(1, 1, 1), (2, 4, 4), (6, 7, 5), (16, 14, 14), (8, 3, 20)] {
        let grid = Grid { height, width };
        let (masked, of) = (masking.masked(crops, grid), format!("{crops} crops of {height}x{width} patches"));
        for step in 0..20 {
            let draw = || masking.draw(&mut Rng::new(1, Stream::Mask, step, 0), crops, grid);
            let rows = draw();
            let whole = rows.len() == crops && rows.iter().all(|row| row.len() == grid.patches());
            ensure(whole, format!("it does not draw a cell for every patch of {of}"))?;
            let hidden = rows.iter().flatten().filter(|&&hidden| hidden).count();
            ensure(hidden == masked, format!("it masks {hidden} patches of {of} and says {masked}"))?;
            ensure(rows == draw(), "equal generators draw differently: everything random comes from `rng`")?;
        }
        let refused = masking.unmasked(crops, grid).is_some();
        ensure(refused == (masked == 0), format!("of {of} it masks {masked}, and `unmasked` says otherwise"))?;
    }
    let (crops, grid) = (1000, Grid { height: 32, width: 32 });
    let (share, found) = (masking.share(grid), masking.masked(crops, grid) as f64 / (crops * grid.patches()) as f64);
    ensure((share - found).abs() < 0.02, format!("it masks {found} of many patches and says {share}"))
}

/// A backbone gives features of the shapes that its contract promises, the same in every call, and every parameter has
/// a gradient.
///
/// # Errors
/// What does not hold.
pub fn backbone(table: &str) -> Held {
    let text = |e: Error| e.to_string();
    let mut builder = ParamBuilder::new();
    let context = &mut BackboneContext { params: &mut builder, global_size: 32, channels: 3 };
    let model = plugin::<dyn Backbone>(table, context).map_err(text)?;
    let layout = builder.finish();
    let flat = layout.init(0, DType::F64).map_err(text)?;
    let (patch, dim) = (model.patch_size(), model.dim());
    let (b, grid) = (2, Grid { height: 2, width: 3 });
    let pixels = normal(0, 0, &[b, 3, grid.height * patch, grid.width * patch]);
    let draws = model.draw(&|stream, index| Rng::new(0, stream, 0, index), &[b]);
    let tape = Tape::new();
    let tracked = Params::tracked(&layout, &flat, &tape);
    let run = |params: &Params<'_>, mode| {
        let mut all = model.forward(params, &[Crops::global(pixels.clone())], mode).map_err(text)?;
        all.pop().ok_or_else(|| "it gives no features for the crops".to_string())
    };
    let eval = run(&Params::frozen(&layout, &flat), Mode::Eval)?;
    let p = grid.patches();
    ensure(eval.grid == grid, format!("the grid is {:?}, not {grid:?}", eval.grid))?;
    ensure(eval.cls.shape() == [b, dim], format!("cls is {:?}, not [B, D]", eval.cls.shape()))?;
    ensure(eval.patches.shape() == [b, p, dim], format!("patches are {:?}, not [B, P, D]", eval.patches.shape()))?;
    let again = run(&Params::frozen(&layout, &flat), Mode::Eval)?;
    ensure(eval.patches.to_f64_vec() == again.patches.to_f64_vec(), "the second call gives other features")?;
    let trained = run(&tracked, Mode::Train(&draws))?;
    let mut grads = Tensor::zeros(&[layout.len()], DType::F64);
    let loss = || trained.cls.square()?.sum()?.add(&trained.patches.square()?.sum()?);
    tape.backward(&loss().map_err(text)?, 1.0, Some(&mut grads)).map_err(text)?;
    let grads = grads.to_f64_vec();
    ensure(grads.iter().all(|g| g.is_finite()), "a gradient is not finite")?;
    let moved = layout.specs().iter().any(|spec| grads[spec.range()].iter().any(|&g| g != 0.0));
    ensure(moved || layout.is_empty(), "no parameter has a gradient")
}

/// Parameters of every kind that an optimizer meets: of embeddings, a block, a last layer and a map to an output, in two
/// sub-models; the backbone has a depth of 1.
pub fn parameters() -> std::sync::Arc<Layout> {
    let normal = Init::Normal(0.5);
    let mut p = ParamBuilder::new();
    p.scope("backbone", |p| {
        p.layer(0, |p| {
            p.add("mask_token", &[1, 6], normal);
            p.role(ParamRole::PatchEmbed, |p| p.add("embed", &[6, 3, 2, 2], normal));
        });
        p.layer(1, |p| {
            p.stacked(3, |p| p.add("qkv", &[18, 6], normal));
            p.add("wide", &[5, 8], normal);
            p.add("tall", &[8, 5], normal);
            p.add_plain("bias", &[7], Init::Zeros);
        });
        p.layer(2, |p| p.add_plain("norm", &[6], Init::Ones));
    });
    p.scope("head", |p| {
        p.add("mlp", &[9, 6], normal);
        p.role(ParamRole::LastLayer, |p| p.add("last", &[10, 9], normal));
        p.role(ParamRole::Output, |p| p.add("classes", &[4, 6], normal));
    });
    p.finish()
}

/// An optimizer changes nothing when gradients are zero and nothing decays, gives the same the second time, and moves every
/// number by no more than it says.
///
/// # Errors
/// What does not hold for the optimizer of a recipe's table `[optimizer]`, as TOML.
pub fn optimizer(table: &str) -> Held {
    const TOTAL: u64 = 8;
    let text = |e: Error| e.to_string();
    let entry: OptimizerEntry = toml::from_str(table).map_err(|e| e.to_string())?;
    let plugin: Box<dyn Optimizer> = entry.plugin.build(&mut ()).map_err(text)?;
    let names = plugin.moments();
    ensure((1..names.len()).all(|i| !names[..i].contains(&names[i])), format!("two moments have one name: {names:?}"))?;

    let layout = parameters();
    let start = |entry: &OptimizerEntry| Updates::new(entry, &layout, 1, TOTAL, (Device::Cpu, DType::F64));
    let mut still = entry.clone();
    still.own.weight_decay = 0.0.into();
    let mut run = start(&still).map_err(text)?;
    let before = run.weights().student.to_f64_vec();
    for step in 0..2 {
        run.update(step, &vec![0.0; layout.len()], 0.5).map_err(text)?;
    }
    ensure(run.weights().student.to_f64_vec() == before, "gradients of zero move a weight, though nothing decays")?;

    let (mut first, mut second) = (start(&entry).map_err(text)?, start(&entry).map_err(text)?);
    for step in 0..TOTAL {
        let (at, update) = (At { step, total: TOTAL }, step + 1);
        let drawn = normal(3, step, &[layout.len()]).to_f64_vec();
        let mut gradients = vec![0.0; layout.len()];
        for spec in layout.specs() {
            gradients[spec.range()].copy_from_slice(&drawn[spec.range()]);
        }
        let numbers = |run: &Updates| {
            let weights = run.weights();
            let moment = weights.moments.first().map_or(vec![0.0; layout.len()], Tensor::to_f64_vec);
            (weights.student.to_f64_vec(), moment)
        };
        let (old, old_moment) = numbers(&first);
        first.update(step, &gradients, 0.5).map_err(text)?;
        second.update(step, &gradients, 0.5).map_err(text)?;
        let (new, moment) = numbers(&first);
        ensure(new == numbers(&second).0, "the same gradients move weights elsewhere the second time")?;
        let greatest = |x: &[f64]| x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        let length = gradients.iter().map(|g| g * g).sum::<f64>().sqrt();
        for (rule, spec) in first.rules().iter().zip(layout.specs()) {
            if plugin.adamw(spec).is_some() {
                continue;
            }
            let place = spec.range();
            let reach = plugin.reach(spec, at, update);
            let most = reach.memory * greatest(&old_moment[place.clone()]) + reach.share * length;
            ensure(
                greatest(&moment[place.clone()]) <= most * 1.000_001,
                format!("the first moment of {} is greater than `reach` says", spec.name),
            )?;
            let lr = entry.lr.at(at) * rule.lr_multiplier;
            let keep = 1.0 - lr * if rule.decays { entry.weight_decay.at(at) } else { 0.0 };
            let moved = old[place.clone()].iter().zip(&new[place]).map(|(old, new)| new - old * keep);
            let moved = greatest(&moved.collect::<Vec<_>>());
            ensure(
                moved <= lr * (reach.gain * most + reach.most) * 1.000_001,
                format!("{} moves by {moved:e}, farther than `reach` says", spec.name),
            )?;
        }
    }
    Ok(())
}

/// The plugin is registered under that kind and name, and every key of it is documented.
pub fn registered(kind: &str, name: &str) -> Held {
    let all = registry::all();
    let found = all.iter().find(|p| (p.kind, p.name) == (kind, name));
    let found = found.ok_or_else(|| format!("no {kind} plugin is named `{name}`: is its module part of the crate?"))?;
    ensure(!found.summary.is_empty(), "its config has no doc comment")?;
    let keys = found.schema.get("properties").and_then(|p| p.as_object()).into_iter().flatten();
    let silent: Vec<&String> =
        keys.filter(|(_, field)| field.get("description").is_none()).map(|(key, _)| key).collect();
    ensure(silent.is_empty(), format!("keys without a doc comment: {silent:?}"))
}
