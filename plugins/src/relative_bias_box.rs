//! Position encoding `relative_bias_box`: a learned bias on the scores, from differences of box coordinates.

use dinolab_core::contract::{Grid, PosContext, PosEncoding, PosTables};
use dinolab_core::ops::Linear;
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::rng::Rng;
use dinolab_core::{plugin, DType, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::box_coords::{axes, ByGrid, DrawPer, Normalize, Rescale};

/// A learned bias on attention scores: a small network on the difference of two patches' box coordinates, the continuous
/// relative position bias of Swin v2 (arXiv:2111.09883, eq. 4 and 5).
///
/// `bias[head, p, q] = W2 gelu(W1 d + b1)`, `d` the (row, column) difference of p and q in the box [-1, 1]. It is
/// defined for any grid, and shared by all blocks. CLS and register tokens get no bias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RelativeBiasBoxConfig {
    /// Width of the network's hidden layer.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub hidden: usize,
    /// Whether differences are log-spaced, `sign(d) ln(1 + 4 |d|) / ln 9`, so that near patches are told apart better.
    pub log_spaced: bool,
    /// What the box means for a grid that is not square.
    pub normalize: Normalize,
    /// In training, multiplied with all coordinates: a number s for log-uniform in [1/s, s], or `{ uniform = [a, b] }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rescale: Option<Rescale>,
    /// How often the factor is drawn anew.
    pub draw_per: DrawPer,
}

impl Default for RelativeBiasBoxConfig {
    fn default() -> Self {
        Self { hidden: 64, log_spaced: true, normalize: Normalize::Separate, rescale: None, draw_per: DrawPer::Block }
    }
}

/// The plugin `relative_bias_box`.
#[derive(Debug)]
pub struct RelativeBiasBox {
    config: RelativeBiasBoxConfig,
    /// `fc1.weight`, `fc1.bias`, `fc2.weight`, and the number of heads; empty until declared.
    network: Option<([ParamId; 3], usize)>,
    /// For every grid seen: where in the flat `[differences, H]` output each element of `[H, P, P]` is found.
    places: ByGrid<Tensor>,
}

impl RelativeBiasBox {
    fn new(config: RelativeBiasBoxConfig) -> Self {
        Self { config, network: None, places: ByGrid::default() }
    }

    /// All distinct differences of a grid, multiplied by `factor`: `[(2h - 1) (2w - 1), 2]`.
    fn differences(&self, grid: Grid, factor: f64, dtype: DType) -> Result<Tensor> {
        let spaced = |d: f64| {
            if self.config.log_spaced {
                d.signum() * (4.0 * d.abs()).ln_1p() / 9f64.ln()
            } else {
                d
            }
        };
        // Centres are evenly spaced, so a difference is that of the first centre to another, or its negative.
        let [rows, columns] = axes(grid, self.config.normalize, |x| x).map(|axis| -> Vec<f64> {
            let ahead = axis.iter().map(|c| spaced((c - axis[0]) * factor));
            ahead.clone().skip(1).rev().map(|d| -d).chain(ahead).collect()
        });
        let pairs: Vec<f64> = rows.iter().flat_map(|&r| columns.iter().flat_map(move |&c| [r, c])).collect();
        Tensor::from_f64(&pairs, &[pairs.len() / 2, 2], dtype)
    }

    /// Indices from `[H, P, P]` into the flat `[differences, H]`.
    fn places(&self, grid: Grid, heads: usize) -> Result<Tensor> {
        self.places.get(grid, DType::U32, || {
            let (h, w, p) = (grid.height, grid.width, grid.patches());
            let mut places = Vec::with_capacity(heads * p * p);
            for head in 0..heads {
                for (from, to) in (0..p * p).map(|i| (i / p, i % p)) {
                    let (row, column) = (to / w + h - 1 - from / w, to % w + w - 1 - from % w);
                    places.push(((row * (2 * w - 1) + column) * heads + head) as u32);
                }
            }
            Tensor::from_slice(&places, &[places.len()])
        })
    }
}

impl PosEncoding for RelativeBiasBox {
    fn declare(&mut self, params: &mut ParamBuilder, context: PosContext) -> Result<()> {
        let hidden = self.config.hidden;
        // The first layer sees two inputs of unit size: uniform in 1 / sqrt(inputs), PyTorch's default.
        let first = Init::Uniform(std::f64::consts::FRAC_1_SQRT_2);
        let [weight1, bias1] =
            params.scope("fc1", |p| [p.add("weight", &[hidden, 2], first), p.add_plain("bias", &[hidden], first)]);
        let weight2 = params.scope("fc2", |p| p.add("weight", &[context.heads, hidden], Init::TruncatedNormal(0.02)));
        self.network = Some(([weight1, bias1, weight2], context.heads));
        Ok(())
    }

    fn architecture(&self) -> serde_json::Value {
        serde_json::json!({ "log_spaced": self.config.log_spaced, "normalize": self.config.normalize })
    }

    fn draw(&self, rng: &mut Rng) -> Vec<f64> {
        self.config.rescale.map(|rescale| rescale.draw(rng)).into_iter().collect()
    }

    fn draws_per_block(&self) -> bool {
        self.config.draw_per == DrawPer::Block && self.config.rescale.is_some()
    }

