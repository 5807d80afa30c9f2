//! Position encoding `rope_box`: axial rotary embedding over coordinates in a box.

use std::f64::consts::TAU;

use dinolab_core::contract::{Grid, PosContext, PosEncoding, PosTables};
use dinolab_core::cuda::args;
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::rng::Rng;
use dinolab_core::{cuda_source, plugin, DType, Error, Result, Tensor};
use half::bf16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::box_coords::{axes, ByGrid, DrawPer, Normalize, Rescale};

/// Axial rotary embedding over patch centres in a box [-1, 1], with DINOv3's training-time shift, jitter and rescale
/// (arXiv:2508.10104, section 3.2).
///
/// A head of width D has D/4 periods for each axis. The angle of patch p, axis a and period j is
/// `2 pi coord[p, a] / period[j]`; a row of the tables is (height angles, width angles) twice, for the half-split rotation
/// `x cos + rotate_half(x) sin`. In training coordinates are shifted, then multiplied per axis (jitter), then
/// multiplied together (rescale).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RopeBoxConfig {
    /// Wavelengths, in units of the box: `{ base = 100.0 }` or `{ range = [min, max] }`.
    pub periods: Periods,
    /// What the box means for a grid that is not square.
    pub normalize: Normalize,
    /// In training, added to each axis: uniform in [-shift, shift].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub shift: Option<f64>,
    /// In training, multiplied with each axis: log-uniform in [1/jitter, jitter].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub jitter: Option<f64>,
    /// In training, multiplied with both axes: a number s for log-uniform in [1/s, s] (2 is the paper's [0.5, 2]), or
    /// `{ uniform = [a, b] }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rescale: Option<Rescale>,
    /// How often shift, jitter and rescale are drawn anew.
    pub draw_per: DrawPer,
    /// Arithmetic of the tables. `bf16` rounds after every operation, as the reference's training code does (its model
    /// builder ignores the key that should choose); the rotation itself stays in the model's precision.
    pub dtype: TableType,
}

impl Default for RopeBoxConfig {
    fn default() -> Self {
        Self {
            periods: Periods::Base(100.0),
            normalize: Normalize::Separate,
            shift: None,
            jitter: None,
            rescale: None,
            draw_per: DrawPer::Block,
            dtype: TableType::F32,
        }
    }
}

/// The wavelengths of a rotary embedding; `j` counts the D/4 periods of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Periods {
    /// `base^(2 j / (D/2))`: from 1 to almost `base`.
    Base(#[schemars(range(min = 0.000_001, max = 1_000_000_000))] f64),
    /// Geometric from `min` to `max`, both included: `max (max/min)^(j / (D/4 - 1)) / (max/min)`.
    Range(#[schemars(inner(range(min = 0.000_001, max = 1_000_000_000)), extend("x-ascending" = true))] [f64; 2]),
}

/// Arithmetic of the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TableType {
    /// Computed in 64 bits, rounded once to the model's precision.
    #[default]
    F32,
    /// Rounded to bfloat16 after every operation.
    Bf16,
}

impl TableType {
    fn round(self, x: f64) -> f64 {
        match self {
            Self::F32 => x,
            // By way of f32, in which PyTorch computes a bf16 operation.
            Self::Bf16 => bf16::from_f32(x as f32).to_f64(),
        }
    }
}

cuda_source! { static ROPE_BOX = "rope_box" { include_str!("rope_box.cu") } }

/// The numbers that an augmentation applies, in the order in which they are drawn and applied:
/// `[shift_h, shift_w, jitter_h, jitter_w, rescale]`.
const NEUTRAL: [f64; 5] = [0.0, 0.0, 1.0, 1.0, 1.0];

/// The plugin `rope_box`.
#[derive(Debug)]
pub struct RopeBox {
    config: RopeBoxConfig,
    /// Width D of a head; 0 until declared.
    head_dim: usize,
    /// Evaluation tables: every block asks for the same few.
    evaluation: ByGrid<PosTables>,
}

impl RopeBox {
    /// From a config whose numbers are in their ranges.
    pub fn new(config: RopeBoxConfig) -> Self {
        Self { config, head_dim: 0, evaluation: ByGrid::default() }
    }

    /// The `head_dim / 4` wavelengths of an axis.
    pub fn periods(&self, head_dim: usize) -> Vec<f64> {
        let n = head_dim / 4;
        let round = |x| self.config.dtype.round(x);
        let period = |j: usize| match self.config.periods {
            Periods::Base(base) => round(base.powf(round(2.0 * j as f64 / (head_dim / 2) as f64))),
            Periods::Range([min, max]) => {
                let exponent = round(j as f64 / (n - 1).max(1) as f64);
                round(round(round((max / min).powf(exponent)) / (max / min)) * max)
            }
        };
        (0..n).map(period).collect()
    }

    fn augments(&self) -> bool {
        self.config.shift.is_some() || self.config.jitter.is_some() || self.config.rescale.is_some()
    }

