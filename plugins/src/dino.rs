//! The image-level loss of DINO: every student crop predicts what the teacher says of another crop of the same image.

use dinolab_core::contract::{
    Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, Needs, Outputs, Schedule, StateSpec, StepContext,
    TargetSpec, Targets,
};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projection_head::{Head, HeadConfig};
use crate::teacher_targets::{Centered, Centering};

plugin!(Loss, "dino", Dino, DinoLoss::build);

/// Cross-entropy between the student's and the teacher's class-token assignments to prototypes.
///
/// With student crops s, teacher (global) crops t, softmax p at temperature tau and targets q:
///
/// ```text
/// global = mean over s != t, images of  -sum_k q_tk log p_sk     (s global)
/// local  = mean over s, t, images of    -sum_k q_tk log p_sk     (s local)
/// loss   = (n_g global + local_weight n_l local) / (n_g + n_l)
/// ```
///
/// n_g and n_l are the numbers of terms: 2 and 2 L for two global and L local crops (Caron et al., arXiv:2104.14294,
/// with the term scaling of the DINOv2 and DINOv3 code).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Dino {
    /// The projection head `dino_head`.
    pub head: HeadConfig,
    /// Temperature tau of the student's softmax.
    #[schemars(range(min = 0.001, max = 100))]
    pub student_temp: f64,
    /// Temperature of the teacher's targets.
    #[schemars(extend("minimum" = 0.001, "maximum" = 100))]
    pub teacher_temp: Schedule,
    /// How teacher logits become targets.
    pub centering: Centering,
    /// Sinkhorn-Knopp iterations.
    #[schemars(range(min = 1, max = 1000), extend("x-with" = { "centering": "sinkhorn_knopp" }))]
    pub sinkhorn_iterations: usize,
    /// Momentum of the centre (softmax centring).
    #[schemars(range(min = 0, max = 1), extend("x-with" = { "centering": "softmax" }))]
    pub center_momentum: f64,
    /// What the local part is multiplied by, after the scaling by terms. DINOv3's Gram stage goes from 1 to 0.5.
    #[schemars(extend("minimum" = 0, "maximum" = 1_000_000))]
    pub local_weight: Schedule,
    /// Leave out the pairs of a global crop with itself.
    pub ignore_diagonal: bool,
}

impl Default for Dino {
    fn default() -> Self {
        Self {
            head: HeadConfig::default(),
            student_temp: 0.1,
            teacher_temp: Schedule::constant(0.07),
            centering: Centering::default(),
            sinkhorn_iterations: 3,
            center_momentum: 0.9,
            local_weight: Schedule::constant(1.0),
            ignore_diagonal: true,
        }
    }
}

/// The loss, with its head.
#[derive(Debug)]
struct DinoLoss {
    config: Dino,
    head: Head,
}

impl DinoLoss {
    fn build(config: Dino, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let head = Head::declare(context.params, context.dim, &config.head);
        Ok(Box::new(Self { config, head }))
    }

    fn centered(&self) -> Centered<'_> {
        Centered {
            centering: self.config.centering,
            iterations: self.config.sinkhorn_iterations,
            center_momentum: self.config.center_momentum,
            temperature: &self.config.teacher_temp,
        }
    }

    /// Mean cross-entropy over pairs (student crop, teacher crop) and images. `logits` are `[crops * B, K]`.
    fn pairs(&self, logits: &Tensor, targets: &Tensor, pairs: &[(usize, usize)], images: usize) -> Result<Tensor> {
        let crops = logits.dim(0) / images;
        let (mut student, mut teacher) = (Vec::new(), Vec::new());
        for row in 0..crops * images {
            let (crop, image) = (row / images, row % images);
            for &(_, t) in pairs.iter().filter(|(s, _)| *s == crop) {
                student.push(row as u32);
                teacher.push((t * images + image) as u32);
            }
        }
        let n = student.len();
        let weights = Tensor::full(&[n], logits.dtype().wide(), 1.0 / n as f64)?;
        let (student, teacher) = (Tensor::from_slice(&student, &[n])?, Tensor::from_slice(&teacher, &[n])?);
        logits.soft_cross_entropy(targets, &student, &teacher, &weights, self.config.student_temp)
    }
}

impl Loss for DinoLoss {
    fn needs(&self) -> Needs {
        let targets = Some(TargetSpec { width: self.config.head.prototypes, distribution: true, features: false });
        Needs { targets, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn state(&self) -> Vec<StateSpec> {
        self.centered().state(self.config.head.prototypes)
    }

    fn project(&self, params: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        self.head.forward(params, &outputs.all_cls()?)
    }

    fn targets(&self, logits: &Tensor, context: &StepContext<'_>) -> Result<Targets> {
        self.centered().compute(logits, context)
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.project(params, &out.student)?;
        let targets = out.targets.expect("`needs` asks for targets");
        let (g, l, b) = (out.globals, out.locals, out.images);
        let all = |students: usize| (0..students).flat_map(move |s| (0..g).map(move |t| (s, t)));
        let global_pairs: Vec<_> = all(g).filter(|(s, t)| !self.config.ignore_diagonal || s != t).collect();
        let local_pairs: Vec<_> = all(l).collect();
        let terms = (global_pairs.len() + local_pairs.len()) as f64;
        let global = self.pairs(&logits.narrow(0, g * b)?, targets, &global_pairs, b)?;
        let mut parts = vec![("global", global.detach())];
        let mut loss = global.scale(global_pairs.len() as f64 / terms)?;
        if l > 0 {
            let local = self.pairs(&logits.narrow(g * b, l * b)?, targets, &local_pairs, b)?;
            parts.push(("local", local.detach()));
            let local = local.scale(local_pairs.len() as f64 / terms)?;
            loss = loss.add(&local.mul(&context.scalar(&self.config.local_weight))?)?;
        }
        Ok(LossValue::of(loss).with_parts(parts))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        self.head.cost(rows.globals + rows.locals, rows.globals)
    }
}
