//! SIGReg of LeJEPA: projections of all crops agree, and are distributed as an isotropic normal.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::params::Params;
use dinolab_core::rng::Rng;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projector::{Projector, ProjectorConfig};

plugin!(Loss, "sigreg", SigReg, SigRegLoss::build);

/// Agreement of the projections of all crops of an image, and the distance of their distribution from a standard normal, along
/// random directions. There is no teacher, no stop-gradient and no schedule.
///
/// With projections z of crop v and image i, their mean m_i over the global crops of an image, unit directions a, and the
/// empirical characteristic function `f_va(t) = mean_i exp(i t a.z_vi)`:
///
/// ```text
/// agreement = mean over v, i and dimensions of (z_vi - m_i)^2
/// sigreg    = mean over v and a of  N integral |f_va(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,  t from -5 to 5
/// loss      = (1 - regularization) agreement + regularization sigreg
/// ```
///
/// (Balestriero and LeCun, "LeJEPA", arXiv:2511.08544, algorithms 1 and 2: the Epps-Pulley statistic by the trapezoidal rule
/// at 17 points.) Directions are drawn anew every step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SigReg {
    /// The projector.
    pub projector: ProjectorConfig,
    /// Random directions of a step.
    #[schemars(range(min = 1, max = 1_000_000), extend("x-width" = true))]
    pub directions: usize,
    /// Weight of the distance from the normal distribution (the paper's lambda).
    #[schemars(range(min = 0, max = 1))]
    pub regularization: f64,
}

impl Default for SigReg {
    fn default() -> Self {
        let projector = ProjectorConfig { hidden: 2048, output: 64, layers: 3 };
        Self { projector, directions: 256, regularization: 0.05 }
    }
}

/// The end of the integral.
pub(crate) const END: f64 = 5.0;
/// Points of the integral over [-END, END].
pub(crate) const POINTS: usize = 17;

#[derive(Debug)]
struct SigRegLoss {
    config: SigReg,
    projector: Projector,
}

impl SigRegLoss {
    fn build(config: SigReg, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let projector = Projector::declare(context.params, "projector", context.dim, &config.projector);
        Ok(Box::new(Self { config, projector }))
    }

    /// The Epps-Pulley statistic of the rows of `z` along `directions` `[A, D]`, the mean over directions.
    fn distance(z: &Tensor, directions: &Tensor) -> Result<Tensor> {
        let along = z.matmul_t(directions)?;
        let step = 2.0 * END / (POINTS - 1) as f64;
        // The integrand is even, and 0 at t = 0, where every characteristic function is 1.
        let mut sum: Option<Tensor> = None;
        for i in 1..=POINTS / 2 {
            let t = step * i as f64;
            let normal = (-t * t / 2.0).exp();
            let angles = along.scale(t)?;
            let real = angles.cos()?.mean_axis(0)?.shift(-normal)?.square()?;
            let error = real.add(&angles.sin()?.mean_axis(0)?.square()?)?.mean()?;
            // Both signs of t; the ends count half.
            let weight = if i == POINTS / 2 { 1.0 } else { 2.0 };
            let term = error.scale(weight * normal * step * z.dim(0) as f64)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        Ok(sum.expect("there are points"))
    }
}

impl Loss for SigRegLoss {
    fn needs(&self) -> Needs {
        Needs { teacher: false, whole_batch: true, min_batch: 2, ..Needs::default() }
    }

    /// Unit vectors, `[directions, output]`.
    fn draw(&self, rng: &mut Rng) -> Vec<f64> {
        let direction = |_| {
            let drawn: Vec<f64> = (0..self.config.projector.output).map(|_| rng.normal()).collect();
            let length = drawn.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            drawn.into_iter().map(|x| x / length).collect::<Vec<_>>()
        };
        (0..self.config.directions).flat_map(direction).collect()
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let z = self.projector.forward(params, &out.student.all_cls()?)?.cast(context.dtype)?;
        let directions = out.draws.expect("`draw` gives directions").cast(context.dtype)?;
        let directions = directions.reshape(&[self.config.directions, self.config.projector.output])?;
        let crops = out.globals + out.locals;
        let of_crop = |crop: usize| z.narrow(crop * out.images, out.images);
        let mut centre = of_crop(0)?;
        for crop in 1..out.globals {
            centre = centre.add(&of_crop(crop)?)?;
        }
        let centre = centre.scale(1.0 / out.globals as f64)?;
        let agreement = z.sub(&Tensor::cat(&vec![&centre; crops])?)?.square()?.mean()?;
        let mut sigreg = Self::distance(&of_crop(0)?, &directions)?;
        for crop in 1..crops {
            sigreg = sigreg.add(&Self::distance(&of_crop(crop)?, &directions)?)?;
        }
        let sigreg = sigreg.scale(1.0 / crops as f64)?;
        let parts = vec![("agreement", agreement.detach()), ("sigreg", sigreg.detach())];
        let weight = self.config.regularization;
        let loss = agreement.scale(1.0 - weight)?.add(&sigreg.scale(weight)?)?;
        Ok(LossValue::of(loss).with_parts(parts))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let crops = rows.globals + rows.locals;
        let own = self.projector.cost(crops, 0.0);
        let (width, directions) = (self.config.projector.output as f64, self.config.directions as f64);
        LossCost {
            forward_flops: own.forward_flops + 2.0 * crops * width * directions,
            // Angles, cosines and sines at every point, with what their derivatives need.
            activations: own.activations + crops * directions * 5.0 * (POINTS / 2) as f64,
            ..own
        }
    }
}
