//! What lies at a path that was named for weights: the one place that says so, for every key and every command.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::places::{entries, import_first, is_pickle, is_there, missing, published_in, snapshot, INDEX_FILE};
use super::{differences, with_model_of_weights, ModelInfo, TensorFiles, WEIGHTS_FILE};
use crate::checkpoint::{self, Set, MODEL_FILE, RECIPE_FILE, STATE_FILE};
use crate::contract::Backbone;
use crate::files::{hash_files, NamedTensors};
use crate::params::ParamBuilder;
use crate::recipe::{RawRecipe, Recipe};
use crate::text::printable;
use crate::{Error, Result};

/// What lies at a path that was named for weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A run: weights by role, those of its newest checkpoint.
    Run {
        /// The run's folder.
        folder: PathBuf,
        /// Its newest checkpoint.
        newest: PathBuf,
    },
    /// A checkpoint, inside its run or copied out of it: weights by role.
    Checkpoint(PathBuf),
    /// A folder that `dinolab import` or `dinolab export` wrote: one model.
    Weights(PathBuf),
    /// A safetensors file by itself, with dinolab's names: nothing says what model it is of.
    File(PathBuf),
}

/// What there is to name.
const NAME: &str =
    "name a run, a step of one (RUN@400), a checkpoint (step-...), a folder that `dinolab import` or `dinolab export` wrote, or a \
    .safetensors file with dinolab's names";

impl Source {
    /// Says what lies at `path`: a run, a checkpoint, a weights folder, a file of one of these, or a safetensors file by
    /// itself. Links are followed. No tensor is read.
    ///
    /// # Errors
    /// If it is none of these. Of what could be made usable, the error says by which command.
    ///
    /// `RUN@400` is the checkpoint of step 400 of a run, where nothing of that name is.
    pub fn at(path: &Path) -> Result<Self> {
        if let Some((run, step)) = run_at_step(path) {
            return Self::step(&run, step);
        }
        if let Some(problem) = missing(path) {
            return Err(Error::content(path, problem, NAME));
        }
        if path.is_dir() {
            return Self::folder(path)?.map_or_else(|| Err(no_weights(path)), Ok);
        }
        // A file of a folder that is known stands for the folder, also where the file's name is a link to it.
        let real = path.canonicalize().map_err(Error::io("read", path))?;
        for file in [path, &real] {
            let is = |name: &str| file.file_name().is_some_and(|n| n == name);
            let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let own = [INDEX_FILE, STATE_FILE, WEIGHTS_FILE, RECIPE_FILE].iter().any(|name| is(name));
            let set = file.file_name().and_then(|name| checkpoint::set_of(&name.to_string_lossy()));
            if set == Some(Set::Optimizer) && is_there(&folder.join(STATE_FILE)) {
                let help = format!("name the checkpoint, {}", printable(folder));
                return Err(Error::content(path, "these are the moments of a checkpoint, and no weights", help));
            }
            if own || set == Some(Set::Model) {
                if let Ok(Some(source)) = Self::folder(folder) {
                    return Ok(source);
                }
            }
        }
        Self::file(path)
    }

    /// The checkpoint of the run in `run` after `step` steps.
    ///
    /// # Errors
    /// If there is no run, or none of that step is kept.
    pub fn step(run: &Path, step: u64) -> Result<Self> {
        let Self::Run { folder, .. } = Self::at(run)? else {
            let problem = format!("this is no run, so it has no step {step}");
            return Err(Error::content(run, problem, "name the folder of a run, or leave out the step"));
        };
        let (all, steps) = (checkpoint::list(&folder)?, checkpoint::steps(&folder)?);
        if let Some((path, _)) = all.into_iter().zip(&steps).find(|(_, s)| **s == step) {
            return Ok(Self::Checkpoint(path));
        }
        let there: Vec<String> = steps.iter().map(ToString::to_string).collect();
        let problem = format!("this run has no checkpoint of step {step}; it keeps {}", there.join(", "));
        let help = "name one of these; to keep others train with `checkpoint.keep_every`";
        Err(Error::content(run, problem, help))
    }

