//! The file of a chain of stages: what it may say, and the checks that need no recipe.

use std::path::{Path, PathBuf};

use dinolab_core::problem::plain_words;
use dinolab_core::recipe::read_text;
use dinolab_core::{Error, Result};
use schemars::JsonSchema;
use serde::Deserialize;
use toml::Value;

use crate::suite::{beside, check_name, nearest, overrides, put_over, walk, Overrides};

/// What programs read of a chain, in its folder.
pub const FILE: &str = "stages.json";
/// What people read of it.
pub(super) const REPORT: &str = "report.html";

/// Runs that go on from each other, as their file says it.
///
/// ```toml
/// name = "two_stages"
///
/// [[stage]]
/// name = "pretrain"
/// recipe = "tiny.toml"
///
/// [[stage]]
/// name = "gram"
/// recipe = "tiny.toml"
/// set = { steps = 400, continue_from = "{pretrain}", "losses.gram.enabled" = true }
/// ```
///
/// In values `{pretrain}` is the folder of that stage's run, and `{pretrain}@100` its checkpoint of step 100.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StagesFile {
    /// Short name, used for the folder under `runs/`.
    pub name: String,
    /// What it is, in a sentence or two; opens the report.
    #[serde(default)]
    pub description: String,
    /// Changes to the recipes of all stages.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
    /// The stages; each may name those before it.
    pub stage: Vec<StageEntry>,
}

/// One stage as the file says it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StageEntry {
    /// Name: letters, digits and `._=+-`.
    pub name: String,
    /// Its recipe, relative to this file.
    pub recipe: PathBuf,
    /// Changes to it.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
}

/// Stages that passed their checks.
#[derive(Clone, Debug)]
pub struct Stages {
    /// Short name.
    pub name: String,
    /// What it is.
    pub description: String,
    /// In the order in which they run.
    pub stages: Vec<Stage>,
}

/// One stage.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its name, and that of its folder.
    pub name: String,
    /// Its recipe.
    pub recipe: PathBuf,
    /// Changes to it, with the folders of other stages not yet in their places.
    pub set: Overrides,
    /// The stages that it names: the key that does, and the stage's name.
    pub parents: Vec<(String, String)>,
}

impl Stages {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// If it cannot be read, has an unknown key or a wrong type, repeats a name, or a stage names one that is not before it.
    pub fn load(path: &Path) -> Result<Self> {
        let text = read_text(path).map_err(|e| e.error(path))?;
        if text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("arm") || table.contains_key("grid")) {
            return Err(Error::content(path, "this is the file of a suite", "run it with `dinolab ablate`"));
        }
        let file: StagesFile = toml::from_str(&text).map_err(|e| {
            let help = "`dinolab recipe schema stages` prints every key that it may have";
            Error::content(path, plain_words(e.to_string().trim_end()), help)
        })?;
        Self::check(file, path).map_err(|(problem, help)| Error::content(path, problem, help))
    }

    fn check(file: StagesFile, path: &Path) -> Result<Self, (String, String)> {
        check_name("name", &file.name)?;
        let common = overrides(&file.set);
        let mut stages: Vec<Stage> = Vec::new();
        for entry in &file.stage {
            check_name("stage name", &entry.name)?;
            if [FILE, REPORT].contains(&entry.name.as_str()) {
                let help = "give the stage another name".to_string();
                return Err((format!("stage name `{}` is that of a file in the stages' folder", entry.name), help));
            }
            if stages.iter().any(|stage| stage.name == entry.name) {
                let help = "give every stage a name of its own".to_string();
                return Err((format!("stage name `{}` is repeated", entry.name), help));
            }
            let mut set = common.clone();
            put_over(&mut set, &overrides(&entry.set));
            let mut parents = Vec::new();
            for (key, value) in &set {
                for named in named(value) {
                    let known: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
                    if !known.contains(&named.as_str()) {
                        let help = match known.is_empty() {
                            true => "it is the first; a stage may name those that stand before it".to_string(),
                            false => format!(
                                "before it stand {}; did you mean `{}`?",
                                known.join(", "),
                                nearest(&named, &known)
                            ),
                        };
                        return Err((
                            format!("stage `{}` names `{{{named}}}` in {key}, which is none before it", entry.name),
                            help,
                        ));
                    }
                    parents.push((key.clone(), named));
                }
            }
            let (name, recipe) = (entry.name.clone(), beside(path, &entry.recipe));
            stages.push(Stage { name, recipe, set, parents });
        }
        if stages.is_empty() {
            return Err(("there are no stages".into(), "add [[stage]] tables".into()));
        }
        Ok(Self { name: file.name, description: file.description, stages })
    }
}