    fn tables(
        &self,
        params: &Params<'_>,
        grid: Grid,
        draw: Option<&Tensor>,
        _: usize,
        dtype: DType,
    ) -> Result<PosTables> {
        let (network, heads) = self.network.expect("a backbone declares its position encoding before it uses it");
        let [weight1, bias1, weight2] = network.map(|id| params.get(id));
        let factor = draw.map_or(1.0, |draw| draw.to_f64_vec()[0]);
        let differences = self.differences(grid, factor, params.dtype())?;
        let hidden = differences.linear(&weight1, Some(&bias1))?;
        let biases = Linear::new(&weight2, None).after_gelu().of(&hidden)?;
        let (p, flat) = (grid.patches(), biases.reshape(&[biases.len()])?);
        let bias = flat.gather_rows(&self.places(grid, heads)?)?.reshape(&[heads, p, p])?;
        Ok(PosTables { rotary: None, bias: Some(bias.cast(dtype)?) })
    }
}

plugin!(PosEncoding, "relative_bias_box", RelativeBiasBoxConfig, |config, _: &mut _| {
    Ok(Box::new(RelativeBiasBox::new(config)) as Box<dyn PosEncoding>)
});

#[cfg(test)]
mod tests {
    use super::*;
    use dinolab_core::tensor::Tape;

    fn declared(config: RelativeBiasBoxConfig) -> (Box<dyn PosEncoding>, std::sync::Arc<dinolab_core::params::Layout>) {
        let mut encoding = RelativeBiasBox::new(config);
        let mut params = ParamBuilder::new();
        let grid = Grid { height: 4, width: 4 };
        encoding.declare(&mut params, PosContext { dim: 8, heads: 2, grid }).unwrap();
        (Box::new(encoding), params.finish())
    }

    /// The bias of every (head, from, to) by the formula, without sharing of differences.
    fn by_formula(weights: [&[f64]; 3], grid: Grid, factor: f64) -> Vec<f64> {
        let at = |i: usize, n: usize| 2.0 * (i as f64 + 0.5) / n as f64 - 1.0;
        let spaced = |d: f64| d.signum() * (1.0 + 4.0 * d.abs()).ln() / 9f64.ln();
        let (p, [w1, b1, w2]) = (grid.patches(), weights);
        let mut out = Vec::new();
        for (head, from, to) in (0..2 * p * p).map(|i| (i / p / p, i / p % p, i % p)) {
            let d = [(grid.width, grid.height), (1, grid.width)]
                .map(|(stride, n)| spaced(factor * (at(to / stride % n, n) - at(from / stride % n, n))));
            let hidden = (0..b1.len()).map(|k| {
                let x = w1[2 * k] * d[0] + w1[2 * k + 1] * d[1] + b1[k];
                let x = Tensor::scalar(x, DType::F64).gelu().unwrap().item();
                x * w2[head * b1.len() + k]
            });
            out.push(hidden.sum());
        }
        out
    }

    #[test]
    fn the_bias_is_that_of_the_formula_for_any_grid_and_factor() {
        let config = RelativeBiasBoxConfig { hidden: 5, rescale: Some(Rescale::LogUniform(2.0)), ..Default::default() };
        let (encoding, layout) = declared(config);
        let flat = layout.init(3, DType::F64).unwrap();
        let params = Params::frozen(&layout, &flat);
        let weights: Vec<&[f64]> = layout.specs().iter().map(|s| &flat.as_slice::<f64>()[s.range()]).collect();
        for (grid, factor) in [(Grid { height: 2, width: 3 }, 1.0), (Grid { height: 3, width: 1 }, 1.7)] {
            let tables = encoding
                .tables(&params, grid, Some(&Tensor::from_slice(&[factor], &[1]).unwrap()), 2, DType::F64)
                .unwrap();
            let bias = tables.bias.unwrap();
            assert_eq!(bias.shape(), [2, grid.patches(), grid.patches()]);
            let want = by_formula([weights[0], weights[1], weights[2]], grid, factor);
            for (got, want) in bias.as_slice::<f64>().iter().zip(want) {
                assert!((got - want).abs() < 1e-14, "{got} and {want}");
            }
        }
    }

    #[test]
    fn its_gradient_is_that_of_differences() {
        let (encoding, layout) = declared(RelativeBiasBoxConfig { hidden: 3, ..Default::default() });
        let grid = Grid { height: 2, width: 3 };
        let flat = layout.init(1, DType::F64).unwrap();
        let weight: Vec<f64> = (0..72).map(|i| (i as f64 * 0.7).sin()).collect();
        let weight = Tensor::from_slice(&weight, &[2, 6, 6]).unwrap();
        let loss = |params: &Params<'_>| {
            let bias = encoding.tables(params, grid, None, 2, DType::F64).unwrap().bias.unwrap();
            bias.mul(&weight).unwrap().sum().unwrap()
        };
        let tape = Tape::new();
        let mut grads = Tensor::zeros(&[layout.len()], DType::F64);
        tape.backward(&loss(&Params::tracked(&layout, &flat, &tape)), 1.0, Some(&mut grads)).unwrap();
        for i in layout.specs().iter().flat_map(|s| s.range()) {
            let at = |h: f64| {
                let mut moved = flat.to_owned();
                moved.as_mut_slice::<f64>()[i] += h;
                loss(&Params::frozen(&layout, &moved)).item()
            };
            let (got, want) = (grads.as_slice::<f64>()[i], (at(1e-5) - at(-1e-5)) / 2e-5);
            assert!((got - want).abs() < 1e-8, "element {i}: {got}, differences say {want}");
        }
    }

    #[test]
    fn without_rescale_one_table_serves_all_blocks() {
        let (encoding, _) = declared(RelativeBiasBoxConfig::default());
        assert!(!encoding.draws_per_block());
    }
}
