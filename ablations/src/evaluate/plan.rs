//! What is going to be measured, checked as a whole before any of it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset, ImageSize, Probe};
use dinolab_core::params::ParamBuilder;
use dinolab_core::problem::nearest;
use dinolab_core::recipe::Overrides;
use dinolab_core::registry::{self, Chosen};
use dinolab_core::resolved::Measured;
use dinolab_core::text::printable;
use dinolab_core::weights::{ModelInfo, Source};
use dinolab_core::{Error, Result};
use serde_json::{json, Value as Json};

/// Changes when the scores of the same weights on the same data may.
const VERSION: u32 = 3;

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
    /// Whether sizes were named for all probes.
    pub sized: bool,
    /// The weights.
    pub jobs: Vec<Job>,
}

/// A probe.
pub struct Taken {
    /// Its name.
    pub name: String,
    /// Its table, every default filled in.
    pub table: Json,
    /// Of the files that it reads, if it reads any.
    pub stamp: Option<String>,
    /// The sizes that its table lists.
    pub sizes: Vec<ImageSize>,
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
    /// The size of the crops that it was trained on.
    pub usual: ImageSize,
    /// What images are brought to.
    pub sizes: Vec<ImageSize>,
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
        sizes: &[ImageSize],
    ) -> Result<Self> {
        let data = Measured::load(data, overrides)?;
        let train: Arc<dyn Dataset> = data.data.build(&mut DataContext { seed: data.seed })?.into();
        let test = train.held_out().unwrap_or_else(|| train.clone());
        let probes = choose(&data, probes, test.as_ref())?;
        let jobs: Vec<Job> = weights.iter().map(|path| Job::new(path, sizes, &probes)).collect::<Result<_>>()?;
        let (there, sees) = (test.channels(), |job: &&Job| job.model.crops.channels());
        if let Some(job) = jobs.iter().find(|job| sees(job) != there) {
            let problem = format!("these weights see {} channels, and the images have {there}", sees(&job));
            let help = "choose data of as many channels: `channels` of [data]";
            return Err(Error::content(&job.path, problem, help));
        }
        Ok(Self { data, train, test, probes, jobs, sized: !sizes.is_empty() })
    }

    /// The probes that are taken at a size, and whether samples are drawn at it where they can be: at one that was named, but not
    /// at the one that is usual, where scores are those that training logs.
    pub fn taken(&self, job: &Job, size: ImageSize) -> impl Iterator<Item = (&Taken, bool)> {
        let usual = size == job.usual;
        self.probes.iter().filter_map(move |taken| {
            let named = self.sized || taken.sizes.contains(&size);
            (named || taken.sizes.is_empty() && usual).then_some((taken, named))
        })
    }

    /// The probes as plain data, by name.
    pub fn probes(&self) -> Json {
        self.probes.iter().map(|p| (p.name.clone(), p.table.clone())).collect::<serde_json::Map<_, _>>().into()
    }

    /// A hash of everything that the scores of weights at a size depend on.
    pub fn key(&self, job: &Job, size: ImageSize) -> String {
        let data = [&self.train, &self.test].map(|part| json!([part.fingerprint(), part.stamp(), part.len()]));
        let all = json!([
            VERSION,
            job.hash,
            job.model.to_toml(),
            size,
            self.data.seed,
            self.data.data,
            data,
            // In the order in which they are taken.
            self.taken(job, size).map(|(p, drawn)| json!([p.name, p.table, drawn, p.stamp])).collect::<Vec<_>>(),
        ]);
        blake3::hash(all.to_string().as_bytes()).to_hex()[..24].to_string()
    }
}

impl Job {
    fn new(path: &Path, sizes: &[ImageSize], probes: &[Taken]) -> Result<Self> {
        let source = Source::at(path)?;
        let model = source.known_model()?;
        let backbone = model.build(&mut ParamBuilder::new())?;
        let usual = ImageSize::square(model.crops.global_size);
        let (mut all, key) = (sizes.to_vec(), if sizes.is_empty() { "the `sizes` of probes" } else { "--sizes" });
        if sizes.is_empty() {
            let without = probes.iter().any(|probe| probe.sizes.is_empty()).then_some(usual);
            let named = probes.iter().flat_map(|probe| &probe.sizes).copied();
            all = without.into_iter().chain(named).collect();
        }
        all.sort_by_key(|size| (size.pixels(), size.width));
        all.dedup();
        for size in &all {
            if let Some((problem, near)) = size.unfit(backbone.patch_size(), backbone.smallest_crop()) {
                let problem = format!("these weights cannot be shown {problem}");
                return Err(Error::content(path, problem, format!("in {key}, choose {near}")));
            }
            for Taken { name, probe, .. } in probes {
                let unfit = probe.unfit_window(*size, backbone.patch_size(), backbone.smallest_crop());
                if let Some((problem, near)) = unfit {
                    let problem = format!("these weights cannot be shown windows of {problem}");
                    return Err(Error::content(path, problem, format!("set probes.{name}.window to {near}")));
                }
                let patches = size.pixels() / backbone.patch_size().pow(2);
                if let Some((problem, help)) = probe.unfit_patches(patches) {
                    return Err(Error::content(path, format!("probe `{name}` {problem}"), help));
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), hash: source.hash()?, model, usual, sizes: all })
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
        let entry = data.probes.0.get(&name);
        let plugin = match entry {
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
        let lacks = probe.lacks(test).first().map(|lacking| {
            let (what, data) = (lacking.name(), data.data.name());
            let problem = format!("probe `{name}` needs {what}, and the dataset `{data}` gives none");
            (problem, "leave it out of --probes, or choose data that has them".into())
        });
        let unfit =
            || Some(probe.unfit_channels(test.channels())?).map(|(p, help)| (format!("probe `{name}`: {p}"), help));
        if let Some((problem, help)) = lacks.or_else(unfit) {
            // Of all that there are, those that the data allows.
            if named.is_empty() && data.probes.is_empty() {
                continue;
            }
            return Err(Error::user(problem, help));
        }
        let sizes = entry.map_or(Vec::new(), |entry| entry.sizes.clone());
        let table = serde_json::to_value(&plugin).expect("a table is plain data");
        chosen.push(Taken { name, table, stamp: probe.stamp(), sizes, probe });
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