    /// Whether there is anything at `path`; of a step of a run (`RUN@400`), whether the run is there.
    pub(crate) fn is_named(path: &Path) -> bool {
        is_there(path) || run_at_step(path).is_some_and(|(run, _)| is_there(&run))
    }

    fn folder(path: &Path) -> Result<Option<Self>> {
        if is_there(&path.join(STATE_FILE)) {
            return Ok(Some(Self::Checkpoint(path.into())));
        }
        if is_there(&path.join(WEIGHTS_FILE)) {
            return Ok(Some(Self::Weights(path.into())));
        }
        if !is_there(&path.join(RECIPE_FILE)) && !path.join(checkpoint::FOLDER).is_dir() {
            return Ok(None);
        }
        match checkpoint::list(path)?.pop() {
            Some(newest) => Ok(Some(Self::Run { folder: path.into(), newest })),
            None => {
                let help = format!("train it first: `dinolab train {} --resume`", printable(path));
                Err(Error::content(path, "this run has no checkpoint yet", help))
            }
        }
    }

    fn file(path: &Path) -> Result<Self> {
        if is_pickle(path) {
            return Err(import_first(path));
        }
        let files = TensorFiles::open(path)?;
        // `student.backbone..`, `teacher.backbone..`, `<name>_teacher.backbone..`, or one model without a role.
        let is_role = |role: &str| ["student", "teacher"].contains(&role) || role.ends_with("_teacher");
        let of_role = |n: &str| n.split_once('.').is_some_and(|(role, n)| is_role(role) && n.starts_with("backbone."));
        if files.names().any(|n| n.starts_with("backbone.") || of_role(n)) {
            return Ok(Self::File(path.into()));
        }
        let first = files.names().next().unwrap_or("none");
        let problem = format!("its tensors have other names than dinolab's (the first is `{first}`)");
        Err(Error::content(path, problem, import(path)))
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Run { folder: path, .. } | Self::Checkpoint(path) | Self::Weights(path) | Self::File(path) => path,
        }
    }

    /// Whether weights are there by role, `teacher.backbone...`, or one model alone.
    pub fn has_roles(&self) -> bool {
        matches!(self, Self::Run { .. } | Self::Checkpoint(_))
    }

    /// What model the weights are of; `None` for a file by itself.
    ///
    /// # Errors
    /// If what says so cannot be read.
    pub fn model(&self) -> Result<Option<ModelInfo>> {
        match self {
            Self::Weights(folder) => ModelInfo::read(&folder.join(WEIGHTS_FILE)).map(Some),
            Self::File(_) => Ok(None),
            Self::Run { .. } | Self::Checkpoint(_) => ModelInfo::read(&self.recipe_file()?).map(Some),
        }
    }

    /// What model the weights are of, which has to be known.
    ///
    /// # Errors
    /// As [`model`](Self::model), and for a file by itself.
    pub fn known_model(&self) -> Result<ModelInfo> {
        self.model()?.ok_or_else(|| {
            let problem = "nothing says what model these weights are of";
            let help =
                "name the run or the folder that the file is from; or put it under the name model.safetensors into a \
                folder with a weights.toml that has the tables [backbone] and [crops]";
            Error::content(self.path(), problem, help)
        })
    }

    /// The recipe of a run or of a checkpoint, which says what model it is and with what heads. Whether its values go together
    /// was checked when the run began.
    ///
    /// # Errors
    /// If there is none, or a key, a type or a number of it is wrong.
    pub(crate) fn recipe(&self) -> Result<Recipe> {
        Ok(with_model_of_weights(RawRecipe::load(self.recipe_file()?)?)?.typed()?.recipe)
    }

    /// The recipe that lies in the checkpoint, or else that of its run.
    ///
    /// # Errors
    /// If there is none.
    pub fn recipe_file(&self) -> Result<PathBuf> {
        let (Self::Run { newest: checkpoint, .. } | Self::Checkpoint(checkpoint)) = self else {
            let problem = "these are weights without the recipe of their run, which says what heads there are";
            return Err(Error::content(self.path(), problem, "name a run, or a checkpoint of one (step-...)"));
        };
        if let Some(own) = checkpoint::recipe_file(checkpoint).map_err(|e| self.broken(e))? {
            return Ok(own);
        }
        if let Some(run) = checkpoint::run_of(checkpoint) {
            return Ok(run.join(RECIPE_FILE));
        }
        let problem = format!("nothing says what model these weights are of: there is no {RECIPE_FILE}");
        let help = format!("copy the {RECIPE_FILE} of the run that it is from into this folder");
        Err(Error::content(self.path(), problem, help))
    }

    /// The files with the weights; those of a checkpoint were found to be what was written.
    ///
    /// # Errors
    /// If one is missing, or was changed.
    pub fn stored(&self) -> Result<TensorFiles> {
        if let Self::Run { newest: folder, .. } | Self::Checkpoint(folder) = self {
            checkpoint::verify(folder, Set::Model).map_err(|e| self.broken(e))?;
        }
        self.unverified()
    }

    /// The same, whether or not they are what was written.
    fn unverified(&self) -> Result<TensorFiles> {
        match self {
            // Those that it says it has, whatever lies beside them.
            Self::Run { newest: folder, .. } | Self::Checkpoint(folder) => {
                checkpoint::model(folder).map_err(|e| self.broken(e))
            }
            Self::Weights(folder) => {
                let [whole, index] = [MODEL_FILE, INDEX_FILE].map(|name| folder.join(name));
                TensorFiles::open(if !is_there(&whole) && is_there(&index) { &index } else { &whole })
            }
            Self::File(file) => TensorFiles::open(file),
        }
    }

    /// Names and shapes of the tensors, which are not read: nor is it seen whether they are what was written.
    ///
    /// # Errors
    /// If a file is missing or cut off.
    pub(crate) fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let files = self.unverified()?;
        Ok(files.names().filter_map(|name| Some((name.to_string(), files.shape(name)?.to_vec()))).collect())
    }

    /// BLAKE3 of the file with the weights; if they are in several, of the hashes of these, in order of their names.
    ///
    /// # Errors
    /// As [`stored`](Self::stored), or if a file cannot be read.
    pub fn hash(&self) -> Result<String> {
        match self {
            Self::Run { newest: folder, .. } | Self::Checkpoint(folder) => {
                checkpoint::verify(folder, Set::Model).map_err(|e| self.broken(e))
            }
            Self::Weights(_) | Self::File(_) => hash_files(self.unverified()?.files()),
        }
    }

    /// Its tensors, read into memory.
    ///
    /// # Errors
    /// If a file is missing or broken, or holds what no weights are.
    pub fn tensors(&self) -> Result<NamedTensors> {
        self.files()?.read_all()
    }

    /// Its tensors, to be read one after the other: weights, so floats, and finite.
    ///
    /// # Errors
    /// As [`tensors`](Self::tensors).
    pub(crate) fn files(&self) -> Result<TensorFiles> {
        let tensors = self.stored()?;
        for name in tensors.names() {
            let refuse = |problem: String| {
                Err(Error::content(self.path(), problem, "take an earlier checkpoint, or import the weights again"))
            };
            let raw = tensors.get(name).expect("it has its names");
            if raw.values().is_none() {
                return refuse(format!("{name} is of type {:?}, which no weights are", raw.dtype));
            }
            let (bad, all) = (raw.non_finite(), raw.shape.iter().product::<usize>());
            if bad > 0 {
                return refuse(format!("{name} has {bad} of {all} numbers that are not finite (NaN or infinite)"));
            }
        }
        Ok(tensors)
    }

    /// A broken newest checkpoint of a run, with the one before it, which is not taken without a word.
    fn broken(&self, error: Error) -> Error {
        let Self::Run { folder, newest } = self else { return error };
        let older = checkpoint::list(folder).unwrap_or_default().into_iter().rev().filter(|c| c != newest);
        match older.into_iter().find(|c| checkpoint::verify(c, Set::Model).is_ok()) {
            Some(whole) => {
                let problem = format!("the newest checkpoint of this run is broken: {}", error.problem_of(""));
                Error::content(newest, problem, format!("name the one before: {}", printable(whole)))
            }
            None => error,
        }
    }

    /// Fails if the weights are known to be of a model that computes something else than `backbone`: shapes alone do not
    /// tell, as the number of heads changes none.
    ///
    /// # Errors
    /// Every key that differs, with both values.
    pub fn check_same_model(&self, backbone: &dyn Backbone) -> Result<()> {
        let Some(info) = self.model()? else { return Ok(()) };
        check_same_model(info.build(&mut ParamBuilder::new())?.as_ref(), backbone, self.path())
    }
}

