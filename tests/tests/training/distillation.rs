//! A small student that learns from a frozen large model.

use dinolab_tests::program::{assert_same_weights, json, metrics, root, Folder};
use serde_json::Value;

/// The micro recipe, taught by the run `teacher`.
const STUDENT: &str = r#"
extends = "micro.toml"
name = "student"
[teacher]
plugin = "frozen"
checkpoint = "teacher"
momentum = 0.9
"#;

/// A folder with a finished run `teacher` of the micro recipe, and `student.toml`.
fn taught() -> Folder {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "teacher"]);
    folder.write("student.toml", STUDENT);
    folder
}

fn losses(folder: &Folder, run: &str, name: &str) -> Vec<f64> {
    let value = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")[name].as_f64().expect("a loss");
    folder.read(&format!("{run}/metrics.jsonl")).lines().map(value).collect()
}

#[test]
fn the_targets_are_those_of_the_teachers_run() {
    let folder = taught();
    // Started from the same weights, the first step has the same teacher, whether it is one's own or a frozen one; from
    // then on only one of them moves.
    let start = ["--set", "init_from=teacher"];
    folder.succeed(&[&["train", "micro.toml", "--out", "own"][..], &start].concat());
    folder.succeed(&[&["train", "student.toml", "--out", "frozen"][..], &start].concat());
    for of_targets in ["health/dino/target_entropy", "health/ibot/marginal_entropy"] {
        let (own, frozen) = (losses(&folder, "own", of_targets), losses(&folder, "frozen", of_targets));
        assert_eq!(own[0], frozen[0], "{of_targets}");
        assert_ne!(own[5], frozen[5], "{of_targets}");
    }
}

#[test]
fn a_distilled_student_sees_whole_crops() {
    // `get_student_output` of the reference hands masks to the student only if `distillation.enabled` is false; the patches of
    // the iBOT loss are those of the masks all the same.
    let folder = taught();
    let first = |recipe: &str, ratio: &str, loss: &str| {
        let run = format!("{recipe}-{ratio}");
        if !folder.path(&run).exists() {
            let set = format!("masking.ratio=[{ratio}, {ratio}]");
            let recipe = format!("{recipe}.toml");
            let args =
                ["train", &recipe, "--out", &run, "--set", "steps=1", "--set", &set, "--set", "init_from=teacher"];
            folder.succeed(&args);
        }
        losses(&folder, &run, loss)[0]
    };
    for loss in ["loss/dino", "loss/koleo"] {
        assert_eq!(first("student", "0.1", loss), first("student", "0.5", loss), "{loss} of no hidden patch");
        assert_ne!(first("micro", "0.1", loss), first("micro", "0.5", loss), "{loss} of hidden patches");
    }
    assert_ne!(first("student", "0.1", "loss/ibot"), first("student", "0.5", "loss/ibot"), "other patches count");
    // Student and teacher are equal and see the same, so the loss is near the least that it can be: lower than with patches hidden.
    assert!(first("student", "0.5", "loss/ibot") < first("micro", "0.5", "loss/ibot"));
}

#[test]
fn a_student_of_another_size_and_kind_learns_and_resumes_to_the_same_bytes() {
    let folder = taught();
    let kinds: [(&str, &[&str]); 2] = [
        ("narrow", &["backbone.dim=16", "backbone.depth=1", "losses.dino.head.hidden=24"]),
        (
            "convnext",
            &[
                "backbone={ plugin = \"convnext\", depths = [1, 1, 1, 1], dims = [4, 6, 8, 12], patch_size = 8 }",
                "crops.local_size=32",
            ],
        ),
    ];
    for (run, sets) in kinds {
        let mut args = vec!["train", "student.toml", "--out", run];
        args.extend(sets.iter().flat_map(|set| ["--set", set]));
        folder.succeed(&args);
        let path = folder.path(run).join("checkpoints/step-00000012/model.safetensors");
        let whole = std::fs::read(&path).expect("it was written");
        std::fs::remove_dir_all(path.parent().expect("a folder")).expect("it is there");
        std::fs::remove_file(folder.path(run).join("result.json")).expect("it is there");
        args.push("--resume");
        folder.succeed(&args);
        assert!(std::fs::read(&path).expect("it was written") == whole, "{run}: the resumed run differs");
    }
}

