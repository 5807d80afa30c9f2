//! Feature distillation: cosines of rows.

use dfdx::prelude::{HasShape as _, SumTo as _, Trace as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{linear, unit_rows, DfdxLoss, DfdxOutputs, Matrix, Scalar};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::feature_distillation::FeatureDistillation;

loss_oracle!("feature_distillation", FeatureDistillation);

impl DfdxLoss for FeatureDistillation {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let term = |student: &Matrix, teacher: &Matrix, scope: &str, weight: f64| {
            let rows = student.shape().0;
            let predicted = unit_rows(linear(student.leaky_trace(), &out.params, scope));
            let cosines = (predicted * unit_rows(teacher.leaky_trace())).sum::<(), _>();
            (-cosines / rows as f64 + 1.0) * weight
        };
        let cls = term(&out.student_cls, &out.teacher_cls, "cls.", self.cls_weight);
        Ok(cls + term(&out.student_patches, &out.teacher_patches, "patches.", self.patch_weight))
    }
}
