//! What the report of a suite says.

use std::fs;

use dinolab::report::{self, Verdict};
use serde_json::json;

use super::lab::*;

#[test]
fn an_effect_that_is_worth_finding_says_what_it_takes() {
    let error = refused(&format!("effect = {{ \"probe/seg/mio\" = 0.01 }}\n{}", suite()));
    assert!(error.contains("no metric of the suite") && error.contains("did you mean `probe/seg/miou`"), "{error}");
    let error = refused(&format!("effect = {{ \"loss/total\" = 0.0 }}\n{}", suite()));
    assert!(error.contains("a difference above zero"), "{error}");

    let lab = Lab::new();
    let plan = lab.plan(&format!("effect = {{ \"probe/seg/miou\" = 0.01 }}\n{}", suite())).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    // Differences of -0.02, 0.01 and 0.04: a standard deviation of 0.03, three times the effect.
    for (seed, miou) in [(0, 0.48), (1, 0.51), (2, 0.54)] {
        for (arm, miou) in [("off", 0.5), ("on", miou)] {
            let path = lab.out().join(format!("arms/{arm}/seed-{seed}/result.json"));
            let metrics = json!({ "probe/seg/miou": miou, "loss/total": 1.0 });
            fs::write(path, json!({ "steps": 40, "seconds": 40.0, "metrics": metrics }).to_string())
                .expect("it is there");
        }
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let miou = &summary.comparisons[0];
    let seeds = miou.seeds_for_effect.expect("it is in reach");
    // 2 + (1.96 + 0.84)² · 9 = 73 by the normal approximation.
    assert!((71..=75).contains(&seeds), "{seeds}");
    assert!(miou.sentence.contains(&format!("To find a difference of 0.01 four times in five takes {seeds} seeds")));
}

#[test]
fn a_metric_that_is_another_quantity_in_an_arm_gets_no_verdict() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    assert!(plan.warnings[0].contains("`loss/total` is another quantity in on"), "{:?}", plan.warnings);
    assert_eq!(plan.measured_otherwise("on", "loss/total"), ["losses.gram.enabled"]);
    for alike in ["loss/gram", "loss/dino", "probe/seg/miou", "health/param_norm"] {
        assert_eq!(plan.measured_otherwise("on", alike), [""; 0], "{alike}");
    }
    lab.execute(&plan, |_| ()).expect("it ran");
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let [miou, total] = &summary.comparisons[..] else { panic!("two metrics of one arm") };
    assert_eq!((miou.verdict, total.verdict, total.p_holm), (Verdict::Higher, Verdict::Unlike, None));
    assert!(total.sentence.contains("their difference is no result: it depends on losses.gram.enabled"));
    let page = fs::read_to_string(lab.out().join("summary.md")).expect("it was written");
    assert!(page.contains("| not comparable |"), "{page}");
}

/// The suite with a head that says what it gave.
fn with_head(miou: f64) -> String {
    format!(
        "{}\n[measured]\non = \"a fake\"\nn = 3\nseconds = 40.0\n[measured.arms.on]\n\"probe/seg/miou\" = {{ mean = {miou}, sd = 0.01 }}\n",
        suite()
    )
}

