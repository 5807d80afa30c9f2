//! A recipe that says what it gave, and a run that is held to it; what Gram targets drift between refreshes.

use dinolab::report::run_page;
use dinolab_tests::program::{assert_same_weights, metrics, Folder};

/// The micro recipe with a table of what it gave: `loss/total` at this mean.
fn told(folder: &Folder, mean: f64) {
    let table = format!(
        "\n[measured]\non = \"a test\"\nn = 3\ndata = \"none\"\n[measured.metrics]\n\"loss/total\" = {{ mean = {mean}, sd = 0.2 }}\n\
         [measured.curves.\"loss/total\"]\nsteps = [1, 12]\nmean = [9.0, 8.9]\nsd = [0.1, 0.2]\n"
    );
    folder.write("told.toml", &(folder.read("micro.toml") + &table));
}

#[test]
fn a_run_is_told_whether_it_gave_what_its_recipe_says() {
    let folder = Folder::with_micro();
    told(&folder, 100.0);
    let far = folder.succeed(&["train", "told.toml", "--out", "far"]).out;
    assert!(far.contains("beside what the recipe says (3 runs on a test, 95% of further ones)"), "{far}");
    assert!(far.contains("loss/total: ") && far.contains("is outside of what the recipe says"), "{far}");
    assert!(far.contains("the data are others than those that the recipe tells of: hash none"), "{far}");
    let last = metrics(&folder, "far").last().expect("a line")["loss/total"].as_f64().expect("a number");
    told(&folder, last);
    // Another seed is a further run of the same recipe, another learning rate is not.
    let near = folder.succeed(&["train", "told.toml", "--out", "near", "--set", "seed=1"]).out;
    assert!(near.contains("as the recipe says"), "{near}");
    let other = folder.succeed(&["train", "told.toml", "--out", "other", "--set", "optimizer.lr=2e-3"]).out;
    assert!(!other.contains("the recipe says"), "{other}");
    folder.write("child.toml", "extends = \"told.toml\"\nname = \"child\"\n");
    let child = folder.succeed(&["train", "child.toml", "--out", "child"]).out;
    assert!(!child.contains("the recipe says"), "a recipe does not inherit what another gave: {child}");

    // It is no part of the recipe, and its curves are drawn behind the run's.
    folder.succeed(&["train", "micro.toml", "--out", "plain"]);
    assert_same_weights(&folder, "plain", "far", 12);
    assert!(!folder.read("far/recipe.toml").contains("measured"));
    let page = |run: &str| run_page(&folder.path(run), None).expect("a page");
    assert!(page("far").contains("Grey: 3 runs on a test") && !page("plain").contains("Grey:"));
    let wrong = folder.read("told.toml").replace("sd = 0.2 }", "sd = -1.0 }");
    folder.write("wrong.toml", &wrong);
    let refused = folder.run(&["recipe", "check", "wrong.toml"]);
    assert!(refused.code == 2 && refused.err.contains("a spread of 0 or more"), "{}", refused.err);
}

#[test]
fn gram_targets_drift_from_one_refresh_to_the_next_and_the_log_changes_no_weight() {
    let folder = Folder::with_micro();
    // Both teachers see the same crops; refreshes before steps 4 and 8.
    let gram = ["--set", "losses.gram.enabled=true", "--set", "teachers.gram.crop_size=32"];
    folder.succeed(&[&["train", "micro.toml", "--out", "plain"], &gram[..]].concat());
    folder.succeed(
        &[&["train", "micro.toml", "--out", "drift", "--set", "losses.gram.log_drift=true"], &gram[..]].concat(),
    );
    assert_same_weights(&folder, "plain", "drift", 12);
    let drift: Vec<(u64, f64)> = metrics(&folder, "drift")
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line["health/gram/drift"].as_f64()?)))
        .collect();
    let at = |step: u64| drift.iter().find(|(at, _)| *at == step).expect("every step is logged").1;
    // A line has the steps done: that of step 4, the first after the refresh, is 5.
    assert!(at(5) < 1e-9 && at(9) < 1e-9, "{drift:?}");
    assert!(at(6) > at(5) && at(8) > at(6) && at(12) > at(9), "{drift:?}");
}
