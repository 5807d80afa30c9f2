//! Students of one frozen teacher that train in one process: each has a run of its own, and all have the teacher and the data in
//! common (multi-student distillation: Siméoni et al., arXiv:2508.10104, section 5.2).
//!
//! They take turns: one begins or does a step while the others wait, and the one that has done least goes first. So a device
//! belongs to one at a time, runs that were killed at different steps come together again, and every run has the bits that it
//! would have by itself.

use std::panic::resume_unwind;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{run_beside, Lead, Observer, Outcome, RunOptions};
use crate::contract::{Augmentation, Dataset};
use crate::data::{Loader, LoaderSpec, StepBatches};
use crate::recipe::{is_within, CropsEntry, OnNonFinite, Recipe};
use crate::registry::Chosen;
use crate::resolved::{changes, fit_students, Resolved};
use crate::step::{declare, named_teachers, SharedTeacher};
use crate::{Error, Result};

/// What students have to have in common: what the teacher is, and all that makes the images that it sees.
const COMMON: [&str; 11] = [
    "augmentations",
    "batch",
    "crops",
    "data",
    "masking",
    "on_non_finite",
    "precision",
    "seed",
    "steps",
    "teacher.checkpoint",
    "teacher.plugin",
];

/// A student's run.
pub struct StudentRun<'a> {
    /// Its recipe.
    pub resolved: &'a Resolved,
    /// Where and how it runs. All have the same `stop`.
    pub options: &'a RunOptions,
    /// Who watches it.
    pub observer: &'a mut (dyn Observer + Send),
}

/// Runs students of one frozen teacher, step by step side by side, each as [`run`](super::run) does; gives how each ended. One that
/// fails does not end the others.
///
/// # Errors
/// If the recipes do not have in common what the students share, or the device cannot hold all of them.
pub fn run_students(students: Vec<StudentRun<'_>>) -> Result<Vec<Result<Outcome>>> {
    let resolved = students.iter().map(|student| student.resolved.clone().absolute());
    let crops = check(&resolved.collect::<Result<Vec<_>>>()?)?;
    let all = Arc::new(Students {
        turns: Mutex::new(vec![Turn::Start; students.len()]),
        changed: Condvar::new(),
        teacher: Arc::default(),
        crops,
        data: Mutex::default(),
    });
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        // All that wait for their turn are there before a thread can fail to start.
        let places: Vec<Student> = (0..students.len()).map(|place| Student { all: all.clone(), place }).collect();
        for (own, StudentRun { resolved, options, observer }) in places.into_iter().zip(students) {
            let work = move || {
                own.wait();
                run_beside(resolved, options, &Lead::alone(), Some(&own), observer)
            };
            // As much as the first thread of a program has.
            let thread = std::thread::Builder::new().name(resolved.recipe.name.clone()).stack_size(8 << 20);
            let help = "let the system have more threads, or train the students one after the other";
            let failed = |e| Error::user(format!("cannot start a thread for the student: {e}"), help);
            threads.push(thread.spawn_scoped(scope, work).map_err(failed));
        }
        let ended = |thread: Result<std::thread::ScopedJoinHandle<'_, _>>| match thread?.join() {
            Ok(ended) => ended,
            Err(panic) => resume_unwind(panic),
        };
        Ok(threads.into_iter().map(ended).collect())
    })
}

/// The crops that are made for all. Fails unless the students can share what they see, and the device holds them.
fn check(students: &[Resolved]) -> Result<Crops> {
    let (first, others) = students.split_first().expect("there is a student");
    let refuse = |problem: String, help: &str| Err(Error::user(problem, help));
    if matches!(first.recipe.on_non_finite, OnNonFinite::Rewind(_)) {
        let problem = "on_non_finite: a student that goes back would see other images than those beside it".into();
        return refuse(problem, "set on_non_finite = \"stop\" or { skip = 3 }, or train the students one by one");
    }
    for other in others {
        let (a, b) = (&first.recipe.name, &other.recipe.name);
        let (here, there) = (first.recipe.device()?, other.recipe.device()?);
        if here != there {
            let problem = format!("`{a}` and `{b}` cannot share a teacher: one is on {here}, the other on {there}");
            return refuse(problem, "name one for all: --device");
        }
        let differ = changes(&first.value, &other.value);
        if let Some(change) = differ.iter().find(|change| COMMON.iter().any(|table| is_within(&change.key, table))) {
            let problem = format!("`{a}` and `{b}` cannot share a teacher: they differ in {change}");
            return refuse(problem, "let both have the same value, or train the students one by one");
        }
    }
    let recipes: Vec<&Recipe> = students.iter().map(|student| &student.recipe).collect();
    if let Some(fit) = fit_students(&recipes, first.recipe.device()?)? {
        return Err(fit.into_error());
    }
    Crops::of(&recipes)
}

/// The crops that some student sees: one more changes nothing in the others.
struct Crops {
    own: CropsEntry,
    augmentations: Vec<(String, Chosen<dyn Augmentation>)>,
    teacher_size: Option<usize>,
}

