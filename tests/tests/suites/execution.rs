//! How a suite is run, stopped, continued, and tried again.

use std::fs;
use std::rc::Rc;

use dinolab::report;
use dinolab::suite::{ExecuteOptions, Status, DROPPED};

use super::lab::*;

#[test]
fn a_trial_that_was_killed_leaves_nothing_behind() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    fs::create_dir_all(lab.out().join(".trial-on/checkpoints")).expect("a temporary folder");
    lab.execute(&plan, |o| o.smoke_steps = 2).expect("it ran");
    assert!(!lab.out().join(".trial-on").exists());
}

#[test]
fn an_interrupted_suite_continues_without_repeating_finished_runs() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.stop_at.borrow_mut() = Some("on 0".into());
    let first = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(first.interrupted, Some(("on seed 0".into(), Some(20))));
    assert_eq!(lab.log(), ["off 0 from 0 to 40", "on 0 from 0 to 40"]);
    let before = fs::read(lab.out().join("arms/off/seed-0/result.json")).expect("it was finished");

    let second = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(lab.log()[0], "on 0 from 20 to 40");
    assert_eq!((lab.log().len(), second.finished, second.skipped), (5, 5, 1));
    assert_eq!(fs::read(lab.out().join("arms/off/seed-0/result.json")).expect("it is still there"), before);

    let third = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((lab.log().len(), third.skipped), (0, 6));
}

#[test]
fn a_changed_suite_does_not_mix_with_finished_runs() {
    let lab = Lab::new();
    lab.execute(&lab.plan(&suite()).expect("a valid suite"), |_| ()).expect("it ran");
    let changed = lab.plan(&format!("{}\n[set]\nsteps = 80\n", suite())).expect("a valid suite");
    let error = lab.execute(&changed, |_| ()).expect_err("the recipe changed").to_string();
    assert!(error.contains("steps: was 40, is 80"), "{error}");
    assert!(lab.log().is_empty(), "nothing may run");
}

#[test]
fn runs_of_other_recipes_are_no_results_however_they_came_into_the_folder() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    let out = plan.out.clone();
    let refused = |said: &str| {
        let error = lab.execute(&plan, |_| ()).expect_err("a run is another's").to_string();
        assert!(error.contains("another recipe") && error.contains(said), "{error}");
    };
    lab.execute(&plan, |_| ()).expect("it ran");
    let swap = |one: &str, other: &str| {
        let [one, other, aside] = [one, other, "aside"].map(|name| out.join("arms").join(name));
        fs::rename(&one, &aside).unwrap();
        fs::rename(&other, &one).unwrap();
        fs::rename(&aside, &other).unwrap();
    };
    swap("on/seed-0", "off/seed-0");
    refused("losses.gram.enabled");
    swap("on/seed-0", "off/seed-0");
    swap("on/seed-0", "on/seed-1");
    refused("seed: was 1, is 0");
    swap("on/seed-0", "on/seed-1");
    let recipe = out.join("arms/on/seed-0/recipe.toml");
    let text = fs::read_to_string(&recipe).unwrap();
    fs::remove_file(out.join("suite.json")).unwrap();
    fs::write(&recipe, text.replace("steps = 40", "steps = 30")).unwrap();
    refused("steps: was 30, is 40");
    fs::remove_file(&recipe).unwrap();
    refused("which cannot be read");
    fs::write(&recipe, text).unwrap();
    assert_eq!(lab.execute(&plan, |_| ()).expect("all is as it was").skipped, 6);
}

#[test]
fn seeds_can_be_added_to_a_finished_suite() {
    let lab = Lab::new();
    lab.execute(&lab.plan(&suite()).expect("a valid suite"), |_| ()).expect("it ran");
    let more = lab.plan(&suite().replace("[0, 1, 2]", "[0, 1, 2, 3]")).expect("a valid suite");
    lab.execute(&more, |_| ()).expect("it ran");
    assert_eq!(lab.log(), ["off 3 from 0 to 40", "on 3 from 0 to 40"]);
}

#[test]
fn a_failed_run_is_recorded_and_the_others_go_on() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len()), (5, 1));
    *lab.trainer.fail_at.borrow_mut() = None;
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").failed.len(), 1, "it stays failed");
    assert!(lab.log().is_empty());
    let retried = lab.execute(&plan, |o| o.retry_failed = true).expect("it ran");
    assert_eq!((retried.finished, retried.failed.len()), (1, 0));
}

