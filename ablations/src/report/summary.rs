//! What a suite found, as data: the content of `summary.json`, from which the other two outputs are written.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::compute::Compute;
use super::plots::{Point, Points};
use super::reproduction::{reproduction, Reproduction};
use super::warnings::warnings;
use super::{p_text, rounded_to};
use crate::statistics::{estimate, holm, paired, seeds_needed, Estimate, Paired, ALPHA};
use crate::suite::{Attempt, Better, Metric, Plan, RunRecord, RunResult, Status, TRUNK};

/// `summary.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the suite.
    pub suite: String,
    /// What was asked.
    pub description: String,
    /// Name of the arm that the others are compared with.
    pub baseline: String,
    /// Metrics that decide, the headline first.
    pub metrics: Vec<String>,
    /// Which way each metric is better.
    pub better: BTreeMap<String, Better>,
    /// Seeds of the suite.
    pub seeds: Vec<u64>,
    /// Every arm, in the suite's order.
    pub arms: Vec<ArmSummary>,
    /// Every arm but the baseline, for every metric.
    pub comparisons: Vec<Comparison>,
    /// What arms go on from, if the suite has a trunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trunk: Option<TrunkSummary>,
    /// Every loss, probe and sign of health over steps, of every arm and of the trunk.
    #[serde(default)]
    pub series: Vec<SeriesSummary>,
    /// What happened at which step, of every arm and of the trunk.
    #[serde(default)]
    pub events: Vec<EventSummary>,
    /// What a reader must know before believing the numbers: failed and missing runs, lost pairs, sicknesses.
    pub warnings: Vec<String>,
    /// What the suite's head says that it gives, beside what it gave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reproduction: Vec<Reproduction>,
    /// Seconds of all finished runs together.
    pub seconds: f64,
    /// The same by what they ran on.
    #[serde(default)]
    pub compute: Compute,
    /// What produced this.
    pub provenance: Provenance,
}

/// Where the numbers come from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of the program.
    pub version: String,
    /// Revision of its source, if known.
    pub revision: Option<String>,
    /// What the runs ran on, as they said.
    pub device: Option<String>,
    /// The command that produces this again.
    pub command: String,
}

impl Provenance {
    /// Of this program, and the command that produces its report again.
    pub fn of(command: String) -> Self {
        let revision = Some(crate::build().to_string()).filter(|revision| !revision.is_empty());
        Self { version: env!("CARGO_PKG_VERSION").into(), revision, device: None, command }
    }
}

/// One arm over its seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArmSummary {
    /// Its name.
    pub name: String,
    /// What it changes in the base recipe.
    pub overrides: BTreeMap<String, serde_json::Value>,
    /// One a seed.
    pub runs: Vec<RunSummary>,
    /// Mean and spread of every metric.
    pub metrics: BTreeMap<String, Estimate>,
    /// Mean seconds of a run.
    pub seconds: Option<f64>,
    /// Mean steps a second.
    pub steps_per_second: Option<f64>,
}

/// The trunk over its seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrunkSummary {
    /// Its steps.
    pub steps: u64,
    /// The step that arms go on from.
    pub fork: u64,
    /// One a seed.
    pub runs: Vec<RunSummary>,
}

/// A metric over steps, as it is drawn: many points are averaged to a few hundred.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SeriesSummary {
    /// Its name in `metrics.jsonl`.
    pub metric: String,
    /// The arm, or `trunk`.
    pub arm: String,
    /// Steps done, ascending.
    pub steps: Vec<f64>,
    /// Mean over seeds at each of them.
    pub mean: Vec<f64>,
    /// Standard deviation over seeds; 0 of one.
    pub std: Vec<f64>,
    /// Seeds.
    pub n: Vec<usize>,
}

