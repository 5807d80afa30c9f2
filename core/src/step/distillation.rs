//! Distillation: the targets come from a trained model with an architecture of its own, which stays as it is.
//!
//! The student learns by the same losses as in pretraining. In place of a teacher of its own layout, the frozen model
//! (backbone and heads as its run's recipe says) sees the global crops. Prototypes are what both have in common; losses whose
//! targets are features ask for no heads, so that published weights can teach. The student's EMA goes on beside it, for
//! evaluation alone (Siméoni et al., arXiv:2508.10104, section 5.2).

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value as Json;

use crate::contract::TeacherPolicy;
use crate::params::ParamBuilder;
use crate::recipe::Recipe;
use crate::tensor::catch_out_of_memory;
use crate::weights::Source;
use crate::{cuda, DType, Device, Error, Result, Tensor};

use super::saved::Stored;
use super::{declare, Declared};

/// A frozen model that gives targets.
pub(super) struct TeacherModel {
    /// Its backbone and heads.
    pub(super) model: Declared,
    /// Its weights, once they are read: the same for all students that share it.
    pub(super) weights: Arc<OnceLock<Tensor>>,
    source: Source,
    device: Device,
    dtype: DType,
}

/// The model of the run, checkpoint or weights folder at `path`, declared but without weights.
fn declared_by(path: &Path) -> Result<(Source, Declared)> {
    let source = Source::at(path)?;
    if source.has_roles() {
        let model = declare(&source.recipe()?)?;
        return Ok((source, model));
    }
    let mut params = ParamBuilder::new();
    let model = source.known_model()?;
    let (backbone, channels) = (model.build(&mut params)?, model.crops.channels());
    Ok((source, Declared { backbone, losses: Vec::new(), layout: params.finish(), channels }))
}

/// The model from which `recipe` distils, where its run can be read.
pub(crate) fn distilled_model(recipe: &Recipe) -> Option<Declared> {
    let policy = recipe.teacher.build(&mut ()).ok()?;
    declared_by(policy.distils()?).ok().map(|(_, model)| model)
}

impl TeacherModel {
    /// The model that `policy` distils from, if it does; it has to fit the student. Its weights are not read yet.
    ///
    /// # Errors
    /// If it cannot be read, or what it gives is not what the student learns from.
    pub(super) fn of(policy: &dyn TeacherPolicy, student: &Declared, recipe: &Recipe) -> Result<Option<Self>> {
        let Some(path) = policy.distils() else { return Ok(None) };
        let (source, model) = declared_by(path)?;
        fits(path, &model, student)?;
        let device = recipe.device()?;
        Ok(Some(Self { model, weights: Arc::default(), source, device, dtype: recipe.dtype(device) }))
    }

    /// Reads its weights, unless a student has.
    ///
    /// # Errors
    /// If they cannot be read, or the device is full.
    pub(super) fn read_once(&self) -> Result<()> {
        if self.weights.get().is_none() {
            let _ = self.weights.set(catch_out_of_memory(|| self.read())?);
        }
        Ok(())
    }

    /// Its weights.
    pub(super) fn flat(&self) -> &Tensor {
        self.weights.get().expect("they are read when the learner is made")
    }

    fn read(&self) -> Result<Tensor> {
        let flat = Device::Cpu.with(|| {
            let tensors = self.source.files()?;
            let role = ["teacher.", "student."].into_iter().find(|role| tensors.has(role)).unwrap_or_default();
            let stored = Stored { files: &tensors, prefix: role.into(), path: self.source.path(), adapt: false };
            stored.flat(&self.model.layout, self.dtype.wide())?.cast(self.dtype)
        })?;
        let _lasting = cuda::lasting_scope();
        Ok(flat.to(self.device))
    }
}

/// Fails unless a student can learn from the model of the run or checkpoint at `path`.
pub(super) fn fits_student(path: &Path, student: &Declared) -> Result<()> {
    fits(path, &declared_by(path)?.1, student)
}

/// Fails unless teacher and student have the same patches and channels and, for every loss of the student with targets, targets
/// of the same width.
pub(super) fn fits(path: &Path, teacher: &Declared, student: &Declared) -> Result<()> {
    let (theirs, ours) = (teacher.backbone.patch_size(), student.backbone.patch_size());
    if theirs != ours {
        let problem = format!("the teacher's patches have {theirs} pixels a side, the student's {ours}");
        return Err(Error::content(path, problem, format!("set backbone.patch_size = {theirs}")));
    }
    let (theirs, ours) = (teacher.channels, student.channels);
    if theirs != ours {
        let problem = format!("the teacher sees images of {theirs} channels, the student of {ours}");
        return Err(Error::content(path, problem, "choose a teacher that was trained on images of as many channels"));
    }
    for loss in &student.losses {
        let name = &loss.name;
        let deepest = loss.needs.layers.iter().max().filter(|_| loss.needs.runs_teacher());
        let depth = if teacher.backbone.gives_layers() { teacher.backbone.depth() } else { 0 };
        if let Some(layer) = deepest.filter(|layer| **layer > depth) {
            let problem = match depth {
                0 => format!("`{name}` reads tokens of inner layers, and the teacher gives none"),
                _ => format!("`{name}` reads tokens after {layer} blocks, and the teacher has {depth}"),
            };
            let help = "name layers that both have, or choose another teacher";
            return Err(Error::content(path, problem, help));
        }
        let Some(spec) = loss.needs.targets else { continue };
        if spec.features {
            let (theirs, ours) = (teacher.backbone.dim(), spec.width);
            if theirs != ours {
                let problem = format!("the teacher's features have {theirs} numbers, and `{name}` expects {ours}");
                return Err(Error::content(path, problem, format!("set losses.{name}.teacher_dim = {theirs}")));
            }
            continue;
        }
        let found = teacher.loss(name).filter(|l| l.chosen.name() == loss.chosen.name());
        let Some((taught, found)) = found.and_then(|l| Some((l, l.needs.targets?))) else {
            let problem = format!("the teacher was not trained with the loss `{name}`, so it has no head for it");
            let help = format!(
                "set losses.{name}.enabled = false; a loss between features (`feature_distillation`) needs no head"
            );
            return Err(Error::content(path, problem, help));
        };
        if found.width != spec.width {
            let (theirs, ours) = (found.width, spec.width);
            let problem = format!("the teacher's head of `{name}` has {theirs} outputs, the student's {ours}");
            let keys = keys_of(loss.chosen.config(), taught.chosen.config(), ours as u64, theirs as u64);
            let help = match &keys[..] {
                [key] => format!("set losses.{name}.{key} = {theirs}"),
                [] => format!("give losses.{name} the keys of the teacher's recipe"),
                keys => format!(
                    "of losses.{name}, set that of {} which is the width of the head to {theirs}",
                    keys.join(", ")
                ),
            };
            return Err(Error::content(path, problem, help));
        }
    }
    Ok(())
}

/// The keys that are `ours` in one table and `theirs` in another.
fn keys_of(a: &Json, b: &Json, ours: u64, theirs: u64) -> Vec<String> {
    let inside = |(key, value): (&String, &Json)| {
        let Some(other) = b.get(key) else { return Vec::new() };
        match value.as_u64() == Some(ours) && other.as_u64() == Some(theirs) {
            true => vec![key.clone()],
            false => keys_of(value, other, ours, theirs).into_iter().map(|inner| format!("{key}.{inner}")).collect(),
        }
    };
    a.as_object().into_iter().flatten().flat_map(inside).collect()
}
