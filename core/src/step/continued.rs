//! Going on from a checkpoint of another run: everything that both recipes have is taken over, what is new starts as in a new
//! run.

use super::optimizer::Began;
use super::saved::{self, Stored};
use super::weights::{role_of, Of, Weights};
use super::{Declared, Learner, Peers};
use crate::checkpoint::Checkpoint;
use crate::contract::{Follow, Role};
use crate::params::{Layout, ParamSpec};
use crate::recipe::Recipe;
use crate::{Result, Tensor};

/// What is said of a teacher of `[teachers]` that starts where its policy says.
pub(crate) fn new_teacher(name: &str) -> String {
    format!("the teacher `{name}` is new")
}

impl Learner {
    /// The model of `recipe` with everything that a checkpoint of a run of `parent` has of it: weights, moments of the same
    /// optimizer, the losses' state, the count of skipped steps, and the last losses if they are the same sum. Gives what the checkpoint does not have, in words: it is as in
    /// a new run. Moments that begin here count updates from here.
    ///
    /// A teacher whose table is another than the parent's starts where its policy says, if that is a checkpoint, and
    /// one of `[teachers]` of another table always does.
    ///
    /// # Errors
    /// If a plugin refuses to be built, or a sub-model that both have has other shapes.
    pub fn continued(recipe: &Recipe, from: &Checkpoint, parent: &Recipe) -> Result<(Self, Vec<String>)> {
        Self::continued_with(recipe, from, parent, Peers::default())
    }

    /// The same for one of several ranks, or students.
    ///
    /// # Errors
    /// As [`continued`](Self::continued), and if it cannot share the teacher.
    pub fn continued_with(
        recipe: &Recipe,
        from: &Checkpoint,
        parent: &Recipe,
        peers: Peers<'_>,
    ) -> Result<(Self, Vec<String>)> {
        let same = recipe.optimizer.plugin.name() == parent.optimizer.plugin.name();
        let mut learner = Self::unstarted(recipe, peers, |layout, moments| began(from, layout, moments, same))?;
        let Self { model, weights, teacher, named, kernels, ranks, optimizer, .. } = &mut learner;
        kernels.load()?;
        weights.student.draw(&model.layout, recipe.seed)?;
        let mut notes = weights.take_over(from, model, optimizer.began())?;
        if let (role @ Role::Checkpoint(_), true) = (teacher.start(), recipe.teacher != parent.teacher) {
            weights.follow(Of::Teacher, Follow::Copy(role), model, ranks)?;
            notes.push("the teacher starts from the weights that its table names".into());
        }
        for (i, own) in named.iter().enumerate() {
            let same = recipe.teachers.0.get(&own.name) == parent.teachers.0.get(&own.name);
            if !(same && weights.take_over_named(i, from, model)?) {
                weights.follow(Of::Named(i), Follow::Copy(own.policy.start()), model, ranks)?;
                notes.push(new_teacher(&own.name));
            }
        }
        weights.forget_bounds();
        weights.bounds(model, ranks)?;
        learner.restore_rest(&from.optimizer)?;
        if let Some(spikes) = &mut learner.spikes {
            spikes.begin(recipe.losses == parent.losses);
        }
        Ok((learner, notes))
    }
}

/// When the moments of sub-models began: here, if the checkpoint has not all of them, or not of the `same` optimizer.
fn began(from: &Checkpoint, layout: &Layout, moments: &[&str], same: bool) -> Result<Began> {
    let mut known = saved::began(&from.optimizer)?;
    let there = |module: &str| moments.iter().all(|moment| from.optimizer.has(&format!("{moment}.{module}.")));
    let began = |module: String| match same && there(&module) {
        true => known.remove_entry(&module),
        false => Some((module, from.updates())),
    };
    Ok(layout.modules().into_iter().filter_map(began).collect())
}

impl Weights {
    /// Student, teacher, moments, state and counts, but for the teachers of `[teachers]`. What is not in the checkpoint is left as it
    /// is, and so are moments that begin where it was written.
    fn take_over(&mut self, from: &Checkpoint, model: &Declared, began: &Began) -> Result<Vec<String>> {
        let (layout, path) = (&model.layout, from.path.as_path());
        let mut notes = Vec::new();
        let of_model = |role: &str| Stored { files: &from.model, prefix: format!("{role}."), path, adapt: false };
        let new = modules(&of_model("student"), layout, |_, spec, tensor| self.student.write(spec.offset, tensor))?;
        notes.extend(new.iter().map(|name| format!("{name} is new: it starts from the seed")));
        self.follow_student()?;
        if let Some(teacher) = self.teacher.as_mut().filter(|_| from.model.has("teacher.")) {
            modules(&of_model("teacher"), layout, |_, spec, tensor| teacher.write(spec.offset, tensor))?;
        }
        let starts = |module: &String| began.get(module) == Some(&from.updates());
        let unsaid = layout.modules().into_iter().filter(|module| starts(module) && !new.contains(module));
        let unsaid = unsaid.collect::<Vec<_>>().join(", ");
        if !(unsaid.is_empty() || self.moment_names.is_empty()) {
            notes.push(format!("the optimizer's moments of {unsaid} are not there: they start at zero"));
        }
        for (i, name) in self.moment_names.clone().into_iter().enumerate() {
            let stored = Stored { files: &from.optimizer, prefix: format!("{name}."), path, adapt: false };
            for module in layout.modules().iter().filter(|module| !starts(module)) {
                let part = format!("{module}.");
                stored.load(layout, &part, |at, spec, tensor| self.write_moment(i, at, spec, tensor))?;
            }
        }
        for (loss, state) in model.losses.iter().zip(&mut self.loss_state) {
            for (own, value) in state {
                let name = format!("state.{}.{own}", loss.name);
                match from.optimizer.read(&name)?.filter(|t| t.shape() == value.shape()) {
                    Some(found) => value.copy_from(&found.cast(value.dtype())?)?,
                    None => notes.push(format!("{own} of the loss {} starts anew", loss.name)),
                }
            }
        }
        self.skipped = from.skipped;
        Ok(notes)
    }

    /// A teacher of `[teachers]`, if the checkpoint has it.
    fn take_over_named(&mut self, i: usize, from: &Checkpoint, model: &Declared) -> Result<bool> {
        let (name, flat) = &mut self.named[i];
        let role = role_of(name);
        if !from.model.has(&format!("{role}.")) {
            return Ok(false);
        }
        let stored = Stored { files: &from.model, prefix: format!("{role}."), path: &from.path, adapt: false };
        stored.load(&model.layout, "backbone.", |_, spec, tensor| flat.write(spec.offset, tensor))?;
        Ok(true)
    }
}

/// Loads every sub-model that is stored, as [`Stored::load`] does; gives the names of the others.
fn modules(
    stored: &Stored<'_>,
    layout: &Layout,
    mut take: impl FnMut(usize, &ParamSpec, &Tensor) -> Result<()>,
) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    for module in layout.modules() {
        let part = format!("{module}.");
        match stored.files.has(&format!("{}{part}", stored.prefix)) {
            true => stored.load(layout, &part, &mut take)?,
            false => missing.push(module),
        }
    }
    Ok(missing)
}