#[test]
fn the_evaluated_model_is_the_students_average() {
    let folder = taught();
    folder.succeed(&["train", "student.toml", "--out", "run", "--set", "teacher.momentum=0.0"]);
    let path = folder.path("run/checkpoints/step-00000012/model.safetensors");
    let file = dinolab_core::files::read_tensors(&path).expect("a checkpoint");
    let names: Vec<&str> = file.names().filter_map(|n| n.strip_prefix("student.")).collect();
    assert!(names.len() > 20);
    for name in names {
        let [student, teacher] = ["student", "teacher"].map(|role| file.get(&format!("{role}.{name}")).expect("both"));
        assert_eq!(student.to_f64_vec(), teacher.to_f64_vec(), "with momentum 0 the average is the student: {name}");
    }
}

#[test]
fn a_teacher_that_does_not_fit_is_refused_with_the_remedy_and_nothing_is_left() {
    let folder = taught();
    let cases: [(&[&str], &str); 5] = [
        (&["losses.dino.head.prototypes=48"], "set losses.dino.head.prototypes = 32"),
        (&["backbone.patch_size=16"], "set backbone.patch_size = 8"),
        (&["teacher.checkpoint=nowhere"], "nowhere: does not exist"),
        (&["teacher.momentum=1.5"], "teacher.momentum: has to be 0 to 1"),
        (
            &["losses.other={ plugin = \"dino\", head = { hidden = 8, bottleneck = 8, prototypes = 8 } }"],
            "no head for it",
        ),
    ];
    for (sets, said) in cases {
        let mut args = vec!["train", "student.toml", "--out", "refused"];
        args.extend(sets.iter().flat_map(|set| ["--set", set]));
        let ended = folder.run(&args);
        assert_eq!(ended.code, 2, "{sets:?}: {}", ended.err);
        assert!(ended.err.contains(said), "{sets:?}: {}", ended.err);
        assert!(!folder.path("refused/recipe.toml").exists());
    }
    let gram =
        ["recipe", "check", "micro.toml", "--set", "teachers.gram={ plugin = \"frozen\", checkpoint = \"teacher\" }"];
    let ended = folder.run(&gram);
    assert!(ended.code == 2 && ended.err.contains("copies weights"), "{}", ended.err);
}

#[test]
fn the_cost_of_a_distillation_counts_the_teacher() {
    let folder = taught();
    let cost = |args: &[&str]| folder.succeed(&[&["recipe", "check", "--cost", "student.toml"][..], args].concat()).out;
    let found = cost(&[]);
    assert!(found.contains("teacher to distil from"), "{found}");
    assert!(!cost(&["--set", "teacher.checkpoint=not/there/yet"]).contains("teacher to distil from"));
}

/// The micro recipe without DINOv3's losses, taught by the features of `teacher`.
fn by_features(folder: &Folder, teacher: &str, more: &str) {
    let text = format!(
        "extends = \"micro.toml\"\nname = \"by_features\"\n[teacher]\nplugin = \"frozen\"\ncheckpoint = \"{teacher}\"\n\
         [losses]\ndino = {{ enabled = false }}\nibot = {{ enabled = false }}\nkoleo = {{ enabled = false }}\n\
         gram = {{ enabled = false }}\n[losses.feature_distillation]\n{more}\n"
    );
    folder.write("by_features.toml", &text);
}

#[test]
fn published_weights_without_heads_teach_by_their_features() {
    let folder = Folder::with_micro();
    let published = root().join("tests/golden/hf_mlp");
    folder.succeed(&["import", published.to_str().expect("a UTF-8 path"), "--out", "published"]);
    by_features(&folder, "published", "");
    let ended = folder.run(&["recipe", "check", "by_features.toml"]);
    let remedy = "set losses.feature_distillation.teacher_dim = 64";
    assert!(ended.code == 2 && ended.err.contains(remedy), "{}", ended.err);
    by_features(&folder, "published", "teacher_dim = 64");
    let longer = ["train", "by_features.toml", "--set", "steps=40", "--set", "optimizer.lr=5e-3", "--out", "run"];
    folder.succeed(&longer);
    let found = losses(&folder, "run", "loss/feature_distillation");
    assert!(found[39] < 0.8 * found[0], "the student comes nearer: {found:?}");
    // No other model can teach features of that width.
    let ended = folder.run(&["recipe", "check", "by_features.toml", "--set", "teacher={ plugin = \"ema\" }"]);
    assert!(ended.code == 2 && ended.err.contains("expects features of 64 numbers"), "{}", ended.err);
}