/// Something that happened in runs of an arm.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventSummary {
    /// Steps done.
    pub step: u64,
    /// The arm, or `trunk`.
    pub arm: String,
    /// `teacher`, `teachers.<name>`, `schedule`, `resume`, `longer`, `rewind`, `fork` or `stop`.
    pub kind: String,
    /// What happened.
    pub text: String,
    /// The seeds in whose runs it did.
    pub seeds: Vec<u64>,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSummary {
    /// The seed.
    pub seed: u64,
    /// Its folder, relative to the summary.
    pub dir: String,
    /// `finished`, `failed`, `interrupted` or `pending`.
    pub status: String,
    /// Final value of every metric it measured; `None` where it is not a finite number.
    pub metrics: BTreeMap<String, Option<f64>>,
    /// What it failed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why it ended before its steps were done, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The tries before the last, which ended with an error.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
    /// Hash of its resolved recipe.
    pub recipe_hash: String,
}

/// An arm against the baseline in one metric.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The arm.
    pub arm: String,
    /// The baseline.
    pub baseline: String,
    /// The metric.
    pub metric: String,
    /// `difference`, `ci95`, `p_value`, `n` and the rest.
    #[serde(flatten)]
    pub paired: Paired,
    /// The p-value after Holm's correction over the arms compared in this metric.
    pub p_holm: Option<f64>,
    /// Differences of the single seeds, in the suite's order.
    pub per_seed: Vec<SeedDifference>,
    /// The difference that the suite says is worth finding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<f64>,
    /// Seeds that find it with 80% power, by the spread of the differences seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seeds_for_effect: Option<usize>,
    /// What may be concluded.
    pub verdict: Verdict,
    /// The same in a sentence.
    pub sentence: String,
}

/// Arm minus baseline for one seed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SeedDifference {
    /// The seed.
    pub seed: u64,
    /// Arm minus baseline.
    pub difference: f64,
}

/// What may be concluded from a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The interval is above zero, and stays so after correction.
    Higher,
    /// The interval is below zero, and stays so after correction.
    Lower,
    /// The interval leaves out zero, but not after correction for the number of arms.
    Suggestive,
    /// The interval holds zero.
    Inconclusive,
    /// Fewer than two pairs, or all differ by the same: nothing can be said about spread.
    NoInterval,
    /// The metric is another quantity in the arm than in the baseline: its difference is no result.
    Unlike,
}

impl Summary {
    /// From the runs of `plan` as they are on disk.
    pub fn new(plan: &Plan, records: &[RunRecord], provenance: Provenance) -> Self {
        let suite = &plan.suite;
        let arms: Vec<ArmSummary> = suite.arms.iter().map(|arm| arm_summary(plan, &arm.name, records)).collect();
        let comparisons = suite.metrics.iter().flat_map(|metric| compare(plan, metric, records)).collect();
        let mut provenance = provenance;
        if provenance.device.is_none() {
            provenance.device = records.iter().find_map(|r| r.device.clone());
        }
        Self {
            suite: suite.name.clone(),
            description: suite.description.clone(),
            baseline: suite.baseline.clone(),
            metrics: suite.metrics.iter().map(|m| m.name.clone()).collect(),
            better: suite.metrics.iter().map(|m| (m.name.clone(), m.better)).collect(),
            seeds: suite.seeds.clone(),
            arms,
            comparisons,
            trunk: suite.trunk.as_ref().map(|trunk| TrunkSummary {
                steps: trunk.steps,
                fork: trunk.fork,
                runs: records.iter().filter(|r| r.arm == TRUNK).map(|record| run_summary(plan, record)).collect(),
            }),
            series: series(plan, records),
            events: events(records),
            warnings: warnings(plan, records),
            reproduction: reproduction(plan, records),
            seconds: records.iter().filter_map(RunRecord::result).map(|r| r.seconds).sum(),
            compute: Compute::of(records),
            provenance,
        }
    }

    /// Comparisons in the headline metric.
    pub fn headlines(&self) -> impl Iterator<Item = &Comparison> {
        self.comparisons.iter().filter(|c| c.metric == self.metrics[0])
    }
}

