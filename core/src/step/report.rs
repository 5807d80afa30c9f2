//! What a step tells of itself.

use std::collections::BTreeMap;

use super::Health;

/// What one step gave.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// `loss/total`, `loss/<name>` (unweighted), `loss/<name>/<part>`; the mean over micro-batches.
    pub losses: BTreeMap<String, f64>,
    /// L2 norm of every sub-model's gradient before clipping, by sub-model.
    pub grad_norms: BTreeMap<String, f64>,
    /// Learning rate and weight decay of this step.
    pub lr: f64,
    /// Weight decay of this step.
    pub weight_decay: f64,
    /// Known ways in which features and targets degenerate, measured when asked for.
    pub health: Option<Health>,
    /// What was not finite, if anything: then no weight, no moment and no state was changed.
    pub non_finite: Option<String>,
    /// What the total loss jumped above, if it did: then nothing was changed either.
    pub spike: Option<f64>,
}

impl Report {
    /// Every number by the name that logs have for it.
    pub fn numbers(&self) -> Vec<(String, f64)> {
        let mut numbers: Vec<(String, f64)> = self.losses.iter().map(|(k, v)| (logged_as(k), *v)).collect();
        numbers.push(("lr".into(), self.lr));
        numbers.push(("weight_decay".into(), self.weight_decay));
        numbers.extend(self.grad_norms.iter().map(|(m, v)| (format!("grad_norm/{m}"), *v)));
        if let Some(health) = &self.health {
            numbers.push(("health/feature_std".into(), health.feature_std));
            numbers.push(("health/effective_rank".into(), health.effective_rank));
            numbers.push(("health/cls_patch_cosine".into(), health.cls_patch_cosine));
            for (loss, marginal, sharpness) in &health.targets {
                numbers.push((format!("health/{loss}/marginal_entropy"), *marginal));
                numbers.push((format!("health/{loss}/target_entropy"), *sharpness));
            }
        }
        numbers
    }
}

/// The name under which a part of a loss is logged: `health/<loss>/<what>` if the loss calls it `health/<what>`.
fn logged_as(name: &str) -> String {
    let health = name.strip_prefix("loss/").and_then(|rest| rest.split_once("/health/"));
    health.map_or_else(|| name.into(), |(loss, what)| format!("health/{loss}/{what}"))
}
