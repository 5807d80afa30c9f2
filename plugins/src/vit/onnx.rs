//! A ViT as a graph of ONNX: pixels of any size in, CLS, registers and patches out.

use std::f64::consts::PI;

use dinolab_core::contract::Backbone;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::{ModelInfo, TensorFiles};
use dinolab_core::{Error, Result};

use super::{Ffn, Norm, VitConfig};
use crate::box_coords::Normalize;
use crate::onnx::{check_size, Attribute, Dim, Graph, END};
use crate::rope_box::{RopeBox, RopeBoxConfig, TableType};

use Attribute::{Int, Ints};

/// The file of a ViT whose tensors are in `files` as `<prefix>backbone.<name>`: input `pixels` `[B, C, H, W]`, normalised, with sides
/// that are whole numbers of patches; outputs `cls` `[B, D]`, `registers` `[B, R, D]` and `patches` `[B, P, D]` after the final
/// norm, row-major over the grid. Computed in f32.
///
/// # Errors
/// If the model has a position encoding other than `rope_box` and `none`, is too large for one file, or a tensor is missing
/// or no float.
pub(crate) fn write(model: &ModelInfo, files: &TensorFiles, prefix: &str) -> Result<Vec<u8>> {
    let config = VitConfig::of(&model.backbone)?;
    let specs = super::declared(model)?.1;
    check_size(&specs)?;
    let rope = rope(&model.backbone, &config)?;
    let export = Export { graph: Graph::of(files, format!("{prefix}backbone.")), config };
    export.whole(rope, model)
}

/// The rotary encoding of the model, or none.
fn rope(backbone: &Chosen<dyn Backbone>, config: &VitConfig) -> Result<Option<RopeBoxConfig>> {
    let refuse = |what: &str| {
        let problem = format!("{what} of the backbone `{}` is not written as ONNX", backbone.name());
        Err(Error::user(problem, "rope_box in f32 and none are; export it with --format safetensors"))
    };
    match config.pos_encoding.name() {
        "none" => Ok(None),
        "rope_box" => {
            let rope: RopeBoxConfig =
                serde_json::from_value(config.pos_encoding.config().clone()).expect("it was checked when read");
            match rope.dtype {
                TableType::F32 => Ok(Some(rope)),
                TableType::Bf16 => refuse("the position encoding in bf16"),
            }
        }
        other => refuse(&format!("the position encoding `{other}`")),
    }
}

struct Export<'a> {
    graph: Graph<'a>,
    config: VitConfig,
}

