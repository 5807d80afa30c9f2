//! `dinolab ablate --dry-run`: what a suite would run, what it changes, and what it costs.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use dinolab_core::resolved::cost;
use dinolab_core::text::{self, printable};
use dinolab_core::Result;

use super::prepared::resolve;
use crate::report::number;
use crate::statistics::{effect_found, paired, seeds_needed};
use crate::style::{self, duration};
use crate::suite::{Arm, Overrides, Plan, PlannedRun, Status};

/// Every finished run of the plan: the steps that it did itself, and the seconds that they took.
pub(super) fn finished(plan: &Plan, runs: &[&PlannedRun]) -> Result<Vec<(u64, f64)>> {
    let mut found = Vec::new();
    for run in runs {
        if let Status::Finished(result) = Status::of(&plan.out.join(&run.dir))? {
            found.push((result.steps.saturating_sub(plan.start(&run.arm)), result.seconds));
        }
    }
    Ok(found)
}

/// The expansion of a suite's runs: arms, seeds, state and cost.
pub(super) fn dry_run(plan: &Plan, runs: &[&PlannedRun]) -> Result<()> {
    plan.check_folder()?;
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic).set_header([
        "arm",
        "changes",
        "steps",
        "memory",
        "TFLOP a run",
        "for probes",
        "runs",
    ]);
    let (mut total, mut probed) = ((0, 0.0), 0.0);
    let mut arms: Vec<&PlannedRun> = Vec::new();
    for run in runs {
        if arms.iter().all(|other| other.arm != run.arm) {
            arms.push(run);
        }
    }
    for run in arms {
        let recipe = resolve(&plan.suite.path, &run.base, &run.overrides)?.recipe;
        let start = plan.start(&run.arm);
        let steps = recipe.steps - start;
        let of_step = cost::cost_on(&recipe, recipe.device()?)?;
        let tera = of_step.flops_per_image * recipe.batch.size as f64 * steps as f64 / 1e12;
        let (taken, images, flops) = cost::probes(&recipe, start)?;
        let probes = flops / 1e12;
        let mut states = Vec::new();
        for other in runs.iter().filter(|r| r.arm == run.arm) {
            states.push(format!("seed {} {}", other.seed, Status::of(&plan.out.join(&other.dir))?.word()));
        }
        total = (total.0 + steps * states.len() as u64, total.1 + tera * states.len() as f64);
        probed += probes * states.len() as f64;
        let probes =
            format!("{probes:.3} ({:.0}%)\n{taken} times, {images:.0} images", 100.0 * probes / tera.max(1e-12));
        let shown = if start > 0 { format!("{start} to {}", recipe.steps) } else { steps.to_string() };
        table.add_row([
            run.arm.clone(),
            changes(plan, run),
            shown,
            text::bytes(of_step.total_memory()),
            format!("{tera:.3}"),
            probes,
            states.join("\n"),
        ]);
    }
    style::print(&format!("{table}\n"));
    let (count, done) = (runs.len(), finished(plan, runs)?);
    let left = count - done.len();
    style::print(&format!(
        "{count} runs in {}, {left} of them to do: {:.3} TFLOP in all, and {probed:.3} for probes\n",
        printable(&plan.out),
        total.1
    ));
    style::print(&time(plan, &done, total.0, left));
    effects(plan)?.iter().for_each(|line| style::print(line));
    Ok(())
}

/// How long it takes, and by what that is known.
fn time(plan: &Plan, done: &[(u64, f64)], steps: u64, left: usize) -> String {
    let (did, seconds) = done.iter().fold((0, 0.0), |sum, run| (sum.0 + run.0, sum.1 + run.1));
    if did > 0 {
        let all = duration(seconds / did as f64 * steps.saturating_sub(did) as f64);
        return format!("{did} steps took {} so far, so about {all} are left\n", duration(seconds));
    }
    let said = plan.suite.measured.as_ref().filter(|_| !plan.is_changed());
    match said.and_then(|said| Some((said, said.seconds?))) {
        Some((said, each)) => format!(
            "a run took {} on {} (the suite's [measured]), so about {} for all that are left, one after the other\n",
            duration(each),
            said.on,
            duration(each * left as f64)
        ),
        None => "the time is not known before the trial of every arm, which tells it\n".into(),
    }
}

/// For every difference that is worth finding: what it takes to find it.
fn effects(plan: &Plan) -> Result<Vec<String>> {
    let suite = &plan.suite;
    let mut lines = Vec::new();
    for (metric, &effect) in &suite.effect {
        let (n, size) = (suite.seeds.len(), number(effect));
        let compared = |arm: &&Arm| arm.name != suite.baseline && plan.measured_otherwise(&arm.name, metric).is_empty();
        let others = || suite.arms.iter().filter(compared);
        let tests = others().count();
        let least = effect_found(n, tests).map(|d| number(effect / d));
        let mut line = match least {
            Some(spread) => format!(
                "a difference of {size} in {metric}: {n} seeds find it four times in five if differences vary by at most \
                 {spread} from seed to seed"
            ),
            None => format!("a difference of {size} in {metric}: one seed finds nothing"),
        };
        for arm in others() {
            let mut pairs = Vec::new();
            for &seed in &suite.seeds {
                pairs.extend(score(plan, &arm.name, seed, metric)?.zip(score(plan, &suite.baseline, seed, metric)?));
            }
            let std = paired(&pairs).std.filter(|std| *std > 0.0);
            if let Some(seeds) = std.and_then(|std| seeds_needed(effect / std, tests)) {
                line += &format!("; by the {} pairs so far {} takes {seeds} seeds", pairs.len(), arm.name);
            } else if let Some(seeds) =
                unpaired(plan, &arm.name, metric).and_then(|std| seeds_needed(effect / std, tests))
            {
                line += &format!("; by the suite's [measured] {} takes {seeds} seeds at most", arm.name);
            }
        }
        lines.push(line + "\n");
    }
    Ok(lines)
}

/// The spread of differences between an arm and the baseline by the suite's head, as if nothing were gained by pairing.
fn unpaired(plan: &Plan, arm: &str, metric: &str) -> Option<f64> {
    let arms = &plan.suite.measured.as_ref()?.arms;
    let sd = |arm: &str| Some(arms.get(arm)?.get(metric)?.sd);
    Some(sd(arm)?.hypot(sd(&plan.suite.baseline)?)).filter(|sd| *sd > 0.0)
}

fn score(plan: &Plan, arm: &str, seed: u64, metric: &str) -> Result<Option<f64>> {
    let run = plan.runs.iter().find(|run| run.arm == arm && run.seed == seed).expect("every arm has every seed");
    Ok(match Status::of(&plan.out.join(&run.dir))? {
        Status::Finished(result) => result.metrics.get(metric).copied().flatten(),
        _ => None,
    })
}

/// What a run changes in its recipe, beside what all share.
fn changes(plan: &Plan, run: &PlannedRun) -> String {
    let shown = |set: &Overrides| set.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>();
    let Some(arm) = plan.suite.arm(&run.arm) else {
        return plan.suite.trunk.as_ref().map_or(Vec::new(), |trunk| shown(&trunk.set)).join("\n");
    };
    let mut changes = shown(&arm.set);
    let follows = plan.differences(&arm.name).into_iter().filter(|(key, ..)| !arm.set.contains_key(key));
    let follows = follows.filter(|(key, ..)| plan.suite.follows.iter().any(|f| key.starts_with(f.as_str())));
    changes.extend(follows.map(|(key, _, is)| format!("follows: {key} = {}", is.unwrap_or_else(|| "none".into()))));
    changes.join("\n")
}