#[test]
fn fail_fast_ends_at_the_first_failure() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 0".into());
    lab.execute(&plan, |o| o.fail_fast = true).expect("it ran");
    assert_eq!(lab.log().len(), 2);
}

#[test]
fn a_run_that_another_process_holds_is_left_alone() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    fs::create_dir_all(lab.out().join("locks")).expect("a temporary folder");
    let held = fs::File::create(lab.out().join("locks/off-seed-1.lock")).expect("a temporary folder");
    fs4::FileExt::lock(&held).expect("nobody else holds it");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.elsewhere), (5, vec!["off seed 1".to_string()]));
}

#[test]
fn a_trial_of_every_arm_comes_before_any_run() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 0".into());
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("an arm is broken").to_string();
    assert!(error.contains("on: the loss is not finite"), "{error}");
    assert_eq!(lab.log(), ["off 0 from 0 to 2", "on 0 from 0 to 2"], "only trials");
    assert!(!lab.out().join("arms").exists());
}

#[test]
fn a_run_that_fails_is_tried_again_as_often_as_the_suite_says() {
    let lab = Lab::new();
    let plan = lab.plan(&format!("retries = 2\n{}", suite())).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    *lab.trainer.fails.borrow_mut() = 2;
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len()), (6, 0));
    assert_eq!(lab.log().iter().filter(|run| run.starts_with("on 1")).count(), 3);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let again = "on seed 1 was tried again 2 times after: the loss is not finite";
    assert_eq!(summary.warnings.iter().filter(|w| w.contains(again)).count(), 1, "{:?}", summary.warnings);

    // What was used up stays used up, until the user asks for more.
    let lab = Lab::new();
    let plan = lab.plan(&format!("retries = 1\n{}", suite())).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    let tries = |change: fn(&mut ExecuteOptions)| {
        assert_eq!(lab.execute(&plan, change).expect("it ran").failed.len(), 1);
        lab.log().iter().filter(|run| run.starts_with("on 1")).count()
    };
    assert_eq!([tries(|_| ()), tries(|_| ()), tries(|o| o.retry_failed = true)], [2, 0, 2]);
}

#[test]
fn what_does_not_fit_is_begun_anew_with_more_micro_batches_if_the_suite_says_so() {
    let lab = Lab { trainer: Rc::new(Trainer { fits: 4, ..Trainer::default() }), ..Lab::new() };
    let plan = lab.plan(&suite()).expect("a valid suite");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").failed.len(), 6);

    let lab = Lab { trainer: Rc::new(Trainer { fits: 4, ..Trainer::default() }), ..Lab::new() };
    let text = format!("on_out_of_memory = \"more_micro_batches\"\n{}", suite());
    let plan = lab.plan(&text).expect("a valid suite");
    let tally = lab.execute(&plan, |o| o.smoke_steps = 2).expect("a trial that does not fit is no broken arm");
    assert_eq!((tally.finished, tally.failed.len()), (6, 0));
    let recipe = fs::read_to_string(lab.out().join("arms/on/seed-1/recipe.toml")).expect("it was run");
    // 12 images in 1, 2, 4 parts.
    assert!(recipe.contains("micro_batches = 4"), "{recipe}");
    // The same command knows it, and does nothing twice.
    let plan = lab.plan(&text).expect("arms may differ in what made them fit");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").skipped, 6);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("off seed 0 did not fit and was begun anew with batch.micro_batches = 4"), "{said}");
}

#[test]
fn a_run_that_failed_before_it_began_is_no_other_suites() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").failed.len(), 1);
    // As a run leaves it whose weights to start from were not there.
    fs::remove_file(lab.out().join("arms/on/seed-1/recipe.toml")).expect("the fake writes it first");
    *lab.trainer.fail_at.borrow_mut() = None;
    assert_eq!(lab.execute(&plan, |_| ()).expect("the others are done").failed.len(), 1);
    let tally = lab.execute(&plan, |o| o.retry_failed = true).expect("it is done now");
    assert_eq!((tally.finished, tally.failed.len()), (1, 0));
}

