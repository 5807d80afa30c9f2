//! The model against the reference's numbers: block, head, and whole vision transformers with all random draws given.

use std::sync::Arc;

use crate::golden::{Comparison, Golden};
use dinolab_core::contract::{Backbone, BackboneContext, Crops, Draws, Features, Grid, Mode, PosContext, PosEncoding};
use dinolab_core::params::{load_named, Layout, ParamBuilder, Params};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::Rng;
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Tensor};
use dinolab_plugins::projection_head::{Head, HeadConfig};
use dinolab_plugins::vit::block::{Block, Layer};
use dinolab_plugins::vit::VitConfig;
use serde_json::{json, Value};

/// The file's weights `<prefix><name>` in a layout. Only buffers, which the product does not keep, may be left over.
fn load(g: &Golden, prefix: &str, layout: &Layout, dtype: DType) -> Tensor {
    let name = |spec: &str| format!("{prefix}{spec}");
    let mut flat = Tensor::zeros(&[layout.len()], dtype);
    let source = |spec: &str| g.has(&name(spec)).then(|| g.tensor(&name(spec), dtype));
    load_named(layout, &mut flat, source, prefix.as_ref()).unwrap();
    let left = g.names().filter_map(|n| n.strip_prefix(prefix)).filter(|n| layout.find(n).is_none());
    let left: Vec<_> = left.filter(|n| !n.ends_with("bias_mask") && *n != "rope_embed.periods").collect();
    assert!(left.is_empty(), "not in the model: {left:?}");
    flat
}

/// Compares every parameter's gradient with `<prefix><name>`; where the reference has none, it has to be zero.
fn check_gradients(g: &Golden, c: &mut Comparison<'_>, prefix: &str, layout: &Layout, grads: &Tensor) {
    let grads = grads.to_f64_vec();
    for spec in layout.specs() {
        let (name, grad) = (format!("{prefix}{}", spec.name), &grads[spec.range()]);
        match g.has(&name) {
            true => c.check_values(&name, grad),
            false => assert!(grad.iter().all(|&x| x == 0.0), "the reference has no {name}"),
        }
    }
}

fn dot(x: &Tensor, weights: &Tensor) -> Tensor {
    x.mul(&weights.reshape(x.shape()).unwrap()).unwrap().sum().unwrap()
}

/// A backbone of the registry with the file's weights.
struct Model {
    backbone: Box<dyn Backbone>,
    layout: Arc<Layout>,
    weights: Tensor,
}

impl Model {
    fn new(g: &Golden, dtype: DType) -> Self {
        let table = crate::reference::backbone(&g.options["vit"]);
        let chosen: Chosen<dyn Backbone> = serde_json::from_value(table).unwrap();
        let mut params = ParamBuilder::new();
        let mut context = BackboneContext { params: &mut params, global_size: 32, channels: 3 };
        let backbone = chosen.build(&mut context).unwrap();
        let layout = params.finish();
        let weights = load(g, "w.", &layout, dtype);
        Self { backbone, layout, weights }
    }

    fn frozen(&self) -> Params<'_> {
        Params::frozen(&self.layout, &self.weights)
    }

    fn evaluate(&self, crops: Crops) -> Features {
        self.backbone.forward(&self.frozen(), &[crops], Mode::Eval).unwrap().remove(0)
    }

    fn intermediate(&self, crops: &Crops, n: usize) -> Vec<Features> {
        self.backbone.intermediate(&self.frozen(), crops, n).unwrap()
    }
}

/// The file's images as a kind of crop, with the masks of that name if there are any.
fn crops(g: &Golden, images: &str, masks: Option<&str>, local: bool, dtype: DType) -> Crops {
    let masks = masks.map(|name| {
        let masks: Vec<u32> = g.values(name).iter().map(|&m| m as u32).collect();
        Tensor::from_slice(&masks, &[masks.len()]).unwrap()
    });
    Crops { masks, local, ..Crops::global(g.tensor(images, dtype)) }
}

