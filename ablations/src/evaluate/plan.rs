//! What is going to be measured, checked as a whole before any of it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{Dataset, Probe};
use dinolab_core::params::ParamBuilder;
use dinolab_core::recipe::{nearest, Measured, Overrides};
use dinolab_core::registry::{self, Chosen, DataContext};
use dinolab_core::text::printable;
use dinolab_core::weights::{ModelInfo, Source};
use dinolab_core::{Error, Result};
use serde_json::{json, Value as Json};

/// Changes when the scores of the same weights on the same data may.
const VERSION: u32 = 1;

/// Data, probes and weights.
pub struct Plan {
    /// What is measured on.
    pub data: Measured,
    /// Images to learn from.
    pub train: Arc<dyn Dataset>,
    /// Images to score on.
    pub test: Arc<dyn Dataset>,
    /// What is taken.
    pub probes: Vec<Taken>,
    /// The weights.
    pub jobs: Vec<Job>,
}

/// A probe.
pub struct Taken {
    /// Its name.
    pub name: String,
    /// Its table, every default filled in.
    pub table: Json,
    /// It.
    pub probe: Box<dyn Probe>,
}

/// One of the weights.
pub struct Job {
    /// Where they are, as it was given.
    pub path: PathBuf,
    /// What model they are of.
    pub model: ModelInfo,
    /// BLAKE3 of their file.
    pub hash: String,
    /// Sides in pixels that images are brought to.
    pub sizes: Vec<usize>,
}

impl Plan {
    /// Reads what is to be measured on, chooses the probes (those that are named; or else those of the recipe; or else all
    /// that the data allows), and looks at all weights.
    ///
    /// # Errors
    /// If anything of it cannot be used.
    pub fn new(
        data: &Path,
        overrides: &Overrides,
        probes: &[String],
        weights: &[PathBuf],
        sizes: &[usize],
    ) -> Result<Self> {
        let data = Measured::load(data, overrides)?;
        let jobs = weights.iter().map(|path| Job::new(path, sizes)).collect::<Result<_>>()?;
        let train: Arc<dyn Dataset> = data.data.build(&mut DataContext { seed: data.seed })?.into();
        let test = train.held_out().unwrap_or_else(|| train.clone());
        let probes = choose(&data, probes, test.as_ref())?;
        Ok(Self { data, train, test, probes, jobs })
    }

    /// The probes as plain data, by name.
    pub fn probes(&self) -> Json {
        self.probes.iter().map(|p| (p.name.clone(), p.table.clone())).collect::<serde_json::Map<_, _>>().into()
    }

    /// A hash of everything that the scores of weights at a size depend on.
    pub fn key(&self, job: &Job, size: usize) -> String {
        let data = [&self.train, &self.test].map(|part| json!([part.fingerprint(), part.len()]));
        let all = json!([
            VERSION,
            job.hash,
            job.model.to_toml(),
            size,
            self.data.seed,
            self.data.data,
            data,
            // In the order in which they are taken.
            self.probes.iter().map(|p| json!([p.name, p.table])).collect::<Vec<_>>(),
        ]);
        blake3::hash(all.to_string().as_bytes()).to_hex()[..24].to_string()
    }
}

impl Job {
    fn new(path: &Path, sizes: &[usize]) -> Result<Self> {
        let source = Source::at(path)?;
        let model = source.known_model()?;
        let backbone = model.build(&mut ParamBuilder::new())?;
        let (patch, least) = (backbone.patch_size(), backbone.smallest_crop());
        let sizes = if sizes.is_empty() { vec![model.crops.global_size] } else { sizes.to_vec() };
        for &size in &sizes {
            if size == 0 || !size.is_multiple_of(patch) || size < least {
                let below = (size / patch * patch).max(least.next_multiple_of(patch));
                let problem = format!(
                    "images of {size} pixels do not go with these weights: a side is a multiple of {patch}, the patch, \
                    and at least {least}"
                );
                let help = format!("choose --sizes such as {below} or {}", below + patch);
                return Err(Error::content(path, problem, help));
            }
        }
        Ok(Self { path: path.to_path_buf(), hash: source.hash()?, model, sizes })
    }

    /// What it is called in tables.
    pub fn name(&self) -> String {
        printable(&self.path)
    }
}

fn choose(data: &Measured, named: &[String], test: &dyn Dataset) -> Result<Vec<Taken>> {
    let of_recipe = || data.probes.0.iter().filter(|(_, entry)| entry.enabled).map(|(name, _)| name.clone());
    let registered = || registry::plugins::<dyn Probe>().into_iter().map(|plugin| plugin.name.to_string());
    let names: Vec<String> = match named.is_empty() {
        false => named.to_vec(),
        true if of_recipe().next().is_some() => of_recipe().collect(),
        true => registered().collect(),
    };
    let mut chosen: Vec<Taken> = Vec::new();
    for name in names {
        if chosen.iter().any(|known| known.name == name) {
            return Err(Error::user(format!("probe `{name}` is named twice"), "name it once in --probes"));
        }
        let plugin = match data.probes.0.get(&name) {
            Some(entry) => entry.probe.clone(),
            None if registry::find::<dyn Probe>(&name).is_some() => plain(&name)?,
            None => {
                let mut known: Vec<String> = registered().chain(data.probes.0.keys().cloned()).collect();
                known.sort();
                known.dedup();
                let meant = nearest(&name, known.iter().map(String::as_str));
                let meant = meant.map_or(String::new(), |meant| format!("did you mean `{meant}`? "));
                let help = format!("{meant}known: {}", known.join(", "));
                return Err(Error::user(format!("there is no probe `{name}`"), help));
            }
        };
        let probe = plugin.build(&mut ())?;
        let lacks = lacks(probe.as_ref(), test);
        match lacks {
            // Of all that there are, those that the data allows.
            Some(_) if named.is_empty() && data.probes.is_empty() => continue,
            Some(what) => {
                let problem = format!("probe `{name}` needs {what}, and the dataset `{}` gives none", data.data.name());
                return Err(Error::user(problem, "leave it out of --probes, or choose data that has them"));
            }
            None => {}
        }
        chosen.push(Taken { name, table: serde_json::to_value(&plugin).expect("a table is plain data"), probe });
    }
    if chosen.is_empty() {
        let help = "name some with --probes, or as tables [probes.<name>]; `dinolab plugins probe` lists them";
        return Err(Error::user("there is no probe to take on this data", help));
    }
    Ok(chosen)
}

/// A probe with the defaults of its keys.
fn plain(name: &str) -> Result<Chosen<dyn Probe>> {
    serde_json::from_value(json!({ "plugin": name })).map_err(|e| {
        let help = format!("give it a table [probes.{name}] in the file of --data");
        Error::user(format!("probe `{name}` has keys without a default: {e}"), help)
    })
}

/// What a probe needs and the data does not have.
fn lacks(probe: &dyn Probe, data: &dyn Dataset) -> Option<&'static str> {
    match probe.needs() {
        (true, _) if data.classes() == 0 => Some("image labels"),
        (_, true) if data.mask_classes() == 0 => Some("pixel masks"),
        _ => None,
    }
}