#[test]
fn a_rule_drops_a_run_or_its_arm_and_says_so() {
    let rule = |more: &str| format!("{}\n[[drop]]\nabove = 9.0\n{more}\n", suite());
    let lab = Lab::new();
    let plan = lab.plan(&rule("after = 50")).expect("a valid suite");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").finished, 6, "the rule holds from step 50 on");
    let said = "a rule of [[drop]] holds from step 50 on, and no arm has more than 40";
    assert!(plan.warnings.iter().any(|warning| warning == said), "{:?}", plan.warnings);

    let lab = Lab::new();
    let plan = lab.plan(&rule("")).expect("a valid suite");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len(), tally.interrupted), (3, 3, None));
    assert_eq!(lab.log().len(), 6, "every seed is tried");
    assert!(tally.failed[0].1.contains("dropped after step 0: loss/total = 9.5000 is above 9"), "{:?}", tally.failed);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("on seed 2 was dropped after step 0") && said.contains("looks better than it is"), "{said}");

    let lab = Lab::new();
    let plan = lab.plan(&rule("arm = true")).expect("a valid suite");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(lab.log().iter().filter(|run| run.starts_with("on")).count(), 1, "one seed drops the arm");
    assert!(tally.failed[2].1.contains("dropped with its arm: see on seed 0"), "{:?}", tally.failed);

    // Nor is a dropped run done again, from behind what the rule forbids; nor do runs of another rule count with these.
    let again = lab.execute(&plan, |o| o.retry_failed = true).expect("nothing is left");
    assert_eq!((again.finished, again.failed.len(), again.skipped), (0, 3, 3));
    let error = lab.plan(&rule("arm = true\nafter = 2")).map(|plan| plan.check_folder()).expect("a valid suite");
    assert!(error.expect_err("other rules").to_string().contains("was held to other rules than [[drop]]"));
    // A seed that was finished when a later one dropped the arm goes with it.
    let lab = Lab::new();
    let last = format!("{}\n[[drop]]\nabove = 1.015\nafter = 40\narm = true\n", suite());
    let plan = lab.plan(&last).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    let status = |seed: u64| Status::of(&lab.out().join(format!("arms/on/seed-{seed}"))).expect("it was begun");
    assert!((0..3).all(|seed| matches!(status(seed), Status::Failed(error) if error.starts_with(DROPPED))));

    for (bounds, said) in [("above = nan", "by NaN"), ("above = 1.0\nbelow = 2.0", "let `below` be at most")] {
        let error = refused(&format!("{}\n[[drop]]\n{bounds}\n", suite()));
        assert!(error.contains(said), "{error}");
    }
    let lab = Lab::new();
    let plan = lab.plan(&rule("metric = \"loss/dinoo\"")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("a rule is misspelt").to_string();
    assert!(error.contains("the rule's metric `loss/dinoo` is not measured"), "{error}");

    // A signal reaches a run that is under rules.
    let lab = Lab::new();
    let plan = lab.plan(&rule("metric = \"loss/dino\"")).expect("a valid suite");
    *lab.trainer.stop_at.borrow_mut() = Some("on 0".into());
    assert!(lab.execute(&plan, |_| ()).expect("it ran").interrupted.is_some());
}

#[test]
fn a_trial_finds_a_metric_that_nothing_measures() {
    let lab = Lab::new();
    let plan = lab.plan(&suite().replace("seg/miou", "seg/miuo")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("a metric is misspelt").to_string();
    assert!(error.contains("`probe/seg/miuo` is not measured; did you mean `probe/seg/miou`"), "{error}");
    let lab = Lab::new();
    let plan = lab.plan(&suite().replace("loss/total", "loss/none")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("no arm has that loss").to_string();
    assert!(error.contains("`loss/none` is not measured"), "{error}");
}

#[test]
fn a_selection_runs_only_what_was_asked_for() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |o| (o.arms, o.seeds) = (vec!["on".into()], vec![2])).expect("it ran");
    assert_eq!(lab.log(), ["on 2 from 0 to 40"]);
    let error = lab.execute(&plan, |o| o.arms = vec!["onn".into()]).expect_err("no such arm").to_string();
    assert!(error.contains("did you mean `on`"), "{error}");
}
