//! The JSON schemas that editors use: every shipped file fits, a mistake does not.

#[allow(dead_code)]
mod program;

use std::path::PathBuf;

use program::{root, Folder};
use serde_json::Value as Json;

/// A schema, ready to be held against files.
struct Validator(boon::Schemas, boon::SchemaIndex);

fn validator(of: &str) -> Validator {
    let schema = Folder::new().succeed(&["recipe", "schema", of]).out;
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("schema.json", serde_json::from_str(&schema).unwrap()).unwrap();
    let index = compiler.compile("schema.json", &mut schemas).unwrap();
    Validator(schemas, index)
}

/// The TOML files of a top-level folder, but for Cargo's.
fn files(folder: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|p| p.extension().is_some_and(|e| e == "toml") && !p.ends_with("Cargo.toml")).collect()
}

/// What does not fit; empty if all does.
fn problems(Validator(schemas, index): &Validator, text: &str) -> String {
    let value: toml::Table = text.parse().unwrap();
    let value: Json = serde_json::to_value(value).unwrap();
    schemas.validate(&value, *index).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn every_shipped_recipe_and_suite_fits_its_schema() {
    for (of, folder) in [("recipe", "recipes"), ("suite", "ablations")] {
        let (validator, files) = (validator(of), files(folder));
        assert!(files.len() >= 4, "{files:?}");
        for file in files {
            let found = problems(&validator, &std::fs::read_to_string(&file).unwrap());
            assert_eq!(found, "", "{}", file.display());
        }
    }
}

#[test]
fn a_mistake_in_a_recipe_does_not_fit() {
    let validator = validator("recipe");
    let tiny = std::fs::read_to_string(root().join("recipes/tiny.toml")).unwrap();
    for (from, to) in [
        ("steps = 300", "stepps = 300"),
        ("steps = 300", "steps = \"many\""),
        ("plugin = \"ema\"", "plugin = \"emma\""),
        ("objects = [1, 3]", "objekts = [1, 3]"),
        ("warmup_steps = 40", "warmup = 40"),
        ("refresh = { every = 50 }", "refresh = { every = 0 }"),
        ("steps = 300", ""),
    ] {
        assert!(tiny.contains(from), "{from}");
        assert!(!problems(&validator, &tiny.replace(from, to)).is_empty(), "{from} -> {to} fits");
    }
}

#[test]
fn a_recipe_that_extends_another_may_say_a_part_of_a_table() {
    let validator = validator("recipe");
    let part = |text: &str| problems(&validator, &format!("extends = \"tiny.toml\"\n{text}"));
    assert_eq!(part("[backbone]\ndim = 32\n[losses.gram]\nenabled = true"), "");
    assert!(!part("[losses.gram]\ntopk = 3").is_empty(), "a key of another loss");
}

#[test]
fn a_mistake_in_a_suite_does_not_fit() {
    let validator = validator("suite");
    let suite = std::fs::read_to_string(root().join("ablations/koleo_weight.toml")).unwrap();
    for (from, to) in [("seeds = [0, 1, 2]", "seeds = \"three\""), ("baseline =", "base_line =")] {
        assert!(suite.contains(from), "{from}");
        assert!(!problems(&validator, &suite.replace(from, to)).is_empty(), "{from} -> {to} fits");
    }
}
