//! Which numbers of a run follow another curve when the run has another length.

use std::fmt;

use super::Resolved;
use crate::contract::{At, Schedule};
use crate::recipe::describe;

/// A schedule that depends on the length of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Seam {
    /// Its dotted key.
    pub key: String,
    /// Steps after which the length changes.
    pub done: u64,
    /// The value of the last of these steps, in a run of the one length.
    pub was: f64,
    /// The value of the same step in a run of the other length.
    pub would_be: f64,
    /// The value of the step that follows, in a run of the other length.
    pub next: f64,
}

impl fmt::Display for Seam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, done, was, would_be, next } = self;
        let [was, would_be, next] =
            [was, would_be, next].map(|x| if *x == 0.0 { "0".into() } else { format!("{x:.3e}") });
        write!(
            f,
            "{key} depends on the length of the run: it was {was} in step {done}, where a run of the new length from the \
             start has {would_be}, and goes on at {next}"
        )
    }
}

impl Resolved {
    /// The keys of schedules whose first steps change when the run is made longer or shorter.
    pub fn depends_on_length(&self) -> Vec<String> {
        let total = self.recipe.steps;
        self.moving().filter(|(_, s)| differ(s, total, total.saturating_mul(2), total)).map(|(key, _)| key).collect()
    }

    /// Where the first `done` steps of this run, in a run of `total` steps, followed another curve than in this recipe's
    /// number of steps. Without any, the run that goes on equals one of this recipe from the start, to the bit.
    pub fn seams(&self, total: u64, done: u64) -> Vec<Seam> {
        let now = self.recipe.steps;
        let seam = |(key, schedule): (String, Schedule)| {
            let last = done.checked_sub(1).filter(|_| differ(&schedule, total, now, done))?;
            let value = |step, total| schedule.at(At { step, total });
            Some(Seam { key, done, was: value(last, total), would_be: value(last, now), next: value(done, now) })
        };
        self.moving().filter_map(seam).collect()
    }

    /// Whether what stands under `key` is read: it is not of a loss that is off.
    fn is_read(&self, key: &str) -> bool {
        let mut off = self.recipe.losses.0.iter().filter(|(_, entry)| !entry.enabled);
        !off.any(|(name, _)| key.starts_with(&format!("losses.{name}.")))
    }

    /// Every schedule that is no bare number and is read.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (String, Schedule)> + '_ {
        let all = describe::schedules(&self.value).into_iter();
        all.filter(|(key, schedule)| schedule.as_constant().is_none() && self.is_read(key))
    }
}

/// Whether one of the first `done` steps has another value in a run of `a` steps than in one of `b`.
fn differ(schedule: &Schedule, a: u64, b: u64, done: u64) -> bool {
    let steps =
        schedule.landmarks(a).into_iter().chain(schedule.landmarks(b)).chain([done / 2, done.saturating_sub(1)]);
    let mut seen = steps.filter(|step| *step < done.min(a).min(b));
    seen.any(|step| schedule.at(At { step, total: a }) != schedule.at(At { step, total: b }))
}

#[cfg(test)]
mod tests {
    use crate::recipe::test_plugins::RECIPE;
    use crate::recipe::{Overrides, RawRecipe};
    use crate::resolved::Resolved;

    fn resolved(sets: &[&str]) -> Resolved {
        let sets = sets.iter().map(ToString::to_string).collect();
        Resolved::of(RawRecipe::from_text(RECIPE).unwrap().with(&Overrides { sets, env: false }).unwrap()).unwrap()
    }

    #[test]
    fn a_schedule_over_the_whole_run_has_a_seam_and_a_number_has_none() {
        let still = resolved(&["steps=20"]);
        assert!(still.depends_on_length().is_empty() && still.seams(10, 10).is_empty());
        // From 1 to 0 over the run.
        let line = resolved(&["steps=20", "optimizer.lr={ plugin='test_ramp', from=1.0, to=0.0 }"]);
        assert_eq!(line.depends_on_length(), ["optimizer.lr"]);
        let seams = line.seams(10, 10);
        assert_eq!(seams.len(), 1);
        assert!((seams[0].was - 0.1).abs() < 1e-12, "{seams:?}");
        assert!((seams[0].would_be - 0.55).abs() < 1e-12 && (seams[0].next - 0.5).abs() < 1e-12, "{seams:?}");
        // Before the first step nothing was different.
        assert!(line.seams(10, 0).is_empty());
    }
}