/// Fails if the weights at `path`, which are of `theirs`, are of a model that computes something else than `backbone`.
///
/// # Errors
/// Every key that differs, with both values.
pub(crate) fn check_same_model(theirs: &dyn Backbone, backbone: &dyn Backbone, path: &Path) -> Result<()> {
    let differences = differences(&theirs.architecture(), &backbone.architecture());
    if differences.is_empty() {
        return Ok(());
    }
    let list: String = differences.iter().map(|d| format!("\n    {d}")).collect();
    let help = "set these keys of [backbone] as they are in the weights, or choose weights of the recipe's model \
        (`backbone.weights` takes the model too, where [backbone] has no `plugin`)";
    Err(Error::content(path, format!("weights of another model than the recipe's{list}"), help))
}

/// The run and the step that `RUN@400` names, where nothing lies under that name itself.
pub(crate) fn run_at_step(path: &Path) -> Option<(PathBuf, u64)> {
    let (run, step) = path.file_name()?.to_str()?.rsplit_once('@')?;
    let step = step.parse().ok().filter(|_| !run.is_empty() && !is_there(path))?;
    Some((path.with_file_name(run), step))
}

/// How published weights become usable.
fn import(path: &Path) -> String {
    format!("make a weights folder of it, `dinolab import {} --out weights/NAME`, and name that", printable(path))
}