/// A model's outputs under the reference's names.
fn outputs(features: &Features) -> [(&'static str, &Tensor); 4] {
    let Features { cls, registers, patches, prenorm, .. } = features;
    [("x_norm_clstoken", cls), ("x_storage_tokens", registers), ("x_norm_patchtokens", patches), ("x_prenorm", prenorm)]
}

fn check_features(g: &Golden, c: &mut Comparison<'_>, prefix: &str, features: &Features) {
    for (name, got) in outputs(features).map(|(name, got)| (format!("{prefix}.{name}"), got)) {
        // A model without storage tokens gives none to store.
        if g.has(&name) || !got.is_empty() {
            c.check(&name, got);
        }
    }
}

/// The scalar that the file differentiates: the sum of `<prefix>.gy.<output>` times the output.
fn weighted_sum(g: &Golden, prefix: &str, features: &Features, dtype: DType) -> Tensor {
    let terms = outputs(features).into_iter().filter_map(|(name, got)| {
        let name = format!("{prefix}.gy.{name}");
        (g.has(&name) && !got.is_empty()).then(|| dot(got, &g.tensor(&name, dtype)))
    });
    terms.reduce(|a, b| a.add(&b).unwrap()).expect("the file weighs some output")
}

/// Evaluation: with and without masks, intermediate blocks, gradients of parameters and pixels.
fn check_evaluation(g: &Golden, model: &Model, dtype: DType, c: &mut Comparison<'_>) {
    let plain = crops(g, "images", None, false, dtype);
    let features = model.evaluate(plain.clone());
    check_features(g, c, "eval", &features);
    if g.has("eval.forward") {
        c.check("eval.forward", &features.cls);
    }
    check_intermediate(g, model, &plain, dtype, c);
    let mut masked = crops(g, "images", Some("masks"), false, dtype);
    check_features(g, c, "eval_masked", &model.evaluate(masked.clone()));
    if g.has("eval_masked.scalar") {
        let tape = Tape::new();
        masked.pixels = tape.leaf(&masked.pixels);
        let images = masked.pixels.clone();
        let params = Params::tracked(&model.layout, &model.weights, &tape);
        let features = model.backbone.forward(&params, &[masked], Mode::Eval).unwrap();
        let scalar = weighted_sum(g, "eval_masked", &features[0], dtype);
        c.check("eval_masked.scalar", &scalar);
        let mut grads = Tensor::zeros(&[model.layout.len()], dtype);
        let leaves = tape.backward(&scalar, 1.0, Some(&mut grads)).unwrap();
        c.check("g_images", leaves.of(&images).unwrap());
        check_gradients(g, c, "g.", &model.layout, &grads);
    }
}

/// `inter.block<i>.<output>` of all blocks, `inter_last<n>.block<i>.patches_nonorm` of the last n.
fn check_intermediate(g: &Golden, model: &Model, crops: &Crops, dtype: DType, c: &mut Comparison<'_>) {
    let depth = model.backbone.depth();
    for name in g.names().filter(|n| n.starts_with("inter")) {
        let [call, block, output] = name.split('.').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let n = call.strip_prefix("inter_last").map_or(depth, |n| n.parse().unwrap());
        let block: usize = block.strip_prefix("block").unwrap().parse().unwrap();
        let all = model.intermediate(crops, n);
        assert_eq!(all.len(), n);
        let features = &all[block + n - depth];
        let patches = features.patches.dim(1);
        let prefix = features.prenorm.dim(1) - patches;
        let got = match output {
            "cls" => features.cls.clone(),
            "storage" => features.registers.clone(),
            "patches" => features.patches.transpose().unwrap(),
            "patches_nonorm" => features.prenorm.narrow_axis(1, prefix, patches).unwrap(),
            other => panic!("output {other}"),
        };
        assert_eq!(got.dtype(), dtype);
        c.check(name, &got);
    }
}

/// The file's random numbers, in place of those that the model would draw for as many images.
fn draws(g: &Golden, backbone: &dyn Backbone, images: &[usize]) -> Draws {
    let own = backbone.draw(&|stream, index| Rng::new(0, stream, 0, index), images);
    let position = |block: usize, entry: usize| -> Vec<f64> {
        let given = |name: &str, neutral: &[f64]| {
            let name = format!("rope.block{block}.entry{entry}.{name}");
            if g.has(&name) {
                g.values(&name).to_vec()
            } else {
                neutral.to_vec()
            }
        };
        [given("shift_hw", &[0.0; 2]), given("jitter_hw", &[1.0; 2]), given("rescale", &[1.0])].concat()
    };
    let kept = |block: usize, entry: usize, branch: usize| -> Vec<u32> {
        let order = g.values(&format!("drop.block{block}.entry{entry}.perm_{}", ["attn", "ffn"][branch]));
        order[..own.kept[block][entry][branch].len()].iter().map(|&i| i as u32).collect()
    };
    let mut given = own.clone();
    for (block, entries) in given.position.iter_mut().enumerate() {
        for (entry, numbers) in entries.iter_mut().enumerate().filter(|(_, numbers)| !numbers.is_empty()) {
            *numbers = position(block, entry);
        }
    }
    for (block, entries) in given.kept.iter_mut().enumerate() {
        for (entry, branches) in entries.iter_mut().enumerate() {
            *branches = [0, 1].map(|branch| kept(block, entry, branch));
        }
    }
    let augmented = given.position.iter().flatten().any(|numbers| !numbers.is_empty());
    assert_eq!(augmented, g.names().any(|n| n.starts_with("rope.block")));
    assert_eq!(given.kept.is_empty(), !g.names().any(|n| n.starts_with("drop.block")));
    given
}

/// Training: global crops with masks and local crops in one forward.
fn check_training(g: &Golden, model: &Model, dtype: DType, c: &mut Comparison<'_>) {
    let masks = g.has("list.masks").then_some("list.masks");
    let kinds = [crops(g, "list.global_images", masks, false, dtype), crops(g, "list.local_images", None, true, dtype)];
    let draws = draws(g, model.backbone.as_ref(), &kinds.each_ref().map(|k| k.pixels.dim(0)));
    let tape = Tape::new();
    let params = Params::tracked(&model.layout, &model.weights, &tape);
    let features = model.backbone.forward(&params, &kinds, Mode::Train(&draws)).unwrap();
    let mut sums = Vec::new();
    for (prefix, features) in ["list.global", "list.local"].into_iter().zip(&features) {
        check_features(g, c, prefix, features);
        sums.push(weighted_sum(g, prefix, features, dtype));
    }
    let scalar = sums[0].add(&sums[1]).unwrap();
    c.check("list.scalar", &scalar);
    let mut grads = Tensor::zeros(&[model.layout.len()], dtype);
    tape.backward(&scalar, 1.0, Some(&mut grads)).unwrap();
    check_gradients(g, c, "g.", &model.layout, &grads);
}

pub fn vit(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let model = Model::new(g, dtype);
    if g.has("images") {
        check_evaluation(g, &model, dtype, c);
    }
    if g.has("list.global_images") {
        check_training(g, &model, dtype, c);
    }
}

pub fn block(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let o = |key: &str| g.options.get(key).cloned().unwrap_or(Value::Null);
    let mut table = crate::reference::backbone(&json!({
        "embed_dim": o("dim"),
        "num_heads": o("heads"),
        "ffn_layer": o("ffn"),
        "ffn_ratio": o("ffn_ratio"),
        "mask_k_bias": o("mask_k_bias") == true,
        "qkv_bias": g.has("w.attn.qkv.bias"),
        "proj_bias": g.has("w.attn.proj.bias"),
        "ffn_bias": g.names().any(|n| n.starts_with("w.mlp.") && n.ends_with(".bias")),
        "layerscale_init": g.has("w.ls1.gamma").then_some(1.0),
        "norm_layer": if g.has("w.norm1.bias") { "layernorm" } else { "rmsnorm" },
        "drop_path_rate": o("drop_path"),
        "pos_embed_rope_base": o("base"),
        "pos_embed_rope_min_period": o("min_period"),
        "pos_embed_rope_max_period": o("max_period"),
        "pos_embed_rope_normalize_coords": o("normalize_coords"),
    }));
    table["norm_eps"] = o("norm_eps");
    table.as_object_mut().unwrap().remove("plugin");
    let config: VitConfig = serde_json::from_value(table.clone()).unwrap();
    let mut builder = ParamBuilder::new();
    let block = Block::declare(&mut builder, &config);
    let layout = builder.finish();
    let weights = load(g, "w.", &layout, dtype);

    let &[images, tokens, dim] = g.shape("x") else { panic!("x is [B, N, D]") };
    let (heads, side) = (g.number("/heads", None) as usize, |key| g.number(key, None) as usize);
    let grid = Grid { height: side("/H"), width: side("/W") };
    assert_eq!(tokens - grid.patches(), side("/prefix"));
    let chosen: Chosen<dyn PosEncoding> = serde_json::from_value(table["pos_encoding"].clone()).unwrap();
    let mut position = chosen.build(&mut ()).unwrap();
    position.declare(&mut ParamBuilder::new(), PosContext { dim, heads, grid }).unwrap();
    let tables = position.tables(&Params::frozen(&layout, &weights), grid, None, heads, dtype).unwrap();
    let layers = [Layer { images, tokens, tables }];

    let count = ((images as f64 * (1.0 - g.number("/drop_path", Some(0.0)))) as usize).max(1);
    let kept = ["attn", "ffn"].map(|branch| {
        let order = g.values(&format!("train.perm_{branch}"));
        let images: Vec<u32> = order[..count].iter().map(|&i| i as u32).collect();
        vec![Tensor::from_slice(&images, &[count]).unwrap()]
    });
    for (mode, kept) in [("eval", None), ("train", Some(&kept))] {
        let tape = Tape::new();
        let params = Params::tracked(&layout, &weights, &tape);
        let x = tape.leaf(&g.tensor("x", dtype));
        let rows = x.reshape(&[images * tokens, dim]).unwrap();
        let y = block.forward(&params, &rows, &layers, kept, &config).unwrap();
        c.check(&format!("{mode}.y"), &y);
        let mut grads = Tensor::zeros(&[layout.len()], dtype);
        let leaves = tape.backward(&dot(&y, &g.tensor("gy", dtype)), 1.0, Some(&mut grads)).unwrap();
        c.check(&format!("{mode}.gx"), leaves.of(&x).unwrap());
        check_gradients(g, c, &format!("{mode}.g."), &layout, &grads);
    }
}

pub fn head(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let o = |key: &str| g.number(&format!("/{key}"), None) as usize;
    for (case, layers) in g.options["cases"].as_object().unwrap() {
        let config = HeadConfig {
            hidden: o("hidden_dim"),
            bottleneck: o("bottleneck_dim"),
            prototypes: o("out_dim"),
            layers: layers.as_u64().unwrap() as usize,
            bias: g.names().any(|name| name.starts_with(&format!("{case}.w.mlp.")) && name.ends_with("bias")),
            ..HeadConfig::default()
        };
        let mut builder = ParamBuilder::new();
        let head = Head::declare(&mut builder, o("in_dim"), &config);
        let layout = builder.finish();
        let weights = load(g, &format!("{case}.w."), &layout, dtype);
        let tape = Tape::new();
        let params = Params::tracked(&layout, &weights, &tape);
        let x = tape.leaf(&g.tensor(&format!("{case}.x"), dtype));
        c.check(&format!("{case}.bottleneck"), &head.bottleneck(&params, &x).unwrap());
        let y = head.forward(&params, &x).unwrap();
        c.check(&format!("{case}.y"), &y);
        let mut grads = Tensor::zeros(&[layout.len()], dtype);
        let scalar = dot(&y, &g.tensor(&format!("{case}.gy"), dtype));
        let leaves = tape.backward(&scalar, 1.0, Some(&mut grads)).unwrap();
        c.check(&format!("{case}.g.x"), leaves.of(&x).unwrap());
        check_gradients(g, c, &format!("{case}.g."), &layout, &grads);
    }
}
