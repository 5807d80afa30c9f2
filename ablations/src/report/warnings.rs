//! What a reader must know before believing the numbers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::recipe::is_within;
use dinolab_core::text::printable;

use crate::suite::{Plan, RunRecord, Status, Warning, DROPPED, TRUNK};

/// Nothing is dropped silently: what is missing, failed or sick is said.
pub(super) fn warnings(plan: &Plan, records: &[RunRecord]) -> Vec<String> {
    let mut warnings = plan.warnings.clone();
    for record in records {
        let run = format!("{} seed {}", record.arm, record.seed);
        match &record.status {
            Status::Finished(_) => {}
            Status::Failed(error) if error.starts_with(DROPPED) => warnings.push(format!(
                "{run} was {error}. It is not in the numbers: an arm that loses its bad runs looks better than it is"
            )),
            Status::Failed(error) => warnings.push(format!("{run} failed and is not in the numbers: {error}")),
            // It may be going on at this moment.
            Status::Interrupted => warnings.push(format!("{run} is not finished and not in the numbers")),
            // Arms that are finished need it no more.
            Status::Pending if record.arm == TRUNK => {}
            Status::Pending => warnings.push(format!("{run} is pending and not in the numbers")),
        }
        let mut again = BTreeMap::<&str, usize>::new();
        for attempt in &record.attempts {
            let error = first_line(&attempt.error);
            match attempt.micro_batches {
                Some(parts) => warnings.push(format!(
                    "{run} did not fit and was begun anew with batch.micro_batches = {parts}: losses that look across a \
                     micro-batch see fewer images in it than in the runs that it is compared with ({error})"
                )),
                None => *again.entry(error).or_default() += 1,
            }
        }
        warnings.extend(again.into_iter().map(|(error, times)| match times {
            1 => format!("{run} was tried again after: {error}"),
            _ => format!("{run} was tried again {times} times after: {error}"),
        }));
        // A trunk has only to be there.
        for metric in plan.suite.metrics.iter().filter(|_| record.result().is_some() && record.arm != TRUNK) {
            if record.score(&metric.name).is_none() {
                warnings.push(format!("{run} gave no finite {}: it is left out of that metric", metric.name));
            }
        }
    }
    let mut kinds = BTreeMap::<&str, Vec<(&RunRecord, &Warning)>>::new();
    // That a run goes on from another is no sickness; it is among the events.
    let all = records.iter().flat_map(|r| r.warnings.iter().map(move |w| (r, w)));
    for (record, warning) in all.filter(|(_, warning)| warning.kind != "fork") {
        kinds.entry(&warning.kind).or_default().push((record, warning));
    }
    warnings.extend(kinds.into_values().map(|said| told_once(&said)));
    warnings.extend(made_of_others(plan, records));
    warnings.extend(unnamed(plan));
    warnings.extend(by_several("builds of dinolab", records, |record| record.revision.clone()));
    // `cuda:1 NVIDIA H100` without its number: GPUs of one model give the same numbers.
    let model = |device: &String| {
        let (place, name) = device.split_once(' ').unwrap_or((device, ""));
        format!("{} {name}", place.split(':').next().unwrap_or(place)).trim_end().to_string()
    };
    warnings.extend(by_several("devices", records, |record| record.device.as_ref().map(model)));
    for arm in plan.suite.arms.iter().filter(|a| a.name != plan.suite.baseline) {
        let changes = plan.differences(&arm.name);
        let seen: Vec<&str> = changes.iter().map(|c| c.0.as_str()).filter(|key| changes_batches(key)).collect();
        if !seen.is_empty() {
            let keys = seen.join(", ");
            warnings.push(format!("{} does not see what the baseline sees in a step: it differs in {keys}", arm.name));
        }
    }
    warnings
}

/// Finished runs in the folder that the suite does not name, or not any more.
fn unnamed(plan: &Plan) -> Option<String> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    let mut found: Vec<String> = entries(&plan.out.join("arms"))
        .iter()
        .flat_map(|arm| entries(arm))
        .filter_map(|run| run.strip_prefix(&plan.out).map(Path::to_path_buf).ok())
        .filter(|dir| plan.runs.iter().all(|run| run.dir != *dir))
        .filter(|dir| matches!(Status::of(&plan.out.join(dir)), Ok(Status::Finished(_))))
        .map(|dir| printable(&dir))
        .collect();
    found.sort();
    (!found.is_empty()).then(|| {
        format!(
            "finished runs lie in the folder that the suite does not name, and are not in the numbers: {}",
            found.join(", ")
        )
    })
}