impl Stage {
    /// Its changes, with the folders of the other stages in `out` in their places.
    pub fn placed(&self, out: &Path) -> Overrides {
        let mut set = self.set.clone();
        for value in set.values_mut() {
            walk(value, &mut |text| {
                for (_, parent) in &self.parents {
                    *text = text.replace(&format!("{{{parent}}}"), &out.join(parent).display().to_string());
                }
            });
        }
        set
    }
}

/// The stages that a value names. `{0000..0146}` and `{a,b}` are files of a dataset.
fn named(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    walk(&mut value.clone(), &mut |text| {
        let mut rest = text.as_str();
        while let Some((name, after)) = rest.split_once('{').and_then(|(_, inner)| inner.split_once('}')) {
            if !name.contains(',') && !is_range(name) {
                found.push(name.to_string());
            }
            rest = after;
        }
    });
    found
}

/// Whether this is a range of numbers: `0000..0146`.
fn is_range(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.split_once("..").is_some_and(|(first, last)| digits(first) && digits(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(stages: &str) -> Result<Stages, String> {
        let file: StagesFile = toml::from_str(&format!("name = \"x\"\n{stages}")).expect("TOML");
        Stages::check(file, Path::new("f/stages.toml")).map_err(|(problem, help)| format!("{problem}; {help}"))
    }

    const TWO: &str = "[[stage]]\nname = \"a\"\nrecipe = \"../r.toml\"\n[[stage]]\nname = \"b\"\nrecipe = \"r.toml\"\n";

    #[test]
    fn files_of_a_dataset_are_no_stages() {
        let set = "set = { data.path = \"train-{000000..000146}.tar\", data.val = \"{a,b}.tar\" }";
        assert!(load(&format!("{TWO}{set}")).unwrap().stages[1].parents.is_empty());
    }

    #[test]
    fn a_stage_names_earlier_ones_wherever_a_value_has_text() {
        let set = "set = { continue_from = \"{a}@5\", teachers.gram = { plugin = \"x\", source = { checkpoint = \"{a}\" } } }";
        let stages = load(&format!("{TWO}{set}")).unwrap().stages;
        assert_eq!(stages[0].recipe, Path::new("r.toml"));
        let keys: Vec<&str> = stages[1].parents.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["continue_from", "teachers.gram"]);
        let placed = stages[1].placed(Path::new("out"));
        assert_eq!(placed["continue_from"].as_str(), Some("out/a@5"));
        assert_eq!(placed["teachers.gram"]["source"]["checkpoint"].as_str(), Some("out/a"));
    }

    #[test]
    fn what_no_chain_can_be_is_refused() {
        let error = |text: &str| load(text).unwrap_err();
        assert!(error(&format!("{TWO}set = {{ init_from = \"{{bb}}\" }}")).contains("did you mean `a`"));
        assert!(error(&TWO.replace("\"b\"", "\"a\"")).contains("repeated"));
        let first = TWO.replacen("recipe = \"../r.toml\"", "recipe = \"r\"\nset = { init_from = \"{b}\" }", 1);
        assert!(error(&first).contains("it is the first"));
    }
}
