//! `dinolab new plugin`: what it writes compiles and passes its tests untouched, for every kind.

use std::path::{Path, PathBuf};
use std::process::Command;

use dinolab_core::registry::KINDS;
use dinolab_tests::program::{root, Folder};

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

/// Makes a folder this workspace once more, with further members: its crates are links, its profile, features and versions are
/// the same. Cargo then takes what the outer build made for what it would make itself.
fn make_workspace(folder: &Folder, members: &str) {
    // The repository as well: the program is built again when it has moved on.
    let links = [".git", "core", "plugins", "ablations", "tests"];
    for (from, name) in links.map(|name| (root().join(name), name)).iter().filter(|(from, _)| from.exists()) {
        std::os::unix::fs::symlink(from, folder.path(name)).expect("the folder can be written");
    }
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("it is there");
    let more = manifest.replacen("\"tests\"]", &format!("\"tests\", {members}]"), 1);
    assert_ne!(more, manifest, "the list of members ends with the tests");
    folder.write("Cargo.toml", &more);
    std::fs::copy(root().join("Cargo.lock"), folder.path("Cargo.lock")).expect("it is there");
}

/// Writes the new crates into the lock file, and gives it the age of the workspace's own: it is one of the files whose change
/// makes the program be built again.
fn lock(folder: &Folder) {
    cargo(folder, &["update", "--workspace", "--offline"]);
    let age = std::fs::metadata(root().join("Cargo.lock")).and_then(|lock| lock.modified()).expect("it is there");
    let file = std::fs::File::options().append(true).open(folder.path("Cargo.lock")).expect("it was copied");
    file.set_modified(age).expect("the file is ours");
}

/// What a program prints that is run in the folder of the workspace, or one inside.
fn run(program: &Path, folder: PathBuf, args: &[&str]) -> [String; 2] {
    let mut command = Command::new(program);
    command.args(args).current_dir(folder).env("CARGO_TARGET_DIR", target());
    let output = command.output().expect("the program is there");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{args:?}: {out}{err}");
    [out, err]
}

fn cargo(folder: &Folder, args: &[&str]) -> [String; 2] {
    run(Path::new(env!("CARGO")), folder.path(""), args)
}

#[test]
fn every_kind_of_new_plugin_and_the_tutorial_compile_and_pass_their_tests() {
    let folder = Folder::new();
    make_workspace(&folder, "\"my_*\", \"uniformity\"");
    let mut new: Vec<String> = KINDS.iter().map(|kind| format!("my_{kind}")).collect();
    for (name, kind) in new.iter().zip(KINDS) {
        let said = folder.succeed(&["new", "plugin", name, "--kind", kind]).out;
        assert!(said.contains("cargo test --release"), "{said}");
    }
    follow_the_tutorial(&folder);
    new.push("uniformity".into());
    for name in &new {
        let manifest = format!("{name}/Cargo.toml");
        let here = folder.path("").to_str().expect("a UTF-8 path").trim_end_matches('/').to_string();
        folder.write(&manifest, &folder.read(&manifest).replace(root().to_str().expect("a UTF-8 path"), &here));
    }
    lock(&folder);
    let mut tests = vec!["test", "--release", "--locked", "--offline", "--workspace"];
    let own = std::fs::read_dir(folder.path("uniformity/tests")).expect("the tutorial has tests");
    let own: Vec<PathBuf> = own.map(|entry| entry.expect("it can be read").path()).collect();
    let own = own.iter().map(|path| path.file_stem().and_then(|name| name.to_str()).expect("a UTF-8 name"));
    for name in new.iter().map(String::as_str).filter(|name| *name != "uniformity").chain(own) {
        tests.extend(["--test", name]);
    }
    let [said, built] = cargo(&folder, &tests);
    // Those of every kind and of the tutorial, and the tutorial's own.
    assert_eq!(said.matches("test the_program_lists_the_plugin ... ok").count(), KINDS.len() + 1, "{said}");
    assert_eq!(said.matches("test result: ok. 3 passed").count(), KINDS.len() + 1, "{said}");
    assert_eq!(said.matches("test result: ok. 2 passed").count(), 1, "{said}");
    let compiled = |line: &str| line.trim().strip_prefix("Compiling ")?.split(' ').next().map(String::from);
    let mut compiled: Vec<String> = built.lines().filter_map(compiled).collect();
    compiled.sort();
    new.sort();
    assert_eq!(compiled, new, "nothing but what is new is compiled");
    let program = |args: &[&str]| run(&target().join("release/uniformity"), folder.path("uniformity"), args)[0].clone();
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
        (&"a".repeat(65), "has 65 letters"),
    ] {
        let ended = folder.run(&["new", "plugin", name, "--kind", "loss"]);
        assert_eq!(ended.code, 2);
        assert!(ended.err.contains(problem), "{}", ended.err);
    }
    folder.succeed(&["new", "plugin", "mine", "--kind", "probe"]);
    let ended = folder.run(&["new", "plugin", "mine", "--kind", "probe"]);
    assert!(ended.err.contains("this is there already"), "{}", ended.err);
}

#[test]
fn a_new_plugin_in_a_workspace_that_does_not_name_it_is_one_of_its_own() {
    let folder = Folder::new();
    folder.write(
        "Cargo.toml",
        "# [workspace]\n[workspace]\nmembers = [\"my_*\", \"others/one\"]\nexclude = [\"my_old\"]\n",
    );
    for (name, member) in [("my_loss", true), ("my_old", false), ("loss", false)] {
        folder.succeed(&["new", "plugin", name, "--kind", "loss"]);
        assert_eq!(!folder.read(&format!("{name}/Cargo.toml")).contains("\n[workspace]\n"), member, "{name}");
        let root = Command::new(env!("CARGO"))
            .args(["locate-project", "--workspace", "--message-format", "plain"])
            .current_dir(folder.path(name))
            .output()
            .expect("cargo starts");
        let root = String::from_utf8_lossy(&root.stdout).trim().to_string();
        let expected = if member { folder.path("Cargo.toml") } else { folder.path(&format!("{name}/Cargo.toml")) };
        assert_eq!(std::fs::canonicalize(root).ok(), std::fs::canonicalize(expected).ok(), "{name}");
    }
}
