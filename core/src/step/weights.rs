//! All weights of a run, each role one flat buffer, and how they are loaded, copied and saved.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, Content};
use crate::contract::{At, Follow, Role, State, TeacherPolicy};
use crate::files::NamedTensors;
use crate::ops::{EightBit, Map, Place};
use crate::params::{check_shapes, load_named, Layout};
use crate::recipe::{InitRole, Recipe};
use crate::tensor::catch_out_of_memory;
use crate::weights::Source;
use crate::{DType, Device, Error, Result, Tensor};

use super::bounds::{Bounds, Reach};
use super::flat::Flat;
use super::moments::Storage;
use super::optimizer::Groups;
use super::{Declared, DeclaredLoss, Teacher};

/// Student, teachers, moments and the losses' state.
pub struct Weights {
    /// The trained model.
    pub student: Flat,
    /// The model that gives targets, if there is one; the student's layout.
    pub teacher: Option<Flat>,
    /// The teachers of `[teachers]` that losses ask for, by name: the backbone's part of the layout, which comes first.
    pub named: Vec<(String, Flat)>,
    /// The optimizer's moments, in the order of [`Optimizer::moments`](crate::contract::Optimizer::moments). Where some are in
    /// eight bits, those that are not, one behind the other.
    pub moments: Vec<Tensor>,
    /// The others.
    pub(super) eight: Vec<EightBit>,
    /// Which are where.
    storage: Arc<Storage>,
    /// Their names.
    pub(super) moment_names: Vec<&'static str>,
    /// By loss: its state by name.
    pub loss_state: Vec<State>,
    /// Steps whose update was skipped.
    pub skipped: u64,
    /// Gradients of the last step.
    pub(super) grads: Tensor,
    /// How large numbers are at most, once they were measured.
    bounds: Option<Bounds>,
}

/// Whose weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// Those of `[teacher]`.
    Teacher,
    /// Those of a teacher of `[teachers]`, by its place.
    Named(usize),
}

/// What the names of a teacher's parameters begin with in files: `<name>_teacher.`.
pub(super) fn role_of(name: &str) -> String {
    format!("{name}_teacher")
}

/// The end of the backbone's part of a layout.
fn backbone_len(layout: &Layout) -> usize {
    layout.range_of("backbone.").end
}

