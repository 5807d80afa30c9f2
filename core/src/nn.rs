//! Layers for backbones and losses: each declares its parameters once and is given the flat buffer at every forward.
//!
//! ```
//! use dinolab_core::nn::{Activation, Mlp};
//! use dinolab_core::params::{ParamBuilder, Params};
//! use dinolab_core::{DType, Tensor};
//!
//! let mut params = ParamBuilder::new();
//! let mlp = params.scope("predictor", |p| Mlp::declare(p, &[8, 32, 4], Activation::Gelu, true));
//! let layout = params.finish();
//! assert_eq!(layout.specs()[0].name, "predictor.0.weight");
//! let flat = layout.init(0, DType::F32)?;
//! let y = mlp.forward(&Params::frozen(&layout, &flat), &Tensor::zeros(&[5, 8], DType::F32))?;
//! assert_eq!(y.shape(), [5, 4]);
//! # Ok::<(), dinolab_core::Error>(())
//! ```

use crate::ops;
use crate::params::{Init, ParamBuilder, ParamId, ParamRole, Params};
use crate::{Result, Tensor};

/// `x W^T + b` over the last axis. Declares `weight` `[O, I]` and `bias` `[O]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
    /// Width of what it is given.
    pub from: usize,
    /// Width of what it gives.
    pub to: usize,
}

impl Linear {
    /// A layer from width `from` to width `to`, with a truncated normal start of deviation 0.02 and no bias at first.
    pub fn declare(params: &mut ParamBuilder, from: usize, to: usize, bias: bool) -> Self {
        Self::declare_with(params, from, to, bias, Init::TruncatedNormal(0.02))
    }

    /// The same with another start of the weight.
    pub fn declare_with(params: &mut ParamBuilder, from: usize, to: usize, bias: bool, init: Init) -> Self {
        let weight = params.add("weight", &[to, from], init);
        Self { weight, bias: bias.then(|| params.add_plain("bias", &[to], Init::Zeros)), from, to }
    }

    /// `[.., I]` to `[.., O]`.
    ///
    /// # Errors
    /// If the width of `x` is not that of the layer, or the device fails.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        self.with(params, |layer| layer.of(x))
    }

    /// The layer of `gelu(x)`, in one pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn after_gelu(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        self.with(params, |layer| layer.after_gelu().of(x))
    }

    /// The operation, to be fused with what is before and behind it.
    pub fn with<R>(&self, params: &Params<'_>, f: impl FnOnce(ops::Linear<'_>) -> R) -> R {
        let (weight, bias) = self.parts(params);
        f(ops::Linear::new(&weight, bias.as_ref()))
    }

    /// Weight and bias.
    pub fn parts(&self, params: &Params<'_>) -> (Tensor, Option<Tensor>) {
        (params.get(self.weight), self.bias.map(|bias| params.get(bias)))
    }

    /// Its parameters, each of which is multiplied and added once a row.
    pub fn parameters(&self) -> f64 {
        self.from as f64 * self.to as f64 + if self.bias.is_some() { self.to as f64 } else { 0.0 }
    }
}

/// A convolution whose stride is its kernel, so that every number is read once: a patch embedding or a downsampling.
/// Declares `weight` `[O, C, K, K]` and `bias` `[O]`.
#[derive(Clone, Copy, Debug)]
pub struct PatchEmbed {
    weight: ParamId,
    bias: ParamId,
    side: usize,
}

impl PatchEmbed {
    /// From `channels` channels of squares of `side` numbers to width `to`; weight and bias start as they are told.
    pub fn declare(
        params: &mut ParamBuilder,
        channels: usize,
        side: usize,
        to: usize,
        [weight, bias]: [Init; 2],
    ) -> Self {
        let weight = params.add("weight", &[to, channels, side, side], weight);
        Self { weight, bias: params.add_plain("bias", &[to], bias), side }
    }

