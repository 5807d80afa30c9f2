//! What a suite file may not say, and the runs that it plans.

use std::path::Path;

use dinolab::suite::{Overrides, Plan};

use super::lab::*;

#[test]
fn repeated_seeds_are_refused() {
    let error = refused(&suite().replace("[0, 1, 2]", "[0, 1, 0]"));
    assert!(error.contains("seed 0 is repeated"), "{error}");
}

#[test]
fn repeated_arm_names_are_refused() {
    let error = refused(&suite().replace("\"on\"", "\"off\""));
    assert!(error.contains("arm name `off` is repeated"), "{error}");
}

#[test]
fn a_baseline_that_is_no_arm_is_refused_with_the_nearest_name() {
    let error = refused(&suite().replace("baseline = \"off\"", "baseline = \"of\""));
    assert!(error.contains("the baseline `of` is no arm") && error.contains("did you mean `off`"), "{error}");
}

#[test]
fn arms_that_resolve_to_the_same_recipe_are_refused() {
    let error = refused(&suite().replace("enabled\" = false", "enabled\" = true"));
    assert!(error.contains("`off` and `on` resolve to the same recipe"), "{error}");
}

#[test]
fn a_key_that_an_arm_sets_and_nothing_reads_is_told() {
    let off = "\"losses.gram.enabled\" = false";
    let plan = Lab::new().plan(&suite().replace(off, &format!("{off}, \"losses.gram.weight\" = 3"))).expect("a suite");
    let said = plan.warnings.join("\n");
    assert!(said.contains("arm `off` sets losses.gram.weight, which nothing reads: losses.gram is off"), "{said}");
    assert!(!said.contains("arm `on`"), "{said}");
    let plan = Lab::new().plan(&suite()).expect("a suite");
    assert!(!plan.warnings.join("\n").contains("nothing reads"), "{:?}", plan.warnings);
}

#[test]
fn an_unknown_key_of_a_suite_is_named_with_its_line() {
    let error = refused(&suite().replace("seeds =", "seedz ="));
    assert!(error.contains("seedz") && error.contains("line 5"), "{error}");
}

#[test]
fn arms_cannot_set_the_seed() {
    let error = refused(&suite().replace("\"losses.gram.enabled\" = false", "seed = 3"));
    assert!(error.contains("sets `seed`"), "{error}");
}

#[test]
fn arm_names_that_are_no_folders_are_refused() {
    let error = refused(&suite().replace("name = \"on\"", "name = \"../on\""));
    assert!(error.contains("`../on` cannot be used"), "{error}");
}

#[test]
fn a_grid_gives_every_combination_in_order() {
    let grid = "[grid]\n\"losses.gram.weight\" = [0.5, 2]\n\"steps\" = [10, 20]\n";
    let suite = format!("{HEADER}{grid}").replace("\"off\"", "\"gram.weight=0.5+steps=10\"");
    let names: Vec<String> = Lab::new().load(&suite).expect("a valid suite").arms.into_iter().map(|a| a.name).collect();
    let expected =
        ["gram.weight=0.5+steps=10", "gram.weight=0.5+steps=20", "gram.weight=2+steps=10", "gram.weight=2+steps=20"];
    assert_eq!(names, expected);
}

/// The names of a grid's arms, in order.
#[track_caller]
fn arms_of(grid: &str, baseline: &str) -> Vec<String> {
    let suite = format!("{HEADER}[grid]\n{grid}").replace("\"off\"", &format!("{baseline:?}"));
    Lab::new().load(&suite).expect("a valid suite").arms.into_iter().map(|a| a.name).collect()
}

#[test]
fn keys_of_a_grid_that_end_alike_are_told_apart() {
    let grid = "\"losses.dino.head.hidden\" = [1, 2]\n\"losses.ibot.head.hidden\" = [1, 2]\n";
    let names = arms_of(grid, "dino.head.hidden=1+ibot.head.hidden=1");
    assert_eq!(names[1], "dino.head.hidden=1+ibot.head.hidden=2");
}

