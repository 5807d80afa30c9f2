//! One pre-norm transformer block: `x + g1 attn(norm1(x))`, then `x + g2 ffn(norm2(x))`.

use dinolab_core::contract::PosTables;
use dinolab_core::ops::{rows_of_images, Linear, Segment};
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::tensor::scope;
use dinolab_core::{Result, Tensor};

use super::{Checkpointing, Ffn, Norm, VitConfig};

/// Linear layers start normal with this deviation, cut at two units, and without bias.
const INIT: Init = Init::TruncatedNormal(0.02);

/// A LayerNorm's or RMSNorm's parameters.
#[derive(Clone, Debug)]
pub(super) struct NormParams {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl NormParams {
    pub(super) fn declare(p: &mut ParamBuilder, name: &str, config: &VitConfig) -> Self {
        p.scope(name, |p| Self {
            weight: p.add_plain("weight", &[config.dim], Init::Ones),
            bias: (config.norm == Norm::LayerNorm).then(|| p.add_plain("bias", &[config.dim], Init::Zeros)),
        })
    }

    pub(super) fn apply(&self, params: &Params<'_>, x: &Tensor, config: &VitConfig) -> Result<Tensor> {
        let weight = params.get(self.weight);
        match self.bias {
            Some(bias) => x.layer_norm(&weight, &params.get(bias), config.norm_eps),
            None => x.rms_norm(&weight, config.norm_eps),
        }
    }

    /// A linear layer (weight and bias) of x normalised.
    fn then(
        &self,
        (weight, bias): (Tensor, Option<Tensor>),
        params: &Params<'_>,
        x: &Tensor,
        config: &VitConfig,
    ) -> Result<Tensor> {
        let (layer, norm) = (Linear::new(&weight, bias.as_ref()), params.get(self.weight));
        match self.bias {
            Some(bias) => layer.after_layer_norm(&norm, &params.get(bias), config.norm_eps).of(x),
            None => layer.after_rms_norm(&norm, config.norm_eps).of(x),
        }
    }
}

#[derive(Clone, Debug)]
struct LinearParams {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl LinearParams {
    fn declare(p: &mut ParamBuilder, name: &str, from: usize, to: usize, bias: bool) -> Self {
        p.scope(name, |p| Self {
            weight: p.add("weight", &[to, from], INIT),
            bias: bias.then(|| p.add_plain("bias", &[to], Init::Zeros)),
        })
    }

    fn get(&self, params: &Params<'_>) -> (Tensor, Option<Tensor>) {
        (params.get(self.weight), self.bias.map(|b| params.get(b)))
    }
}

#[derive(Clone, Debug)]
enum FfnParams {
    Mlp { fc1: LinearParams, fc2: LinearParams },
    Swiglu { w1: LinearParams, w2: LinearParams, w3: LinearParams },
}

/// One kind of crop inside the packed tokens, with its position tables.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Images `B` of this kind.
    pub images: usize,
    /// Tokens `N` of each: CLS, registers, patches.
    pub tokens: usize,
    /// Where its patches are.
    pub tables: PosTables,
}

/// A block's parameters.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: NormParams,
    qkv: LinearParams,
    proj: LinearParams,
    scale1: Option<ParamId>,
    norm2: NormParams,
    ffn: FfnParams,
    scale2: Option<ParamId>,
}

impl Block {
    /// Declares the parameters of one block under the reference's names.
    pub fn declare(p: &mut ParamBuilder, config: &VitConfig) -> Self {
        let (dim, hidden) = (config.dim, config.hidden());
        let scale = |p: &mut ParamBuilder, name: &str| {
            let init = Init::Constant(config.layer_scale);
            (config.layer_scale != 0.0).then(|| p.scope(name, |p| p.add_plain("gamma", &[dim], init)))
        };
        let norm1 = NormParams::declare(p, "norm1", config);
        let (qkv, proj) = p.scope("attn", |p| {
            let qkv = p.stacked(3, |p| LinearParams::declare(p, "qkv", dim, 3 * dim, config.qkv_bias));
            (qkv, LinearParams::declare(p, "proj", dim, dim, config.proj_bias))
        });
        let scale1 = scale(p, "ls1");
        let norm2 = NormParams::declare(p, "norm2", config);
        let linear = |p: &mut ParamBuilder, name, from, to| LinearParams::declare(p, name, from, to, config.ffn_bias);
        let ffn = p.scope("mlp", |p| match config.ffn {
            Ffn::Mlp => FfnParams::Mlp { fc1: linear(p, "fc1", dim, hidden), fc2: linear(p, "fc2", hidden, dim) },
            Ffn::Swiglu => FfnParams::Swiglu {
                w1: linear(p, "w1", dim, hidden),
                w2: linear(p, "w2", dim, hidden),
                w3: linear(p, "w3", hidden, dim),
            },
        });
        Self { norm1, qkv, proj, scale1, norm2, ffn, scale2: scale(p, "ls2") }
    }