impl Export<'_> {
    fn whole(mut self, rope: Option<RopeBoxConfig>, model: &ModelInfo) -> Result<Vec<u8>> {
        let VitConfig { dim, depth, registers, patch_size, .. } = self.config;
        let prefix = 1 + registers as i64;
        let (images, rows, columns) = (Dim::Any("images"), Dim::Any("height"), Dim::Any("width"));
        self.graph.input("pixels", &[images, Dim::Is(model.crops.channels()), rows, columns]);
        let map = self.graph.patchify("patch_embed.proj", "pixels", patch_size)?;
        let shape = self.graph.node("Shape", &[&map], &[]);
        let tables = rope.map(|rope| self.tables(&rope, &shape));
        let flat = self.graph.reshape(&map, &[0, dim as i64, -1]);
        let patches = self.graph.node("Transpose", &[&flat], &[("perm", Ints(&[0, 2, 1]))]);
        let first = self.tokens(&shape)?;
        let mut x = self.graph.node("Concat", &[&first, &patches], &[("axis", Int(1))]);
        for i in 0..depth {
            x = self.block(&format!("blocks.{i}."), &x, tables.as_ref())?;
        }
        let normed = self.norm("norm", &x)?;
        let head = if self.config.untie_cls_and_patch_norms { self.norm("cls_norm", &x)? } else { normed.clone() };
        let cls = self.graph.slice(&head, 1, 0, 1);
        let axis = self.graph.ints(&[1]);
        let cls = self.graph.node("Squeeze", &[&cls, &axis], &[]);
        let (of_registers, patches) =
            (self.graph.slice(&head, 1, 1, prefix), self.graph.slice(&normed, 1, prefix, END));
        self.graph.output("cls", &cls, &[images, Dim::Is(dim)]);
        self.graph.output("registers", &of_registers, &[images, Dim::Is(registers), Dim::Is(dim)]);
        self.graph.output("patches", &patches, &[images, Dim::Any("patches"), Dim::Is(dim)]);
        Ok(self.graph.encode("vit", &model.crops, patch_size))
    }

    fn norm(&mut self, name: &str, x: &str) -> Result<String> {
        let eps = self.config.norm_eps;
        if self.config.norm == Norm::LayerNorm {
            return self.graph.layer_norm(name, x, eps);
        }
        let weight = self.graph.tensor(&format!("{name}.weight"))?;
        let square = self.graph.node("Mul", &[x, x], &[]);
        let mean = self.graph.node("ReduceMean", &[&square], &[("axes", Ints(&[-1])), ("keepdims", Int(1))]);
        let eps = self.graph.float(eps);
        let shifted = self.graph.node("Add", &[&mean, &eps], &[]);
        let root = self.graph.node("Sqrt", &[&shifted], &[]);
        let scaled = self.graph.node("Div", &[x, &root], &[]);
        Ok(self.graph.node("Mul", &[&scaled, &weight], &[]))
    }

    /// CLS and registers of every image, `[B, 1 + R, D]`; `shape` is that of the map of patches.
    fn tokens(&mut self, shape: &str) -> Result<String> {
        let cls = self.graph.tensor("cls_token")?;
        let first = match self.config.registers {
            0 => cls,
            _ => {
                let registers = self.graph.tensor("storage_tokens")?;
                self.graph.node("Concat", &[&cls, &registers], &[("axis", Int(1))])
            }
        };
        let images = self.graph.slice(shape, 0, 0, 1);
        let ones = self.graph.ints(&[1, 1]);
        let shape = self.graph.node("Concat", &[&images, &ones], &[("axis", Int(0))]);
        Ok(self.graph.node("Expand", &[&first, &shape], &[]))
    }

    /// Sine and cosine of every patch, `[P, D/H]` each, as [`RopeBox`] has them in evaluation.
    fn tables(&mut self, rope: &RopeBoxConfig, shape: &str) -> [String; 2] {
        let head = self.config.dim / self.config.heads;
        let periods = RopeBox::new(rope.clone()).periods(head);
        let n = periods.len();
        let turns = periods.iter().map(|period| (2.0 * PI / period) as f32);
        let turns = self.graph.floats("rope.turns", &[1, n], turns);
        let sides = [2, 3].map(|axis| {
            let index = self.graph.ints(&[axis]);
            let side = self.graph.node("Gather", &[shape, &index], &[("axis", Int(0))]);
            let axis = self.graph.ints(&[0]);
            self.graph.node("Squeeze", &[&side, &axis], &[])
        });
        let longest = match rope.normalize {
            Normalize::Separate => None,
            Normalize::Min => Some(self.graph.node("Min", &[&sides[0], &sides[1]], &[])),
            Normalize::Max => Some(self.graph.node("Max", &[&sides[0], &sides[1]], &[])),
        };
        // Angles of rows `[h, 1, n]`, and of columns `[1, w, n]`.
        let [zero, one] = [0, 1].map(|x| self.graph.int(x));
        let angles = [0, 1].map(|axis| {
            let places = self.graph.node("Range", &[&zero, &sides[axis], &one], &[]);
            let float = [("to", Int(1))];
            let places = self.graph.node("Cast", &[&places], &float);
            let side = self.graph.node("Cast", &[longest.as_ref().unwrap_or(&sides[axis])], &float);
            let [half, two, less] = [0.5, 2.0, -1.0].map(|x| self.graph.float(x));
            let centres = self.graph.node("Add", &[&places, &half], &[]);
            let centres = self.graph.node("Div", &[&centres, &side], &[]);
            let centres = self.graph.node("Mul", &[&centres, &two], &[]);
            let centres = self.graph.node("Add", &[&centres, &less], &[]);
            let column = self.graph.reshape(&centres, &[-1, 1]);
            let angles = self.graph.node("Mul", &[&column, &turns], &[]);
            let shape = if axis == 0 { [-1, 1, n as i64] } else { [1, -1, n as i64] };
            self.graph.reshape(&angles, &shape)
        });
        let height = self.graph.slice(shape, 0, 2, 4);
        let n = self.graph.ints(&[n as i64]);
        let all = self.graph.node("Concat", &[&height, &n], &[("axis", Int(0))]);
        let [rows, columns] = angles.map(|x| self.graph.node("Expand", &[&x, &all], &[]));
        let twice = [&rows[..], &columns, &rows, &columns];
        let angles = self.graph.node("Concat", &twice, &[("axis", Int(2))]);
        let angles = self.graph.reshape(&angles, &[-1, head as i64]);
        ["Sin", "Cos"].map(|wave| self.graph.node(wave, &[&angles], &[]))
    }

    /// Queries or keys `[B, H, N, D/H]` with their patches turned.
    fn rotate(&mut self, x: &str, [sin, cos]: &[String; 2]) -> String {
        let (prefix, half) = (1 + self.config.registers as i64, (self.config.dim / self.config.heads / 2) as i64);
        let (first, patches) = (self.graph.slice(x, 2, 0, prefix), self.graph.slice(x, 2, prefix, END));
        let (left, right) = (self.graph.slice(&patches, 3, 0, half), self.graph.slice(&patches, 3, half, END));
        let right = self.graph.node("Neg", &[&right], &[]);
        let turned = self.graph.node("Concat", &[&right, &left], &[("axis", Int(3))]);
        let turned = self.graph.node("Mul", &[&turned, sin], &[]);
        let kept = self.graph.node("Mul", &[&patches, cos], &[]);
        let patches = self.graph.node("Add", &[&kept, &turned], &[]);
        self.graph.node("Concat", &[&first, &patches], &[("axis", Int(2))])
    }

    fn block(&mut self, name: &str, x: &str, tables: Option<&[String; 2]>) -> Result<String> {
        let VitConfig { dim, heads, ffn_bias, qkv_bias, mask_k_bias, proj_bias, ffn, .. } = self.config;
        let head = (dim / heads) as i64;
        let normed = self.norm(&format!("{name}norm1"), x)?;
        let qkv = self.graph.linear(&format!("{name}attn.qkv"), &normed, qkv_bias, mask_k_bias)?;
        let parts = self.graph.nodes("Split", &[&qkv], 3, &[("axis", Int(-1))]);
        let mut parts = parts.into_iter().map(|part| {
            let part = self.graph.reshape(&part, &[0, 0, heads as i64, head]);
            self.graph.node("Transpose", &[&part], &[("perm", Ints(&[0, 2, 1, 3]))])
        });
        let [mut q, mut k, v] = std::array::from_fn(|_| parts.next().expect("there are three parts"));
        drop(parts);
        if let Some(tables) = tables {
            (q, k) = (self.rotate(&q, tables), self.rotate(&k, tables));
        }
        let k = self.graph.node("Transpose", &[&k], &[("perm", Ints(&[0, 1, 3, 2]))]);
        let scale = self.graph.float(1.0 / (head as f64).sqrt());
        let q = self.graph.node("Mul", &[&q, &scale], &[]);
        let scores = self.graph.node("MatMul", &[&q, &k], &[]);
        let shares = self.graph.node("Softmax", &[&scores], &[("axis", Int(-1))]);
        let attended = self.graph.node("MatMul", &[&shares, &v], &[]);
        let attended = self.graph.node("Transpose", &[&attended], &[("perm", Ints(&[0, 2, 1, 3]))]);
        let attended = self.graph.reshape(&attended, &[0, 0, dim as i64]);
        let attended = self.graph.linear(&format!("{name}attn.proj"), &attended, proj_bias, false)?;
        let x = self.onto(x, &attended, &format!("{name}ls1.gamma"))?;
        let normed = self.norm(&format!("{name}norm2"), &x)?;
        let layer = |layer: &str, x: &str, this: &mut Self| {
            this.graph.linear(&format!("{name}mlp.{layer}"), x, ffn_bias, false)
        };
        let last = match ffn {
            Ffn::Mlp => {
                let hidden = layer("fc1", &normed, self)?;
                let hidden = self.graph.gelu(&hidden);
                layer("fc2", &hidden, self)?
            }
            Ffn::Swiglu => {
                let (gate, up) = (layer("w1", &normed, self)?, layer("w2", &normed, self)?);
                let share = self.graph.node("Sigmoid", &[&gate], &[]);
                let gate = self.graph.node("Mul", &[&gate, &share], &[]);
                let hidden = self.graph.node("Mul", &[&gate, &up], &[]);
                layer("w3", &hidden, self)?
            }
        };
        self.onto(&x, &last, &format!("{name}ls2.gamma"))
    }

    /// `x + gamma y`, or `x + y` without LayerScale.
    fn onto(&mut self, x: &str, y: &str, gamma: &str) -> Result<String> {
        let y = match self.config.layer_scale {
            0.0 => y.to_string(),
            _ => {
                let gamma = self.graph.tensor(gamma)?;
                self.graph.node("Mul", &[y, &gamma], &[])
            }
        };
        Ok(self.graph.node("Add", &[x, &y], &[]))
    }
}
