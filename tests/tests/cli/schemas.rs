//! What an editor is told: every shipped recipe and suite is valid by the schema that the program prints, and a mistake is
//! not.
//!
//! Needs a Python with `jsonschema`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, the test says so
//! and passes.

use std::path::{Path, PathBuf};

use dinolab_tests::program::{python, root, script, Ended, Folder};

/// The problems of these files by the schema that `dinolab recipe schema <kind>` prints.
fn problems(python: &Path, folder: &Folder, kind: &[&str], files: &[PathBuf]) -> String {
    let Ended { code, out, err } = folder.run(&[&["recipe", "schema"], kind].concat());
    assert_eq!(code, 0, "{err}");
    folder.write("schema.json", &out);
    let schema = folder.path("schema.json");
    let args: Vec<&Path> = [&schema].into_iter().chain(files).map(PathBuf::as_path).collect();
    script(python, "schemas.py", &args)
}

fn shipped(folder: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let toml = |path: &PathBuf| path.extension().is_some_and(|e| e == "toml") && !path.ends_with("Cargo.toml");
    files.filter(toml).collect()
}

#[test]
fn every_shipped_recipe_and_suite_is_valid_and_mistakes_are_not() {
    let Some(python) = python("jsonschema, tomllib") else { return };
    let folder = Folder::new();
    let recipes = [shipped("recipes"), shipped("recipes/bench")].concat();
    let suites = shipped("ablations");
    assert!(recipes.len() > 10 && suites.len() > 5);
    assert_eq!(problems(&python, &folder, &[], &recipes), "");
    assert_eq!(problems(&python, &folder, &["suite"], &suites), "");
    assert_eq!(problems(&python, &folder, &["stages"], &shipped("recipes/stages")), "");

    folder.write(
        "typo.toml",
        "extends = \"tiny.toml\"\n[backbone]\nplugin = \"vit\"\ndpeth = 3\n[batch]\nsize = \"many\"\n",
    );
    let found = problems(&python, &folder, &[], &[folder.path("typo.toml")]);
    assert!(found.contains("backbone") && found.contains("batch.size"), "{found}");
    // A plugin of another crate, as an author sees it.
    folder.write("toy.toml", "extends = \"tiny.toml\"\n[backbone]\nplugin = \"toy_matrix\"\ndim = 8\n");
    assert_eq!(problems(&python, &folder, &[], &[folder.path("toy.toml")]), "");
}