    /// Packed tokens `[sum of B * N, D]` to packed tokens. `kept` (stochastic depth) names, for both branches and every
    /// kind of crop, the images that go through; their branch is scaled by `B / kept`.
    pub fn forward(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        layers: &[Layer],
        kept: Option<&[Vec<Tensor>; 2]>,
        config: &VitConfig,
    ) -> Result<Tensor> {
        let x = branch(x, layers, kept.map(|k| &k[0][..]), |x, images, onto| {
            let _scope = scope::enter("attn");
            self.attention(params, x, layers, images, onto, config)
        })?;
        branch(&x, layers, kept.map(|k| &k[1][..]), |x, _, onto| {
            let _scope = scope::enter("mlp");
            match config.checkpointing {
                Checkpointing::Selective => {
                    let (block, config, all) = (self.clone(), config.clone(), onto.is_some());
                    params.recomputed(&[x], move |params, inputs| {
                        let x = &inputs[0];
                        block.feed_forward(params, x, all.then_some(x), &config)
                    })
                }
                _ => self.feed_forward(params, x, onto, config),
            }
        })
    }

    /// `[onto +] gamma2 ffn(norm2(x))`.
    fn feed_forward(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        onto: Option<&Tensor>,
        config: &VitConfig,
    ) -> Result<Tensor> {
        let normed = |layer: &LinearParams| self.norm2.then(layer.get(params), params, x, config);
        let gamma = self.scale2.map(|id| params.get(id));
        match &self.ffn {
            FfnParams::Mlp { fc1, fc2 } => {
                let (weight, bias) = fc2.get(params);
                let last = Linear::new(&weight, bias.as_ref()).scale(gamma.as_ref()).onto(onto);
                last.after_gelu().of(&normed(fc1)?)
            }
            FfnParams::Swiglu { w1, w2, w3 } => {
                let ((weight, bias), up) = (w3.get(params), normed(w2)?);
                let last = Linear::new(&weight, bias.as_ref()).scale(gamma.as_ref()).onto(onto);
                last.after_swiglu(&up).of(&normed(w1)?)
            }
        }
    }

    /// [`forward`](Self::forward), keeping no more than what goes into the block.
    pub(super) fn recomputed(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        layers: Vec<Layer>,
        kept: Option<[Vec<Tensor>; 2]>,
        config: &VitConfig,
    ) -> Result<Tensor> {
        // Biases are followed like the tokens; whatever else a layer has is constant.
        let biases: Vec<Tensor> = layers.iter().filter_map(|l| l.tables.bias.clone()).collect();
        let inputs: Vec<&Tensor> = [x].into_iter().chain(&biases).collect();
        let (block, config) = (self.clone(), config.clone());
        params.recomputed(&inputs, move |params, inputs| {
            let mut layers = layers.clone();
            let own = layers.iter_mut().filter(|l| l.tables.bias.is_some());
            own.zip(&inputs[1..]).for_each(|(layer, bias)| layer.tables.bias = Some(bias.clone()));
            block.forward(params, &inputs[0], &layers, kept.as_ref(), &config)
        })
    }

    /// `[onto +] gamma1 attn(norm1(x))`.
    fn attention(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        layers: &[Layer],
        images: &[usize],
        onto: Option<&Tensor>,
        config: &VitConfig,
    ) -> Result<Tensor> {
        let (weight, mut bias) = self.qkv.get(params);
        if config.mask_k_bias {
            bias = bias.map(|b| b.mul(&key_bias_mask(config.dim, params)?)).transpose()?;
        }
        let qkv = self.norm1.then((weight, bias), params, x, config)?;
        let segments: Vec<Segment> = layers
            .iter()
            .zip(images)
            .map(|(layer, &images)| Segment {
                images,
                tokens: layer.tokens,
                rotary: layer.tables.rotary.clone(),
                bias: layer.tables.bias.clone(),
            })
            .collect();
        let ((weight, bias), gamma) = (self.proj.get(params), self.scale1.map(|id| params.get(id)));
        let last = Linear::new(&weight, bias.as_ref()).scale(gamma.as_ref()).onto(onto);
        last.of(&qkv.attention(config.heads, &segments)?)
    }
}

/// One on queries and values, zero on keys: `[3 D]`.
fn key_bias_mask(dim: usize, params: &Params<'_>) -> Result<Tensor> {
    let mask: Vec<f64> = (0..3 * dim).map(|i| if (dim..2 * dim).contains(&i) { 0.0 } else { 1.0 }).collect();
    Tensor::from_f64(&mask, &[3 * dim], params.dtype())
}

/// `x + f(x)`, over all images or (stochastic depth) over those kept. `f` is given the tokens, how many images of each
/// kind they are, and what its last layer is to add its result to: x, unless some images are dropped.
fn branch(
    x: &Tensor,
    layers: &[Layer],
    kept: Option<&[Tensor]>,
    f: impl FnOnce(&Tensor, &[usize], Option<&Tensor>) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(kept) = kept else {
        let images: Vec<usize> = layers.iter().map(|l| l.images).collect();
        return f(x, &images, Some(x));
    };
    let (mut parts, mut scales, mut start) = (Vec::new(), Vec::new(), 0);
    for (layer, kept) in layers.iter().zip(kept) {
        parts.push((kept.clone(), start, layer.tokens));
        scales.extend(std::iter::repeat_n(layer.images as f64 / kept.len() as f64, kept.len() * layer.tokens));
        start += layer.images * layer.tokens;
    }
    let images: Vec<usize> = kept.iter().map(Tensor::len).collect();
    let rows = rows_of_images(&parts)?;
    let scales = Tensor::from_f64(&scales, &[scales.len()], x.dtype().wide())?;
    x.index_add(&rows, &f(&x.gather_rows(&rows)?, &images, None)?, &scales)
}
