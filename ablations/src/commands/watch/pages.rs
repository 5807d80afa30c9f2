//! The page of what is watched, made anew when its files have changed.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use dinolab_core::checkpoint;
use dinolab_core::weights::Source;
use dinolab_core::{Device, Error, Result};

use crate::commands::prepared::prepare;
use crate::filmstrip::{filmstrip, Filmstrip};
use crate::report::{self, Gallery, Provenance};
use crate::stages;
use crate::suite::{Origin, Overrides, Plan, Suite};

/// Checkpoints of more bytes are not looked into while the run goes on: pictures are made on the CPU, which trains or reads
/// data.
const LARGEST: u64 = 256 << 20;
/// Kept steps that make a filmstrip.
const FILM_STEPS: usize = 2;

/// A file by its size and the time of its last change.
type Stamp = (PathBuf, u64, Option<SystemTime>);

/// What is watched, and what of it was last shown.
pub(super) struct Pages {
    folder: PathBuf,
    /// The suite's file, if it was given.
    suite: Option<PathBuf>,
    seen: Option<Vec<Stamp>>,
    gallery: Gallery,
    film: Option<Filmstrip>,
    /// The checkpoints that the filmstrip is of.
    film_of: Vec<PathBuf>,
}

impl Pages {
    /// A run or suite by its folder, or a suite by its file.
    ///
    /// # Errors
    /// If the file is no suite, or the folder a checkpoint.
    pub(super) fn of(path: &Path, out: Option<&Path>) -> Result<Self> {
        let suite = path.is_file().then(|| Suite::load(path)).transpose()?;
        let folder = match (&suite, out) {
            (_, Some(out)) => out.to_path_buf(),
            (Some(suite), None) => Path::new("runs").join(&suite.name),
            (None, None) => path.to_path_buf(),
        };
        if matches!(Source::at(&folder), Ok(Source::Checkpoint(_))) {
            let problem = "this is a checkpoint, of which there is no report";
            return Err(Error::content(&folder, problem, "watch the folder of its run"));
        }
        let suite = suite.map(|suite| suite.path);
        Ok(Self { folder, suite, seen: None, gallery: Gallery::default(), film: None, film_of: Vec::new() })
    }

    /// The folder of the run or suite.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The page as it is now, if a file has changed since the last one.
    pub(super) fn refresh(&mut self) -> Option<String> {
        let mut now = Vec::new();
        stamps(&self.folder, 4, &mut now);
        now.extend(self.suite.as_deref().and_then(stamp));
        if self.seen.as_ref() == Some(&now) {
            return None;
        }
        self.seen = Some(now);
        // What cannot be read now may be whole in a moment: it is said, and the page goes on.
        Some(self.page().unwrap_or_else(|error| report::waiting_page(&self.folder, &error.to_string())))
    }

    fn page(&mut self) -> Result<String> {
        let given = self.suite.clone().map(|file| Origin { file, ..Origin::default() });
        let known = match Origin::of(&self.folder) {
            Err(error) if given.is_none() => return Err(error),
            known => known.ok().flatten(),
        };
        if let Some(origin) = known.or(given) {
            return self.suite_page(origin);
        }
        if self.folder.join("recipe.toml").exists() {
            self.look();
            return report::run_page(&self.folder, self.film.as_ref());
        }
        let said = match self.folder.join(stages::FILE).exists() {
            true => "Stages are in this folder: watch the folder of one of them.",
            false => "No run and no suite is here yet; what comes is shown.",
        };
        Ok(report::waiting_page(&self.folder, said))
    }

    fn suite_page(&mut self, origin: Origin) -> Result<String> {
        let suite = Suite::load(self.suite.as_ref().unwrap_or(&origin.file))?;
        let provenance = Provenance::of(origin.command(&self.folder));
        let file = suite.path.clone();
        let prepare = |base: &Path, overrides: &Overrides| prepare(&file, base, overrides);
        let plan = Plan::new(suite, self.folder.clone(), &origin.set, &prepare)?;
        report::live_page(&plan, provenance, &mut self.gallery)
    }

    /// Makes the filmstrip of a run again if it keeps other checkpoints than before.
    fn look(&mut self) {
        let kept = checkpoint::list(&self.folder).unwrap_or_default();
        let small = |path: &PathBuf| checkpoint::model_bytes(path).is_ok_and(|bytes| bytes <= LARGEST);
        if kept == self.film_of || !kept.iter().all(small) {
            return;
        }
        let runs = [("run".to_string(), self.folder.clone())];
        // A checkpoint may be removed while it is read: then the next look is whole.
        if let Ok(film) = filmstrip(&runs, FILM_STEPS, Some(Device::Cpu)) {
            (self.film, self.film_of) = (film, kept);
        }
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = path.metadata().ok()?;
    Some((path.to_path_buf(), meta.len(), meta.modified().ok()))
}

/// The files under `folder`, so many folders deep, but for what is in checkpoints and what no page is made of.
fn stamps(folder: &Path, depth: usize, into: &mut Vec<Stamp>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with('.') || ["tensorboard", "captures", "crash", "locks"].contains(&name.as_str()) {
            continue;
        }
        match path.is_dir() {
            true if name.starts_with("step-") => into.push((path, 0, None)),
            true if depth > 0 => stamps(&path, depth - 1, into),
            true => {}
            false => into.extend(stamp(&path)),
        }
    }
}
