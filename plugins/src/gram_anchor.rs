//! Teacher policy `gram_anchor`: a snapshot that holds the student's patch similarities in place.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A snapshot of the EMA teacher or a checkpoint, refreshed from the EMA teacher at set steps: the Gram teacher of
/// DINOv3 (arXiv:2508.10104, section 4).
///
/// Every step number means "just before this step": with `first_step = 100` the snapshot is taken from the EMA teacher
/// after 100 steps, and step 100 is the first to use it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GramAnchor {
    /// Where the weights come from: `"ema"`, or `{ checkpoint = "path" }`.
    pub source: Source,
    /// The first step that uses this teacher; before it, it costs nothing. With `source = "ema"` the snapshot is taken
    /// just before this step.
    pub first_step: u64,
    /// When the snapshot is replaced by the current EMA teacher; by default never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refresh: Option<Refresh>,
    /// Side in pixels of its own, larger crops; by default it sees the student's global crops.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 16384))]
    pub crop_size: Option<NonZeroUsize>,
    /// Whether the bicubic resize of its larger patch grid is anti-aliased.
    pub antialias: bool,
}

/// Refreshes that a timeline lists one by one.
const MOST_EVENTS: u64 = 12;

/// Where a Gram teacher's weights come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A snapshot of the EMA teacher, taken just before `first_step`.
    #[default]
    Ema,
    /// A run folder, a checkpoint folder or a safetensors file.
    Checkpoint(#[schemars(extend("format" = "path"))] PathBuf),
}

/// When a Gram teacher is replaced by the EMA teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Refresh {
    /// Steps between refreshes.
    pub every: NonZeroU64,
    /// The first step that uses refreshed weights; by default `first_step + every`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<u64>,
    /// Maximum number of refreshes in a run; by default no limit. 0: none; it lets an arm of a suite turn off
    /// refreshes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<u64>,
}

impl Default for GramAnchor {
    fn default() -> Self {
        Self { source: Source::Ema, first_step: 0, refresh: None, crop_size: None, antialias: false }
    }
}

impl GramAnchor {
    fn build(self) -> Result<Box<dyn TeacherPolicy>> {
        match self.refresh.as_ref().and_then(|r| r.first) {
            Some(first) if first <= self.first_step => Err(Error::user(
                format!(
                    "teacher `gram_anchor`: the first refresh ({first}) is not after `first_step` ({})",
                    self.first_step
                ),
                "the weights of `source` would never be used: set `refresh.first` to a later step",
            )),
            _ => Ok(Box::new(self)),
        }
    }

    /// The refreshes of a run, the first of many one by one.
    fn refreshes(&self, refresh: &Refresh, total: u64) -> Vec<(u64, String)> {
        let (first, every) = (self.first_refresh(refresh), refresh.every.get());
        let within = total.saturating_sub(first).div_ceil(every);
        let count = refresh.at_most.map_or(within, |most| most.min(within));
        let step = |k: u64| first + k * every;
        let one = |k: u64| (step(k), format!("refresh {} from the EMA teacher", k + 1));
        let mut events: Vec<_> = (0..count.min(MOST_EVENTS)).map(one).collect();
        if count > MOST_EVENTS {
            let (next, last) = (step(MOST_EVENTS), step(count - 1));
            events.push((
                next,
                format!(
                    "and so on every {every} steps: refreshes {} to {count}, the last before step {last}",
                    MOST_EVENTS + 1
                ),
            ));
        }
        events
    }

    /// The first step that uses refreshed weights.
    fn first_refresh(&self, refresh: &Refresh) -> u64 {
        refresh.first.unwrap_or(self.first_step.saturating_add(refresh.every.get()))
    }

    /// Which refresh (from 0) step `step` is the first to use, if any. The reference's rule, `i + 1 >= it_first_update`
    /// and `(i + 1) % update_frequency == 0`, is `first` = the least such multiple and `every = update_frequency`.
    fn refresh_before(&self, step: u64) -> Option<u64> {
        let refresh = self.refresh.as_ref()?;
        let every = refresh.every.get();
        let since = step.checked_sub(self.first_refresh(refresh))?;
        let k = since / every;
        (since % every == 0 && refresh.at_most.is_none_or(|most| k < most)).then_some(k)
    }
}

impl TeacherPolicy for GramAnchor {
    fn start(&self) -> Role {
        match &self.source {
            Source::Ema => Role::Teacher,
            Source::Checkpoint(path) => Role::Checkpoint(path.clone()),
        }
    }

    fn before_step(&self, at: At) -> Follow {
        if self.source == Source::Ema && at.step == self.first_step {
            Follow::Copy(Role::Teacher)
        } else {
            Follow::Keep
        }
    }

