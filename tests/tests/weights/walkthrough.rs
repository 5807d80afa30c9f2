//! The walkthrough of the book, run as it stands: its files are written and its commands run, from top to bottom.
//!
//! Needs a Python with `torch`, `transformers` and `onnxruntime`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`.
//! Without, the test says so and passes.

use dinolab_tests::program;
use std::fs;
use std::process::Command;

use dinolab_tests::program::{root, Folder};

/// The fenced blocks of a page: what stands behind the fence, and the text.
fn blocks(page: &str) -> Vec<(&str, &str)> {
    let parts: Vec<&str> = page.split("```").collect();
    parts.chunks(2).filter_map(|pair| pair.get(1)?.split_once('\n')).collect()
}

#[test]
fn the_walkthrough_works_from_top_to_bottom() {
    let Some(python) = program::python("torch, transformers, onnxruntime, PIL") else { return };
    let page = fs::read_to_string(root().join("book/src/walkthrough.md")).expect("the repository is whole");
    let folder = Folder::new();
    // `python` and `dinolab` are the ones that are tested.
    let bin = folder.path("bin");
    fs::create_dir(&bin).expect("a temporary folder");
    for (name, program) in [("python", python.as_path()), ("dinolab", env!("CARGO_BIN_EXE_with_plugins").as_ref())] {
        fs::write(bin.join(name), format!("#!/bin/sh\nexec '{}' \"$@\"\n", program.display()))
            .expect("it can be written");
        let run = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(bin.join(name), run).expect("it is there");
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let mut ran = 0;
    for (kind, text) in blocks(&page) {
        if let Some(name) = text.lines().next().and_then(|line| line.strip_prefix("# ")).filter(|_| kind != "sh,no_run")
        {
            fs::write(folder.path(name), text).expect("a temporary folder");
            continue;
        }
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", text])
            .current_dir(folder.path("."))
            .env("PATH", &path)
            .output()
            .expect("bash starts");
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}");
        assert!(output.status.success(), "{text}\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
        ran += 1;
    }
    assert_eq!(ran, 4, "blocks of commands");
    let card = folder.read("as_hf/README.md");
    for part in [
        "license_name: \"dinov3-license\"",
        "library_name: transformers",
        "linear_segmentation/miou | 96x80",
        "[backbone]",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
    assert!(
        folder.path("as_hf/model.safetensors.index.json").exists() && !folder.path("as_hf/model.safetensors").exists()
    );
    let page = folder.read("scores/eval.html");
    assert!(page.contains("data:image/png;base64,") && page.contains("predicted"), "pictures");
    // What was split comes back to the bit.
    folder.succeed(&["import", "as_hf", "--out", "again"]);
    assert_eq!(
        fs::read(folder.path("again/model.safetensors")).expect("it is there"),
        fs::read(folder.path("weights/model.safetensors")).expect("it is there")
    );
}
