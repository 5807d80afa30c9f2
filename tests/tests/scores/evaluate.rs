//! `dinolab eval`: weights of every kind side by side, resumed, and refused before any work.

use dinolab_plugins as _;
use dinolab_tests::program;
use dinolab_tests::program::{json, root, Folder};
use serde_json::Value;

/// Drawn scenes, alone in a file.
const SCENES: &str = "
[data]
plugin = \"scenes\"
size = 48
count = 40
held_out = 24
classes = 4
[probes.knn]
more_k = [1, 5]
[probes.linear_segmentation]
[probes.cls_patch_cosine]
";

/// A folder with a short run `run`, the same weights exported as `weights`, an imported ConvNeXt `convnext`, and `data.toml`.
fn lab() -> Folder {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "run"]);
    folder.succeed(&["export", "run", "--format", "safetensors", "--out", "weights"]);
    folder.write("data.toml", SCENES);
    folder
}

/// Value of a score of the weights number `weights` at the size number `size`.
fn score<'a>(eval: &'a Value, weights: usize, size: usize, name: &str) -> &'a Value {
    let (probe, name) = name.split_once('/').expect("probe/score");
    let scores = eval["weights"][weights]["sizes"][size]["scores"].as_array().expect("a list");
    scores.iter().find(|s| s["probe"] == probe && s["score"] == name).unwrap_or_else(|| panic!("{name}: {eval:#}"))
}

#[test]
fn a_key_that_is_not_read_of_a_recipe_is_refused() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", "steps=1"]);
    let eval = |set: &str| {
        folder.run(&[
            "eval",
            "run",
            "--data",
            "micro.toml",
            "--probes",
            "cls_patch_cosine",
            "--out",
            "seen",
            "--set",
            set,
        ])
    };
    for set in ["crops.mean=[0.0, 0.0, 0.0]", "batch.size=2"] {
        let ended = eval(set);
        assert!(ended.code == 2 && ended.err.contains(&format!("--set {set}: ")), "{}", ended.err);
    }
    assert_eq!(eval("data.count=32").code, 0);
}

#[test]
fn a_run_its_step_and_its_export_are_scored_side_by_side_and_done_ones_are_kept() {
    let folder = lab();
    let args = ["eval", "run", "weights", "run@8", "--data", "data.toml", "--sizes", "32,48", "--out", "seen"];
    let ended = folder.succeed(&args);
    for part in ["knn/top1", "knn/top1_k5", "linear_segmentation/miou", "run@8", "32", "48"] {
        assert!(ended.out.contains(part), "{part}: {}", ended.out);
    }
    assert!(!ended.out.contains("iou/"), "single classes are left to the files: {}", ended.out);
    let eval = json(&folder, "seen/eval.json");
    for size in 0..2 {
        for name in ["knn/top1", "linear_segmentation/miou", "linear_segmentation/iou/0", "cls_patch_cosine/mean"] {
            let (of_run, of_export) = (score(&eval, 0, size, name), score(&eval, 1, size, name));
            assert_eq!(of_run["value"], of_export["value"], "the export is the run's teacher: {name}");
            if !name.starts_with("cls") {
                let [low, value, high] =
                    [&of_run["ci95"][0], &of_run["value"], &of_run["ci95"][1]].map(|x| x.as_f64().expect("a number"));
                assert!(low <= value && value <= high && of_run["images"] == 24, "{of_run}");
            }
        }
        assert_eq!(score(&eval, 1, size, "knn/top1")["difference"]["ci95"], serde_json::json!([0.0, 0.0]));
        let other = score(&eval, 2, size, "linear_segmentation/miou");
        assert!(other["difference"]["value"] != 0.0 && other["difference"]["value"].is_number(), "{other}");
    }
    let page = folder.read("seen/eval.html");
    assert!(
        page.contains("<svg") && page.contains("In detail") && !page.contains("<script"),
        "curves, classes, no script"
    );

    // The same again measures nothing; further weights are added to what is there.
    let again = folder.succeed(&args);
    assert!(again.err.contains("6 of 6") && again.out == ended.out, "{}", again.err);
    let mut more = args.to_vec();
    more.splice(1..4, ["run@8", "run"]);
    let more = folder.succeed(&[&more[..], &["--json"]].concat());
    assert!(more.err.contains("4 of 4"), "{}", more.err);
    let printed: Value = serde_json::from_str(&more.out).expect("--json prints JSON");
    assert_eq!(printed, json(&folder, "seen/eval.json"));
    assert_eq!(score(&printed, 1, 0, "knn/top1")["value"], score(&eval, 0, 0, "knn/top1")["value"]);
}

