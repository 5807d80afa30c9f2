//! Optimizer `muon`.

use dinolab_core::contract::{At, Direction, Optimizer, ParamUpdate, Reach, Schedule};
use dinolab_core::params::ParamSpec;
use dinolab_core::{ops, plugin, DType, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Muon: the momentum of every hidden matrix, made orthogonal; AdamW for all other parameters.
///
/// The direction of a matrix `[rows, cols]` with gradient G:
///
/// ```text
/// M = momentum M + (1 - momentum) G
/// U = M,   or with nesterov   momentum M + (1 - momentum) G
/// X = U / |U|,   then ns_steps times   X = 3.4445 X - 4.7750 X X^T X + 2.0315 (X X^T)^2 X
/// direction = 0.2 sqrt(max(rows, cols)) X
/// ```
///
/// (Jordan et al., <https://kellerjordan.github.io/posts/muon/>). The last factor, of Liu et al. (arXiv:2502.16982, equation
/// 4), gives a direction the size of AdamW's, so that AdamW's learning rate and weight decay carry over:
/// `torch.optim.Muon` with `match_rms_adamw`. In a bf16 step the iteration is in bf16.
///
/// A hidden matrix is a parameter with two axes and weight decay that has no special role and is not an embedding: the
/// linear layers of attention and MLPs, in blocks and heads. Matrices that lie in one parameter, as queries, keys and
/// values do, are made orthogonal one by one. Patch embeddings, tokens, maps to prototypes, classes and pixels,
/// convolutions, norms and biases are left to AdamW. The moments are `exp_avg`, which holds the momentum of a matrix, and
/// `exp_avg_sq`, which stays zero for matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Muon {
    /// Share of a matrix's momentum that stays.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub momentum: Schedule,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Newton-Schulz iterations.
    #[schemars(range(min = 1, max = 100))]
    pub ns_steps: usize,
    /// AdamW: decay of the first and second moment.
    #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }))]
    pub betas: [f64; 2],
    /// AdamW: added to the root of the second moment.
    #[schemars(range(min = 1e-20, max = 1000))]
    pub eps: f64,
}

impl Default for Muon {
    fn default() -> Self {
        Self { momentum: Schedule::constant(0.95), nesterov: true, ns_steps: 5, betas: [0.9, 0.999], eps: 1e-8 }
    }
}

/// Coefficients of the iteration, which takes singular values in (0, 1] near 1.
const NEWTON_SCHULZ: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// What is divided by at least: of `torch.optim.Muon`.
const EPS: f64 = 1e-7;
/// No singular value exceeds this after any number of iterations: the polynomial stays below 1.21 on [0, 1.21], and bf16
/// rounds to a hundredth.
const LARGEST: f64 = 1.5;

/// Rows and columns of each matrix that lies in a parameter, if these are hidden matrices.
fn hidden(param: &ParamSpec) -> Option<(usize, usize)> {
    match param.shape[..] {
        [rows, cols] if param.decays && param.role.is_none() && param.layer != Some(0) => {
            Some((rows / param.stacked, cols))
        }
        _ => None,
    }
}

/// The root mean square of an orthogonal matrix becomes 0.2, about that of AdamW's directions.
fn scale((rows, cols): (usize, usize)) -> f64 {
    0.2 * (rows.max(cols) as f64).sqrt()
}

/// The nearest orthogonal matrix, about, with products in `products`.
fn orthogonal(matrix: &Tensor, steps: usize, products: DType) -> Result<Tensor> {
    let tall = matrix.dim(0) > matrix.dim(1);
    let wide = if tall { matrix.transpose()? } else { matrix.clone() };
    let length = wide.square()?.sum()?.sqrt()?.clamp_min(EPS)?;
    let mut x = wide.mul(&length.recip()?)?.cast(products)?;
    let [a, b, c] = NEWTON_SCHULZ;
    for _ in 0..steps {
        let gram = x.matmul_t(&x)?;
        let even = gram.scale(b)?.add(&gram.matmul(&gram)?.scale(c)?)?;
        x = x.scale(a)?.add(&even.matmul(&x)?)?;
    }
    let x = x.cast(matrix.dtype())?;
    if tall {
        x.transpose()
    } else {
        Ok(x)
    }
}

impl Optimizer for Muon {
    fn moments(&self) -> &[&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn adamw(&self, param: &ParamSpec) -> Option<ops::AdamW> {
        let [beta1, beta2] = self.betas;
        hidden(param).is_none().then_some(ops::AdamW { beta1, beta2, eps: self.eps })
    }

    fn numbers(&self, at: At, _: u64) -> Vec<f64> {
        let momentum = self.momentum.at(at);
        vec![momentum, 1.0 - momentum]
    }

    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        let size @ (rows, _) = hidden(param.spec).expect("others are left to AdamW");
        let [momentum, rest] = &param.numbers[..] else { unreachable!("`numbers` gives two") };
        let new = param.gradient.mul(rest)?;
        let moment = param.moments[0].mul(momentum)?.add(&new)?;
        let ahead = if self.nesterov { moment.mul(momentum)?.add(&new)? } else { moment.clone() };
        let part = |i: usize| orthogonal(&ahead.narrow(i * rows, rows)?, self.ns_steps, param.products);
        let parts: Vec<Tensor> = (0..param.spec.stacked).map(part).collect::<Result<_>>()?;
        let direction = Tensor::cat(&parts.iter().collect::<Vec<_>>())?.scale(scale(size))?;
        Ok(Direction { direction, moments: vec![moment] })
    }

    fn reach(&self, param: &ParamSpec, at: At, _: u64) -> Reach {
        let momentum = self.momentum.at(at);
        let most = hidden(param).map_or(0.0, |size| LARGEST * scale(size));
        Reach { memory: momentum, share: 1.0 - momentum, gain: 0.0, most }
    }
}

plugin!(Optimizer, "muon", Muon);