fn run_summary(plan: &Plan, record: &RunRecord) -> RunSummary {
    let planned = plan.all_runs().find(|p| p.arm == record.arm && p.seed == record.seed);
    RunSummary {
        seed: record.seed,
        dir: record.dir.clone(),
        status: record.status.word().to_string(),
        metrics: record.result().map(|r| r.metrics.clone()).unwrap_or_default(),
        error: if let Status::Failed(error) = &record.status { Some(error.clone()) } else { None },
        stopped: record.result().and_then(|r| r.stopped.clone()),
        attempts: record.attempts.clone(),
        recipe_hash: record.recipe_hash.clone().or(planned.map(|p| p.hash.clone())).unwrap_or_default(),
    }
}

/// Arms, and the trunk before them, whose runs are among `records`.
fn lines_of(plan: &Plan) -> impl Iterator<Item = &str> {
    let trunk = plan.suite.trunk.iter().map(|_| TRUNK);
    trunk.chain(plan.suite.arms.iter().map(|arm| arm.name.as_str()))
}

fn series(plan: &Plan, records: &[RunRecord]) -> Vec<SeriesSummary> {
    let shown = |name: &&String| ["loss/", "probe/", "health/"].iter().any(|group| name.starts_with(group));
    let names: BTreeSet<&String> = records.iter().flat_map(|r| r.curves.keys()).filter(shown).collect();
    let of = |metric: &String, arm: &str| {
        let runs: Vec<_> = records.iter().filter(|r| r.arm == arm).filter_map(|r| r.curves.get(metric)).collect();
        let points = Points::over(&runs).0;
        let all = |of: fn(&Point) -> f64| points.iter().map(of).collect::<Vec<_>>();
        let n = points.iter().map(|p| p.n).collect();
        let (steps, mean, std) = (all(|p| p.step), all(|p| p.mean), all(|p| p.std));
        (!points.is_empty()).then(|| SeriesSummary { metric: metric.clone(), arm: arm.into(), steps, mean, std, n })
    };
    names.into_iter().flat_map(|metric| lines_of(plan).filter_map(move |arm| of(metric, arm))).collect()
}

/// What happened in these runs, in order.
pub(super) fn events(records: &[RunRecord]) -> Vec<EventSummary> {
    let mut seeds = BTreeMap::<(u64, &str, &str, &str), BTreeSet<u64>>::new();
    for record in records {
        for event in &record.events {
            let key = (event.step, record.arm.as_str(), event.kind.as_str(), event.text.as_str());
            seeds.entry(key).or_default().insert(record.seed);
        }
    }
    let event = |((step, arm, kind, text), seeds): ((u64, &str, &str, &str), BTreeSet<u64>)| {
        let seeds = seeds.into_iter().collect();
        EventSummary { step, arm: arm.into(), kind: kind.into(), text: text.into(), seeds }
    };
    seeds.into_iter().map(event).collect()
}

fn arm_summary(plan: &Plan, arm: &str, records: &[RunRecord]) -> ArmSummary {
    let mine: Vec<&RunRecord> = records.iter().filter(|r| r.arm == arm).collect();
    let finished: Vec<_> = mine.iter().filter_map(|r| r.result()).collect();
    let runs = mine.iter().map(|record| run_summary(plan, record));
    let metric = |m: &Metric| {
        let values: Vec<f64> = mine.iter().filter_map(|r| r.score(&m.name)).collect();
        (m.name.clone(), estimate(&values))
    };
    let set = &plan.suite.arm(arm).expect("arms of a plan are arms of its suite").set;
    let json = |v: &toml::Value| serde_json::to_value(v).expect("TOML values are plain data");
    let seconds: Vec<f64> = finished.iter().map(|r| r.seconds).collect();
    let done = |r: &RunResult| r.steps.saturating_sub(plan.start(arm)) as f64;
    let speeds: Vec<f64> = finished.iter().filter(|r| r.seconds > 0.0).map(|r| done(r) / r.seconds).collect();
    ArmSummary {
        name: arm.to_string(),
        overrides: set.iter().map(|(k, v)| (k.clone(), json(v))).collect(),
        runs: runs.collect(),
        metrics: plan.suite.metrics.iter().map(metric).collect(),
        seconds: estimate(&seconds).mean,
        steps_per_second: estimate(&speeds).mean,
    }
}

