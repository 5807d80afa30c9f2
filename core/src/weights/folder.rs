//! The folder of weights: what model they are of, and the model's tensors.

use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;

use figment::Figment;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::contract::{Backbone, BackboneContext};
use crate::files::{new_folder, sync_dir, BUILDING};
use crate::params::ParamBuilder;
use crate::problem::{Nested, Problem};
use crate::recipe::{as_written, check_schema, check_tables, toml_value, CropConfig, SCHEMA};
use crate::registry::Chosen;
use crate::{Error, Result};

/// The file that makes a folder one of weights.
pub const WEIGHTS_FILE: &str = "weights.toml";

/// What weights are of: the part of a recipe that says how pixels become features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The model: a plugin.
    pub backbone: Chosen<dyn Backbone>,
    /// The pixels that it was trained on.
    #[serde(default)]
    pub crops: Preprocessing,
}

/// What a model was trained on: size and normalisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Preprocessing {
    /// Side of a global crop: a learned position table has as many places.
    pub global_size: usize,
    /// Mean of the pixels per channel, in [0, 1]: one number for every channel of the images.
    #[serde(serialize_with = "as_written")]
    pub mean: Vec<f32>,
    /// Standard deviation of the pixels per channel, in [0, 1].
    #[serde(serialize_with = "as_written")]
    pub std: Vec<f32>,
}

impl Preprocessing {
    const KEYS: [&'static str; 3] = ["global_size", "mean", "std"];

    /// Channels of the images: as many as `mean` has numbers.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Fails, naming the key, if these are no mean and standard deviation of pixels in [0, 1].
    fn check(&self) -> Result<(), (&'static str, String)> {
        let [means, stds] = [&self.mean, &self.std].map(Vec::len);
        if means == 0 || stds != means {
            return Err(("crops.std", format!("has {stds} numbers, and crops.mean {means}: one for every channel")));
        }
        let range = |key, values: &[f32], least: f32| match values.iter().all(|x| (least..=1.0).contains(x)) {
            true => Ok(()),
            false => {
                Err((key, format!("{values:?} is outside of pixels in [0, 1]: divide numbers of 0 to 255 by 255")))
            }
        };
        range("crops.mean", &self.mean, 0.0)?;
        range("crops.std", &self.std, f32::MIN_POSITIVE)
    }
}

impl Default for Preprocessing {
    fn default() -> Self {
        let CropConfig { global_size, mean, std, .. } = CropConfig::default();
        Self { global_size, mean, std }
    }
}

impl ModelInfo {
    /// What `weights.toml`, or the recipe of a run, says. A recipe has more keys than are asked for here; `weights.toml` has
    /// none, so that one that somebody wrote into it and misspelt is refused.
    pub(super) fn read(file: &Path) -> Result<Self> {
        let help = "correct it, or write it anew with `dinolab import` or `dinolab export`";
        let wrong = |key: &str, problem: String| Error::content(file, format!("{key}: {problem}"), help);
        let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong("TOML", e.message().into()))?;
        let strict = file.ends_with(WEIGHTS_FILE);
        check_schema(table.remove("schema").as_ref()).map_err(|problem| wrong("schema", problem))?;
        let mut take = |key: &str| match table.remove(key) {
            Some(toml::Value::Table(table)) => Ok(Some(table)),
            None => Ok(None),
            Some(_) => Err(wrong(key, "expected a table".into())),
        };
        let backbone = take("backbone")?.ok_or_else(|| wrong("backbone", "missing in this file".into()))?;
        let mut crops = take("crops")?.unwrap_or_default();
        if !strict {
            crops.retain(|key, _| Preprocessing::KEYS.contains(&key));
        } else if let Some(key) = table.keys().next() {
            return Err(wrong(
                key,
                format!(
                    "unknown key; known: backbone, {}",
                    Preprocessing::KEYS.map(|k| format!("crops.{k}")).join(", ")
                ),
            ));
        }
        for key in ["mean", "std"] {
            if crops.get(key).is_some_and(|v| v.clone().try_into::<Vec<f32>>().is_err()) {
                return Err(wrong(&format!("crops.{key}"), "expected a list of numbers".into()));
            }
        }
        let pixels: Preprocessing =
            crops.try_into().map_err(|e: toml::de::Error| wrong("crops", e.message().into()))?;
        pixels.check().map_err(|(key, problem)| wrong(key, problem))?;
        let mut backbone = serde_json::to_value(backbone).expect("TOML is plain data");
        // A recipe's own key: where its weights came from.
        backbone.as_object_mut().map(|table| table.remove("weights"));
        let backbone = Figment::from(figment::providers::Serialized::defaults(&backbone)).extract();
        let backbone = backbone.map_err(|e| {
            let Problem { key, message, .. } = Problem::of(&Nested::of(&e));
            wrong(&format!("backbone.{key}"), message)
        })?;
        Ok(Self { backbone, crops: pixels })
    }

