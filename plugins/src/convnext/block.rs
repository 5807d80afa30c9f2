//! One ConvNeXt block, `x + gamma pwconv2(gelu(pwconv1(norm(dwconv(x)))))`, and the layers that it shares with the model.

use dinolab_core::ops::{rows_of_images, Linear};
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::tensor::scope;
use dinolab_core::{Result, Tensor};

use super::ConvNextConfig;

/// Convolutions and linear layers start normal with this deviation, cut at two units, and without bias.
const INIT: Init = Init::TruncatedNormal(0.02);
/// Side of the depthwise kernel.
pub(super) const KERNEL: usize = 7;

/// A weight and its bias: a convolution, a linear layer or a norm.
#[derive(Debug)]
pub(super) struct Affine {
    weight: ParamId,
    bias: ParamId,
}

impl Affine {
    /// A convolution or a linear layer; `shape` begins with the outputs.
    pub(super) fn declare(p: &mut ParamBuilder, name: impl Into<String>, shape: &[usize]) -> Self {
        p.scope(name, |p| Self {
            weight: p.add("weight", shape, INIT),
            bias: p.add_plain("bias", &shape[..1], Init::Zeros),
        })
    }

    /// A norm; weight decay acts on its weight if `decays`.
    pub(super) fn norm(p: &mut ParamBuilder, name: impl Into<String>, dim: usize, decays: bool) -> Self {
        let add = if decays { ParamBuilder::add } else { ParamBuilder::add_plain };
        p.scope(name, |p| Self {
            weight: add(p, "weight", &[dim], Init::Ones),
            bias: p.add_plain("bias", &[dim], Init::Zeros),
        })
    }

    /// The weight as a matrix `[out, in]`, and the bias.
    fn matrix(&self, params: &Params<'_>) -> Result<(Tensor, Tensor)> {
        let weight = params.get(self.weight);
        let out = weight.dim(0);
        Ok((weight.reshape(&[out, weight.len() / out])?, params.get(self.bias)))
    }

    pub(super) fn linear(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.matrix(params)?;
        x.linear(&weight, Some(&bias))
    }

    pub(super) fn layer_norm(&self, params: &Params<'_>, x: &Tensor, eps: f64) -> Result<Tensor> {
        x.layer_norm(&params.get(self.weight), &params.get(self.bias), eps)
    }
}

/// A block's parameters.
#[derive(Debug)]
pub(super) struct Block {
    dwconv: Affine,
    norm: Affine,
    pwconv1: Affine,
    pwconv2: Affine,
    gamma: Option<ParamId>,
}

impl Block {
    /// Declares the parameters of one block under the reference's names.
    pub(super) fn declare(p: &mut ParamBuilder, dim: usize, config: &ConvNextConfig) -> Self {
        let gamma = Init::Constant(config.layer_scale);
        Self {
            gamma: (config.layer_scale != 0.0).then(|| p.add_plain("gamma", &[dim], gamma)),
            dwconv: Affine::declare(p, "dwconv", &[dim, 1, KERNEL, KERNEL]),
            norm: Affine::norm(p, "norm", dim, false),
            pwconv1: Affine::declare(p, "pwconv1", &[4 * dim, dim]),
            pwconv2: Affine::declare(p, "pwconv2", &[dim, 4 * dim]),
        }
    }

    /// Maps `[B, rows * columns, C]` to the same; `kept` (stochastic depth) names the images that go through, whose
    /// branch is scaled by `B / kept`.
    pub(super) fn forward(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        grid: (usize, usize),
        kept: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let Some(kept) = kept else { return self.branch(params, x, grid, Some(x), eps) };
        let (images, pixels) = (x.dim(0), x.dim(1));
        let rows = rows_of_images(&[(kept.clone(), 0, pixels)])?;
        let scales = Tensor::full(&[rows.len()], x.dtype().wide(), images as f64 / kept.len() as f64)?;
        let seen = x.gather_rows(kept)?;
        x.index_add(&rows, &self.branch(params, &seen, grid, None, eps)?, &scales)
    }

    /// `[onto +] gamma pwconv2(gelu(pwconv1(norm(dwconv(x)))))`.
    fn branch(
        &self,
        params: &Params<'_>,
        x: &Tensor,
        grid: (usize, usize),
        onto: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let x = {
            let _scope = scope::enter("dwconv");
            x.depthwise_conv(grid, &params.get(self.dwconv.weight), &params.get(self.dwconv.bias))?
        };
        let _scope = scope::enter("mlp");
        let (norm, norm_bias) = (params.get(self.norm.weight), params.get(self.norm.bias));
        let (weight, bias) = self.pwconv1.matrix(params)?;
        let hidden = Linear::new(&weight, Some(&bias)).after_layer_norm(&norm, &norm_bias, eps).of(&x)?;
        let (weight, bias) = self.pwconv2.matrix(params)?;
        let gamma = self.gamma.map(|id| params.get(id));
        Linear::new(&weight, Some(&bias)).after_gelu().scale(gamma.as_ref()).onto(onto).of(&hidden)
    }
}
