//! Suites and what runs leave, as nobody would write them: whatever a file says, it is refused by name or means one thing.
//!
//! `PROPTEST_CASES=100000` tries as many of each kind; by default a few hundred.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dinolab::suite::{Job, Outcome, Overrides, Plan, Prepared, RunRecord, Status, Suite};
use dinolab_core::{Error, Result};
use proptest::prelude::*;
use serde_json::json;

/// A recipe that takes every key.
struct Anything(toml::Table);

impl Prepared for Anything {
    fn recipe(&self) -> &toml::Table {
        &self.0
    }
    fn hash(&self) -> &str {
        "hash"
    }
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
    fn run(&self, _: Job<'_>) -> Result<Outcome> {
        Err(Error::user("nothing is run here", "do not"))
    }
}

fn prepare(_: &Path, overrides: &Overrides) -> Result<Box<dyn Prepared>> {
    let flat = overrides.iter().map(|(key, value)| (key.clone(), value.clone()));
    Ok(Box::new(Anything(flat.collect())))
}

const SUITE: &str = r#"
name = "koleo"
description = "Does it help?"
base = "recipe.toml"
seeds = [0, 1]
metrics = ["probe/knn/top1", { name = "loss/total", better = "lower" }]
baseline = "without"
follows = ["backbone.dim"]
set = { steps = 40 }

[[arm]]
name = "without"
set = { "losses.koleo.enabled" = false }

[[arm]]
name = "with"
set = { "losses.koleo.weight" = 0.1 }
"#;

/// Every key of a suite, and some that are none.
const KEYS: [&str; 12] = [
    "name",
    "description",
    "base",
    "seeds",
    "metrics",
    "baseline",
    "follows",
    "set",
    "arm",
    "grid",
    "extends",
    "seedz",
];

fn names() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("a".repeat(300)),
        Just("../up".into()),
        Just(".".into()),
        Just("nul\0".into()),
        Just("two\nlines\x1b[31m".into()),
        Just("without".into()),
        Just("losses.koleo.weight".into()),
        Just("überlang".into()),
        any::<String>(),
        "[a-z]{1,3}(\\.[a-z]{1,3}){0,4}",
    ]
}

fn values() -> impl Strategy<Value = toml::Value> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(toml::Value::from),
        any::<f64>().prop_map(toml::Value::from),
        any::<bool>().prop_map(toml::Value::from),
        names().prop_map(toml::Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(toml::Value::from),
            prop::collection::btree_map(names(), inner, 0..4).prop_map(|t| toml::Value::Table(t.into_iter().collect())),
        ]
    })
}

/// Grids from none to more combinations than there are atoms.
fn grids() -> impl Strategy<Value = toml::Value> {
    let list = prop_oneof![
        prop::collection::vec(values(), 0..4),
        (0usize..60).prop_map(|n| (0..n as i64).map(toml::Value::from).collect()),
    ];
    prop::collection::btree_map(names(), list.prop_map(toml::Value::from), 0..12)
        .prop_map(|t| toml::Value::Table(t.into_iter().collect()))
}

