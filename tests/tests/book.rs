//! What the book and the README show works: every command is run, every recipe and suite is checked.
//!
//! A page gets a folder of its own with the shipped recipes and suites, `recipes/tiny.toml` made smaller, and a folder of
//! photographs where the page says `/path/to/images`. Its blocks work in this order:
//!
//! | block | what is done |
//! |---|---|
//! | `toml` whose first line is a comment with a path (`# recipes/mine.toml`) | written to that file; then as below |
//! | `toml` with arms or a grid | `dinolab ablate --dry-run` |
//! | `toml` with stages | `dinolab stages --dry-run` |
//! | `toml` | `dinolab recipe check`, on top of the shipped tiny recipe if it is only a part of one |
//! | `sh` | run by bash, page by page from top to bottom; `cargo run --release --` is `dinolab` |
//! | `sh,fails` | has to fail |
//! | `sh,no_run` | for another machine: every `dinolab` command is parsed and not run, everything else left out |
//!
//! Blocks of `rust` are compiled as documentation tests of this crate (`tests/src/lib.rs` lists the pages); `python` needs
//! other programs and `json` is output, like `text`: they are not run.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use dinolab_tests::program::{root, Ended, Folder};
use rayon::prelude::*;

/// The tiny recipe as pages get it: a step takes a moment.
const TINY: &str = r#"
extends = "TINY"
steps = 8
[backbone]
dim = 32
depth = 2
heads = 2
[data]
count = 64
held_out = 32
size = 48
[batch]
size = 4
[crops]
global_size = 32
local_size = 16
local_count = 2
[teachers.gram]
first_step = 2
refresh = { every = 2 }
crop_size = 48
[optimizer]
freeze_last_layer_steps = 0
[checkpoint]
every = 4
[probes.knn]
train_samples = 32
test_samples = 16
[probes.linear_segmentation]
train_samples = 8
test_samples = 8
"#;

/// Goes before the commands of a page.
const PRELUDE: &str = r#"
set -eEuo pipefail
trap 'echo "$page:$line: this fails" >&2' ERR
dinolab() { "$PROGRAM" "$@"; }
# `cargo test` is what runs these commands.
cargo() {
    case "$1" in
        run) while [ "$1" != -- ]; do shift; done; shift; dinolab "$@" ;;
        test) ;;
        *) echo "mark a block with \`cargo $1\` as sh,no_run" >&2; return 1 ;;
    esac
}
"#;

/// Makes the commands of a block parsed only: clap reads all arguments before it shows its help.
const NO_RUN: &str = r#"
PATH=/nowhere
dinolab() { "$PROGRAM" "$@" --help > /dev/null; }
command_not_found_handle() { :; }
"#;

struct Block {
    line: usize,
    /// What follows the opening fence.
    info: String,
    text: String,
}

