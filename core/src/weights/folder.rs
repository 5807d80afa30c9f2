//! The folder of weights: what model they are of, and the model's tensors.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Toml};
use figment::Figment;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::checkpoint::{new_folder, sync_dir};
use crate::contract::Backbone;
use crate::params::ParamBuilder;
use crate::recipe::{as_written, check_tables, toml_value, CropConfig, Nested, Problem};
use crate::registry::{BackboneContext, Chosen};
use crate::step::CHANNELS;
use crate::{Error, Result};

/// The file that makes a folder one of weights.
pub const WEIGHTS_FILE: &str = "weights.toml";
/// The tensors of a weights folder or a checkpoint.
pub const MODEL_FILE: &str = "model.safetensors";

/// What weights are of: the part of a recipe that says how pixels become features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The model: a plugin.
    pub backbone: Chosen<dyn Backbone>,
    /// The pixels that it was trained on.
    #[serde(default)]
    pub crops: Pixels,
}

/// What a model was trained on: size and normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pixels {
    /// Side of a global crop: a learned position table has as many places.
    pub global_size: usize,
    /// Mean of the pixels per channel, in [0, 1].
    #[serde(serialize_with = "as_written")]
    pub mean: [f32; 3],
    /// Standard deviation of the pixels per channel, in [0, 1].
    #[serde(serialize_with = "as_written")]
    pub std: [f32; 3],
}

impl Default for Pixels {
    fn default() -> Self {
        let CropConfig { global_size, mean, std, .. } = CropConfig::default();
        Self { global_size, mean, std }
    }
}

impl ModelInfo {
    /// What the weights at `path` are of: a weights folder, a run, a checkpoint of a run, or a file in one of these.
    /// `None` for a file that nothing is known of.
    ///
    /// # Errors
    /// If what says so cannot be read.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        match described_by(path) {
            Some(file) => Self::read(&file).map(Some),
            None => Ok(None),
        }
    }

    fn read(file: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Said {
            backbone: Json,
            #[serde(default)]
            crops: Pixels,
        }
        let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
        let wrong = |e: figment::Error| {
            let problem = Problem::of(&Nested::of(&e));
            let help = "it was written by dinolab: write it anew with `dinolab import` or `dinolab export`";
            Error::content(file, format!("{}: {}", problem.key, problem.message), help)
        };
        let said: Said = Figment::from(Toml::string(&text)).extract().map_err(wrong)?;
        let mut backbone = said.backbone;
        // A recipe's own key: where its weights came from.
        backbone.as_object_mut().map(|table| table.remove("weights"));
        let backbone = Figment::from(figment::providers::Serialized::defaults(&backbone)).extract().map_err(wrong)?;
        Ok(Self { backbone, crops: said.crops })
    }

    /// The tables `backbone` and `crops` of a recipe, without keys that have no value.
    pub(crate) fn to_table(&self) -> serde_json::Map<String, Json> {
        let Ok(Json::Object(mut tables)) = serde_json::to_value(self) else { unreachable!("a struct is a table") };
        tables.values_mut().filter_map(Json::as_object_mut).for_each(|table| table.retain(|_, value| !value.is_null()));
        tables
    }

    /// As TOML that a recipe may extend.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for (name, table) in self.to_table() {
            writeln!(text, "[{name}]").expect("writing to a string");
            for (key, value) in table.as_object().into_iter().flatten() {
                writeln!(text, "{key} = {}", toml_value(value)).expect("writing to a string");
            }
        }
        text
    }

    /// Builds the backbone, declaring its parameters in `params`.
    ///
    /// # Errors
    /// If a number is out of its range, or the plugin refuses its configuration.
    pub fn build(&self, params: &mut ParamBuilder) -> Result<Box<dyn Backbone>> {
        if let Some(problem) = check_tables(&Json::Object(self.to_table())) {
            let problem = format!("the model of these weights: {}: {}", problem.key, problem.message);
            return Err(Error::user(
                problem,
                "the file that describes the model is damaged or of another kind of model",
            ));
        }
        let global_size = self.crops.global_size;
        params.scope("backbone", |params| {
            self.backbone.build(&mut BackboneContext { params, global_size, channels: CHANNELS })
        })
    }
}

/// The file that says what the weights at `path` are of.
fn described_by(path: &Path) -> Option<PathBuf> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    // A checkpoint is in <run>/checkpoints/step-...
    let run = folder.parent().and_then(Path::parent).filter(|_| folder.join("state.json").exists());
    // What lies beside a single file may be any recipe.
    let own = path.is_dir().then(|| folder.join("recipe.toml"));
    let files = [Some(folder.join(WEIGHTS_FILE)), own, run.map(|r| r.join("recipe.toml"))];
    files.into_iter().flatten().find(|file| file.exists())
}

/// Fails if the weights at `path` are known to be of a model that computes something else than `backbone`: shapes alone
/// do not tell, as the number of heads changes none.
///
/// # Errors
/// Every key that differs, with both values.
pub fn check_same_model(path: &Path, backbone: &dyn Backbone) -> Result<()> {
    let Some(info) = ModelInfo::of(path)? else { return Ok(()) };
    let theirs = info.build(&mut ParamBuilder::new())?;
    let mut differences = Vec::new();
    differences_of("backbone", &theirs.architecture(), &backbone.architecture(), &mut differences);
    if differences.is_empty() {
        return Ok(());
    }
    let list: String = differences.iter().map(|d| format!("\n    {d}")).collect();
    let help = "leave `plugin` and these keys out of [backbone] to take the model of `backbone.weights`, or choose \
        weights of the recipe's model";
    Err(Error::content(path, format!("weights of another model than the recipe's{list}"), help))
}

fn differences_of(key: &str, theirs: &Json, ours: &Json, list: &mut Vec<String>) {
    match (theirs, ours) {
        (Json::Object(theirs), Json::Object(ours)) => {
            let keys: std::collections::BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
            for inner in keys {
                let get = |table: &serde_json::Map<String, Json>| table.get(inner).cloned().unwrap_or(Json::Null);
                differences_of(&format!("{key}.{inner}"), &get(theirs), &get(ours), list);
            }
        }
        _ if theirs == ours => {}
        _ => list.push(format!("{key} is {} in the weights, {} in the recipe", toml_value(theirs), toml_value(ours))),
    }
}

/// Makes the folder `out` with everything that `fill` writes into it, or nothing. It may exist if it is empty.
///
/// # Errors
/// If there is something at `out`, or it cannot be written.
pub fn write_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let taken = if out.is_dir() { std::fs::read_dir(out).is_ok_and(|mut d| d.next().is_some()) } else { out.exists() };
    if taken {
        return Err(Error::content(
            out,
            "there is something already",
            "choose another folder with --out, or remove it",
        ));
    }
    let beside = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(beside).map_err(Error::io("create", beside))?;
    let building = new_folder(beside)?;
    fill(building.path())?;
    sync_dir(building.path())?;
    // An empty folder gives way.
    std::fs::rename(building.keep(), out).map_err(Error::io("write", out))?;
    sync_dir(beside)
}