    /// `[B, C, height, width]` to `[B * (height / K) * (width / K), O]`, row-major over the squares.
    ///
    /// # Errors
    /// If the channels are not those of the layer, or the device fails.
    pub fn forward(&self, params: &Params<'_>, pixels: &Tensor) -> Result<Tensor> {
        self.apply(&self.matrix(params)?, pixels)
    }

    /// The weight as a matrix `[O, C * K * K]`, and the bias: taken once for crops of several sizes.
    ///
    /// # Errors
    /// If the device fails.
    pub fn matrix(&self, params: &Params<'_>) -> Result<[Tensor; 2]> {
        let weight = params.get(self.weight);
        let (to, from) = (weight.dim(0), weight.len() / weight.dim(0));
        Ok([weight.reshape(&[to, from])?, params.get(self.bias)])
    }

    /// [`forward`](Self::forward) with what [`matrix`](Self::matrix) gave.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn apply(&self, [weight, bias]: &[Tensor; 2], pixels: &Tensor) -> Result<Tensor> {
        pixels.patchify(self.side)?.cast(weight.dtype())?.linear(weight, Some(bias))
    }
}

/// Normalisation of every row by its own numbers: LayerNorm, `w (x - mean) / sqrt(var + eps) + b`, or RMSNorm,
/// `w x / sqrt(mean x^2 + eps)`. Declares `weight` `[D]` and, for LayerNorm, `bias` `[D]`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    weight: ParamId,
    bias: Option<ParamId>,
    eps: f64,
}

impl Norm {
    /// LayerNorm (Ba et al., arXiv:1607.06450).
    pub fn layer(params: &mut ParamBuilder, dim: usize, eps: f64) -> Self {
        let weight = params.add_plain("weight", &[dim], Init::Ones);
        Self { weight, bias: Some(params.add_plain("bias", &[dim], Init::Zeros)), eps }
    }

    /// LayerNorm with weight decay on its weight.
    pub fn decayed_layer(params: &mut ParamBuilder, dim: usize, eps: f64) -> Self {
        let weight = params.add("weight", &[dim], Init::Ones);
        Self { weight, bias: Some(params.add_plain("bias", &[dim], Init::Zeros)), eps }
    }

    /// RMSNorm (Zhang and Sennrich, arXiv:1910.07467).
    pub fn rms(params: &mut ParamBuilder, dim: usize, eps: f64) -> Self {
        Self { weight: params.add_plain("weight", &[dim], Init::Ones), bias: None, eps }
    }

    /// `[.., D]` to `[.., D]`.
    ///
    /// # Errors
    /// If the width of `x` is not that of the layer, or the device fails.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        let weight = params.get(self.weight);
        match self.bias {
            Some(bias) => x.layer_norm(&weight, &params.get(bias), self.eps),
            None => x.rms_norm(&weight, self.eps),
        }
    }

    /// A linear layer of the normalised rows, in one pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn then(&self, params: &Params<'_>, layer: ops::Linear<'_>, x: &Tensor) -> Result<Tensor> {
        let weight = params.get(self.weight);
        match self.bias {
            Some(bias) => layer.after_layer_norm(&weight, &params.get(bias), self.eps).of(x),
            None => layer.after_rms_norm(&weight, self.eps).of(x),
        }
    }
}

/// Batch normalisation of rows by the statistics of the rows that it is given, in training and in evaluation:
/// `w (x - mean) / sqrt(var + eps) + b` with the biased variance, for every column (Ioffe and Szegedy,
/// arXiv:1502.03167). Declares `weight` and `bias` `[D]`. It keeps no running statistics.
#[derive(Clone, Copy, Debug)]
pub struct BatchNorm {
    affine: Option<(ParamId, ParamId)>,
    eps: f64,
}

impl BatchNorm {
    /// For rows of width `dim`; without `affine` there is no weight and no bias.
    pub fn declare(params: &mut ParamBuilder, dim: usize, affine: bool) -> Self {
        let affine = affine
            .then(|| (params.add_plain("weight", &[dim], Init::Ones), params.add_plain("bias", &[dim], Init::Zeros)));
        Self { affine, eps: 1e-5 }
    }