#[test]
fn a_suite_says_whether_it_gave_what_its_head_says() {
    // The fake gives 0.55 and noise of 0.02.
    for (said, agrees) in [(0.55, true), (0.9, false)] {
        let lab = Lab::new();
        let plan = lab.plan(&with_head(said)).expect("a valid suite");
        lab.execute(&plan, |_| ()).expect("it ran");
        let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
        assert_eq!(summary.reproduction.len(), 1);
        assert_eq!(summary.reproduction[0].agrees, Some(agrees), "{:?}", summary.reproduction);
        let page = fs::read_to_string(lab.out().join("report.html")).expect("it was written");
        assert!(page.contains(if agrees { "as said" } else { "other than said" }));
        let text = fs::read_to_string(lab.out().join("summary.md")).expect("it was written");
        assert!(text.contains("## Beside what the suite's file says"), "{text}");
    }
    let error = refused(&with_head(0.5).replace("arms.on", "arms.onn"));
    assert!(error.contains("[measured] has an arm `onn`") && error.contains("did you mean `on`"), "{error}");
    for (was, is, said) in [
        ("n = 3", "n = 18446744073709551615", "no number of seeds"),
        ("n = 3", "n = 0", "no number of seeds"),
        ("\"probe/seg/miou\" = {", "\"probe/seg/miuo\" = {", "did you mean `probe/seg/miou`"),
        ("sd = 0.01", "sd = -1.0", "the spread 0 or more"),
    ] {
        let error = refused(&with_head(0.5).replacen(was, is, 1));
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn the_summary_has_drawings_and_hours() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    for (arm, device) in [("on", "cuda:0 (a GPU)"), ("off", "cpu")] {
        for seed in 0..3 {
            let path = lab.out().join(format!("arms/{arm}/seed-{seed}/run.json"));
            fs::write(path, json!({ "device": device, "threads": 9 }).to_string()).expect("it is there");
        }
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    // Three runs of 40 s each: on one GPU, and on nine threads.
    assert!((summary.compute.gpu_hours - 120.0 / 3600.0).abs() < 1e-12);
    assert!((summary.compute.core_hours - 9.0 * 120.0 / 3600.0).abs() < 1e-12);
    let text = fs::read_to_string(lab.out().join("summary.md")).expect("it was written");
    assert!(text.contains("0.03333 GPU hours and 0.3 core hours"), "{text}");
    for line in text.lines().filter(|line| line.starts_with("![")) {
        let path = line.rsplit_once('(').expect("a picture has a path").1.trim_end_matches(')');
        assert!(fs::read_to_string(lab.out().join(path)).expect("it was drawn").starts_with("<svg"));
    }
    // Differences and a curve of each of the two metrics.
    assert_eq!(text.matches("](summary/").count(), 4, "{text}");
}

#[test]
fn runs_that_were_made_of_other_data_or_weights_are_told() {
    let lab = Lab::new();
    let recipe = lab.folder.path().join("recipe.toml");
    let text = fs::read_to_string(&recipe).expect("it is there");
    fs::write(&recipe, format!("{text}data = {{ path = \"x\" }}\nteacher = {{ checkpoint = \"t\" }}\n"))
        .expect("a folder");
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    for (arm, seed, revision, teacher) in
        [("off", 0, "1", "t"), ("on", 0, "2", "u"), ("off", 1, "1", "v"), ("on", 1, "2", "v")]
    {
        let info = json!({ "data": "a", "revision": revision, "parents": { "teacher.checkpoint": teacher } });
        let path = lab.out().join(format!("arms/{arm}/seed-{seed}/run.json"));
        fs::write(path, info.to_string()).expect("it is there");
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("off seed 0 and on seed 0 are paired, and were made of different weights"), "{said}");
    assert!(said.contains("off seed 1 was made of other weights than off seed 0"), "{said}");
    assert!(said.contains("`teacher.checkpoint`") && !said.contains("other data"), "{said}");
    assert!(
        said.contains("different builds of dinolab: 1 (off seed 0, off seed 1), 2 (on seed 0, on seed 1)"),
        "{said}"
    );
}

#[test]
fn summary_json_has_the_documented_shape() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    report::write(&plan, provenance(), &look).expect("it was written");
    let text = fs::read_to_string(lab.out().join("summary.json")).expect("it was written");
    let summary: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!((&summary["suite"], &summary["baseline"]), (&json!("gram"), &json!("off")));
    assert_eq!(summary["metrics"], json!(["probe/seg/miou", "loss/total"]));
    let on = &summary["arms"][1];
    assert_eq!((&on["name"], &on["overrides"]), (&json!("on"), &json!({"losses.gram.enabled": true})));
    assert_eq!((&on["runs"][2]["seed"], &on["runs"][2]["dir"]), (&json!(2), &json!("arms/on/seed-2")));
    assert_eq!(on["runs"][2]["metrics"]["loss/total"], 1.02);
    let total = &on["metrics"]["loss/total"];
    assert!((total["mean"].as_f64().expect("a number") - 1.01).abs() < 1e-12, "{total}");
    assert!((total["std"].as_f64().expect("a number") - 0.01).abs() < 1e-12, "{total}");
    assert_eq!((total["ci95"].as_array().expect("an interval").len(), &total["n"]), (2, &json!(3)));
    let comparison = &summary["comparisons"][0];
    assert_eq!((&comparison["arm"], &comparison["baseline"]), (&json!("on"), &json!("off")));
    assert_eq!((&comparison["metric"], &comparison["n"]), (&json!("probe/seg/miou"), &json!(3)));
    // Nearly all of the fake's noise depends on the seed alone, so pairing takes it away.
    assert!((comparison["difference"].as_f64().expect("a number") - 0.05).abs() < 1e-6);
    assert!(comparison["p_value"].as_f64().expect("a number") < 1e-9);
    assert_eq!(comparison["verdict"], json!("higher"));
}

#[test]
fn missing_and_failed_runs_are_said_and_their_pairs_left_out() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    lab.execute(&plan, |o| o.seeds = vec![0, 1]).expect("it ran");
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    assert_eq!(summary.comparisons[0].paired.n, 1);
    assert_eq!(summary.comparisons[0].verdict, Verdict::NoInterval);
    let said = summary.warnings.join("\n");
    assert!(said.contains("on seed 1 failed") && said.contains("off seed 2 is pending"), "{said}");
    // A seed that the suite does not name any more is not in the numbers, and the report says so.
    let plan = lab.plan(&suite().replace("[0, 1, 2]", "[1, 2]")).expect("a valid suite");
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("not in the numbers: arms/off/seed-0, arms/on/seed-0"), "{said}");
}

#[test]
fn the_report_is_one_file_without_scripts_or_requests() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    let (_, path) = report::write(&plan, provenance(), &look).expect("it was written");
    let page = fs::read_to_string(path).expect("it was written");
    for outside in ["<script", "src=\"http", "href=\"http", "@import", "url(http", "<link rel=\"stylesheet"] {
        assert!(!page.contains(outside), "the page has {outside}");
    }
    for part in ["higher than off in probe", "data:image/png;base64,", "<svg", "losses.gram.enabled"] {
        assert!(page.contains(part), "the page lacks {part}");
    }
}
