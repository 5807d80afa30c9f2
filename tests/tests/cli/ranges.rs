//! Ranges of numbers: every key states one, every scheduler says where its extremes are, and what is stated holds for what
//! is shipped.

use dinolab_tests::program;
use std::path::PathBuf;

use dinolab_core::contract::{At, Schedule};
use dinolab_core::recipe::describe;
use proptest::prelude::*;
use serde_json::{json, Value as Json};

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

/// A table that chooses a scheduler with random numbers.
fn scheduler() -> impl Strategy<Value = Json> {
    let (x, n) = (-10.0..10.0f64, 0..40u64);
    let value = (x.clone(), x.clone(), x, n.clone(), n.clone(), proptest::option::of(n.clone()), 0.0..2.0f64);
    let milestones = proptest::collection::vec(n, 0..5);
    (value, milestones, 0..5usize).prop_map(|((a, b, c, w, f, n, e), milestones, kind)| {
        let mut table = match kind {
            0 => json!({ "plugin": "constant", "value": a }),
            1 => json!({ "plugin": "linear_warmup", "start": a, "peak": b, "warmup_steps": w }),
            2 => json!({ "plugin": "linear_warmup_cosine", "start": a, "peak": b, "end": c, "warmup_steps": w }),
            3 => json!({ "plugin": "cosine", "start": a, "peak": b, "end": c, "warmup_steps": w, "freeze_steps": f,
                "trunc_extra": e }),
            _ => json!({ "plugin": "step", "value": a, "factor": e, "milestones": milestones }),
        };
        let steps = ["", "", "cosine_steps", "total", ""][kind];
        if let (Some(n), false) = (n, steps.is_empty()) {
            table[steps] = n.into();
        }
        table
    })
}

fn schedule(table: &Json) -> Schedule {
    figment::value::Value::serialize(table).unwrap().deserialize().unwrap()
}

fn extremes(schedule: &Schedule, steps: impl Iterator<Item = u64>, total: u64) -> (f64, f64) {
    let values = steps.map(|step| schedule.at(At { step, total }));
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), x| (least.min(x), most.max(x)))
}

proptest! {
    #[test]
    fn the_landmarks_of_a_schedule_hold_its_extremes(table in scheduler(), total in 1..90u64) {
        let schedule = schedule(&table);
        let landmarks = schedule.landmarks(total);
        prop_assert!(landmarks.iter().all(|step| *step < total));
        let (least, most) = extremes(&schedule, 0..total, total);
        let (low, high) = extremes(&schedule, landmarks.into_iter(), total);
        // A cosine's ends are rounded.
        prop_assert!((low - least).abs() < 1e-9 && (high - most).abs() < 1e-9, "{low}..{high}, not {least}..{most}");
    }
}

/// The keys of a schema whose numbers have no range.
fn unlimited(schema: &Json, path: &str, scheduler: bool, found: &mut Vec<String>) {
    let has = |key: &str| schema.get(key).is_some();
    let is =
        |name: &str| schema["type"] == name || schema["type"].as_array().is_some_and(|all| all.contains(&name.into()));
    let bounded = (has("minimum") || has("exclusiveMinimum")) && (has("maximum") || has("exclusiveMaximum"));
    // What a scheduler gives is held to the range of the key that takes it.
    if is("number") && !bounded && !scheduler
        || has("x-schedule") && !bounded
        || is("integer") && !(has("minimum") || has("const"))
    {
        found.push(path.to_string());
    }
    let scheduler = scheduler || schema["x-kind"] == "scheduler";
    for (key, inside) in schema["properties"].as_object().into_iter().flatten() {
        unlimited(inside, &format!("{path}.{key}"), scheduler, found);
    }
    let alternatives = ["anyOf", "oneOf"].iter().filter_map(|k| schema[*k].as_array()).flatten();
    let parts = alternatives.chain(schema.get("items")).chain(schema.get("additionalProperties"));
    // The bare number of a schedule has the range of the schedule.
    let outer = |part: &&Json| bounded && part.get("x-schedule").is_some();
    parts.filter(|part| !outer(part) && (!has("x-schedule") || part.get("x-kind").is_some())).for_each(|part| {
        unlimited(part, &format!("{path}/{}", part["title"].as_str().unwrap_or_default()), scheduler, found)
    });
}

#[test]
fn every_number_states_its_range() {
    let mut found = Vec::new();
    let schema = describe::schema();
    unlimited(&schema, "", false, &mut found);
    let definitions = schema["definitions"].as_object().expect("what tables of losses and probes are");
    definitions.iter().for_each(|(name, inside)| unlimited(inside, name, false, &mut found));
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn shipped_recipes_are_right_without_a_word() {
    let folder = program::Folder::new();
    for place in ["recipes", "recipes/bench"] {
        let files = std::fs::read_dir(program::root().join(place)).unwrap().map(|entry| entry.unwrap().path());
        for file in files.filter(|path| path.extension().is_some_and(|e| e == "toml")) {
            // The model of these weights is known when they are there.
            let weights =
                ["--set".to_string(), "backbone.preset=vit_s16".into(), "--set".into(), "backbone.plugin=vit".into()];
            let more = if file.ends_with("continue_from_hf.toml") { weights.to_vec() } else { Vec::new() };
            let path: &PathBuf = &file;
            let mut args = vec!["recipe", "check", path.to_str().unwrap()];
            args.extend(more.iter().map(String::as_str));
            let ended = folder.run(&args);
            let said: Vec<&str> =
                ended.err.lines().filter(|line| line.starts_with("warning: ") && !line.contains(": data: ")).collect();
            // Some are for larger machines than this.
            // Others start from runs that are not there.
            let odd = said.iter().filter(|line| !line.contains("the run needs about") && !line.contains("(yet)"));
            assert_eq!((ended.code, odd.count()), (0, 0), "{}: {}", file.display(), ended.err);
        }
    }
}