/// Every arm but the baseline in one metric, corrected for how many they are.
fn compare(plan: &Plan, metric: &Metric, records: &[RunRecord]) -> Vec<Comparison> {
    let suite = &plan.suite;
    let score = |arm: &str, seed: u64| {
        records.iter().find(|r| r.arm == arm && r.seed == seed).and_then(|r| r.score(&metric.name))
    };
    let mut comparisons = Vec::new();
    for arm in suite.arms.iter().filter(|a| a.name != suite.baseline) {
        let both = |&seed: &u64| Some((seed, (score(&arm.name, seed)?, score(&suite.baseline, seed)?)));
        let (seeds, pairs): (Vec<u64>, Vec<(f64, f64)>) = suite.seeds.iter().filter_map(both).unzip();
        let per_seed = seeds.iter().zip(&pairs).map(|(&seed, (a, b))| SeedDifference { seed, difference: a - b });
        comparisons.push(Comparison {
            arm: arm.name.clone(),
            baseline: suite.baseline.clone(),
            metric: metric.name.clone(),
            paired: paired(&pairs),
            p_holm: None,
            per_seed: per_seed.collect(),
            effect: suite.effect.get(&metric.name).copied(),
            seeds_for_effect: None,
            verdict: Verdict::NoInterval,
            sentence: String::new(),
        });
    }
    let unlike: Vec<Vec<String>> = comparisons.iter().map(|c| plan.measured_otherwise(&c.arm, &metric.name)).collect();
    let is_tested = |&i: &usize| unlike[i].is_empty() && comparisons[i].paired.p_value.is_some();
    let tested: Vec<usize> = (0..comparisons.len()).filter(is_tested).collect();
    let tests = tested.len();
    let p_values: Vec<f64> = tested.iter().filter_map(|&i| comparisons[i].paired.p_value).collect();
    for (&i, p) in tested.iter().zip(holm(&p_values)) {
        comparisons[i].p_holm = Some(p);
    }
    for (comparison, unlike) in comparisons.iter_mut().zip(unlike) {
        if !unlike.is_empty() {
            comparison.verdict = Verdict::Unlike;
            comparison.sentence = format!(
                "{} is another quantity in {} than in {}, so that their difference is no result: it depends on {}.",
                metric.name,
                comparison.arm,
                comparison.baseline,
                unlike.join(", ")
            );
            continue;
        }
        // Differences without any spread find everything.
        let spread = comparison.paired.std.filter(|std| *std > 0.0);
        comparison.seeds_for_effect =
            comparison.effect.zip(spread).and_then(|(effect, std)| seeds_needed(effect / std, tests));
        let size = comparison.paired.effect_size;
        comparison.paired.seeds_for_80_percent_power = size.and_then(|d| seeds_needed(d, tests));
        comparison.verdict = verdict(comparison);
        comparison.sentence = sentence(comparison, metric, tests) + &of_effect(comparison);
    }
    comparisons
}

fn verdict(c: &Comparison) -> Verdict {
    match (c.paired.ci95, c.p_holm) {
        (Some([low, high]), _) if low <= 0.0 && high >= 0.0 => Verdict::Inconclusive,
        (Some(_), Some(p)) if p >= ALPHA => Verdict::Suggestive,
        (Some([low, _]), Some(_)) => {
            if low > 0.0 {
                Verdict::Higher
            } else {
                Verdict::Lower
            }
        }
        _ => Verdict::NoInterval,
    }
}