impl Weights {
    /// All zero, for features in `features`; a teacher only if there is one, and those of these names.
    pub(super) fn new<'a>(
        model: &Declared,
        optimizer: &Groups,
        teacher: bool,
        named: impl IntoIterator<Item = &'a str>,
        features: DType,
    ) -> Result<Self> {
        let dtype = features.wide();
        let state =
            |l: &DeclaredLoss| l.loss.state().iter().map(|s| (s.name, Tensor::zeros(&s.shape, dtype))).collect();
        let loss_state = model.losses.iter().map(state).collect();
        Ok(Self { loss_state, ..Self::of_layout(&model.layout, optimizer, teacher, named, features)? })
    }

    /// The same without losses.
    pub(crate) fn of_layout<'a>(
        layout: &Layout,
        optimizer: &Groups,
        teacher: bool,
        named: impl IntoIterator<Item = &'a str>,
        features: DType,
    ) -> Result<Self> {
        let dtype = features.wide();
        let zeros = |len| Flat::zeros(len, features, optimizer.config().offload);
        let named = named.into_iter().map(|name| Ok((name.to_string(), zeros(backbone_len(layout))?)));
        let storage = optimizer.storage.clone();
        // AdamW's two: others are refused when the groups are made.
        let eight = if storage.blocks == 0 { &[][..] } else { &[Map::Signed, Map::Unsigned] };
        let eight = eight.iter().map(|map| EightBit::zeros(*map, storage.blocks)).collect();
        Ok(Self {
            student: zeros(layout.len())?,
            teacher: teacher.then(|| zeros(layout.len())).transpose()?,
            named: named.collect::<Result<_>>()?,
            moments: optimizer.moments().iter().map(|_| storage.whole(dtype)).collect(),
            eight,
            storage,
            moment_names: optimizer.moments().to_vec(),
            loss_state: Vec::new(),
            skipped: 0,
            grads: Tensor::zeros(&[layout.len()], dtype),
            bounds: None,
        })
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
        self.student.rounded()
    }

    /// What the teacher computes with; without one, the student: what is evaluated.
    pub(super) fn evaluated(&self) -> &Tensor {
        self.teacher.as_ref().unwrap_or(&self.student).rounded()
    }

    /// What a teacher of `[teachers]` computes with.
    pub(super) fn named(&self, i: usize) -> &Tensor {
        self.named[i].1.rounded()
    }

    /// Moment `i` of the whole layout; where some are in eight bits, in host memory.
    pub(super) fn moment(&self, i: usize, layout: &Layout) -> Tensor {
        let Some(eight) = self.eight.get(i) else { return self.moments[i].clone() };
        let (eight, whole) = (eight.to(Device::Cpu), self.moments[i].to(Device::Cpu));
        let mut flat = Device::Cpu.with(|| Tensor::zeros(&[layout.len()], DType::F32));
        let numbers = flat.as_mut_slice::<f32>();
        for (spec, place) in layout.specs().iter().zip(&self.storage.places) {
            let numbers = &mut numbers[spec.range()];
            match *place {
                Place::Whole(at) => numbers.copy_from_slice(&whole.as_slice()[at..at + numbers.len()]),
                Place::Eight(first) => eight.read(first, numbers),
            }
        }
        flat
    }

    /// Lets `f` change moment `i`, given as [`moment`](Self::moment) does.
    pub(super) fn change_moment<R>(
        &mut self,
        i: usize,
        layout: &Layout,
        f: impl FnOnce(&mut Tensor) -> Result<R>,
    ) -> Result<R> {
        if self.eight.is_empty() {
            return f(&mut self.moments[i]);
        }
        let mut flat = self.moment(i, layout);
        let done = f(&mut flat)?;
        let (mut eight, mut whole) = Device::Cpu.with(|| (self.eight[i].zeros_like(), self.storage.whole(DType::F32)));
        let numbers = flat.as_slice::<f32>();
        for (spec, place) in layout.specs().iter().zip(&self.storage.places) {
            let numbers = &numbers[spec.range()];
            match *place {
                Place::Whole(at) => whole.as_mut_slice()[at..at + numbers.len()].copy_from_slice(numbers),
                Place::Eight(first) => eight.write(first, numbers),
            }
        }
        self.eight[i].copy_from(&eight)?;
        self.moments[i].copy_from(&whole)?;
        Ok(done)
    }

    /// The start of a run: as `drawn` from the seed, or read where the recipe says.
    pub(super) fn start(
        &mut self,
        drawn: &Tensor,
        recipe: &Recipe,
        model: &Declared,
        teacher: &dyn TeacherPolicy,
        named: &[Teacher],
    ) -> Result<()> {
        let layout = &model.layout;
        self.student.set(drawn)?;
        if let Some(path) = &recipe.backbone.weights {
            let source = read_model(path, model)?;
            load_role(&layout.part("backbone."), &mut self.student, &source, EVALUATED, path)?;
        }
        self.follow_student()?;
        if let Some(path) = &recipe.init_from {
            let source = read_model(path, model)?;
            let student = start_of_student(recipe.init_role);
            let average = if recipe.init_role.is_some() { student } else { EVALUATED };
            load_role(layout, &mut self.student, &source, student, path)?;
            if let Some(teacher) = &mut self.teacher {
                load_role(layout, teacher, &source, average, path)?;
            }
        }
        if let role @ Role::Checkpoint(_) = teacher.start() {
            self.copy(Of::Teacher, &role, model)?;
        }
        named.iter().enumerate().try_for_each(|(i, teacher)| self.copy(Of::Named(i), &teacher.policy.start(), model))
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

    /// A teacher's weights follow, as its policy says; without weights there is nothing to do.
    pub(super) fn follow(&mut self, of: Of, how: Follow, model: &Declared) -> Result<()> {
        match how {
            Follow::Keep => Ok(()),
            Follow::Copy(role) => self.copy(of, &role, model),
            Follow::Ema { momentum } => self.ema(of, momentum),
        }
    }

    /// All weights of a teacher are replaced.
    fn copy(&mut self, of: Of, role: &Role, model: &Declared) -> Result<()> {
        let Self { student, teacher, named, bounds, .. } = self;
        let backbone = model.layout.part("backbone.");
        let (flat, layout, own, taught) = match (of, teacher) {
            (Of::Teacher, None) => return Ok(()),
            (Of::Teacher, Some(_)) if *role == Role::Teacher => return Ok(()),
            (Of::Teacher, Some(flat)) => (flat, model.layout.as_ref(), "teacher".to_string(), None),
            (Of::Named(i), teacher) => {
                let (name, flat) = &mut named[i];
                (flat, &backbone, role_of(name), teacher.as_ref())
            }
        };
        // The backbone, which is all that a further teacher has, comes first.
        match role {
            Role::Teacher => flat.copy_from(taught.unwrap_or(student)),
            Role::Student => flat.copy_from(student),
            Role::Checkpoint(path) => {
                *bounds = None;
                let source = read_model(path, model)?;
                load_role(layout, flat, &source, &["teacher.", &format!("{own}."), "student.", ""], path)
            }
        }
    }

    /// `[teacher]` is averaged with the student; a teacher of `[teachers]` with `[teacher]`, or without one with the student.
    fn ema(&mut self, of: Of, momentum: f64) -> Result<()> {
        match of {
            Of::Teacher => match &mut self.teacher {
                Some(teacher) => teacher.average(&self.student, momentum),
                None => Ok(()),
            },
            Of::Named(i) => self.named[i].1.average(self.teacher.as_ref().unwrap_or(&self.student), momentum),
        }
    }

    /// Everything a run needs to go on after `step` steps, by name, in host memory.
    ///
    /// # Errors
    /// If the device fails.
    pub fn content(&self, step: u64, model: &Declared) -> Result<Content> {
        let mut content = Content { step, skipped: self.skipped, model: Vec::new(), optimizer: Vec::new() };
        let put = |list: &mut Vec<(String, Tensor)>, role: &str, flat: &Tensor| {
            let inside = model.layout.specs().iter().filter(|s| s.range().end <= flat.len());
            list.extend(inside.map(|s| (format!("{role}.{}", s.name), flat.view(s.offset, &s.shape))));
        };
        put(&mut content.model, "student", &self.student.to_host()?);
        if let Some(teacher) = &self.teacher {
            put(&mut content.model, "teacher", &teacher.to_host()?);
        }
        for (name, flat) in &self.named {
            put(&mut content.model, &role_of(name), &flat.to_host()?);
        }
        for (i, name) in self.moment_names.iter().enumerate() {
            put(&mut content.optimizer, name, &self.moment(i, &model.layout).to(Device::Cpu));
        }
        for (loss, state) in model.losses.iter().zip(&self.loss_state) {
            for (name, value) in state {
                content.optimizer.push((format!("state.{}.{name}", loss.name), value.to(Device::Cpu)));
            }
        }
        Ok(content)
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
        self.student.change(|flat| whole(&from.model, "student", layout, flat))?;
        if let Some(teacher) = &mut self.teacher {
            teacher.change(|flat| whole(&from.model, "teacher", layout, flat))?;
        }
        for (name, flat) in &mut self.named {
            flat.change(|flat| whole(&from.model, &role_of(name), &layout.part("backbone."), flat))?;
        }
        for (i, name) in self.moment_names.clone().into_iter().enumerate() {
            self.change_moment(i, layout, |flat| whole(&from.optimizer, name, layout, flat))?;
        }
        for (loss, state) in model.losses.iter().zip(&mut self.loss_state) {
            for (name, value) in state {
                let name = format!("state.{}.{name}", loss.name);
                let found = from.optimizer.get(&name).filter(|t| t.shape() == value.shape());
                let missing =
                    || Error::content(&from.path, format!("no {name} {:?}", value.shape()), "start the run anew");
                value.copy_from(&found.ok_or_else(missing)?.cast(value.dtype())?)?;
            }
        }
        self.skipped = from.skipped;
        Ok(())
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
fn load_role(layout: &Layout, flat: &mut Flat, source: &NamedTensors, prefixes: &[&str], path: &Path) -> Result<()> {
    let (prefix, parts) = parts_in(layout, |prefix| source.has(prefix), prefixes, path)?;
    flat.change(|flat| {
        parts.iter().try_for_each(|part| {
            let shape =
                |name: &str| part.specs().iter().find(|spec| spec.name == name).map(|spec| spec.shape.as_slice());
            let get = |name: &str| Some(adapted(source.get(&format!("{prefix}{name}"))?, shape(name)?));
            load(part, flat, get, path)
        })
    })
}

/// The first of `prefixes` under which a file has a backbone, and the sub-models that it has there.
fn parts_in<'a>(
    layout: &Layout,
    has: impl Fn(&str) -> bool,
    prefixes: &[&'a str],
    path: &Path,
) -> Result<(&'a str, Vec<Layout>)> {
    let Some(prefix) = prefixes.iter().copied().find(|p| has(&format!("{p}backbone."))) else {
        let wanted: Vec<String> = prefixes.iter().map(|prefix| format!("{prefix}backbone.*")).collect();
        let problem = format!("no tensors {} in it", wanted.join(" or "));
        return Err(Error::content(path, problem, "name a run, a checkpoint, or weights that dinolab wrote"));
    };
    let known = layout.modules().into_iter().filter(|m| m == "backbone" || has(&format!("{prefix}{m}.")));
    Ok((prefix, known.map(|module| layout.part(&format!("{module}."))).collect()))
}

/// The shapes of tensors by their names in files.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// Fails if [`load_role`] would not load from tensors of these shapes, which lie at `path`.
pub(super) fn check_role(layout: &Layout, shapes: &Shapes, prefixes: &[&str], path: &Path) -> Result<()> {
    let has = |prefix: &str| shapes.keys().any(|name| name.starts_with(prefix));
    let (prefix, parts) = parts_in(layout, has, prefixes, path)?;
    for part in parts {
        let found = part.specs().iter().map(|spec| {
            let shape = shapes.get(&format!("{prefix}{}", spec.name))?.as_slice();
            Some(if is_adapted(shape, &spec.shape) { &spec.shape } else { shape })
        });
        check_shapes(&part, found, path)?;
    }
    Ok(())
}

/// The prefixes under which the weights that are evaluated are looked for.
pub(super) const EVALUATED: &[&str] = &["teacher.", "student.", ""];

/// The prefixes under which the student of a run that starts from `init_from` looks for its weights.
pub(super) fn start_of_student(role: Option<InitRole>) -> &'static [&'static str] {
    match role {
        None => &["student.", "teacher.", ""],
        Some(InitRole::Student) => &["student.", ""],
        Some(InitRole::Teacher) => &["teacher.", ""],
    }
}

/// Channels of images in colour.
pub(super) const RGB: usize = 3;

/// A map `[D, 3, p, p]` of RGB as one of the shape `[D, n, p, p]`, by the rule of timm's `adapt_input_conv`: for one channel the
/// sum over RGB; for more RGB repeated, cut to n, times 3/n, so that a grey image gives what it gave. Any other tensor is itself.
fn adapted(tensor: &Tensor, shape: &[usize]) -> Tensor {
    if !is_adapted(tensor.shape(), shape) {
        return tensor.clone();
    }
    let (n, pixels) = (shape[1], shape[2] * shape[3]);
    let from = tensor.to_f64_vec();
    let at = |row: usize, channel: usize, i: usize| from[(row * RGB + channel) * pixels + i];
    let value = |k: usize| {
        let (row, channel, i) = (k / (n * pixels), k / pixels % n, k % pixels);
        match n {
            1 => (0..RGB).map(|channel| at(row, channel, i)).sum(),
            _ => at(row, channel % RGB, i) * RGB as f64 / n as f64,
        }
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
    let dtype = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Tensor::from_f64(&values, shape, dtype).expect("it has the shape's numbers")
}

/// Whether [`adapted`] makes another tensor of one of this shape.
fn is_adapted(from: &[usize], to: &[usize]) -> bool {
    let (&[_, RGB, height, width], &[rows, n, ..]) = (from, to) else { return false };
    n != RGB && to == [rows, n, height, width] && from[0] == rows
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
