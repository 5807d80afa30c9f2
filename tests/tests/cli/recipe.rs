//! `dinolab plugins`, `dinolab recipe`: what they print, and how they end.

use dinolab_tests::program::{assert_same_weights, root, Ended, Folder};

const RECIPE: &str = r#"name = "toy"
steps = 100
[backbone]
plugin = "toy_matrix"
dim = 8
[data]
plugin = "toy_greys"
[teacher]
plugin = "ema"
[losses.toy_loss]
"#;

fn with_toy(more: &str) -> (Folder, String) {
    let folder = Folder::new();
    folder.write("toy.toml", &format!("{RECIPE}{more}\n"));
    (folder, "toy.toml".into())
}

#[test]
fn plugins_of_other_crates_are_listed() {
    let folder = Folder::new();
    let Ended { code, out, .. } = folder.run(&["plugins"]);
    assert_eq!(code, 0);
    for name in ["toy_matrix", "linear_warmup_cosine", "rope_box", "gram_anchor", "knn"] {
        assert!(out.contains(name), "{name} is missing in\n{out}");
    }
    assert!(!out.contains('\x1b'), "no colour in a pipe");
    let Ended { out: losses, .. } = folder.run(&["plugins", "loss"]);
    assert!(losses.contains("toy_loss") && !losses.contains("rope_box"), "{losses}");
}

#[test]
fn a_plugin_shows_keys_types_defaults_and_docs() {
    let Ended { code, out, .. } = Folder::new().run(&["plugins", "backbone", "toy_matrix"]);
    assert_eq!(code, 0);
    let row = |key: &str| {
        let line = out.lines().find(|l| l.trim_start().starts_with(key)).unwrap_or_else(|| panic!("{key}: {out}"));
        line.split("  ").map(str::trim).filter(|c| !c.is_empty()).map(String::from).collect::<Vec<_>>()
    };
    assert!(out.contains("One matrix over patches.\n\nFor tests."), "{out}");
    assert_eq!(row("dim"), ["dim", "whole number, 0 or more", "required", "Width of the features."]);
    assert_eq!(row("patch_size"), ["patch_size", "whole number, 0 or more", "16", "Side of a patch in pixels."]);
}

