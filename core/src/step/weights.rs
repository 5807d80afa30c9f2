//! All weights of a run, each role one flat buffer, and how they are loaded, copied and saved.

use std::path::Path;

use crate::checkpoint::{Checkpoint, Content, NamedTensors};
use crate::contract::{At, Role, TeacherPolicy};
use crate::ops::convert_into;
use crate::params::{load_named, Layout};
use crate::recipe::{InitRole, Recipe};
use crate::tensor::catch_out_of_memory;
use crate::weights::Source;
use crate::{DType, Device, Error, Result, Tensor};

use super::bounds::{Bounds, Reach};
use super::{Declared, DeclaredLoss};

/// Student, teachers, moments and the losses' state.
pub struct Weights {
    /// The trained model.
    pub student: Tensor,
    /// The model that gives targets, if there is one; the student's layout.
    pub teacher: Option<Tensor>,
    /// The Gram teacher: the backbone's part of the layout, which comes first.
    pub gram: Option<Tensor>,
    /// The optimizer's moments, in the order of [`Optimizer::moments`](crate::contract::Optimizer::moments).
    pub moments: Vec<Tensor>,
    /// Their names.
    pub(super) moment_names: Vec<&'static str>,
    /// By loss, then in the order of [`Loss::state`](crate::contract::Loss::state).
    pub loss_state: Vec<Vec<Tensor>>,
    /// Steps whose update was skipped.
    pub skipped: u64,
    /// Gradients of the last step.
    pub(super) grads: Tensor,
    /// Copies in bf16 that a bf16 step computes with.
    pub(super) narrow: Option<Narrow>,
    /// How large numbers are at most, once they were measured.
    bounds: Option<Bounds>,
}

/// Student, teacher and Gram teacher in bf16, at fixed addresses.
pub(super) struct Narrow {
    pub(super) student: Tensor,
    pub(super) teacher: Option<Tensor>,
    pub(super) gram: Option<Tensor>,
}

/// The end of the backbone's part of a layout.
fn backbone_len(layout: &Layout) -> usize {
    layout.range_of("backbone.").end
}