#[test]
fn a_run_and_its_exported_weights_teach_the_same() {
    let folder = taught();
    folder.succeed(&["export", "teacher", "--format", "safetensors", "--out", "exported"]);
    for teacher in ["teacher", "exported"] {
        by_features(&folder, teacher, "");
        folder.succeed(&["train", "by_features.toml", "--out", &format!("by_{teacher}")]);
    }
    let of = |run: &str| losses(&folder, run, "loss/feature_distillation");
    assert_eq!(of("by_teacher"), of("by_exported"));
}

/// Three students of [`taught`]: one that also sees a Gram teacher's own crops, a narrow one, and one that is no transformer and sees
/// no local crops.
const STUDENTS: [&str; 3] = ["student", "narrow", "convnext"];

fn with_students() -> Folder {
    let folder = taught();
    folder.write("student.toml", &format!("{STUDENT}[losses]\ngram = {{ enabled = true }}\n"));
    let without = "gram = { enabled = false }\n";
    let narrow =
        format!("extends = \"student.toml\"\nname = \"narrow\"\n[backbone]\ndim = 16\ndepth = 1\n[losses]\n{without}");
    folder.write("narrow.toml", &narrow);
    let convnext = format!(
        "extends = \"student.toml\"\nname = \"convnext\"\n[losses]\n{without}koleo = {{ enabled = false }}\n\
         dino = {{ enabled = false }}\n"
    );
    folder.write("convnext.toml", &convnext);
    folder
}

const SIDE_BY_SIDE: [&str; 6] = ["train", "student.toml", "--with", "narrow.toml", "--with", "convnext.toml"];

#[test]
fn students_side_by_side_have_the_bits_that_they_have_alone_also_after_a_kill() {
    let folder = with_students();
    for student in STUDENTS {
        let out = format!("alone/{student}");
        folder.succeed(&["train", &format!("{student}.toml"), "--out", &out]);
    }
    let ended = folder.succeed(&SIDE_BY_SIDE);
    assert!(ended.err.contains("narrow   "), "lines say whose they are: {}", ended.err);
    let same = || {
        for student in STUDENTS {
            let (own, alone) = (format!("runs/{student}"), format!("alone/{student}"));
            assert_same_weights(&folder, &own, &alone, 12);
            let losses = |run: &str| -> Vec<Value> {
                metrics(&folder, run).into_iter().map(|line| line["loss/total"].clone()).collect()
            };
            assert_eq!(losses(&own), losses(&alone), "{student}");
        }
    };
    same();
    // As if killed when one had saved its step 8 and another had not: who has done least goes on until all are together.
    for (student, left) in [("student", 8), ("narrow", 4), ("convnext", 8)] {
        let run = folder.path(&format!("runs/{student}"));
        std::fs::remove_file(run.join("result.json")).expect("it is there");
        for step in [8, 12].into_iter().filter(|step| *step > left) {
            std::fs::remove_dir_all(run.join(format!("checkpoints/step-{step:08}"))).expect("it is kept");
        }
    }
    folder.succeed(&[&SIDE_BY_SIDE[..], &["--resume"]].concat());
    same();
}

#[test]
fn a_student_that_ends_early_takes_no_step_from_one_that_has_done_more() {
    let folder = with_students();
    let stop = "extends = \"student.toml\"\nname = \"short\"\nstop = { metric = \"probe/cls_patch_cosine/mean\", patience = 5, min_delta = 10.0 }\n\
        [probes]\ncls_patch_cosine = { enabled = true, every = 1 }\n";
    folder.write("short.toml", stop);
    let args = ["train", "short.toml", "--with", "narrow.toml"];
    folder.succeed(&args);
    let ended = json(&folder, "runs/short/result.json")["steps"].as_u64().expect("a number");
    assert!((5..8).contains(&ended), "it ends between the checkpoints of steps 4 and 8: {ended}");
    folder.succeed(&["train", "narrow.toml", "--out", "alone"]);
    assert_same_weights(&folder, "runs/narrow", "alone", 12);
    // One goes on after step 4 and ends before step 8, where the other goes on.
    for (run, gone) in [("short", ended), ("narrow", 12)] {
        std::fs::remove_file(folder.path(&format!("runs/{run}/result.json"))).expect("it is there");
        std::fs::remove_dir_all(folder.path(&format!("runs/{run}/checkpoints/step-{gone:08}"))).expect("it is there");
    }
    // Runs are named by their folders as well.
    folder.succeed(&["train", "runs/short", "--with", "narrow.toml", "--resume"]);
    assert_same_weights(&folder, "runs/narrow", "alone", 12);
}

