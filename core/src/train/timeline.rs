//! What happens in a run at a step: a Gram teacher begins, a schedule enters its next phase, the run was resumed. A curve that
//! bends there is no riddle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::lines::{Lines, Writer};
use crate::contract::At;
use crate::recipe::Recipe;
use crate::resolved::Resolved;
use crate::step::declare;
use crate::Result;

/// The file in a run's folder, one event a line.
pub(super) const FILE: &str = "events.jsonl";

/// Something that happened: a line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunEvent {
    /// Steps done when it happened.
    pub step: u64,
    /// What it is of: `teacher`, `teachers.<name>`, `schedule`, `resume`, `longer`, `rewind`, `fork`, `stop`.
    pub kind: String,
    /// What happened, in a few words.
    pub text: String,
}

impl RunEvent {
    pub(super) fn new(step: u64, kind: &str, text: impl Into<String>) -> Self {
        Self { step, kind: kind.into(), text: text.into() }
    }

    /// The events of the run in `folder`, in order; none of one that wrote none.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn read(folder: &Path) -> Result<Vec<Self>> {
        let objects = Lines::read(&folder.join(FILE))?.objects;
        Ok(objects.into_iter().filter_map(|object| serde_json::from_value(object.into()).ok()).collect())
    }
}

/// The events that a recipe says beforehand, by the steps before which they happen: what teachers' policies do, and where
/// schedules enter their next phase.
pub(super) fn planned(resolved: &Resolved) -> Result<BTreeMap<u64, Vec<RunEvent>>> {
    let (recipe, total) = (&resolved.recipe, resolved.recipe.steps);
    let model = declare(recipe)?;
    let wanted = model.teachers();
    let mut events = Vec::new();
    for (key, chosen) in recipe.all_teachers() {
        if key.strip_prefix("teachers.").is_some_and(|name| !wanted.contains(name)) {
            continue;
        }
        let happens = chosen.build(&mut ())?.events(total).into_iter();
        events.extend(happens.map(|(step, text)| RunEvent::new(step, &key, text)));
    }
    let mut phases = BTreeMap::<u64, BTreeSet<String>>::new();
    for (key, schedule) in resolved.moving() {
        for step in schedule.phases(total) {
            phases.entry(step).or_default().insert(key.clone());
        }
    }
    let said = |keys: BTreeSet<String>| keys.into_iter().collect::<Vec<_>>().join(", ");
    events.extend(
        phases.into_iter().map(|(step, keys)| RunEvent::new(step, "schedule", format!("next phase of {}", said(keys)))),
    );
    let mut by_step = BTreeMap::<u64, Vec<RunEvent>>::new();
    for event in events.into_iter().filter(|event| event.step < total) {
        by_step.entry(event.step).or_default().push(event);
    }
    Ok(by_step)
}

/// The beginnings of those teachers of `[teachers]` that are new in a run that continues another after `step` steps, and are
/// used from there.
pub(super) fn beginnings(recipe: &Recipe, step: u64, is_new: impl Fn(&str) -> bool) -> Result<Vec<RunEvent>> {
    let mut events = Vec::new();
    for (name, chosen) in recipe.teachers.0.iter().filter(|(name, _)| is_new(name)) {
        if chosen.build(&mut ())?.active(At { step, total: recipe.steps }) {
            events.push(RunEvent::new(step, &format!("teachers.{name}"), "begins"));
        }
    }
    Ok(events)
}

/// The file of events that is being written.
pub(super) struct Timeline {
    writer: Writer,
    /// Those of the step that the run goes on from, which may come again.
    known: Vec<RunEvent>,
}

impl Timeline {
    /// Opens the file of a run that has done `start` steps; gives it and what was wrong with it.
    pub(super) fn open(folder: &Path, start: u64) -> Result<(Self, Option<String>)> {
        let opened = Writer::open(folder.join(FILE), start, false)?;
        let known = RunEvent::read(folder)?.into_iter().filter(|event| event.step == start).collect();
        Ok((Self { writer: opened.writer, known }, opened.problem))
    }

    /// Writes an event, unless it was written before the run was interrupted; gives whether it did.
    pub(super) fn put(&mut self, event: &RunEvent) -> Result<bool> {
        if self.known.contains(event) {
            return Ok(false);
        }
        let object = serde_json::to_value(event).expect("plain data");
        self.writer.put(object.as_object().expect("a struct is an object"))?;
        Ok(true)
    }
}
