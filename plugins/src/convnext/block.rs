//! One ConvNeXt block, `x + gamma pwconv2(gelu(pwconv1(norm(dwconv(x)))))`.

use dinolab_core::nn::{Linear, Norm};
use dinolab_core::ops::rows_of_images;
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::scope;
use dinolab_core::{Result, Tensor};

use super::ConvNextConfig;

/// Convolutions start normal with this deviation, cut at two units, and without bias.
pub(super) const INIT: [Init; 2] = [Init::TruncatedNormal(0.02), Init::Zeros];
/// Side of the depthwise kernel.
pub(super) const KERNEL: usize = 7;

/// A block's parameters.
#[derive(Debug)]
pub(super) struct Block {
    /// Weight and bias.
    dwconv: [ParamId; 2],
    norm: Norm,
    pwconv1: Linear,
    pwconv2: Linear,
    gamma: Option<ParamId>,
}

impl Block {
    /// Declares the parameters of one block under the reference's names.
    pub(super) fn declare(p: &mut ParamBuilder, dim: usize, config: &ConvNextConfig) -> Self {
        let gamma = Init::Constant(config.layer_scale);
        Self {
            gamma: (config.layer_scale != 0.0).then(|| p.add_plain("gamma", &[dim], gamma)),
            dwconv: p.scope("dwconv", |p| {
                [p.add("weight", &[dim, 1, KERNEL, KERNEL], INIT[0]), p.add_plain("bias", &[dim], INIT[1])]
            }),
            norm: p.scope("norm", |p| Norm::layer(p, dim, config.norm_eps)),
            pwconv1: p.scope("pwconv1", |p| Linear::declare(p, dim, 4 * dim, true)),
            pwconv2: p.scope("pwconv2", |p| Linear::declare(p, 4 * dim, dim, true)),
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
    ) -> Result<Tensor> {
        let Some(kept) = kept else { return self.branch(params, x, grid, Some(x)) };
        let (images, pixels) = (x.dim(0), x.dim(1));
        let rows = rows_of_images(&[(kept.clone(), 0, pixels)])?;
        let scales = Tensor::full(&[rows.len()], x.dtype().wide(), images as f64 / kept.len() as f64)?;
        let seen = x.gather_rows(kept)?;
        x.index_add(&rows, &self.branch(params, &seen, grid, None)?, &scales)
    }

    /// `[onto +] gamma pwconv2(gelu(pwconv1(norm(dwconv(x)))))`.
    fn branch(&self, params: &Params<'_>, x: &Tensor, grid: (usize, usize), onto: Option<&Tensor>) -> Result<Tensor> {
        let x = {
            let _scope = scope::enter("dwconv");
            let [weight, bias] = self.dwconv.map(|id| params.get(id));
            x.depthwise_conv(grid, &weight, &bias)?
        };
        let _scope = scope::enter("mlp");
        let hidden = self.pwconv1.with(params, |layer| self.norm.then(params, layer, &x))?;
        let gamma = self.gamma.map(|id| params.get(id));
        self.pwconv2.with(params, |layer| layer.after_gelu().scale(gamma.as_ref()).onto(onto).of(&hidden))
    }
}