#[test]
fn values_of_a_grid_that_look_alike_in_a_name_are_told_apart() {
    let grid = "\"data.path\" = [\"a/b\", \"a b\", \"c\"]\n";
    let names = arms_of(grid, "data.path=c");
    assert!(names[0].starts_with("data.path=a_b-") && names[1].starts_with("data.path=a_b-"), "{names:?}");
    assert_ne!(names[0], names[1]);
}

#[test]
fn long_names_of_a_grid_are_shortened_and_differ() {
    let value = |end: &str| format!("\"{}{end}\"", "x".repeat(300));
    let error = refused(&format!("{HEADER}[grid]\n\"data.path\" = [{}, {}]\n", value("a"), value("b")));
    let arms = error.split_once("the arms are ").expect("the baseline is none of them").1;
    let names: Vec<&str> = arms.split([',', ';']).take(2).map(str::trim).collect();
    assert!(names[0] != names[1] && names.iter().all(|name| name.len() == 200), "{names:?}");
}

#[test]
fn a_name_too_long_for_a_folder_is_refused_before_anything_runs() {
    let error = refused(&suite().replace("name = \"on\"", &format!("name = \"{}\"", "x".repeat(201))));
    assert!(error.contains("has 201 characters") && error.contains("at most 200"), "{error}");
}

#[test]
fn a_grid_of_more_runs_than_anyone_means_is_refused_at_once() {
    let list: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
    let line = |key: &str| format!("\"losses.gram.{key}\" = [{}]\n", list.join(", "));
    let error = refused(&format!("{HEADER}[grid]\n{}{}{}", line("a"), line("b"), line("c")));
    assert!(error.contains("1000000000 combinations"), "{error}");
}

#[test]
fn a_key_that_differs_between_arms_without_being_named_is_refused_or_declared() {
    // The trainer's recipe has a key that follows from another.
    let text = suite().replace("set.losses.gram.enabled = true", "set.losses.gram.enabled = true\nset.steps = 80");
    let text = text.replace("\"losses.gram.enabled\" = false", "\"losses.gram.weight\" = 2.0");
    Lab::new().plan(&text).map(drop).expect("both keys are set by an arm");

    let lab = Lab::new();
    let trainer = lab.trainer.clone();
    let with_a_follower = move |base: &Path, overrides: &Overrides| {
        let mut overrides = overrides.clone();
        let on = overrides.get("losses.gram.enabled").and_then(toml::Value::as_bool);
        overrides.insert("probes.seg.every".into(), if on == Some(true) { 7 } else { 0 }.into());
        prepare(&trainer, base, &overrides)
    };
    let plan = |text: &str| Plan::new(lab.load(text)?, lab.out(), &Overrides::new(), &with_a_follower).map(drop);
    let error = plan(&suite()).expect_err("an arm changes a key that it does not set").to_string();
    for part in ["arm `on`", "probes.seg.every: was 0, is 7", "follows = [\"probes.seg.every\"]"] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    for follows in ["probes.seg.every", "probes.seg", "probes"] {
        plan(&suite().replace("seeds =", &format!("follows = [{follows:?}]\nseeds ="))).expect("it is declared");
    }
}

#[test]
fn a_table_that_names_a_plugin_is_one_value() {
    let set = "set = { optimizer.lr = { plugin = \"cosine\", peak = 1.0 }, losses.gram.enabled = false }";
    let suite = suite().replace("set.losses.gram.enabled = true", set);
    let suite = Lab::new().load(&suite).expect("a valid suite");
    let keys: Vec<&String> = suite.arms[1].set.keys().collect();
    assert_eq!(keys, ["losses.gram.enabled", "optimizer.lr"]);
}

#[test]
fn runs_are_ordered_so_that_pairs_complete_early() {
    let plan = Lab::new().plan(&suite()).expect("a valid suite");
    let order: Vec<(u64, &str)> = plan.runs.iter().map(|r| (r.seed, r.arm.as_str())).collect();
    assert_eq!(order, [(0, "off"), (0, "on"), (1, "off"), (1, "on"), (2, "off"), (2, "on")]);
}

#[test]
fn a_metric_of_no_enabled_probe_or_loss_is_warned_of() {
    let plan = Lab::new().plan(&suite().replace("probe/seg/miou", "loss/gram")).expect("a valid suite");
    assert_eq!(plan.warnings[0], "metric `loss/gram` is not measured by off");
}