#[test]
fn plugins_as_json_carry_their_schemas() {
    let Ended { out, .. } = Folder::new().run(&["plugins", "backbone", "toy_matrix", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json[0]["schema"]["properties"]["patch_size"]["default"], 16);
}

#[test]
fn unknown_kinds_and_names_have_a_suggestion_and_exit_code_2() {
    let folder = Folder::new();
    let Ended { code, err, .. } = folder.run(&["plugins", "losss"]);
    assert_eq!(code, 2);
    assert!(err.starts_with("error: there is no kind of plugin `losss`\n  help: did you mean `loss`?"), "{err}");
    let Ended { code, err, .. } = folder.run(&["plugins", "loss", "toy_los"]);
    assert_eq!(code, 2);
    assert!(err.starts_with("error: there is no loss plugin `toy_los`\n  help: did you mean `toy_loss`?"), "{err}");
}

#[test]
fn show_prints_a_recipe_that_resolves_to_itself() {
    let (folder, path) = with_toy("");
    let Ended { code, out, err } = folder.run(&["recipe", "show", &path, "--set", "optimizer.lr=2e-3"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("lr = 0.002"), "{out}");
    assert!(out.contains("# --set optimizer.lr=2e-3"), "{out}");
    assert!(out.contains("# toy.toml:2"), "{out}");
    folder.write("saved.toml", &out);
    let Ended { out: diff, .. } = folder.run(&["recipe", "diff", &path, "saved.toml"]);
    assert_eq!(diff.trim(), "optimizer.lr  0.001 -> 0.002");
    let Ended { out: same, .. } = folder.run(&["recipe", "diff", "saved.toml", "saved.toml"]);
    assert_eq!(same, "no difference\n");
    folder.write("ramp.toml", "extends = \"toy.toml\"\n[optimizer]\nlr = { plugin = \"constant\", value = 1 }\n");
    let Ended { out: ramp, .. } = folder.run(&["recipe", "diff", &path, "ramp.toml"]);
    assert_eq!(ramp.trim(), "optimizer.lr  0.001 -> { plugin = \"constant\", value = 1.0 }");
}

#[test]
fn run_folders_stand_for_their_recipe() {
    let (folder, path) = with_toy("");
    std::fs::create_dir(folder.path("run")).unwrap();
    folder.write("run/recipe.toml", &RECIPE.replace("steps = 100", "steps = 50"));
    let Ended { out: diff, .. } = folder.run(&["recipe", "diff", &path, "run"]);
    assert_eq!(diff.trim(), "steps  100 -> 50");
}

#[test]
fn show_says_what_a_recipe_changes_of_its_base() {
    let (folder, path) = with_toy("");
    folder.write("child.toml", "extends = \"toy.toml\"\nsteps = 7\n");
    let Ended { code, out, .. } = folder.run(&["recipe", "show", "child.toml", "--diff-base"]);
    assert_eq!((code, out.trim()), (0, "steps  100 -> 7"));
    let Ended { code, err, .. } = folder.run(&["recipe", "show", &path, "--diff-base"]);
    assert_eq!(code, 2);
    assert!(err.contains("toy.toml extends nothing"), "{err}");
}

#[test]
fn the_timeline_draws_schedules_and_lists_events() {
    let (folder, path) = with_toy(
        "[optimizer]\nlr = { plugin = \"linear_warmup\", peak = 1e-3, warmup_steps = 10 }\n[teachers.gram]\nplugin = \"gram_anchor\"\nrefresh = { every = 20 }\n",
    );
    let Ended { code, out, err } = folder.run(&["recipe", "show", &path, "--timeline"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("optimizer.weight_decay  0.04 throughout"), "{out}");
    assert!(out.contains("optimizer.lr  "), "{out}");
    assert!(out.contains("teachers.gram (gram_anchor)\n  step "), "{out}");
}

#[test]
fn check_reports_every_recipe_and_ends_with_2() {
    let (folder, path) = with_toy("");
    folder.write("typo.toml", &RECIPE.replace("dim = 8", "dmi = 8"));
    let Ended { code, out, err } = folder.run(&["recipe", "check", "typo.toml", &path]);
    assert_eq!(code, 2);
    assert!(out.starts_with("ok  toy.toml  "), "{out}");
    let expected =
        "error: typo.toml:5:1: backbone.dmi: unknown key\n  |\n5 | dmi = 8\n  | ^^^\n  help: did you mean `dim`?";
    assert!(err.starts_with(expected), "{err}");
    assert_eq!(folder.run(&["recipe", "check", &path]).code, 0);
}

#[test]
fn a_misspelt_environment_variable_is_named() {
    let (folder, path) = with_toy("");
    let Ended { code, err, .. } =
        folder.run_with(&[("DINOLAB_LOSSES__TOY_LOSS__WIEGHT", "2")], &["recipe", "check", &path]);
    assert_eq!(code, 2);
    let expected = "error: environment DINOLAB_LOSSES__TOY_LOSS__WIEGHT: losses.toy_loss.wieght: unknown key\n  \
        help: did you mean `weight`?";
    assert!(err.starts_with(expected), "{err}");
}

#[test]
fn set_wins_over_the_environment() {
    let (folder, path) = with_toy("");
    // The last is no key.
    let env = [("DINOLAB_SEED", "3"), ("DINOLAB_BATCH__SIZE", "8"), ("DINOLAB_CUDA_SYNC", "0")];
    let Ended { code, out, .. } = folder.run_with(&env, &["recipe", "show", &path, "--set", "seed=4"]);
    assert_eq!(code, 0);
    assert!(out.lines().any(|l| l.starts_with("seed = 4") && l.ends_with("# --set seed=4")), "{out}");
    assert!(
        out.lines().any(|l| l.starts_with("size = 8") && l.ends_with("# environment DINOLAB_BATCH__SIZE")),
        "{out}"
    );
}

#[test]
fn cost_is_told_without_allocating() {
    let (folder, path) = with_toy("");
    // 3 * 16 * 16 * 2e10 numbers: 61 TB, if anything were allocated.
    let args = ["recipe", "check", &path, "--cost", "--set", "backbone.dim=20000000000"];
    let Ended { code, out, err } = folder.run(&args);
    assert_eq!(code, 0, "{err}");
    // 2 x 256 + 8 x 49 patches of the student thrice, 2 x 256 of the teacher once, 1e6 each.
    assert!(out.contains("operations 3.22 GFLOP an image"), "{out}");
    assert!(out.contains("15.4 T"), "{out}");
    assert!(out.contains("EMA teacher"), "{out}");
}

#[test]
fn explain_says_value_origin_and_reader() {
    let (folder, path) = with_toy("weight = 2.5");
    let row = |out: &str, name: &str| {
        let line = out.lines().find(|l| l.trim_start().starts_with(name)).map(|l| l.trim_start()[name.len()..].trim());
        line.unwrap_or_else(|| panic!("{name}: {out}")).to_string()
    };
    let Ended { code, out, .. } = folder.run(&["recipe", "explain", "losses.toy_loss.weight", &path]);
    assert_eq!(code, 0);
    let rows = ["value", "from", "read by", "type", "default"].map(|name| row(&out, name));
    assert_eq!(rows, ["2.5", "toy.toml:11", "training step", "number or scheduler, -1000000 to 1000000", "1.0"]);
    let Ended { out, .. } = folder.run(&["recipe", "explain", "backbone.patch_size", &path]);
    assert_eq!(["value", "from", "read by"].map(|n| row(&out, n)), ["16", "default", "backbone plugin `toy_matrix`"]);
    assert_eq!(row(&out, "doc"), "Side of a patch in pixels.");
    let tiny = root().join("recipes/tiny.toml").to_string_lossy().into_owned();
    let Ended { out, .. } = folder.run(&["recipe", "explain", "backbone.dim", &tiny]);
    assert!(out.contains("the preset vit_tiny_test, chosen by") && out.contains("tiny.toml:13"), "{out}");
    let Ended { code, err, .. } = folder.run(&["recipe", "explain", &path, "steps"]);
    assert!(code == 2 && err.contains(&format!("dinolab recipe explain steps {path}")), "{err}");
    let Ended { code, err, .. } = folder.run(&["recipe", "explain", "backbone.patchsize", &path]);
    assert_eq!(code, 2);
    assert!(err.contains("did you mean `backbone.patch_size`?"), "{err}");
    let Ended { code, err, .. } = folder.run(&["recipe", "explain", "losses.toy_los.weight", &path]);
    assert!(code == 2 && err.contains("known: losses.toy_loss"), "{err}");
}

#[test]
fn the_schema_knows_plugins_of_other_crates() {
    let Ended { code, out, .. } = Folder::new().run(&["recipe", "schema"]);
    assert_eq!(code, 0);
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#");
    let backbones = schema["properties"]["backbone"]["anyOf"].as_array().unwrap();
    let toy = backbones.iter().find(|b| b["title"] == "toy_matrix").unwrap();
    assert_eq!(toy["required"], serde_json::json!([]));
    assert!(toy["properties"]["dim"].is_object());
    assert!(schema["properties"]["losses"]["properties"]["toy_loss"].is_object());
    let Ended { out, .. } = Folder::new().run(&["recipe", "schema", "suite"]);
    let suite: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(suite["properties"]["seeds"].is_object());
}

#[test]
fn completions_are_printed() {
    let Ended { code, out, .. } = Folder::new().run(&["completions", "bash"]);
    assert_eq!(code, 0);
    assert!(out.contains("dinolab"), "{out}");
}

#[test]
fn ranges_are_shown_where_keys_are() {
    let Ended { out, .. } = Folder::new().run(&["plugins", "loss", "dino"]);
    for shown in [
        "number, 0.001 to 100",
        "number or scheduler, 0.001 to 100",
        "whole number, 1 to 1000",
        "number, above 0, at most 2",
    ] {
        assert!(out.contains(shown), "{shown}: {out}");
    }
    let (folder, path) = with_toy("");
    let Ended { out, .. } = folder.run(&["recipe", "explain", "optimizer.eps", &path]);
    assert!(out.contains("number, 1e-20 to 1000"), "{out}");
    let Ended { out, .. } = Folder::new().run(&["recipe", "schema"]);
    let schema: serde_json::Value = serde_json::from_str(&out).unwrap();
    let momentum = schema["properties"]["teacher"]["anyOf"].as_array().unwrap().iter().find(|t| t["title"] == "ema");
    assert_eq!(momentum.unwrap()["properties"]["momentum"]["maximum"], 1);
}

#[test]
fn a_run_of_a_million_million_steps_is_checked_and_drawn_at_once() {
    let begin = std::time::Instant::now();
    let (folder, path) = with_toy("[teachers.gram]\nplugin = \"gram_anchor\"\nrefresh = { every = 1 }\n");
    let lr = "optimizer.lr={ plugin = 'linear_warmup', peak = 1e-3, warmup_steps = 10 }";
    let sets = ["--set", "steps=1000000000000", "--set", lr];
    assert_eq!(folder.run(&[&["recipe", "check", &path], &sets[..]].concat()).code, 0);
    let Ended { code, out, .. } = folder.run(&[&["recipe", "show", &path, "--timeline"], &sets[..]].concat());
    assert_eq!(code, 0);
    assert!(out.contains("and so on every 1 steps: refreshes 13 to"), "{out}");
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());
}

#[test]
fn keys_that_nothing_reads_now_are_told_by_check() {
    let folder = Folder::with_micro();
    let ended = folder.succeed(&["recipe", "check", "micro.toml"]);
    assert!(ended.err.contains("note: ") && ended.err.contains("teachers.gram.crop_size"), "{}", ended.err);
    let sets = ["losses.koleo.enabled=false", "losses.koleo.topk=3", "losses.dino.center_momentum=0.5"];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["recipe", "check", "micro.toml"].into_iter().chain(sets).collect();
    let ended = folder.succeed(&args);
    for said in ["losses.koleo.topk: is off, so nothing reads", "it is read with centering = \"softmax\" only"] {
        assert!(ended.err.lines().any(|l| l.starts_with("warning: ") && l.contains(said)), "{said}: {}", ended.err);
    }
}

#[test]
fn a_window_that_the_model_cannot_be_shown_is_refused_before_the_run() {
    let folder = Folder::with_micro();
    let check = |set: &str| {
        let probe = format!("probes.linear_segmentation={{ enabled = true, {set} }}");
        folder.run(&["recipe", "check", "micro.toml", "--set", &probe])
    };
    let ended = check("window = 20");
    let said = "probes.linear_segmentation.window: ";
    assert!(ended.code == 2 && ended.err.contains(said) && ended.err.contains("use 16 or 24"), "{}", ended.err);
    // Windows end where the image does.
    let ended = check("window = 20, sizes = [16]");
    assert_eq!(ended.code, 0, "{}", ended.err);
}

#[test]
fn probes_that_could_never_be_taken_are_refused_before_the_run() {
    let folder = Folder::with_micro();
    for (set, said) in [
        ("probes.linear_classification.penalties=[]", "at least 1 values"),
        ("probes.robustness.corruptions=[]", "at least 1 values"),
        ("probes.few_shot.shots=[]", "at least 1 values"),
        ("probes.tracking.frames=films", "of `frames` and `masks` one is given"),
        ("probes.dse.image_clusters=16", "cannot put 16 patches of an image"),
        ("probes.knn.k=0", "expected a whole number, 1 to"),
    ] {
        let ended = folder.run(&["recipe", "check", "micro.toml", "--set", set]);
        assert!(ended.code == 2 && ended.err.contains(said), "{set}: {}", ended.err);
    }
}

#[test]
fn one_of_several_choices_takes_the_place_of_another_below_it() {
    let folder = Folder::with_micro();
    let text = |base: &str, value: &str| {
        format!("extends = \"{base}\"\nname = \"x\"\n[backbone.pos_encoding]\nperiods = {value}\n")
    };
    folder.write("base.toml", &text("micro.toml", "{ base = 50.0 }"));
    folder.write("range.toml", &text("base.toml", "{ range = [0.5, 20.0] }"));
    let shown = folder.succeed(&["recipe", "show", "range.toml"]).out;
    assert!(shown.contains("range = [0.5, 20.0]") && !shown.contains("base = 50"), "{shown}");
    // The same choice is changed in place, and a run's own recipe can be overridden.
    folder.succeed(&["train", "base.toml", "--out", "run", "--set", "steps=1"]);
    let set = ["--set", "backbone.pos_encoding.periods={ range = [0.5, 20] }"];
    let shown = folder.succeed(&[&["recipe", "show", "run"][..], &set].concat()).out;
    assert!(shown.contains("range = [0.5, 20") && !shown.contains("base = 50"), "{shown}");
}

#[test]
fn what_features_over_a_run_does_not_read_is_refused() {
    let folder = Folder::new();
    for option in [&["--size", "32"][..], &["--patch", "1,1"], &["--format", "npy"], &["--no-pictures"]] {
        let ended = folder.run(&[&["features", "--over", "run"], option].concat());
        assert!(ended.code == 2 && ended.err.contains("cannot be used with"), "{option:?}: {}", ended.err);
    }
}

#[test]
fn data_that_are_here_are_held_to_what_they_are_and_those_elsewhere_are_a_warning() {
    let folder = Folder::with_micro();
    folder.add_photos("photos");
    let check =
        |set: &str| folder.run(&["recipe", "check", "micro.toml", "--set", "data.plugin=image_folder", "--set", set]);
    let ended = check("data.path=elsewhere");
    assert!(ended.code == 0 && ended.err.contains("warning: micro.toml: data: elsewhere"), "{}", ended.err);
    assert_eq!(check("data.path=photos").code, 0);
    std::fs::create_dir(folder.path("masks")).expect("a new folder");
    let masks = ["--set", "data.path=photos", "--set", "data.masks=masks"];
    let ended =
        folder.run(&[&["recipe", "check", "micro.toml", "--set", "data.plugin=image_folder"], &masks[..]].concat());
    assert!(ended.code == 2 && ended.err.contains("have no mask here"), "{}", ended.err);
}

#[test]
fn files_of_another_kind_and_recipes_that_teach_nothing_are_named() {
    let folder = Folder::with_micro();
    folder.write("chain.toml", "name = \"c\"\n[[stage]]\nname = \"a\"\nrecipe = \"micro.toml\"\n");
    folder.write("suite.toml", "name = \"s\"\nbase = \"micro.toml\"\n[[arm]]\nname = \"a\"\n");
    for (file, command) in [("chain.toml", "dinolab stages chain.toml"), ("suite.toml", "dinolab ablate suite.toml")] {
        let ended = folder.run(&["train", file]);
        assert!(ended.code == 2 && ended.err.contains(command), "{}", ended.err);
    }
    let check = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        folder.run(&["recipe", "check", "micro.toml"].into_iter().chain(sets).collect::<Vec<_>>())
    };
    let deep = format!("{}=1", vec!["a"; 20_000].join("."));
    let ended = check(&[&deep]);
    assert!(ended.code == 2 && ended.err.contains("more than 64 parts"), "{}", ended.code);
    let none = ["losses.dino.weight=0", "losses.ibot.weight=0", "losses.koleo.weight=0"];
    assert!(check(&none).err.contains("all losses have the weight 0"));
    assert!(!check(&none[..2]).err.contains("all losses have the weight 0"));
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", "steps=1"]);
    let frozen = ["teacher={ plugin = 'frozen', checkpoint = 'run' }", "losses.inpainting.weight=1"];
    let ended = check(&frozen);
    assert!(ended.code == 0 && ended.err.contains("sees whole images"), "{}", ended.err);
}

/// What leaves the GPU's memory is counted as the host's.
#[test]
fn pinned_host_memory_is_told_with_the_cost() {
    let folder = Folder::new();
    let recipe = root().join("recipes/vit_7b_one_card.toml");
    let path = recipe.to_str().expect("a path in UTF-8");
    let told = |sets: &[&str]| {
        let args = ["recipe", "check", "--cost", path].into_iter().chain(sets.iter().flat_map(|set| ["--set", *set]));
        let out = folder.succeed(&args.collect::<Vec<_>>()).out;
        let gib = |line: &str| line.split(" GiB").next()?.split_whitespace().next_back()?.parse::<f64>().ok();
        let find =
            |word: &str| out.lines().filter(|line| line.contains("GiB")).find(|line| line.contains(word)).and_then(gib);
        (find("together").expect("a sum"), find("pinned host memory").unwrap_or(0.0))
    };
    let (all, none) = told(&["optimizer.moments=f32"]);
    assert_eq!(none, 0.0);
    for sets in [&["offload"][..], &["offload_moments"], &["offload", "offload_moments"]] {
        let sets: Vec<String> = sets.iter().map(|key| format!("optimizer.{key}=true")).collect();
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(["optimizer.moments=f32"]).collect();
        let (gpu, host) = told(&sets);
        assert!(host > 20.0 && (gpu + host - all).abs() < 0.05, "{sets:?}: {gpu} + {host}, and {all} in all");
    }
}

#[test]
fn an_update_in_the_backward_pass_is_refused_where_it_needs_all_gradients() {
    let folder = Folder::with_micro();
    let check = |sets: &[&str]| {
        let sets = ["optimizer.update=fused"].iter().chain(sets).flat_map(|set| ["--set", set]);
        let ended = folder.run(&["recipe", "check", "micro.toml"].into_iter().chain(sets).collect::<Vec<_>>());
        (ended.code, ended.err)
    };
    assert_eq!(check(&[]).0, 0);
    for (set, key) in [
        ("batch.micro_batches=2", "optimizer.update: "),
        ("optimizer.plugin=muon", "the optimizer `muon` needs all gradients"),
        ("log.histograms_every=5", "log.histograms_every: "),
    ] {
        let (code, said) = check(&[set]);
        assert!(code == 2 && said.contains(key), "{set}: {said}");
    }
    // On a CPU all gradients are kept, and the numbers are those of a GPU: what was clipped is clipped by the norm before.
    folder.succeed(&["train", "micro.toml", "--out", "fused", "--set", "optimizer.update=fused"]);
    folder.succeed(&["train", "micro.toml", "--out", "stopped", "--set", "optimizer.update=fused", "--set", "steps=5"]);
    folder.succeed(&["train", "micro.toml", "--out", "stopped", "--set", "optimizer.update=fused", "--resume"]);
    assert_same_weights(&folder, "fused", "stopped", 12);
}

#[test]
fn what_would_change_nothing_is_said_before_a_run() {
    let folder = Folder::new();
    let tiny = root().join("recipes/tiny.toml");
    let tiny = tiny.to_str().expect("a path in UTF-8");
    let check = |sets: &[&str]| {
        let sets = ["device=cpu"].iter().chain(sets).flat_map(|set| ["--set", set]);
        let ended = folder.run(&["recipe", "check", tiny].into_iter().chain(sets).collect::<Vec<_>>());
        (ended.code, ended.err)
    };
    // The Gram teacher of `tiny.toml` begins at step 150.
    let (code, said) = check(&["losses.gram.enabled=true", "steps=150"]);
    assert!(code == 0 && said.contains("teachers.gram: is asked at none of 150 steps"), "{said}");
    assert!(!check(&["losses.gram.enabled=true", "steps=151"]).1.contains("is asked at none"));
    let (code, said) = check(&["optimizer.offload=true"]);
    assert!(code == 0 && said.contains("nothing reads optimizer.offload"), "{said}");
    let (code, said) = check(&["optimizer.offload_moments=true"]);
    assert!(code == 0 && said.contains("nothing reads optimizer.offload_moments"), "{said}");
    let (code, said) = check(&["crops.resolutions=[]"]);
    assert!(code == 2 && said.contains("crops.resolutions: the list is empty"), "{said}");
    // A run is extended by the recipe in its folder.
    std::fs::create_dir(folder.path("run")).unwrap();
    folder.write("run/recipe.toml", "steps = 3\n");
    folder.write("child.toml", "extends = \"run\"\n");
    let ended = folder.run(&["recipe", "check", "child.toml"]);
    assert!(
        ended.code == 2 && ended.err.contains("run is a folder") && ended.err.contains("run/recipe.toml"),
        "{}",
        ended.err
    );
}