/// Loads and plans a suite; what it gives is checked for what every plan has to be.
fn hold(text: &[u8]) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("suite.toml");
    fs::write(&path, text).unwrap();
    let plan = Suite::load(&path).and_then(|s| Plan::new(s, folder.path().join("out"), &Overrides::new(), &prepare));
    match plan {
        Err(error) => prop_assert!(error.to_string().contains("suite.toml"), "{error}"),
        Ok(plan) => {
            let folders: BTreeSet<_> = plan.runs.iter().map(|run| &run.dir).collect();
            prop_assert_eq!(folders.len(), plan.runs.len());
            prop_assert_eq!(plan.runs.len(), plan.suite.arms.len() * plan.suite.seeds.len());
            let fits = |c: char| c.is_ascii_alphanumeric() || "._=+-".contains(c);
            for arm in &plan.suite.arms {
                prop_assert!(arm.name.len() <= 200 && !arm.name.starts_with('.') && arm.name.chars().all(fits));
                // The longest file that is named after it.
                let lock = format!("{}-seed-{}.lock", arm.name, u64::MAX);
                prop_assert!(lock.len() <= 255, "{} is too long", lock);
            }
            prop_assert!(plan.suite.arm(&plan.suite.baseline).is_some());
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_suite_with_any_values_under_any_keys_is_refused_by_name_or_a_plan(
        changes in prop::collection::vec((prop::sample::select(&KEYS[..]), values()), 1..4),
        gone in prop::sample::select(&KEYS[..]),
        drop in any::<bool>(),
    ) {
        let mut suite: toml::Table = SUITE.parse().unwrap();
        suite.extend(changes.into_iter().map(|(key, value)| (key.to_string(), value)));
        if drop {
            suite.remove(gone);
        }
        hold(suite.to_string().as_bytes())?;
    }

    #[test]
    fn a_grid_of_any_size_is_refused_or_gives_arms_that_can_be_told_apart(grid in grids(), first in any::<bool>()) {
        let mut suite: toml::Table = SUITE.parse().unwrap();
        suite.remove("arm");
        suite.insert("grid".into(), grid);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("suite.toml");
        if first {
            // The baseline is named as the suite would name its first arm, which the error tells.
            fs::write(&path, suite.to_string()).unwrap();
            if let Err(error) = Suite::load(&path) {
                let text = error.to_string();
                let arm = text.split_once("the arms are ").and_then(|(_, rest)| rest.split([',', ';']).next());
                suite.extend(arm.map(|arm| ("baseline".to_string(), arm.into())));
            }
        }
        hold(suite.to_string().as_bytes())?;
    }

    #[test]
    fn a_suite_with_any_byte_changed_or_cut_off_is_refused_by_name_or_a_plan(
        at in 0..SUITE.len(), byte: u8, cut in 0..2 * SUITE.len(),
    ) {
        let mut bytes = SUITE.as_bytes().to_vec();
        bytes[at] = byte;
        bytes.truncate(cut);
        hold(&bytes)?;
    }

    /// Files of a finished run, cut at any byte, with any byte changed, or with anything behind: no panic, and what cannot
    /// be read is an error that names the file, or said in the report.
    #[test]
    fn a_damaged_file_of_a_run_is_named_or_said(which in 0usize..4, at in 0usize..200, byte: u8, cut in 0usize..400, tail: Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let line = |step: u64| format!("{}\n", json!({ "step": step, "loss/total": 8.5 - step as f64 }));
        let files = [
            ("result.json", json!({ "steps": 3, "seconds": 1.5, "skipped": 0, "metrics": { "loss/total": 5.5 } }).to_string()),
            ("metrics.jsonl", (1..=3).map(line).collect()),
            ("messages.jsonl", format!("{}\n", json!({ "step": 1, "kind": "data", "text": "cat.jpg is broken" }))),
            ("run.json", json!({ "device": "cpu" }).to_string()),
        ];
        for (i, (name, text)) in files.iter().enumerate() {
            let mut bytes = text.clone().into_bytes();
            if i == which {
                if let Some(there) = bytes.get_mut(at) {
                    *there = byte;
                }
                bytes.truncate(cut);
                bytes.extend(&tail);
            }
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let name = files[which].0;
        match RunRecord::of("a", 0, ".".into(), folder.path()) {
            Err(error) => prop_assert!(error.to_string().contains(name), "{error}"),
            Ok(record) => {
                prop_assert!(matches!(record.status, Status::Finished(_)));
                let whole = record.curves.get("loss/total").map_or(0, Vec::len);
                let said = record.warnings.iter().any(|w| w.text.contains(name));
                let clean = fs::read(folder.path().join(name)).unwrap().split_inclusive(|b| *b == b'\n')
                    .all(|line| serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(line).is_ok());
                prop_assert!(which == 0 || which == 3 || said || clean, "{whole} lines of {name}: {:?}", record.warnings);
            }
        }
    }
}
