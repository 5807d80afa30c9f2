//! One pre-norm transformer block: `x + g1 attn(norm1(x))`, then `x + g2 ffn(norm2(x))`.

use dinolab_core::contract::PosTables;
use dinolab_core::nn;
use dinolab_core::ops::{rows_of_images, Linear, Segment};
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::scope;
use dinolab_core::{Result, Tensor};

use super::{Checkpointing, Ffn, Norm, VitConfig};

/// A norm of the kind that the recipe names.
pub(super) fn declare_norm(p: &mut ParamBuilder, name: &str, config: &VitConfig) -> nn::Norm {
    p.scope(name, |p| match config.norm {
        Norm::LayerNorm => nn::Norm::layer(p, config.dim, config.norm_eps),
        Norm::RmsNorm => nn::Norm::rms(p, config.dim, config.norm_eps),
    })
}

#[derive(Clone, Debug)]
enum FeedForward {
    Mlp { fc1: nn::Linear, fc2: nn::Linear },
    Swiglu { w1: nn::Linear, w2: nn::Linear, w3: nn::Linear },
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
    norm1: nn::Norm,
    qkv: nn::Linear,
    proj: nn::Linear,
    scale1: Option<ParamId>,
    norm2: nn::Norm,
    ffn: FeedForward,
    scale2: Option<ParamId>,
}

impl Block {
    /// Declares the parameters of one block under the reference's names.
    pub fn declare(p: &mut ParamBuilder, config: &VitConfig) -> Self {
        let (dim, hidden) = (config.dim, config.hidden());
        let linear = |p: &mut ParamBuilder, name: &str, from, to, bias| {
            p.scope(name, |p| nn::Linear::declare(p, from, to, bias))
        };
        let scale = |p: &mut ParamBuilder, name: &str| {
            let init = Init::Constant(config.layer_scale);
            (config.layer_scale != 0.0).then(|| p.scope(name, |p| p.add_plain("gamma", &[dim], init)))
        };
        let norm1 = declare_norm(p, "norm1", config);
        let (qkv, proj) = p.scope("attn", |p| {
            let qkv = p.stacked(3, |p| linear(p, "qkv", dim, 3 * dim, config.qkv_bias));
            (qkv, linear(p, "proj", dim, dim, config.proj_bias))
        });
        let scale1 = scale(p, "ls1");
        let norm2 = declare_norm(p, "norm2", config);
        let layer = |p: &mut ParamBuilder, name, from, to| linear(p, name, from, to, config.ffn_bias);
        let ffn = p.scope("mlp", |p| match config.ffn {
            Ffn::Mlp => FeedForward::Mlp { fc1: layer(p, "fc1", dim, hidden), fc2: layer(p, "fc2", hidden, dim) },
            Ffn::Swiglu => FeedForward::Swiglu {
                w1: layer(p, "w1", dim, hidden),
                w2: layer(p, "w2", dim, hidden),
                w3: layer(p, "w3", hidden, dim),
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
                    let (block, all) = (self.clone(), onto.is_some());
                    params.recomputed(&[x], move |params, inputs| {
                        let x = &inputs[0];
                        block.feed_forward(params, x, all.then_some(x))
                    })
                }
                _ => self.feed_forward(params, x, onto),
            }
        })
    }

    /// `[onto +] gamma2 ffn(norm2(x))`.
    fn feed_forward(&self, params: &Params<'_>, x: &Tensor, onto: Option<&Tensor>) -> Result<Tensor> {
        let normed = |layer: &nn::Linear| layer.with(params, |layer| self.norm2.then(params, layer, x));
        let gamma = self.scale2.map(|id| params.get(id));
        match &self.ffn {
            FeedForward::Mlp { fc1, fc2 } => {
                let hidden = normed(fc1)?;
                fc2.with(params, |last| last.scale(gamma.as_ref()).onto(onto).after_gelu().of(&hidden))
            }
            FeedForward::Swiglu { w1, w2, w3 } => {
                let (up, gate) = (normed(w2)?, normed(w1)?);
                w3.with(params, |last| last.scale(gamma.as_ref()).onto(onto).after_swiglu(&up).of(&gate))
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
        let (weight, mut bias) = self.qkv.parts(params);
        if config.mask_k_bias {
            bias = bias.map(|b| b.mul(&key_bias_mask(config.dim, params)?)).transpose()?;
        }
        let qkv = self.norm1.then(params, Linear::new(&weight, bias.as_ref()), x)?;
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
        let (attended, gamma) = (qkv.attention(config.heads, &segments)?, self.scale1.map(|id| params.get(id)));
        self.proj.with(params, |last| last.scale(gamma.as_ref()).onto(onto).of(&attended))
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
