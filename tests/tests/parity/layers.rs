//! The layers of a transformer, composed from the engine's operations, against the reference's numbers.

use crate::golden::{Comparison, Golden};
use dinolab_core::contract::{Grid, PosContext, PosEncoding};
use dinolab_core::ops::{Linear, Segment};
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::registry::Chosen;
use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Result, Tensor};
use dinolab_plugins as _;

/// The tensors of one case of a file: its input `x`, its weights, and which gradients are stored.
struct Layer<'a> {
    golden: &'a Golden,
    case: &'a str,
    dtype: DType,
    tape: Tape,
    /// Input and weights, tracked.
    leaves: Vec<(String, Tensor)>,
}

impl<'a> Layer<'a> {
    fn new(golden: &'a Golden, case: &'a str, dtype: DType) -> Self {
        let tape = Tape::new();
        let leaf = |name: &str| tape.leaf(&golden.tensor(&format!("{case}.{name}"), dtype));
        let weights = golden.names().filter_map(|name| name.strip_prefix(&format!("{case}.w.")));
        let mut leaves = vec![("x".to_string(), leaf("x"))];
        leaves.extend(weights.map(|name| (name.to_string(), leaf(&format!("w.{name}")))));
        Self { golden, case, dtype, tape, leaves }
    }

    fn x(&self) -> &Tensor {
        &self.leaves[0].1
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.leaves.iter().find(|(n, _)| n == name).map(|(_, t)| t)
    }

    fn weight(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("{} has no weight {name}", self.case))
    }

    /// The linear layer of that name, with its bias if it has one.
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        x.linear(self.weight(&format!("{name}.weight")), self.find(&format!("{name}.bias")))
    }

    /// Compares the result, and with the stored gradient of the result every stored gradient.
    fn check(self, c: &mut Comparison<'_>, y: Result<Tensor>) {
        let (golden, case) = (self.golden, self.case);
        let y = y.unwrap();
        c.check(&format!("{case}.y"), &y);
        let dy = golden.tensor(&format!("{case}.gy"), self.dtype).reshape(y.shape()).unwrap();
        let grads = self.tape.backward(&y.mul(&dy).unwrap().sum().unwrap(), 1.0, None).unwrap();
        for (name, leaf) in &self.leaves {
            let stored = format!("{case}.g.{name}");
            if golden.has(&stored) {
                c.check(&stored, grads.of(leaf).expect("the layer uses all its weights"));
            }
        }
    }
}

pub fn norms_and_layer_scale(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".y") {
        let layer = Layer::new(g, case, dtype);
        let eps = || g.number(&format!("/eps/{case}"), None);
        let y = match case {
            "layerscale" => {
                let d = layer.x().last_dim();
                let one: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
                let one = Tensor::from_f64(&one, &[d, d], dtype).unwrap();
                Linear::new(&one, None).scale(layer.weight("gamma")).of(layer.x())
            }
            "rmsnorm" => layer.x().rms_norm(layer.weight("weight"), eps()),
            _ => layer.x().layer_norm(layer.weight("weight"), layer.weight("bias"), eps()),
        };
        layer.check(c, y);
    }
}

pub fn feed_forward(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".y") {
        let layer = Layer::new(g, case, dtype);
        let y = if case.starts_with("mlp") {
            let last = Linear::new(layer.weight("fc2.weight"), layer.find("fc2.bias"));
            last.after_gelu().of(&layer.linear("fc1", layer.x()).unwrap())
        } else {
            let last = Linear::new(layer.weight("w3.weight"), layer.find("w3.bias"));
            let [gate, up] = ["w1", "w2"].map(|name| layer.linear(name, layer.x()).unwrap());
            last.after_swiglu(&up).of(&gate)
        };
        layer.check(c, y);
    }
}

/// `[sin, cos]` of the plugin that the file's options describe.
fn rotary_tables(g: &Golden, dtype: DType) -> [Tensor; 2] {
    let size = |key: &str| g.number(&format!("/{key}"), None) as usize;
    let table = serde_json::json!({ "plugin": "rope_box", "periods": { "base": g.number("/base", Some(100.0)) },
        "normalize": g.options["normalize_coords"] });
    let chosen: Chosen<dyn PosEncoding> = serde_json::from_value(table).unwrap();
    let mut encoding = chosen.build(&mut ()).unwrap();
    let grid = Grid { height: size("H"), width: size("W") };
    let (dim, heads) = (size("dim"), size("heads"));
    encoding.declare(&mut ParamBuilder::new(), PosContext { dim, heads, grid }).unwrap();
    let layout = ParamBuilder::new().finish();
    let flat = layout.init(0, dtype).unwrap();
    let tables = encoding.tables(&Params::frozen(&layout, &flat), grid, None, heads, dtype).unwrap();
    tables.rotary.expect("rope_box rotates").into()
}

pub fn attention(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let tables = rotary_tables(g, dtype);
    c.check("sin", &tables[0]);
    c.check("cos", &tables[1]);
    for case in g.prefixes(".y") {
        let layer = Layer::new(g, case, dtype);
        let (x, heads) = (layer.x().clone(), g.number("/heads", None) as usize);
        let (images, tokens, dim) = (x.dim(0), x.dim(1), x.dim(2));
        let rotary = g.options["cases"][case]["rope"].as_bool().unwrap().then(|| tables.clone());
        // The key part of the bias is masked out by a buffer of ones and zeros.
        let bias = match (layer.find("qkv.bias"), g.has(&format!("{case}.w.qkv.bias_mask"))) {
            (Some(bias), true) => Some(bias.mul(&layer.weight("qkv.bias_mask").detach()).unwrap()),
            (bias, _) => bias.cloned(),
        };
        let packed = x.linear(layer.weight("qkv.weight"), bias.as_ref()).unwrap();
        let segment = Segment { images, tokens, rotary: rotary.map(|[sin, cos]: [Tensor; 2]| (sin, cos)), bias: None };
        let mixed = packed.reshape(&[images * tokens, 3 * dim]).unwrap().attention(heads, &[segment]).unwrap();
        let y = layer.linear("proj", &mixed);
        layer.check(c, y);
    }
}

pub fn patch_embedding(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    for case in g.prefixes(".y") {
        let layer = Layer::new(g, case, dtype);
        let patches = layer.x().patchify(g.number(&format!("/{case}/patch"), None) as usize).unwrap();
        let kernel = layer.weight("proj.weight");
        let kernel = kernel.reshape(&[kernel.dim(0), patches.dim(1)]).unwrap();
        let y = patches.linear(&kernel, layer.find("proj.bias"));
        layer.check(c, y);
    }
}
