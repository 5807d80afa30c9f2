//! `dinolab new plugin`: what it writes compiles and passes its tests untouched, for every kind.

#[allow(dead_code)]
mod program;

use std::path::{Path, PathBuf};
use std::process::Command;

use dinolab_core::registry::KINDS;
use program::{root, Folder};

/// Where the tests' programs are built.
fn target() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_with_plugins"));
    program.ancestors().nth(2).expect("target/release/program").to_path_buf()
}

/// Does what the tutorial says up to its suite: makes the crate, and puts every block whose first line names a file there.
fn follow_the_tutorial(folder: &Folder) {
    let page = std::fs::read_to_string(root().join("book/src/tutorial.md")).expect("the page is there");
    let mut written = 0;
    for (i, block) in page.split("```").enumerate().filter(|(i, _)| i % 2 == 1) {
        let (info, text) = block.split_once('\n').unwrap_or_else(|| panic!("block {i} has no line"));
        let file = text.lines().next().and_then(|line| line.strip_prefix("// ").or_else(|| line.strip_prefix("# ")));
        match (info, file) {
            ("sh", _) => {
                let args: Vec<&str> = text.split_whitespace().collect();
                folder.succeed(args.strip_prefix(&["dinolab"]).expect("a command of the program"));
            }
            ("sh,no_run", _) => {}
            (_, file) => {
                folder.write(file.unwrap_or_else(|| panic!("{info}: no file is named")), text);
                written += 1;
            }
        }
    }
    assert_eq!(written, 6, "four plugins, a test and a suite");
}

#[test]
fn every_kind_of_new_plugin_and_the_tutorial_compile_and_pass_their_tests() {
    let folder = Folder::new();
    // One workspace for all, with the versions of this one, so that only what is new is built.
    folder.write("Cargo.toml", "[workspace]\nresolver = \"2\"\nmembers = [\"my_*\", \"uniformity\"]\n");
    std::fs::copy(root().join("Cargo.lock"), folder.path("Cargo.lock")).unwrap();
    for kind in KINDS {
        let said = folder.succeed(&["new", "plugin", &format!("my_{kind}"), "--kind", kind]).out;
        assert!(said.contains("cargo test --release"), "{said}");
    }
    follow_the_tutorial(&folder);
    let run = |program: &Path, inside: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir(folder.path(inside)).env("CARGO_TARGET_DIR", target());
        let output = command.output().expect("the program is there");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (out, err) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "{args:?}: {out}{err}");
        out
    };
    let tests = ["test", "--release", "--offline", "--workspace", "--test", "*"];
    let said = run(Path::new(env!("CARGO")), ".", &tests);
    // Those of every kind and of the tutorial, and the tutorial's own.
    assert_eq!(said.matches("test the_program_lists_the_plugin ... ok").count(), KINDS.len() + 1, "{said}");
    assert_eq!(said.matches("test result: ok. 3 passed").count(), KINDS.len() + 1, "{said}");
    assert_eq!(said.matches("test result: ok. 2 passed").count(), 1, "{said}");
    let program = |args: &[&str]| run(&target().join("release/uniformity"), "uniformity", args);
    assert!(program(&["check", "uniformity"]).contains("ok"));
    assert!(program(&["check", "turned"]).contains("ok"));
    let plan = program(&["ablate", "suite.toml", "--dry-run"]);
    assert!(["dino", "uniformity", "turned", "sincos", "warm_ema"].iter().all(|arm| plan.contains(arm)), "{plan}");
    program(&["train", "recipe.toml", "--set", "steps=2", "--set", "probes.knn.enabled=false"]);
}

#[test]
fn a_crate_that_lies_in_no_workspace_is_one_of_its_own() {
    let folder = Folder::new();
    folder.succeed(&["new", "plugin", "patch_contrast", "--kind", "loss"]);
    let manifest = folder.read("patch_contrast/Cargo.toml");
    assert!(manifest.ends_with("\n[workspace]\n"), "{manifest}");
    assert!(folder.read("patch_contrast/src/lib.rs").contains("pub struct PatchContrast {"));
}

#[test]
fn names_that_cannot_be_are_refused() {
    let folder = Folder::new();
    for (name, problem) in [
        ("Patch-Contrast", "cannot be the name of a plugin"),
        ("match", "a crate cannot be named `match`"),
        ("koleo", "there is a plugin `koleo` of kind loss already"),
    ] {
        let ended = folder.run(&["new", "plugin", name, "--kind", "loss"]);
        assert_eq!(ended.code, 2);
        assert!(ended.err.contains(problem), "{}", ended.err);
    }
    folder.succeed(&["new", "plugin", "mine", "--kind", "probe"]);
    let ended = folder.run(&["new", "plugin", "mine", "--kind", "probe"]);
    assert!(ended.err.contains("this is there already"), "{}", ended.err);
}