    /// The tables `backbone` and `crops` of a recipe, without keys that have no value.
    pub(crate) fn to_table(&self) -> serde_json::Map<String, Json> {
        let Ok(Json::Object(mut tables)) = serde_json::to_value(self) else { unreachable!("a struct is a table") };
        tables.values_mut().filter_map(Json::as_object_mut).for_each(|table| table.retain(|_, value| !value.is_null()));
        tables
    }

    /// As TOML that a recipe may extend.
    pub fn to_toml(&self) -> String {
        let mut text = format!("schema = {SCHEMA}\n");
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
        let (global_size, channels) = (self.crops.global_size, self.crops.channels());
        params.scope("backbone", |params| self.backbone.build(&mut BackboneContext { params, global_size, channels }))
    }
}

/// Keys in which two architectures (see [`Backbone::architecture`]) differ, with both values.
pub(super) fn differences(theirs: &Json, ours: &Json) -> Vec<String> {
    let mut list = Vec::new();
    differences_of("backbone", theirs, ours, &mut list);
    list
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

/// Fails if `out` is not free: it may be an empty folder.
///
/// # Errors
/// If there is something at `out`.
pub fn check_free(out: &Path) -> Result<()> {
    let empty = out.is_dir() && std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if empty || out.symlink_metadata().is_err() {
        return Ok(());
    }
    Err(Error::content(out, "there is something already", "choose another folder with --out, or remove it"))
}

/// Held by who writes a folder.
const LOCK: &str = ".lock";

/// Removes half-written folders whose writers were killed.
fn remove_leavings(beside: &Path) -> Result<()> {
    for entry in std::fs::read_dir(beside).map_err(Error::io("list", beside))?.flatten() {
        let folder = entry.path();
        let half = entry.file_name().to_string_lossy().starts_with(BUILDING);
        // Without a lock it was begun a moment ago, or is of something else.
        let dead = half && File::open(folder.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok());
        if dead {
            std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
        }
    }
    Ok(())
}

/// Puts the lock into a folder that is being written. It has its name only when it is held: else another writer could find
/// it free, and take the folder for one whose writer was killed.
fn locked(building: &Path) -> Result<File> {
    let unnamed = building.join(".locking");
    let lock = File::create(&unnamed).map_err(Error::io("write in", building))?;
    lock.try_lock().map_err(|e| Error::io("lock", building)(e.into()))?;
    std::fs::rename(unnamed, building.join(LOCK)).map_err(Error::io("write in", building))?;
    Ok(lock)
}

/// Makes the folder `out` with everything that `fill` writes into it, or nothing. It may exist if it is empty.
///
/// # Errors
/// If there is something at `out`, or it cannot be written.
pub fn write_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check_free(out)?;
    let beside = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(beside).map_err(Error::io("create", beside))?;
    remove_leavings(beside)?;
    let building = new_folder(beside)?;
    let _lock = locked(building.path())?;
    fill(building.path())?;
    std::fs::remove_file(building.path().join(LOCK)).map_err(Error::io("remove", building.path()))?;
    sync_dir(building.path())?;
    // An empty folder gives way. What another process has put there meanwhile does not.
    std::fs::rename(building.path(), out).map_err(|e| match check_free(out) {
        Err(_) => Error::content(
            out,
            "another process has just written something here",
            "look whether it is the same; choose another folder with --out, or remove it",
        ),
        Ok(()) => Error::io("write", out)(e),
    })?;
    // It has its place: nothing is to be removed.
    let _ = building.keep();
    sync_dir(beside)
}
