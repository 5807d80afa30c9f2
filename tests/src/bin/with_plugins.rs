//! The program with plugins of a researcher's own: a backbone, losses and a dataset, in one file that dinolab does not
//! know. The tests of the command line run it.

use dinolab_core::contract::{
    Backbone, BackboneContext, Cost, Crops, Dataset, Features, Grid, Loss, LossValue, Mode, Needs, Outputs, Sample,
    StepContext,
};
use dinolab_core::dfdx::prelude::{MeanTo as _, Trace as _};
use dinolab_core::dfdx_loss::{on_the_host, DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::params::{Init, Params};
use dinolab_core::{plugin, Result, Tensor};
use serde::{Deserialize, Serialize};

/// One matrix over patches.
///
/// For tests.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToyMatrix {
    /// Width of the features.
    dim: usize,
    /// Side of a patch in pixels.
    #[serde(default = "sixteen")]
    patch_size: usize,
}

fn sixteen() -> usize {
    16
}

impl ToyMatrix {
    fn build(self, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        context.params.add("weight", &[self.dim, 3 * self.patch_size * self.patch_size], Init::Zeros);
        Ok(Box::new(self))
    }
}

impl Backbone for ToyMatrix {
    fn dim(&self) -> usize {
        self.dim
    }
    fn patch_size(&self) -> usize {
        self.patch_size
    }
    fn forward(&self, _: &Params<'_>, _: &[Crops], _: Mode<'_>) -> Result<Vec<Features>> {
        Ok(Vec::new())
    }
    fn cost(&self, crops: &[(usize, Grid)]) -> Cost {
        let patches: usize = crops.iter().map(|(n, grid)| n * grid.patches()).sum();
        Cost { forward_flops: 1e6 * patches as f64, activations: patches as f64, ..Cost::default() }
    }
}

plugin!(Backbone, "toy_matrix", ToyMatrix, ToyMatrix::build);

/// Nothing.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToyLoss {
    /// Softness.
    #[serde(default)]
    temperature: f64,
}

impl Loss for ToyLoss {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn compute(&self, _: &Params<'_>, _: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        Ok(LossValue::of(Tensor::scalar(self.temperature, context.dtype)))
    }
}

plugin!(Loss, "toy_loss", ToyLoss);

/// Infinite at one step.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToySpike {
    /// The step.
    #[serde(default = "late")]
    at_step: u64,
}

fn late() -> u64 {
    1_000_000
}

impl Loss for ToySpike {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn compute(&self, _: &Params<'_>, outputs: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let factor = if context.at.step == self.at_step { f64::INFINITY } else { 1e-3 };
        outputs.student.cls.square()?.mean()?.scale(factor).map(LossValue::of)
    }
}

plugin!(Loss, "toy_spike", ToySpike);

/// Squared distance of student and teacher CLS, of operations.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToyDistance {}

impl Loss for ToyDistance {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        out.student.cls.sub(out.teacher.cls)?.square()?.mean().map(LossValue::of)
    }
}

plugin!(Loss, "toy_distance", ToyDistance);

/// The same in dfdx only.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToyDistanceDfdx {}

impl DfdxLoss for ToyDistanceDfdx {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        Ok((out.student_cls.leaky_trace() - out.teacher_cls.clone()).square().mean())
    }
}

plugin!(Loss, "toy_distance_dfdx", ToyDistanceDfdx, on_the_host);

/// Grey pixels.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ToyGreys {}

impl Dataset for ToyGreys {
    fn len(&self) -> usize {
        1
    }
    fn get(&self, _: usize) -> Result<Sample> {
        Ok(Sample { width: 64, height: 64, pixels: vec![0u8; 3 * 64 * 64].into(), ..Sample::default() })
    }
}

plugin!(Dataset, "toy_greys", ToyGreys);

fn main() -> std::process::ExitCode {
    dinolab::cli::main()
}