    fn after_step(&self, at: At) -> Follow {
        match self.refresh_before(at.step + 1) {
            Some(_) => Follow::Copy(Role::Teacher),
            None => Follow::Keep,
        }
    }

    fn active(&self, at: At) -> bool {
        at.step >= self.first_step
    }

    fn crop_size(&self) -> Option<usize> {
        self.crop_size.map(NonZeroUsize::get)
    }

    fn antialias(&self) -> bool {
        self.antialias
    }

    fn events(&self, total: u64) -> Vec<(u64, String)> {
        let begin = match &self.source {
            Source::Ema => "snapshot of the EMA teacher".to_string(),
            Source::Checkpoint(path) => format!("checkpoint {}", path.display()),
        };
        let begin = (self.first_step < total).then_some((self.first_step, begin));
        let refreshes = self.refresh.as_ref().map_or(Vec::new(), |refresh| self.refreshes(refresh, total));
        begin.into_iter().chain(refreshes).collect()
    }
}

plugin!(TeacherPolicy, "gram_anchor", GramAnchor, |config: GramAnchor, _: &mut _| config.build());

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(policy: &GramAnchor, steps: u64) -> (Vec<u64>, Vec<u64>) {
        let at = |step| At { step, total: steps };
        let copy = Follow::Copy(Role::Teacher);
        let before = (0..steps).filter(|&s| policy.before_step(at(s)) == copy).collect();
        (before, (0..steps).filter(|&s| policy.after_step(at(s)) == copy).collect())
    }

    fn refresh(every: u64, first: Option<u64>, at_most: Option<u64>) -> Option<Refresh> {
        let every = NonZeroU64::new(every).expect("tests refresh at a positive distance");
        Some(Refresh { every, first, at_most })
    }

    #[test]
    fn an_ema_snapshot_is_taken_once_before_the_first_step() {
        let policy = GramAnchor { first_step: 5, ..GramAnchor::default() };
        assert_eq!(copies(&policy, 20), (vec![5], vec![]));
        assert!(!policy.active(At { step: 4, total: 20 }) && policy.active(At { step: 5, total: 20 }));
        assert_eq!(policy.events(20), [(5, "snapshot of the EMA teacher".to_string())]);
    }

    #[test]
    fn refreshes_are_counted_from_the_first_step_and_limited() {
        let policy = GramAnchor { first_step: 2, refresh: refresh(4, None, Some(3)), ..GramAnchor::default() };
        assert_eq!(copies(&policy, 30), (vec![2], vec![5, 9, 13]));
        let marked: Vec<u64> = policy.events(30).into_iter().map(|e| e.0).collect();
        assert_eq!(marked, [2, 6, 10, 14]);
        let never = GramAnchor { first_step: 2, refresh: refresh(4, None, Some(0)), ..GramAnchor::default() };
        assert_eq!((copies(&never, 30), never.events(30).len()), ((vec![2], vec![]), 1));
    }

    #[test]
    fn a_timeline_of_a_million_refreshes_is_short() {
        let policy = GramAnchor { refresh: refresh(2, None, None), ..GramAnchor::default() };
        let events = policy.events(2_000_001);
        let (step, what) = events.last().expect("it has refreshes");
        assert_eq!((events.len(), *step), (14, 26));
        assert_eq!(what, "and so on every 2 steps: refreshes 13 to 1000000, the last before step 2000000");
    }

    #[test]
    fn events_are_the_steps_before_which_weights_are_copied() {
        for (first, every, most, total) in [(None, 4, None, 45), (Some(3), 7, Some(2), 50), (Some(9), 1, Some(3), 10)] {
            let policy = GramAnchor { first_step: 2, refresh: refresh(every, first, most), ..GramAnchor::default() };
            let copied: Vec<u64> = (2..total).filter(|&step| policy.refresh_before(step).is_some()).collect();
            let marked: Vec<u64> = policy.events(total).into_iter().skip(1).map(|e| e.0).collect();
            assert_eq!(marked, copied);
        }
    }

    #[test]
    fn a_checkpoint_is_used_from_the_start_and_may_be_refreshed() {
        let source = Source::Checkpoint("weights".into());
        let policy = GramAnchor { source, refresh: refresh(4, Some(4), None), ..GramAnchor::default() };
        assert_eq!(policy.start(), Role::Checkpoint("weights".into()));
        assert_eq!(copies(&policy, 10), (vec![], vec![3, 7]));
    }

    #[test]
    fn a_refresh_before_the_first_use_is_refused() {
        let policy = GramAnchor { first_step: 8, refresh: refresh(4, Some(8), None), ..GramAnchor::default() };
        assert!(policy.build().unwrap_err().to_string().contains("not after `first_step` (8)"));
    }
}