/// Runs whose recipes name the same data or weights, of which something else was there at another time.
fn made_of_others(plan: &Plan, records: &[RunRecord]) -> Vec<String> {
    // By what a recipe names: arms may differ in it, and seeds that go on from a trunk have one of their own.
    let mut known = BTreeMap::<(String, String), (&RunRecord, &String)>::new();
    let mut of_seed = BTreeMap::<(String, String, u64), (&RunRecord, &String)>::new();
    let mut warnings = Vec::new();
    let of = |record: &RunRecord| format!("{} seed {}", record.arm, record.seed);
    for record in records {
        let Some(run) = plan.all_runs().find(|run| run.arm == record.arm && run.seed == record.seed) else { continue };
        for (key, hash) in &record.made_of {
            let parts = key.split('.').try_fold(None, |table: Option<&toml::Value>, part| {
                Some(Some(table.map_or_else(|| run.prepared.recipe().get(part), |table| table.get(part))?))
            });
            let Some(Some(named)) = parts else { continue };
            let named = if key == "data" { named.to_string() } else { weights_of(named) };
            let what = if key == "data" { "data" } else { "weights" };
            // Arms are paired with each other, not with what they go on from.
            let (pair, of_pair) = match record.arm == TRUNK {
                true => (record, hash),
                false => *of_seed.entry((key.clone(), named.clone(), record.seed)).or_insert((record, hash)),
            };
            let (first, before) = *known.entry((key.clone(), named)).or_insert((record, hash));
            if of_pair != hash {
                let (one, two) = (of(pair), of(record));
                warnings.push(format!(
                    "{one} and {two} are paired, and were made of different {what}: files at `{key}` changed between them; \
                     remove the folder of one to have it run again"
                ));
            } else if before != hash {
                let (one, two) = (of(record), of(first));
                warnings
                    .push(format!("{one} was made of other {what} than {two}: files at `{key}` changed between them"));
            }
        }
    }
    warnings
}

/// Which weights a value of a recipe names: a path, or a table of a teacher or of `continue_from` with one in it.
fn weights_of(value: &toml::Value) -> String {
    match value {
        toml::Value::Table(table) => {
            let named = |key: &str| ["checkpoint", "run", "step", "source"].contains(&key);
            table.iter().filter(|(key, _)| named(key)).map(|(_, value)| weights_of(value)).collect::<Vec<_>>().join("@")
        }
        other => other.to_string(),
    }
}

/// Says which of several builds of the program, or devices, did which runs: numbers may differ between them.
fn by_several(what: &str, records: &[RunRecord], by: impl Fn(&RunRecord) -> Option<String>) -> Option<String> {
    let mut groups = BTreeMap::<String, Vec<String>>::new();
    for record in records {
        let runs = by(record).map(|group| groups.entry(group).or_default());
        runs.into_iter().for_each(|runs| runs.push(format!("{} seed {}", record.arm, record.seed)));
    }
    let said: Vec<String> = groups.iter().map(|(group, runs)| format!("{group} ({})", runs.join(", "))).collect();
    (groups.len() > 1).then(|| format!("runs were done by different {what}: {}", said.join(", ")))
}

/// An error without what is to be done about it, which `attempts.json` has.
fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// Whether runs that differ in `key` have other images, crops or masks in a step. Keys of the Gram teacher's crops and
/// `batch.micro_batches` change none of the student's.
fn changes_batches(key: &str) -> bool {
    const KEYS: [&str; 5] = ["seed", "data", "masking", "batch.size", "backbone.patch_size"];
    let within = |table: &str| is_within(key, table);
    KEYS.into_iter().any(within) || within("crops") && key != "crops.teacher_without_distortion"
}

/// Warnings of one kind as one: the text of the first, and who else gave one.
fn told_once(said: &[(&RunRecord, &Warning)]) -> String {
    let (record, first) = said[0];
    let mut text = format!("{} seed {}, step {}: {}", record.arm, record.seed, first.step, first.text);
    let mut runs: Vec<String> = said.iter().map(|(r, _)| format!("{} seed {}", r.arm, r.seed)).collect();
    runs.dedup();
    if said.len() > runs.len() {
        text += &format!(" ({} like this; see messages.jsonl of the runs)", said.len());
    }
    if runs.len() > 1 {
        text += &format!(". The like in {} more runs: {}", runs.len() - 1, runs[1..].join(", "));
    }
    text
}