/// Why a folder is no weights, and what to name instead.
fn no_weights(path: &Path) -> Error {
    let refuse = |problem: &str, help: String| Error::content(path, problem, help);
    if path.ends_with(checkpoint::FOLDER) {
        if let Some(run) = path.parent().filter(|run| is_there(&run.join(RECIPE_FILE))) {
            return refuse(
                "these are the checkpoints of a run",
                format!("name the run, {}, or one of them", printable(run)),
            );
        }
    }
    match snapshot(path) {
        Ok(Some(_)) => return refuse("this is a published model in Hugging Face's cache", import(path)),
        Err(error) => return error,
        Ok(None) => {}
    }
    if is_there(&path.join("config.json")) || published_in(path).is_ok() {
        return refuse("these are published weights, in a layout of their own", import(path));
    }
    match run_below(path, 3) {
        Some(run) => {
            refuse("there are no weights here, but runs below", format!("name one of them, such as {}", printable(run)))
        }
        None => refuse("there are no weights here", NAME.into()),
    }
}

/// The first run inside a folder, as those of a suite are.
fn run_below(folder: &Path, depth: usize) -> Option<PathBuf> {
    let inner = || entries(folder).unwrap_or_default().into_iter().map(|name| folder.join(name)).filter(|p| p.is_dir());
    let run = inner().find(|p| is_there(&p.join(RECIPE_FILE)));
    run.or_else(|| depth.checked_sub(1).and_then(|depth| inner().find_map(|p| run_below(&p, depth))))
}
