//! A run on several ranks: rank 0 has the run's folder, its log and its probes, and tells the others what to do.
//!
//! The others wait for its orders. What all do together is a step; whatever rank 0 decides between steps (to stop, to go
//! back, to end by a rule) they learn by the next order. A rank that fails, or rank 0 in the middle of a step, ends all.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{datasets, loader_spec, parents};
use crate::checkpoint::{self, Saving, Written};
use crate::comm::{Comm, Ranks, Single};
use crate::data::{BrokenSample, Loader, LoaderSpec};
use crate::recipe::Recipe;
use crate::resolved::Resolved;
use crate::step::{Learner, Peers};
use crate::{Error, Result};

/// What rank 0 tells the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// The model is made, and stands where rank 0's does.
    Begin {
        /// Hash of the recipe, which is that of all.
        recipe: String,
        /// Hash of the data, where the recipe does not say it all.
        data: Option<String>,
        /// The checkpoint that it is read from; without one it begins as the recipe says.
        checkpoint: Option<PathBuf>,
        /// The run's folder.
        folder: PathBuf,
        /// Steps done.
        start: u64,
        /// As in [`LoaderSpec`].
        left_out: Vec<(u64, u64)>,
    },
    /// A step is done by all.
    Step(u64),
    /// A checkpoint after so many steps is written into a folder by all.
    Save { folder: PathBuf, step: u64 },
    /// The teachers copy after a step that was skipped.
    PassOver(u64),
    /// Rank 0 is given what the others have of a checkpoint.
    Content,
    /// All are given the gradients of all.
    Gradients,
    /// Rank 0 is given the weights that are evaluated.
    Evaluated,
    /// What the command is about is done by all.
    Work,
    /// The program ends with this code.
    End(u8),
}

impl Order {
    /// The next one, on a rank that follows.
    fn next(comm: &dyn Comm) -> Result<Self> {
        serde_json::from_str(&comm.told(None)?).map_err(|e| misunderstood(&e))
    }
}

/// What a rank has to say after a step.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    /// It was asked to stop.
    stop: bool,
    /// Samples that it could not read.
    broken: Vec<BrokenSample>,
}

/// Rank 0, for the others.
#[derive(Debug)]
pub struct Lead {
    comm: Arc<dyn Comm>,
    /// Whether all are in the middle of what they do together.
    together: AtomicBool,
}

impl Lead {
    /// Rank 0 of those that `comm` joins.
    pub fn new(comm: Arc<dyn Comm>) -> Self {
        Self { comm, together: AtomicBool::new(false) }
    }

    /// One rank, without others.
    pub fn alone() -> Self {
        Self::new(Arc::new(Single))
    }

    /// What joins the ranks.
    pub fn comm(&self) -> &Arc<dyn Comm> {
        &self.comm
    }

    /// Fails unless the ranks can share the steps of this recipe.
    ///
    /// # Errors
    /// If they cannot share its shards.
    pub fn check(&self, recipe: &Recipe) -> Result<()> {
        Ranks::new(self.comm.clone(), recipe.batch.shards).map(drop)
    }

    /// Does what all ranks do together: those that follow have to [`join_in`].
    ///
    /// # Errors
    /// That of `work`, or if a rank has failed.
    pub fn share<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.together(&Order::Work, work)
    }

    pub(super) fn order(&self, order: &Order) -> Result<()> {
        if self.comm.world() > 1 {
            self.comm.told(Some(serde_json::to_string(order).expect("plain data")))?;
        }
        Ok(())
    }

    /// Does what all ranks do together after this order.
    pub(super) fn together<R>(&self, order: &Order, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.order(order)?;
        self.together.store(true, Ordering::Relaxed);
        let done = work()?;
        self.together.store(false, Ordering::Relaxed);
        Ok(done)
    }

    /// What the ranks have to say after a step: whether one was asked to stop, and what others could not read.
    pub(super) fn notes(&self, stop: bool) -> Result<(bool, Vec<BrokenSample>)> {
        if self.comm.world() == 1 {
            return Ok((stop, Vec::new()));
        }
        let mut all = exchange(self.comm.as_ref(), Note { stop, broken: Vec::new() })?;
        let stop = all.iter().any(|note| note.stop);
        Ok((stop, all.drain(..).flat_map(|note| note.broken).collect()))
    }

    /// Writes a checkpoint of `learner` after `step` steps with all ranks, each of which writes its files.
    pub(super) fn save(&self, learner: &Learner, step: u64, saving: &Saving, most: u64) -> Result<Vec<Written>> {
        if self.comm.world() == 1 {
            return learner.write(step, saving.folder(), most)?;
        }
        let order = Order::Save { folder: saving.folder().into(), step };
        let parts =
            self.together(&order, || exchange_parts(self.comm.as_ref(), learner.write(step, saving.folder(), most)?))?;
        let mut all = Vec::new();
        for (rank, part) in parts.into_iter().enumerate() {
            all.extend(part.map_err(|error| {
                let (problem, help) =
                    error.split_once("\n  help: ").unwrap_or((&error, "mend that, and go on with --resume"));
                Error::user(format!("rank {rank}: {problem}"), help)
            })?);
        }
        Ok(all)
    }

    /// The program of all ranks ends with this code, which was said why; in the middle of a step they are ended.
    pub fn end(&self, code: u8) {
        // Ranks that cannot be reached any more are ended by their launcher.
        match self.together.load(Ordering::Relaxed) {
            true => self.comm.abort(),
            false => drop(self.order(&Order::End(code))),
        }
    }
}

