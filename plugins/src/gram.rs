//! Gram anchoring: the similarities between a crop's patches stay those of an earlier teacher.

use dinolab_core::contract::{Loss, LossValue, Needs, Outputs, StepContext};
use dinolab_core::ops::{NegativeRemoval, SimilarityOptions};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "gram", Gram);

/// Which patches are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tokens {
    /// All patches.
    #[default]
    All,
    /// Patches that were masked for the student, over the whole micro-batch.
    Masked,
    /// Patches that the student saw, over the whole micro-batch.
    Unmasked,
}

/// Negative similarities that are set to zero before comparing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RemoveNegative {
    /// None.
    #[default]
    None,
    /// The student's and the teacher's.
    Both,
    /// The teacher's only.
    Teacher,
}

/// Mean squared difference between the Gram matrices of student and Gram-teacher patches: `|X_S X_S^T - X_G X_G^T|^2`
/// over its number of entries.
///
/// X are the L2-normalised patch features of a crop; the student's come from the masked forward, the teacher's from
/// larger crops, resized to the student's grid (Siméoni et al., "DINOv3", section 4, equation 2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gram {
    /// L2-normalise the features first.
    pub normalize: bool,
    /// Compare patches within a crop; otherwise all patches of the micro-batch with each other.
    pub image_level: bool,
    /// Negative similarities that are set to zero first.
    pub remove_negative: RemoveNegative,
    /// Which patches are compared. Masked and unmasked are compared over the whole micro-batch.
    pub tokens: Tokens,
    /// Log the loss on masked and on unmasked patches beside it.
    pub log_parts: bool,
    /// Log, as `health/<loss>/drift`, how far the targets are from the targets that the current EMA teacher would give: the
    /// same mean squared difference, between the Gram matrices of the two teachers. It grows between refreshes and shows how
    /// much a refresh changes the targets.
    pub log_drift: bool,
    /// The teacher with which the student is compared: the name of its table, `[teachers.<name>]`.
    pub teacher: String,
}

impl Default for Gram {
    fn default() -> Self {
        Self {
            normalize: true,
            image_level: true,
            remove_negative: RemoveNegative::None,
            tokens: Tokens::All,
            log_parts: false,
            log_drift: false,
            teacher: "gram".into(),
        }
    }
}

impl Gram {
    /// The loss over the patches with these flat indices in `[G*B*P]`, batch level; 0 over none, as of a micro-batch without masks.
    fn over(&self, student: &Tensor, teacher: &Tensor, rows: &Tensor) -> Result<Tensor> {
        if rows.is_empty() {
            return student.mean()?.scale(0.0);
        }
        let flat = |x: &Tensor| x.reshape(&[x.dim(0) * x.dim(1), x.dim(2)])?.gather_rows(rows);
        flat(student)?.similarity_distance(&flat(teacher)?, self.options(false))
    }

    fn options(&self, image_level: bool) -> SimilarityOptions {
        let remove = match self.remove_negative {
            RemoveNegative::None => NegativeRemoval::None,
            RemoveNegative::Both => NegativeRemoval::Both,
            RemoveNegative::Teacher => NegativeRemoval::Teacher,
        };
        SimilarityOptions { normalize: self.normalize, image_level, remove }
    }
}

impl Loss for Gram {
    fn needs(&self) -> Needs {
        let masks = self.log_parts || self.tokens != Tokens::All;
        let teachers = vec![self.teacher.clone()];
        Needs { locals: false, teachers, masks, teacher: self.log_drift, min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        let student = out.student.patches;
        let teacher = &out.teacher(&self.teacher)?.patches;
        let loss = match self.tokens {
            Tokens::All => student.similarity_distance(teacher, self.options(self.image_level))?,
            Tokens::Masked => self.over(student, teacher, out.student.mask_indices)?,
            Tokens::Unmasked => self.over(student, teacher, out.unmasked_indices)?,
        };
        let mut parts = Vec::new();
        if self.log_parts {
            let student = student.detach();
            parts.push(("masked", self.over(&student, teacher, out.student.mask_indices)?));
            parts.push(("unmasked", self.over(&student, teacher, out.unmasked_indices)?));
        }
        if self.log_drift {
            let now = out.teacher.patches.detach();
            parts.push(("health/drift", now.similarity_distance(teacher, self.options(self.image_level))?));
        }
        Ok(LossValue::of(loss).with_parts(parts))
    }
}