impl Weights {
    /// All zero, for features in `features`; a teacher and a Gram teacher only if there is one.
    pub(super) fn new(model: &Declared, moments: &[&'static str], teachers: (bool, bool), features: DType) -> Self {
        let dtype = features.wide();
        let state = |l: &DeclaredLoss| l.loss.state().iter().map(|s| Tensor::zeros(&s.shape, dtype)).collect();
        let loss_state = model.losses.iter().map(state).collect();
        Self { loss_state, ..Self::of_layout(&model.layout, moments, teachers, features) }
    }

    /// The same without losses.
    pub(crate) fn of_layout(
        layout: &Layout,
        moments: &[&'static str],
        (teacher, gram): (bool, bool),
        features: DType,
    ) -> Self {
        let dtype = features.wide();
        let zeros = || Tensor::zeros(&[layout.len()], dtype);
        let narrow = |len| Tensor::zeros(&[len], DType::BF16);
        let narrow = (features == DType::BF16).then(|| Narrow {
            student: narrow(layout.len()),
            teacher: teacher.then(|| narrow(layout.len())),
            gram: gram.then(|| narrow(backbone_len(layout))),
        });
        Self {
            student: zeros(),
            teacher: teacher.then(zeros),
            gram: gram.then(|| Tensor::zeros(&[backbone_len(layout)], dtype)),
            moments: moments.iter().map(|_| zeros()).collect(),
            moment_names: moments.to_vec(),
            loss_state: Vec::new(),
            skipped: 0,
            grads: zeros(),
            narrow,
            bounds: None,
        }
    }

    /// Updates that the moments have seen after step `at`: those that were skipped do not count.
    pub(super) fn updates(&self, at: At) -> u64 {
        at.step + 1 - self.skipped
    }

    /// How large the numbers are at most: measured, if weights came from elsewhere.
    ///
    /// # Errors
    /// If one is not finite.
    pub(super) fn bounds(&mut self, model: &Declared) -> Result<Bounds> {
        if self.bounds.is_none() {
            self.bounds = Some(catch_out_of_memory(|| Bounds::measured(self, model))?);
        }
        Ok(self.bounds.expect("measured just above"))
    }

    /// Numbers came from elsewhere.
    pub(super) fn forget_bounds(&mut self) {
        self.bounds = None;
    }

    /// After an update with a gradient of this length.
    pub(super) fn moved(&mut self, reach: Reach, gradient: f64) {
        self.bounds = self.bounds.map(|bounds| bounds.after(reach, gradient));
    }

    /// What the student computes with.
    pub(super) fn student(&self) -> &Tensor {
        self.narrow.as_ref().map_or(&self.student, |n| &n.student)
    }

    /// What the teacher computes with; without one, the student: what is evaluated.
    pub(super) fn evaluated(&self) -> &Tensor {
        let teacher = self.narrow.as_ref().map_or(self.teacher.as_ref(), |n| n.teacher.as_ref());
        teacher.unwrap_or_else(|| self.student())
    }

    /// What the Gram teacher computes with.
    pub(super) fn gram(&self) -> Option<&Tensor> {
        self.narrow.as_ref().map_or(self.gram.as_ref(), |n| n.gram.as_ref())
    }

    /// Brings the bf16 copies up to date after weights were replaced outside the update.
    pub(super) fn narrow(&mut self) -> Result<()> {
        let Some(narrow) = &mut self.narrow else { return Ok(()) };
        convert_into(&mut narrow.student, &self.student)?;
        if let (Some(narrow), Some(teacher)) = (&mut narrow.teacher, &self.teacher) {
            convert_into(narrow, teacher)?;
        }
        match (&mut narrow.gram, &self.gram) {
            (Some(narrow), Some(gram)) => convert_into(narrow, gram),
            _ => Ok(()),
        }
    }

    /// The start of a run: as `drawn` from the seed, or read where the recipe says.
    pub(super) fn start(
        &mut self,
        drawn: &Tensor,
        recipe: &Recipe,
        model: &Declared,
        teacher: &dyn TeacherPolicy,
        gram: Option<&dyn TeacherPolicy>,
    ) -> Result<()> {
        let layout = &model.layout;
        self.student.copy_from(drawn)?;
        if let Some(path) = &recipe.backbone.weights {
            let source = read_model(path, model)?;
            load_role(&layout.part("backbone."), &mut self.student, &source, &["teacher.", "student.", ""], path)?;
        }
        self.follow_student()?;
        if let Some(path) = &recipe.init_from {
            let source = read_model(path, model)?;
            let (student, average): (&[&str], &[&str]) = match recipe.init_role {
                None => (&["student.", "teacher.", ""], &["teacher.", "student.", ""]),
                Some(InitRole::Student) => (&["student.", ""], &["student.", ""]),
                Some(InitRole::Teacher) => (&["teacher.", ""], &["teacher.", ""]),
            };
            load_role(layout, &mut self.student, &source, student, path)?;
            if let Some(teacher) = &mut self.teacher {
                load_role(layout, teacher, &source, average, path)?;
            }
        }
        if let role @ Role::Checkpoint(_) = teacher.start() {
            self.copy_to_teacher(&role, model)?;
        }
        if let Some(gram) = gram {
            self.copy_to_gram(&gram.start(), model)?;
        }
        self.narrow()
    }

    /// The gradients of the last step, in the student's layout.
    pub fn grads(&self) -> &Tensor {
        &self.grads
    }

    /// The gradient buffer, to be written outside; put back after the step.
    pub(super) fn take_grads(&mut self) -> Tensor {
        std::mem::replace(&mut self.grads, Device::Cpu.with(|| Tensor::zeros(&[0], DType::F32)))
    }

    /// The teacher becomes the student.
    pub(super) fn follow_student(&mut self) -> Result<()> {
        match &mut self.teacher {
            Some(teacher) => teacher.copy_from(&self.student),
            None => Ok(()),
        }
    }

    pub(super) fn copy_to_teacher(&mut self, role: &Role, model: &Declared) -> Result<()> {
        match (role, &mut self.teacher) {
            (Role::Teacher, _) | (_, None) => return Ok(()),
            (Role::Student, _) => self.follow_student()?,
            (Role::Checkpoint(path), Some(teacher)) => {
                self.bounds = None;
                let source = read_model(path, model)?;
                load_role(&model.layout, teacher, &source, &["teacher.", "student.", ""], path)?;
            }
        }
        self.narrow()
    }

    pub(super) fn copy_to_gram(&mut self, role: &Role, model: &Declared) -> Result<()> {
        let gram = self.gram.as_mut().expect("a Gram teacher has weights");
        let n = gram.len();
        match role {
            Role::Student => gram.copy_from(&self.student.view(0, &[n]))?,
            Role::Teacher => gram.copy_from(&self.teacher.as_ref().unwrap_or(&self.student).view(0, &[n]))?,
            Role::Checkpoint(path) => {
                self.bounds = None;
                let source = read_model(path, model)?;
                let prefixes = ["teacher.", "gram_teacher.", "student.", ""];
                load_role(&model.layout.part("backbone."), gram, &source, &prefixes, path)?;
            }
        }
        self.narrow()
    }

    pub(super) fn ema(&mut self, momentum: f64) -> Result<()> {
        if let Some(teacher) = &mut self.teacher {
            crate::ops::ema_update(teacher, &self.student, momentum)?;
        }
        self.narrow()
    }

    pub(super) fn ema_gram(&mut self, momentum: f64) -> Result<()> {
        let gram = self.gram.as_mut().expect("a Gram teacher has weights");
        let n = gram.len();
        crate::ops::ema_update(gram, &self.teacher.as_ref().unwrap_or(&self.student).view(0, &[n]), momentum)?;
        self.narrow()
    }

    /// Everything a run needs to go on after `step` steps, by name, in host memory.
    pub fn content(&self, step: u64, model: &Declared) -> Content {
        let mut content = Content { step, skipped: self.skipped, model: Vec::new(), optimizer: Vec::new() };
        let put = |list: &mut Vec<(String, Tensor)>, role: &str, flat: &Tensor| {
            let flat = flat.to(Device::Cpu);
            let inside = model.layout.specs().iter().filter(|s| s.range().end <= flat.len());
            list.extend(inside.map(|s| (format!("{role}.{}", s.name), flat.view(s.offset, &s.shape))));
        };
        put(&mut content.model, "student", &self.student);
        if let Some(teacher) = &self.teacher {
            put(&mut content.model, "teacher", teacher);
        }
        if let Some(gram) = &self.gram {
            put(&mut content.model, "gram_teacher", gram);
        }
        for (name, flat) in self.moment_names.iter().zip(&self.moments) {
            put(&mut content.optimizer, name, flat);
        }
        for (loss, state) in model.losses.iter().zip(&self.loss_state) {
            for (spec, value) in loss.loss.state().iter().zip(state) {
                content.optimizer.push((format!("state.{}.{}", loss.name, spec.name), value.to(Device::Cpu)));
            }
        }
        content
    }

    /// Takes everything from a checkpoint of the same recipe.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, from: &Checkpoint, model: &Declared) -> Result<()> {
        let layout = &model.layout;
        let whole = |source: &NamedTensors, role: &str, layout: &Layout, flat: &mut Tensor| {
            load(layout, flat, |name| source.get(&format!("{role}.{name}")).cloned(), &from.path)
        };
        whole(&from.model, "student", layout, &mut self.student)?;
        if let Some(teacher) = &mut self.teacher {
            whole(&from.model, "teacher", layout, teacher)?;
        }
        if let Some(gram) = &mut self.gram {
            whole(&from.model, "gram_teacher", &layout.part("backbone."), gram)?;
        }
        for (name, flat) in self.moment_names.iter().zip(&mut self.moments) {
            whole(&from.optimizer, name, layout, flat)?;
        }
        for (loss, state) in model.losses.iter().zip(&mut self.loss_state) {
            for (spec, value) in loss.loss.state().iter().zip(state) {
                let name = format!("state.{}.{}", loss.name, spec.name);
                let found = from.optimizer.get(&name).filter(|t| t.shape() == spec.shape);
                let missing =
                    || Error::content(&from.path, format!("no {name} {:?}", spec.shape), "start the run anew");
                value.copy_from(&found.ok_or_else(missing)?.cast(value.dtype())?)?;
            }
        }
        self.skipped = from.skipped;
        self.narrow()
    }
}

/// Weights of the same model.
fn read_model(path: &Path, model: &Declared) -> Result<NamedTensors> {
    let source = Source::at(path)?;
    source.check_same_model(model.backbone.as_ref())?;
    Device::Cpu.with(|| source.tensors())
}

/// Loads a model from the first of `prefixes` under which the file has a backbone. A head that the file does not have
/// at all keeps its start: published weights come without heads.
fn load_role(layout: &Layout, flat: &mut Tensor, source: &NamedTensors, prefixes: &[&str], path: &Path) -> Result<()> {
    let found = prefixes.iter().find(|p| source.has(&format!("{p}backbone.")));
    let Some(prefix) = found else {
        let wanted: Vec<&str> = prefixes.iter().map(|p| p.trim_end_matches('.')).filter(|p| !p.is_empty()).collect();
        let problem = format!("no backbone.* tensors in it, of {} or without a role", wanted.join(" or "));
        return Err(Error::content(path, problem, "name a run, a checkpoint, or weights that dinolab wrote"));
    };
    let known: Vec<String> =
        layout.modules().into_iter().filter(|m| m == "backbone" || source.has(&format!("{prefix}{m}."))).collect();
    for module in known {
        let part = layout.part(&format!("{module}."));
        load(&part, flat, |name| source.get(&format!("{prefix}{name}")).cloned(), path)?;
    }
    Ok(())
}

/// [`load_named`] into a buffer wherever it is.
pub(super) fn load(
    layout: &Layout,
    flat: &mut Tensor,
    source: impl Fn(&str) -> Option<Tensor>,
    path: &Path,
) -> Result<()> {
    let Device::Cuda(_) = flat.device() else { return load_named(layout, flat, source, path) };
    let mut host = flat.to(Device::Cpu);
    Device::Cpu.with(|| load_named(layout, &mut host, source, path))?;
    flat.copy_from(&host)
}