/// A run with k-NN at the size of its crops, segmentation at three, one of them not square.
fn sized() -> Folder {
    let folder = Folder::with_micro();
    let sets = [
        "probes.knn.enabled=true",
        "probes.linear_segmentation={ enabled = true, sizes = [32, 48, \"64x32\"], iterations = 20 }",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    folder.succeed(&[&["train", "micro.toml", "--out", "run"], &sets[..]].concat());
    folder
}

#[test]
fn a_run_scores_itself_as_its_own_probes_did_at_every_size() {
    let folder = sized();
    folder.succeed(&["eval", "run", "--data", "run"]);
    let (result, eval) = (json(&folder, "run/result.json"), json(&folder, "eval/eval.json"));
    let sizes: Vec<&Value> =
        eval["weights"][0]["sizes"].as_array().expect("a list").iter().map(|s| &s["size"]).collect();
    assert_eq!(sizes, [&Value::from(32), &"64x32".into(), &48.into()]);
    let segmentation = ["linear_segmentation/miou", "linear_segmentation/accuracy"];
    let of_sizes = ["@32", "@64x32", "@48"].into_iter().enumerate();
    let of_sizes = of_sizes.flat_map(|(i, at)| segmentation.map(|name| (name, i, at)));
    let all: Vec<(&str, usize, &str)> = [("knn/top1", 0, "")].into_iter().chain(of_sizes).collect();
    for (name, i, at) in &all {
        let theirs = &result["metrics"][format!("probe/{name}{at}")];
        let ours = &score(&eval, 0, *i, name)["value"];
        let difference = theirs.as_f64().expect("a number") - ours.as_f64().expect("a number");
        assert!(difference.abs() < 1e-9, "{name}{at}: {theirs} in training, {ours}");
    }
    let probes = result["metrics"].as_object().expect("a table").keys().filter(|name| name.starts_with("probe/"));
    assert_eq!(probes.count(), all.len(), "no score is there twice: {:#}", result["metrics"]);
    // At sizes that are named all probes are taken, at all of them.
    folder.succeed(&["eval", "run", "--data", "run", "--sizes", "32,32x64", "--out", "named"]);
    let named = json(&folder, "named/eval.json");
    assert!(score(&named, 0, 1, "knn/top1")["value"].is_number());
    let drawn = score(&named, 0, 0, "linear_segmentation/miou");
    assert_eq!(
        drawn["value"],
        score(&eval, 0, 0, "linear_segmentation/miou")["value"],
        "both draw scenes at 32 pixels"
    );
}

#[test]
fn sizes_of_a_probe_count_in_its_cost_and_are_refused_where_they_do_not_fit() {
    let folder = Folder::with_micro();
    let probe = |sizes: &str| format!("probes.linear_segmentation={{ enabled = true, sizes = [{sizes}] }}");
    for (sizes, parts) in [
        ("32, 50", vec!["probes.linear_segmentation.sizes", "50", "multiple of 8", "48 or 56"]),
        ("\"64x30\"", vec!["64x30", "64x24 or 72x32"]),
        ("32, 48, 32", vec!["32 stands there twice"]),
        ("\"64 x 32\"", vec!["no size", "96x64"]),
        ("0", vec!["sizes"]),
    ] {
        let ended = folder.run(&["recipe", "check", "micro.toml", "--set", &probe(sizes)]);
        assert_eq!(ended.code, 2, "{sizes}: {} {}", ended.out, ended.err);
        for part in parts {
            assert!(ended.err.contains(part) || ended.out.contains(part), "{sizes}: {part} in {}", ended.err);
        }
    }
    let suite = "name = \"s\"\nbase = \"micro.toml\"\nseeds = [0]\nmetrics = [\"probe/knn/top1@48\", \"probe/knn/top1\"]\nbaseline = \"a\"\n\
        [set]\nprobes.knn = { enabled = true, sizes = [SIZES], train_samples = 30, test_samples = 10 }\n[[arm]]\nname = \"a\"\n[[arm]]\nname = \"b\"\nset = { \"losses.koleo.weight\" = 0.2 }\n";
    let tell = |sizes: &str| {
        folder.write("s.toml", &suite.replace("SIZES", sizes));
        let ended = folder.succeed(&["ablate", "s.toml", "--dry-run"]);
        ended.out + &ended.err
    };
    let (two, three) = (tell("32, 48"), tell("32, 48, \"64x32\""));
    assert!(two.contains("80 images") && three.contains("120 images"), "{two} {three}");
    assert!(two.contains("metric `probe/knn/top1` is not measured") && !two.contains("top1@48` is not"), "{two}");
}

#[test]
fn convnext_and_imported_weights_are_scored_too() {
    let folder = Folder::new();
    folder.write("data.toml", SCENES);
    let fixture = root().join("tests/golden/hf_mlp");
    folder.succeed(&["import", fixture.to_str().expect("UTF-8"), "--out", "hf"]);
    let convnext = "extends = \"micro.toml\"\n[backbone]\nplugin = \"convnext\"\ndims = [8, 16, 16, 32]\ndepths = [1, 1, 1, 1]\n[crops]\nglobal_size = 64\nlocal_size = 32\n[teachers.gram]\ncrop_size = 64\n";
    let recipes = root().join("recipes");
    folder.write("micro.toml", &program::MICRO.replace("RECIPES", recipes.to_str().expect("UTF-8")));
    folder.write("convnext.toml", convnext);
    folder.succeed(&["train", "convnext.toml", "--out", "convnext", "--set", "steps=1"]);
    let size = ["--sizes", "64"];
    folder.succeed(&[&["eval", "hf", "convnext", "--data", "data.toml", "--probes", "knn"], &size[..]].concat());
    let eval = json(&folder, "eval/eval.json");
    assert!((0..2).all(|i| score(&eval, i, 0, "knn/top1")["value"].is_number()));
}

#[test]
fn what_cannot_be_scored_is_refused_before_anything_is() {
    let folder = lab();
    folder.write("typo.toml", &SCENES.replace("[probes.knn]", "[probes.knm]"));
    folder.write("extra.toml", &format!("{SCENES}\n[dta]\nx = 1\n"));
    let plain = "[data]\nplugin = \"image_folder\"\npath = \"images\"\nheld_out = 0.5\n";
    folder.write("plain.toml", plain);
    folder.add_photos("images");
    let data = ["--data", "data.toml"];
    for (args, parts) in [
        (vec!["run", "--data", "data.toml", "--sizes", "32,50"], vec!["50", "multiple of 8", "48 or 56"]),
        (vec!["run", "nothing", data[0], data[1]], vec!["nothing"]),
        (vec!["run@5", data[0], data[1]], vec!["no checkpoint of step 5"]),
        (vec!["run", "--data", "nowhere.toml"], vec!["nowhere.toml"]),
        (vec!["run", data[0], data[1], "--probes", "knm"], vec!["no probe `knm`", "did you mean `knn`"]),
        (vec!["run", data[0], data[1], "--probes", "knn,knn"], vec!["named twice"]),
        (vec!["run", "--data", "typo.toml"], vec!["typo.toml", "knm"]),
        (vec!["run", "--data", "extra.toml"], vec!["extra.toml", "dta"]),
        (vec!["run", "--data", "plain.toml", "--probes", "linear_segmentation"], vec!["needs pixel masks"]),
        (vec!["run", data[0], data[1], "--set", "probes.knn.temperature=-1"], vec!["temperature"]),
        // Folders of others: a run's, and one with pictures.
        (vec!["run", data[0], data[1], "--out", "run"], vec!["not empty"]),
        (vec!["run", data[0], data[1], "--out", "images"], vec!["not empty"]),
    ] {
        let ended = folder.run(&[&["eval"], &args[..]].concat());
        assert_eq!(ended.code, 2, "{args:?}: {}", ended.err);
        for part in parts {
            assert!(ended.err.contains(part), "{args:?}: {part} in {}", ended.err);
        }
        assert!(!folder.path("eval").exists(), "{args:?}: nothing is written");
    }
    // Without a table of probes: all that the data allows.
    let ended = folder.succeed(&["eval", "run", "--data", "plain.toml"]);
    assert!(ended.out.contains("cls_patch_cosine/mean") && !ended.out.contains("knn"), "{}", ended.out);
}