/// What a rank wrote of a checkpoint, or why it could not.
type Part = std::result::Result<Vec<Written>, String>;

/// Tells all ranks what each of them wrote.
pub(super) fn exchange_parts(comm: &dyn Comm, own: Result<Vec<Written>>) -> Result<Vec<Part>> {
    let own: Part = own.map_err(|error| error.to_string());
    let all = comm.gather_text(&serde_json::to_string(&own).expect("plain data"))?;
    all.iter().map(|text| serde_json::from_str(text).map_err(|e| misunderstood(&e))).collect()
}

fn exchange(comm: &dyn Comm, own: Note) -> Result<Vec<Note>> {
    let quiet = !own.stop && own.broken.is_empty();
    let text = if quiet { String::new() } else { serde_json::to_string(&own).expect("plain data") };
    let parse = |text: &String| match text.is_empty() {
        true => Ok(Note::default()),
        false => serde_json::from_str(text).map_err(|e| misunderstood(&e)),
    };
    comm.gather_text(&text)?.iter().map(parse).collect()
}

/// What to do about ranks that do not go together.
const SAME: &str = "start the same program with the same arguments on all ranks";

fn misunderstood(error: &serde_json::Error) -> Error {
    Error::user(format!("ranks do not understand each other: {error}"), SAME)
}

/// Does `work` when rank 0 [shares](Lead::share) it; gives the code that the program ends with.
///
/// # Errors
/// That of `work`, or if a rank has failed.
pub fn join_in(comm: &Arc<dyn Comm>, work: impl FnOnce() -> Result<()>) -> Result<u8> {
    let mut work = Some(work);
    loop {
        match Order::next(comm.as_ref())? {
            Order::End(code) => return Ok(code),
            Order::Work => work.take().map_or(Ok(()), |work| work())?,
            _ => return Err(Error::user("rank 0 does a run, and this rank another command", SAME)),
        }
    }
}

/// Does what rank 0 says until it ends; gives the code that the program ends with. `resolve` gives the recipe, which is asked
/// for when rank 0 has accepted its own.
///
/// # Errors
/// If this rank cannot do what all do: it then has to end the others.
pub fn follow(comm: &Arc<dyn Comm>, resolve: &dyn Fn() -> Result<Resolved>, stop: &AtomicBool) -> Result<u8> {
    let mut member = None;
    loop {
        match (Order::next(comm.as_ref())?, &mut member) {
            (Order::End(code), _) => return Ok(code),
            (order @ Order::Begin { .. }, before) => {
                // Of a run that goes back, there may be no memory for two.
                *before = None;
                *before = Some(Member::begin(&resolve()?.absolute()?, comm, order)?);
            }
            (Order::Step(step), Some(member)) => {
                let broken = member.step(step)?;
                exchange(comm.as_ref(), Note { stop: stop.load(Ordering::Relaxed), broken })?;
            }
            (Order::Save { folder, step }, Some(member)) => drop(member.save(step, &folder)?),
            (Order::PassOver(step), Some(member)) => member.learner.pass_over(step)?,
            (Order::Content, Some(member)) => member.learner.hand_over()?,
            (Order::Gradients, Some(member)) => drop(member.learner.gradients()?),
            (Order::Evaluated, Some(member)) => member.learner.gather_evaluated()?,
            _ => return Err(Error::user("rank 0 does another command than this rank, which does a run", SAME)),
        }
    }
}

/// A rank that follows.
struct Member {
    learner: Learner,
    loader: Loader,
    /// Bytes of a file of a checkpoint, at most.
    most: u64,
}

impl Member {
    fn begin(resolved: &Resolved, comm: &Arc<dyn Comm>, order: Order) -> Result<Self> {
        let Order::Begin { recipe: hash, data, checkpoint, folder, start, left_out } = order else {
            unreachable!("asked for with that order")
        };
        let recipe = &resolved.recipe;
        let (train, _) = datasets(recipe)?;
        if (&resolved.hash, &train.fingerprint()) != (&hash, &data) {
            let problem = "this rank reads another recipe or other data than rank 0";
            return Err(Error::user(problem, "let all ranks see the same files, at the same places"));
        }
        let peers = Peers::of(comm.as_ref());
        let mut learner = match checkpoint {
            Some(path) => Learner::from_checkpoint_with(recipe, &checkpoint::open(&path)?, peers)?,
            None => parents::begin(resolved, train.as_ref(), peers)?.0,
        };
        learner.join(comm.clone())?;
        let most = recipe.checkpoint.file_bytes();
        if learner.all_write(most) && !folder.is_dir() {
            let problem =
                "the run's folder is not there for this process, which writes its part of the checkpoints into it";
            let help = "choose with --out a folder that all machines see; or set checkpoint.file_mb so high that rank 0 writes all";
            return Err(Error::content(folder, problem, help));
        }
        let spec = LoaderSpec { left_out, ..loader_spec(recipe, &learner, start) };
        Ok(Self { learner, loader: Loader::new(train, spec)?, most })
    }

    /// Writes this rank's files of a checkpoint.
    fn save(&self, step: u64, folder: &Path) -> Result<Vec<Part>> {
        exchange_parts(self.learner.ranks().comm(), self.learner.write(step, folder, self.most)?)
    }

    /// Does a step with the others; gives what could not be read.
    fn step(&mut self, step: u64) -> Result<Vec<BrokenSample>> {
        let batches = self.loader.next().expect("rank 0 asks for steps of the run alone")?;
        assert_eq!(batches.step, step, "all ranks are at the same step");
        self.learner.step(step, &batches.batches, false)?;
        Ok(batches.broken)
    }
}
