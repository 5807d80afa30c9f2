//! Rules by which a run of a suite ends before its steps are done: it diverged, or is so far off that the rest of it would be
//! wasted.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::plan::{Event, Plan, PlannedRun};
use super::record::{RunResult, Status};

/// How the error of a run begins that was dropped by a rule.
pub const DROPPED: &str = "dropped";

/// What it says of a rule that drops an arm.
const WITH_ARM: &str = ", and its arm with it";

/// A rule: `[[drop]]` of a suite. It holds from step `after` on, of every value that a step or a probe gives. Without a
/// bound it drops what is not a finite number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DropRule {
    /// The name of the value, such as `loss/total` or `probe/knn/top1`.
    #[serde(default = "total")]
    pub metric: String,
    /// A run ends with a value above this.
    #[serde(default)]
    pub above: Option<f64>,
    /// A run ends with a value below this.
    #[serde(default)]
    pub below: Option<f64>,
    /// Steps before which the rule does not hold.
    #[serde(default)]
    pub after: u64,
    /// Whether the other seeds of the arm are dropped too, whether they are finished or not.
    #[serde(default)]
    pub arm: bool,
}

fn total() -> String {
    "loss/total".into()
}

impl DropRule {
    /// What is wrong with its bounds, and what to do.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let name = &self.metric;
        if let Some(bound) = [self.above, self.below].into_iter().flatten().find(|bound| !bound.is_finite()) {
            let help = "name a number; without a bound a rule drops what is not finite".to_string();
            return Err((format!("a rule of [[drop]] bounds `{name}` by {bound}"), help));
        }
        match (self.above, self.below) {
            (Some(above), Some(below)) if above < below => {
                let problem = format!("a rule of [[drop]] drops every `{name}`: it is above {above} or below {below}");
                Err((problem, "let `below` be at most `above`".into()))
            }
            _ => Ok(()),
        }
    }

    /// Why a run is dropped that has these values after `step` steps.
    fn judge(&self, step: u64, values: &BTreeMap<String, f64>) -> Option<String> {
        let value = *values.get(&self.metric).filter(|_| step >= self.after)?;
        let why = match (self.above, self.below) {
            _ if !value.is_finite() => "is not finite".to_string(),
            (Some(bound), _) if value > bound => format!("is above {bound}"),
            (_, Some(bound)) if value < bound => format!("is below {bound}"),
            _ => return None,
        };
        let arm = if self.arm { WITH_ARM } else { "" };
        Some(format!("{DROPPED} after step {step}{arm}: {} = {value:.4} {why}", self.metric))
    }
}

/// Why what happens in a run drops it, if it does.
pub(super) fn judge(rules: &[DropRule], event: &Event<'_>) -> Option<String> {
    let (Event::Step { step, values, .. } | Event::Probed { step, values }) = event else { return None };
    rules.iter().find_map(|rule| rule.judge(*step, values))
}

/// Why a run that did all its steps is dropped, if it is: by its last values.
pub(super) fn judge_end(rules: &[DropRule], result: &RunResult) -> Option<String> {
    let values = result.metrics.iter().map(|(name, value)| (name.clone(), value.unwrap_or(f64::NAN))).collect();
    rules.iter().find_map(|rule| rule.judge(result.steps, &values))
}

/// Why a run is dropped with its arm: another seed of it was.
///
/// # Errors
/// If a run's folder has files that cannot be understood.
pub(super) fn with_its_arm(plan: &Plan, run: &PlannedRun) -> dinolab_core::Result<Option<String>> {
    if !plan.suite.drop.iter().any(|rule| rule.arm) {
        return Ok(None);
    }
    for other in plan.runs.iter().filter(|other| other.arm == run.arm && other.seed != run.seed) {
        if was_dropped_with_its_arm(&plan.out.join(&other.dir))? {
            return Ok(Some(with(other)));
        }
    }
    Ok(None)
}

/// Whether a run that ended with `error` was dropped by a rule that drops its arm.
fn drops_its_arm(error: &str) -> bool {
    error.starts_with(DROPPED) && error.contains(WITH_ARM)
}

/// Why a run is dropped with `first`.
pub(super) fn with(first: &PlannedRun) -> String {
    format!("{DROPPED} with its arm: see {}", first.label())
}

/// The other seeds that are dropped with a run that ended with `error`.
pub(super) fn of_its_arm<'a>(plan: &'a Plan, run: &'a PlannedRun, error: &str) -> impl Iterator<Item = &'a PlannedRun> {
    let drops = drops_its_arm(error);
    plan.runs.iter().filter(move |other| drops && other.arm == run.arm && other.seed != run.seed)
}

fn was_dropped_with_its_arm(dir: &Path) -> dinolab_core::Result<bool> {
    let status = Status::of(dir)?;
    Ok(matches!(status, Status::Failed(error) if drops_its_arm(&error)))
}