    /// `[N, D]` to `[N, D]`.
    ///
    /// # Errors
    /// If the width of `x` is not that of the layer, or the device fails.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        // Statistics of bf16 rows are f32, and so is what they are applied to.
        let wide = x.cast(x.dtype().wide())?;
        let centred = wide.add_row(&wide.mean_axis(0)?.neg()?)?;
        let scale = centred.square()?.mean_axis(0)?.shift(self.eps)?.sqrt()?.recip()?;
        let normed = match self.affine {
            None => centred.mul_row(&scale)?,
            Some((weight, bias)) => {
                let [weight, bias] = [weight, bias].map(|p| params.get(p).cast(wide.dtype()));
                centred.mul_row(&scale.mul(&weight?)?)?.add_row(&bias?)?
            }
        };
        normed.cast(x.dtype())
    }
}

/// What stands between the layers of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU, computed with the layer behind it.
    Gelu,
    /// Batch normalisation, then ReLU: the usual layers of projectors.
    BatchNormRelu,
}

/// Linear layers with an activation between them. Declares layer `i` as `<2 i>`, as PyTorch's `Sequential` numbers it with
/// one module between two layers; a [batch norm](Activation::BatchNormRelu) is `<2 i + 1>`.
#[derive(Clone, Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
    norms: Vec<BatchNorm>,
}

impl Mlp {
    /// Layers from each width to the next; all of them have a bias, or none.
    pub fn declare(params: &mut ParamBuilder, widths: &[usize], activation: Activation, bias: bool) -> Self {
        Self::declare_with(params, widths, activation, bias, None)
    }

    /// The same, to what is predicted: the last layer is an [`Output`](ParamRole::Output).
    pub fn declare_to_output(params: &mut ParamBuilder, widths: &[usize], activation: Activation, bias: bool) -> Self {
        Self::declare_with(params, widths, activation, bias, Some(ParamRole::Output))
    }

    fn declare_with(
        params: &mut ParamBuilder,
        widths: &[usize],
        activation: Activation,
        bias: bool,
        last: Option<ParamRole>,
    ) -> Self {
        let n = widths.len() - 1;
        let (mut layers, mut norms) = (Vec::new(), Vec::new());
        for (i, pair) in widths.windows(2).enumerate() {
            let layer = |p: &mut ParamBuilder| Linear::declare(p, pair[0], pair[1], bias);
            layers.push(params.scope((2 * i).to_string(), |p| match last.filter(|_| i + 1 == n) {
                Some(role) => p.role(role, layer),
                None => layer(p),
            }));
            if activation == Activation::BatchNormRelu && i + 1 < n {
                norms.push(params.scope((2 * i + 1).to_string(), |p| BatchNorm::declare(p, pair[1], true)));
            }
        }
        Self { layers, norms }
    }

    /// `[.., I]` to `[.., O]`; `[N, I]` with batch norms.
    ///
    /// # Errors
    /// If the width of `x` is not that of the first layer, or the device fails.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        let mut x = self.layers[0].forward(params, x)?;
        for (i, layer) in self.layers[1..].iter().enumerate() {
            x = match self.norms.get(i) {
                Some(norm) => layer.forward(params, &norm.forward(params, &x)?.relu()?)?,
                None => layer.after_gelu(params, &x)?,
            };
        }
        Ok(x)
    }

    /// Width of what it gives.
    pub fn output(&self) -> usize {
        self.layers.last().expect("it has a layer").to
    }

    /// Parameters of the linear layers, each of which is multiplied and added once a row.
    pub fn parameters(&self) -> f64 {
        self.layers.iter().map(Linear::parameters).sum()
    }

    /// Numbers of a row that are kept from forward to backward: the input of every layer and the output, and of a batch
    /// norm its input, that centred and scaled.
    pub fn activations(&self) -> f64 {
        let of_layers = self.layers.iter().map(|layer| layer.from).sum::<usize>() + self.output();
        let of_norms = 3 * self.layers.iter().take(self.norms.len()).map(|layer| layer.to).sum::<usize>();
        (of_layers + of_norms) as f64
    }
}