#[test]
fn a_student_that_fails_ends_no_other() {
    let folder = with_students();
    // There is another run in its folder.
    folder.succeed(&["train", "student.toml", "--set", "seed=7", "--set", "steps=1"]);
    let ended = folder.run(&["train", "student.toml", "--with", "narrow.toml"]);
    assert!(ended.code == 2 && ended.err.contains("--resume"), "{}: {}", ended.code, ended.err);
    assert_eq!(json(&folder, "runs/narrow/result.json")["steps"], 12);
    assert_eq!(json(&folder, "runs/student/result.json")["steps"], 1);
}

#[test]
fn layers_that_the_teacher_does_not_have_are_refused() {
    let folder = with_students();
    for layer in [2, 3] {
        let (out, set) = (format!("out-{layer}"), format!("losses.cka.layer={layer}"));
        let sets = ["--set", "backbone.depth=3", "--set", "steps=2", "--set", &set];
        let ended = folder.run(&[&["train", "student.toml", "--out", &out], &sets[..]].concat());
        match layer {
            2 => assert_eq!(ended.code, 0, "{}", ended.err),
            _ => assert!(
                ended.code == 2 && ended.err.contains("`cka` reads tokens after 3 blocks, and the teacher has 2")
            ),
        }
    }
}

#[test]
fn students_that_cannot_share_a_teacher_are_refused_before_any_begins() {
    let folder = with_students();
    let other = |name: &str, text: &str| {
        folder.write(&format!("{name}.toml"), &format!("extends = \"student.toml\"\nname = \"{name}\"\n{text}"));
    };
    other("seeded", "seed = 7");
    other("larger", "[crops]\nglobal_size = 40");
    other("own", "[teacher]\nplugin = \"ema\"");
    other("gram", "[teachers.gram]\ncrop_size = 40");
    let cases: [(&[&str], &str); 6] = [
        (&["--with", "seeded.toml"], "they differ in seed: was 0, is 7"),
        (&["--with", "larger.toml"], "they differ in crops.global_size: was 32, is 40"),
        (&["--with", "own.toml"], "they differ in teacher.plugin"),
        (&["--with", "gram.toml"], "crops of 48 and of 40 pixels"),
        (&["--with", "student.toml"], "give each recipe a `name` of its own"),
        (&["--with", "narrow.toml", "--set", "on_non_finite={ rewind = 2 }"], "set on_non_finite"),
    ];
    for (args, said) in cases {
        let ended = folder.run(&[&["train", "student.toml"], args].concat());
        assert!(ended.code == 2 && ended.err.contains(said), "{args:?}: {}", ended.err);
        assert!(!folder.path("runs").exists(), "{args:?}");
    }
    let ended = folder.run(&["train", "micro.toml", "--with", "micro.toml", "--set", "name=other"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
}

#[test]
fn a_student_does_not_go_on_under_another_teacher() {
    let folder = taught();
    folder.succeed(&["train", "student.toml", "--out", "run"]);
    std::fs::remove_file(folder.path("run/result.json")).expect("it is there");
    std::fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("it is there");
    // The same run, longer: its newest checkpoint is another.
    folder.succeed(&["train", "teacher", "--resume", "--set", "steps=16"]);
    let ended = folder.run(&["train", "run", "--resume"]);
    assert!(ended.code == 2 && ended.err.contains("teacher is no longer what this run began with"), "{}", ended.err);
    folder.succeed(&["train", "student.toml", "--out", "run", "--resume", "--set", "teacher.checkpoint=teacher@12"]);
}