impl Crops {
    /// Those of all these recipes, which have the same tables.
    ///
    /// # Errors
    /// If teachers of `[teachers]` want crops of different sizes.
    fn of(recipes: &[&Recipe]) -> Result<Self> {
        let mut all = Self { own: recipes[0].crops.clone(), augmentations: Vec::new(), teacher_size: None };
        let mut locals = false;
        for recipe in recipes {
            let model = declare(recipe)?;
            locals |= model.student_sees()[1];
            for (name, augmentation) in model.augmentations(recipe) {
                if !all.augmentations.iter().any(|(known, _)| *known == name) {
                    all.augmentations.push((name, augmentation));
                }
            }
            let size = named_teachers(recipe, &model)?.iter().find_map(|teacher| teacher.policy.crop_size());
            match (all.teacher_size, size) {
                (Some(a), Some(b)) if a != b => {
                    let problem = format!("students side by side have teachers with crops of {a} and of {b} pixels");
                    return Err(Error::user(problem, "let crop_size be the same, or train the students one by one"));
                }
                (known, size) => all.teacher_size = known.or(size),
            }
        }
        if !locals {
            all.own.own.local_count = 0;
        }
        Ok(all)
    }

    fn spec(&self, of_one: &LoaderSpec) -> LoaderSpec {
        LoaderSpec {
            crops: self.own.clone(),
            augmentations: self.augmentations.clone(),
            teacher_crop_size: self.teacher_size,
            ..of_one.clone()
        }
    }
}

/// How far a student is, in the order of who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// It has not begun.
    Start,
    /// It is to do this step.
    Step(u64),
    /// It has ended.
    Ended,
}

struct Students {
    turns: Mutex<Vec<Turn>>,
    changed: Condvar,
    teacher: Arc<SharedTeacher>,
    crops: Crops,
    data: Mutex<Data>,
}

/// The batches of all, made once.
#[derive(Default)]
struct Data {
    /// With the step that it gives next.
    loader: Option<(u64, Loader)>,
    newest: Option<StepBatches>,
    /// Why there are no more, if they could not be made.
    failed: Option<String>,
}

/// One of several students.
pub(super) struct Student {
    all: Arc<Students>,
    place: usize,
}

impl Student {
    fn turns(&self) -> MutexGuard<'_, Vec<Turn>> {
        self.all.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is this student's turn.
    fn wait(&self) {
        let first = |turns: &[Turn]| (0..turns.len()).min_by_key(|&place| (turns[place], place));
        let waiting = |turns: &mut Vec<Turn>| first(turns) != Some(self.place);
        drop(self.all.changed.wait_while(self.turns(), waiting).unwrap_or_else(PoisonError::into_inner));
    }

    fn is_at(&self, turn: Turn) {
        self.turns()[self.place] = turn;
        self.all.changed.notify_all();
    }

    /// Ends its turn, and waits for that of `step`.
    pub(super) fn turn(&self, step: u64) {
        self.is_at(Turn::Step(step));
        self.wait();
    }

    pub(super) fn teacher(&self) -> &Arc<SharedTeacher> {
        &self.all.teacher
    }

    /// Fails if its run leaves data out that the others do not.
    pub(super) fn reads(&self, spec: &LoaderSpec) -> Result<&Self> {
        if spec.left_out.is_empty() {
            return Ok(self);
        }
        let problem = "the run went back from a step that was not finite, and sees other images than those beside it";
        Err(Error::user(problem, "go on with it by itself"))
    }

    /// The batches of `step`, which is this student's turn; as [`Loader::next_unless`].
    pub(super) fn batches(
        &self,
        step: u64,
        dataset: &Arc<dyn Dataset>,
        spec: &LoaderSpec,
        stop: &AtomicBool,
    ) -> Option<Result<StepBatches>> {
        let mut data = self.all.data.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(newest) = data.newest.as_ref().filter(|newest| newest.step == step) {
            return Some(Ok(newest.clone()));
        }
        if let Some(problem) = &data.failed {
            return Some(Err(Error::user(problem.clone(), "it is the same for all students: see the first")));
        }
        data.newest = None;
        let spec = LoaderSpec { start_step: step, ..self.all.crops.spec(spec) };
        let made = data.next(dataset, &spec, stop).transpose()?;
        match &made {
            Ok(made) => data.newest = Some(made.clone()),
            Err(error) => data.failed = Some(error.problem()),
        }
        Some(made)
    }
}

impl Data {
    /// The batches of `spec`'s first step. The loader goes from step to step; where one who had done less has ended, it begins anew.
    fn next(
        &mut self,
        dataset: &Arc<dyn Dataset>,
        spec: &LoaderSpec,
        stop: &AtomicBool,
    ) -> Result<Option<StepBatches>> {
        let loader = match &mut self.loader {
            Some((next, loader)) if *next == spec.start_step => loader,
            other => &mut other.insert((spec.start_step, Loader::new(dataset.clone(), spec.clone())?)).1,
        };
        let made = loader.next_unless(stop).transpose()?;
        if let (Some(made), Some((next, _))) = (&made, &mut self.loader) {
            *next = made.step + 1;
        }
        Ok(made)
    }
}

impl Drop for Student {
    fn drop(&mut self) {
        self.is_at(Turn::Ended);
    }
}