    /// Tables for coordinates augmented by `draw`.
    fn compute(&self, grid: Grid, draw: &[f64; 5], dtype: DType) -> Result<PosTables> {
        let round = |x| self.config.dtype.round(x);
        let [shift, jitter, rescale] = [&draw[..2], &draw[2..4], &draw[4..]];
        let periods = self.periods(self.head_dim);
        // The angles of an axis depend on the row or on the column alone: `(sin, cos)` for every position and period.
        let waves = |axis: usize, coords: &[f64]| -> Vec<(f64, f64)> {
            let augment =
                |c: f64| round(round(round(c + round(shift[axis])) * round(jitter[axis])) * round(rescale[0]));
            let angles = coords.iter().flat_map(|&c| {
                let turn = round(TAU * augment(c));
                periods.iter().map(move |period| round(turn / period))
            });
            angles.map(|a| (round(a.sin()), round(a.cos()))).collect()
        };
        let [rows, columns] = axes(grid, self.config.normalize, round);
        let (rows, columns) = (waves(0, &rows), waves(1, &columns));
        let n = periods.len();
        let (mut sin, mut cos) = (Vec::new(), Vec::new());
        for (row, column) in rows.chunks(n).flat_map(|row| columns.chunks(n).map(move |column| (row, column))) {
            let half = || row.iter().chain(column);
            sin.extend(half().chain(half()).map(|w| w.0));
            cos.extend(half().chain(half()).map(|w| w.1));
        }
        let shape = [grid.patches(), self.head_dim];
        let rotary = (Tensor::from_f64(&sin, &shape, dtype)?, Tensor::from_f64(&cos, &shape, dtype)?);
        Ok(PosTables { rotary: Some(rotary), bias: None })
    }
}

impl RopeBox {
    /// Tables for a draw on a GPU, computed there.
    fn compute_on(&self, grid: Grid, draw: &Tensor, dtype: DType) -> Result<PosTables> {
        let gpu = draw.gpu().expect("called for a draw on a GPU");
        let round = |x| self.config.dtype.round(x);
        let list = |x: Vec<f64>| Tensor::from_slice(&x, &[x.len()]);
        let [rows, columns] = axes(grid, self.config.normalize, round);
        let (rows, columns, periods) = (list(rows)?, list(columns)?, list(self.periods(self.head_dim))?);
        let shape = [grid.patches(), self.head_dim];
        let (mut sin, mut cos) = (Tensor::uninit(&shape, dtype), Tensor::uninit(&shape, dtype));
        let (width, n, narrow) = (grid.width as i32, periods.len() as i32, self.config.dtype == TableType::Bf16);
        let count = (grid.patches() * 2 * periods.len()) as i32;
        gpu.kernel(&ROPE_BOX, "rope_box", dtype)?.over(count as usize).launch(args![
            &mut sin,
            &mut cos,
            &rows,
            &columns,
            &periods,
            draw,
            width,
            n,
            i32::from(narrow),
            count
        ])?;
        Ok(PosTables { rotary: Some((sin, cos)), bias: None })
    }
}

impl PosEncoding for RopeBox {
    fn declare(&mut self, _: &mut ParamBuilder, context: PosContext) -> Result<()> {
        let (dim, heads) = (context.dim, context.heads);
        if dim % (4 * heads) != 0 {
            return Err(Error::user(
                format!("position encoding `rope_box`: {dim} channels in {heads} heads are not a multiple of 4 a head"),
                "each head needs pairs of channels for both axes: change `dim` or `heads` of the backbone",
            ));
        }
        self.head_dim = dim / heads;
        Ok(())
    }

    fn architecture(&self) -> serde_json::Value {
        serde_json::json!({ "periods": self.config.periods, "normalize": self.config.normalize })
    }

    fn draw(&self, rng: &mut Rng) -> Vec<f64> {
        if !self.augments() {
            return Vec::new();
        }
        let mut draw = NEUTRAL;
        if let Some(shift) = self.config.shift {
            draw[..2].fill_with(|| rng.uniform(-shift, shift));
        }
        if let Some(jitter) = self.config.jitter {
            draw[2..4].fill_with(|| rng.log_uniform(1.0 / jitter, jitter));
        }
        if let Some(rescale) = self.config.rescale {
            draw[4] = rescale.draw(rng);
        }
        draw.to_vec()
    }

    fn draws_per_block(&self) -> bool {
        self.config.draw_per == DrawPer::Block && self.augments()
    }

    fn tables(&self, _: &Params<'_>, grid: Grid, draw: Option<&Tensor>, _: usize, dtype: DType) -> Result<PosTables> {
        match draw {
            Some(draw) if draw.shape() != [5] || draw.dtype() != DType::F64 => {
                Err(Error::shape("rope_box", format!("a draw is 5 numbers in f64, not {draw:?}")))
            }
            Some(draw) if draw.gpu().is_some() => self.compute_on(grid, draw, dtype),
            Some(draw) => self.compute(grid, draw.as_slice().try_into().expect("checked just above"), dtype),
            None => self.evaluation.get(grid, dtype, || self.compute(grid, &NEUTRAL, dtype)),
        }
    }
}

plugin!(PosEncoding, "rope_box", RopeBoxConfig, |config: RopeBoxConfig, _: &mut _| {
    Ok(Box::new(RopeBox::new(config)) as Box<dyn PosEncoding>)
});