fn sentence(c: &Comparison, metric: &Metric, tests: usize) -> String {
    let (arm, baseline, name) = (&c.arm, &c.baseline, &metric.name);
    let Some(difference) = c.paired.difference else {
        return format!("{arm} cannot be compared with {baseline} in {name}: no seed has both.");
    };
    if difference == 0.0 && c.paired.std.is_none_or(|std| std == 0.0) {
        let seeds = if c.paired.n == 1 { "the one seed".to_string() } else { format!("all {} seeds", c.paired.n) };
        return format!("{arm} equals {baseline} in {name} for {seeds}.");
    }
    let direction = if difference > 0.0 { "higher" } else { "lower" };
    let good = (difference > 0.0) == (metric.better == Better::Higher);
    let worth = if good { "better" } else { "worse" };
    let show = rounded_to(c.paired.ci95);
    let signed = |value: f64| if value < 0.0 { show(value) } else { format!("+{}", show(value)) };
    let by = show(difference.abs());
    let Some([low, high]) = c.paired.ci95 else {
        if c.paired.n > 1 {
            let flipped = c.paired.p_sign_flip.map_or(String::new(), |p| format!(" (sign-flip {})", p_text(p)));
            return format!(
                "{arm} is {direction} than {baseline} in {name} by {by} in each of {} seeds{flipped}: without any spread no interval \
                 can be given. The score may be too coarse: measure it on more samples, or add seeds.",
                c.paired.n
            );
        }
        return format!(
            "{arm} is {by} {direction} than {baseline} in {name} for one seed: no interval can be given. Add seeds."
        );
    };
    let interval = format!("95% interval {} to {}", signed(low), signed(high));
    let n = c.paired.n;
    match c.verdict {
        Verdict::Higher | Verdict::Lower => {
            let p = p_text(c.p_holm.unwrap_or(1.0));
            let corrected = if tests > 1 { " after Holm's correction" } else { "" };
            format!("{arm} is {direction} than {baseline} in {name} by {by} ({interval}, {p}{corrected}, {n} seeds): {worth}.")
        }
        Verdict::Suggestive => format!(
            "{arm} is {direction} than {baseline} in {name} by {by} ({interval}, {n} seeds), but not after correction for \
             {tests} arms ({}): suggestive only.",
            p_text(c.p_holm.unwrap_or(1.0))
        ),
        _ => {
            let need = match c.paired.seeds_for_80_percent_power {
                Some(seeds) if seeds > n => {
                    format!(" If the true difference is the one seen, about {seeds} seeds would find it four times in five.")
                }
                Some(_) => String::new(),
                None => " No number of seeds in reach would find a difference this small.".to_string(),
            };
            format!(
                "Inconclusive for {arm} in {name}: the difference to {baseline} is {} but its {interval} spans zero \
                 ({n} seeds).{need}",
                signed(difference)
            )
        }
    }
}

/// What can be said of the difference that the suite says is worth finding.
fn of_effect(c: &Comparison) -> String {
    let (Some(effect), Some(std)) = (c.effect, c.paired.std) else { return String::new() };
    let n = c.paired.n;
    // Differences without any spread say nothing of others.
    if std == 0.0 {
        return String::new();
    }
    let excluded = c.paired.ci95.filter(|[low, high]| *low > -effect && *high < effect);
    if excluded.is_some() {
        return format!(" A difference of {} or more is left out by the interval.", super::number(effect));
    }
    match c.seeds_for_effect {
        Some(seeds) if seeds > n => format!(
            " To find a difference of {} four times in five takes {seeds} seeds: from seed to seed it varies by {}.",
            super::number(effect),
            super::number(std)
        ),
        Some(_) => format!(" {n} seeds are enough to find a difference of {}.", super::number(effect)),
        None => format!(" No number of seeds in reach finds a difference of {}.", super::number(effect)),
    }
}