/// The fenced blocks of a page.
fn blocks(page: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut open: Option<(String, Block)> = None;
    for (i, line) in page.lines().enumerate() {
        let fence: String = line.trim_start().chars().take_while(|c| *c == '`').collect();
        match &mut open {
            None if fence.len() >= 3 => {
                let info = line.trim_start()[fence.len()..].trim().to_string();
                open = Some((fence, Block { line: i + 1, info, text: String::new() }));
            }
            None => {}
            Some((opening, _)) if *opening == line.trim() => found.extend(open.take().map(|(_, block)| block)),
            Some((_, block)) => {
                block.text += line;
                block.text.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

/// The README and the pages of the book, relative to the repository.
fn pages() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("README.md")];
    let mut folders = vec![PathBuf::from("book/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("the book is there") {
            let path = folder.join(entry.expect("it can be read").file_name());
            match path.extension() {
                Some(extension) if extension == "md" => found.push(path),
                None if root().join(&path).is_dir() => folders.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// A folder in which the commands of a page work.
fn workplace() -> Folder {
    let folder = Folder::new();
    for name in ["recipes", "ablations"] {
        fs::create_dir(folder.path(name)).expect("the folder is empty");
        for entry in fs::read_dir(root().join(name)).expect("the repository is whole") {
            let path = entry.expect("it can be read").path();
            if path.extension().is_some_and(|e| e == "toml") && !path.ends_with("Cargo.toml") {
                fs::copy(&path, folder.path(name).join(path.file_name().expect("a file"))).expect("it can be copied");
            }
        }
    }
    let shipped = root().join("recipes/tiny.toml");
    folder.write("recipes/tiny.toml", &TINY.replace("TINY", shipped.to_str().expect("a UTF-8 path")));
    folder.add_photos("images");
    folder
}

fn bash(folder: &Folder, script: &str) -> Ended {
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script]).current_dir(folder.path(".")).stdin(Stdio::null());
    command.env("PROGRAM", env!("CARGO_BIN_EXE_with_plugins"));
    command.output().expect("there is a bash").into()
}

/// Writes the block where its first line says, or else beside the recipes; gives the command that checks it.
fn check_toml(folder: &Folder, block: &Block) -> String {
    let table: toml::Table = block.text.parse().unwrap_or_else(|e| panic!("line {}: {e}", block.line));
    let first = block.text.lines().next().unwrap_or_default();
    let named = first.strip_prefix("# ").filter(|path| path.ends_with(".toml"));
    let beside = format!("recipes/page-line-{}.toml", block.line);
    let path = named.unwrap_or(&beside);
    if let Some(inside) = Path::new(path).parent() {
        fs::create_dir_all(folder.path("").join(inside)).expect("the folder can be written");
    }
    let suite = ["arm", "grid"].iter().any(|key| table.contains_key(*key));
    let stages = table.contains_key("stage");
    let whole = suite
        || stages
        || table.contains_key("extends")
        || table.contains_key("backbone") && table.contains_key("data");
    // What is only checked may be of any size.
    let extends = if whole { String::new() } else { format!("extends = {:?}\n", root().join("recipes/tiny.toml")) };
    folder.write(path, &format!("{extends}{}", block.text));
    match (suite, stages) {
        (true, _) => format!("dinolab ablate --dry-run {path} > /dev/null"),
        (_, true) => format!("dinolab stages --dry-run {path} > /dev/null"),
        _ => format!("dinolab recipe check {path} > /dev/null"),
    }
}

/// Does what a page says; gives what went wrong.
fn follow(page: &Path) -> Result<(), String> {
    let text = fs::read_to_string(root().join(page)).expect("the page is there").replace("/path/to/images", "images");
    let folder = workplace();
    let mut script = format!("page={}\n{PRELUDE}", page.display());
    for block in blocks(&text) {
        writeln!(script, "line={}", block.line).expect("writing to a string");
        let body = &block.text;
        script += &match block.info.as_str() {
            "toml" => check_toml(&folder, &block),
            "sh" => body.clone(),
            "sh,fails" => format!("if (\n{body}\n); then echo \"$page:$line: this does not fail\" >&2; exit 1; fi"),
            "sh,no_run" => format!("(\n{NO_RUN}\n{body}\n)"),
            info if info.starts_with("rust") || ["text", "json", "python"].contains(&info) => String::new(),
            other => return Err(format!("{}:{}: a block of `{other}`", page.display(), block.line)),
        };
        script.push('\n');
    }
    let Ended { code, out, err } = bash(&folder, &script);
    if code == 0 {
        Ok(())
    } else {
        Err(format!("{} ended with {code}\n{out}{err}", page.display()))
    }
}

#[test]
fn every_command_and_every_recipe_of_every_page_works() {
    let failures: Vec<String> = pages().par_iter().filter_map(|page| follow(page).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn every_page_with_rust_is_a_documentation_test() {
    let list = fs::read_to_string(root().join("tests/src/lib.rs")).expect("it is this crate");
    for page in pages() {
        let text = fs::read_to_string(root().join(&page)).expect("the page is there");
        let rust = blocks(&text).iter().any(|b| b.info.starts_with("rust") && !b.info.contains("ignore"));
        let listed = list.contains(&format!("\"../../{}\"", page.display()));
        assert_eq!(rust, listed, "{} in tests/src/lib.rs", page.display());
    }
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let summary = fs::read_to_string(root().join("book/src/SUMMARY.md")).expect("the book is there");
    for page in pages().iter().filter_map(|p| p.strip_prefix("book/src").ok()).filter(|p| !p.ends_with("SUMMARY.md")) {
        assert!(summary.contains(&format!("({})", page.display())), "{} is not in SUMMARY.md", page.display());
    }
}
