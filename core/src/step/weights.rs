//! All weights of a run, each role one flat buffer, and how they are loaded, copied and saved.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, Content};
use crate::comm::Ranks;
use crate::contract::{At, Follow, Role, State, TeacherPolicy};
use crate::files::NamedTensors;
use crate::ops::{write_range, EightBit, Map, Place};
use crate::params::{check_shapes, load_part, Layout};
use crate::recipe::{InitRole, Recipe};
use crate::tensor::catch_out_of_memory;
use crate::weights::Source;
use crate::{cuda, DType, Device, Error, Result, Tensor};

use super::bounds::{Bounds, Reach};
use super::flat::Flat;
use super::moments::{Placed, Storage};
use super::optimizer::Groups;
use super::parts::Parts;
use super::{Declared, DeclaredLoss, Teacher};

/// Student, teachers, moments and the losses' state.
pub struct Weights {
    /// The trained model.
    pub student: Flat,
    /// The model that gives targets, if there is one; the student's layout.
    pub teacher: Option<Flat>,
    /// The teachers of `[teachers]` that losses ask for, by name: the backbone's part of the layout, which comes first.
    pub named: Vec<(String, Flat)>,
    /// The optimizer's moments, in the order of [`Optimizer::moments`](crate::contract::Optimizer::moments): those of the part that
    /// this rank updates. Where some are in eight bits, those that are not, one behind the other.
    pub moments: Vec<Tensor>,
    /// The others.
    pub(super) eight: Vec<EightBit>,
    /// Which are where.
    storage: Arc<Storage>,
    /// What each rank updates.
    parts: Arc<Parts>,
    /// Their names.
    pub(super) moment_names: Vec<&'static str>,
    /// By loss: its state by name.
    pub loss_state: Vec<State>,
    /// Steps whose update was skipped.
    pub skipped: u64,
    /// Gradients of the last step: those of [`Groups::gradients`].
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

/// Flat memory of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gathered {
    Weights,
    Moment,
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
        let parts = optimizer.parts.clone();
        let zeros = |len| Flat::zeros(len, parts.own_of(len), features, optimizer.config().offload);
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
            parts: parts.clone(),
            moment_names: optimizer.moments().to_vec(),
            loss_state: Vec::new(),
            skipped: 0,
            grads: Tensor::zeros(&[optimizer.gradients().len()], dtype),
            bounds: None,
        })
    }

    /// Updates that the moments have seen after step `at`: those that were skipped do not count.
    pub(super) fn updates(&self, at: At) -> u64 {
        at.step + 1 - self.skipped
    }

    /// How large the numbers of all ranks are at most: measured, if weights came from elsewhere.
    ///
    /// # Errors
    /// If one is not finite.
    pub(super) fn bounds(&mut self, model: &Declared, ranks: &Ranks) -> Result<Bounds> {
        if self.bounds.is_none() {
            self.bounds = Some(catch_out_of_memory(|| Bounds::measured(self, model))?.of_all(ranks)?);
        }
        Ok(self.bounds.expect("measured just above"))
    }

    /// Has the same bounds as all ranks.
    pub(super) fn agree(&mut self, model: &Declared, ranks: &Ranks) -> Result<()> {
        self.bounds = Some(self.bounds(model, &Ranks::one(1))?.of_all(ranks)?);
        Ok(())
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

    /// Moment `i` of this rank's part; where some are in eight bits, in host memory.
    pub(super) fn moment(&self, i: usize) -> Tensor {
        let Some(eight) = self.eight.get(i) else { return self.moments[i].clone() };
        let (eight, whole) = (eight.to(Device::Cpu), self.moments[i].to(Device::Cpu));
        let mut part = Device::Cpu.with(|| Tensor::zeros(&[self.parts.own().len()], DType::F32));
        let numbers = part.as_mut_slice::<f32>();
        for (range, placed) in self.in_part().zip(&self.storage.places) {
            let numbers = &mut numbers[range];
            match placed.place {
                Place::Whole(at) => numbers.copy_from_slice(&whole.as_slice()[at..at + numbers.len()]),
                Place::Eight(first) => eight.read(first, numbers),
            }
        }
        part
    }

    /// Where the numbers of each parameter are in what [`moment`](Self::moment) gives.
    pub(super) fn in_part(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let own = self.parts.own();
        let range = |placed: &Placed| placed.range.start - own.start..placed.range.end - own.start;
        self.storage.places.iter().map(move |placed| if placed.range.is_empty() { 0..0 } else { range(placed) })
    }

    /// Lets `f` change moment `i`, given as [`moment`](Self::moment) does with the element that its first number is of.
    pub(super) fn change_moment<R>(
        &mut self,
        i: usize,
        f: impl FnOnce((&mut Tensor, usize)) -> Result<R>,
    ) -> Result<R> {
        let start = self.parts.own().start;
        if self.eight.is_empty() {
            return f((&mut self.moments[i], start));
        }
        let mut part = self.moment(i);
        let done = f((&mut part, start))?;
        let (mut eight, mut whole) = Device::Cpu.with(|| (self.eight[i].zeros_like(), self.storage.whole(DType::F32)));
        let numbers = part.as_slice::<f32>();
        for (range, placed) in self.in_part().zip(&self.storage.places) {
            let numbers = &numbers[range];
            match placed.place {
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

    /// The gradients of the last step, in the student's layout: on several ranks, those of a part are of use.
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
    pub(super) fn follow(&mut self, of: Of, how: Follow, model: &Declared, ranks: &Ranks) -> Result<()> {
        match how {
            Follow::Keep => Ok(()),
            Follow::Copy(role) => self.copy(of, &role, model),
            Follow::Ema { momentum } => self.ema(of, momentum, ranks),
        }
    }

    /// Gives what this rank updated to the others: the student, and the teacher where it follows in the update.
    pub(super) fn spread(&mut self, follows: bool, ranks: &Ranks) -> Result<()> {
        let Self { student, teacher, parts, .. } = self;
        ranks.spread(student.rounded_mut(), parts.ranges())?;
        match teacher.as_mut().filter(|_| follows) {
            Some(teacher) => ranks.spread(teacher.rounded_mut(), parts.ranges()),
            None => Ok(()),
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
    fn ema(&mut self, of: Of, momentum: f64, ranks: &Ranks) -> Result<()> {
        let Self { student, teacher, named, parts, .. } = self;
        let (flat, other) = match (of, teacher) {
            (Of::Teacher, None) => return Ok(()),
            (Of::Teacher, Some(teacher)) => (teacher, &*student),
            (Of::Named(i), teacher) => (&mut named[i].1, teacher.as_ref().unwrap_or(student)),
        };
        flat.average(other, momentum)?;
        match flat.is_spread() {
            true => {
                let _step = cuda::step_scope();
                let ranges = parts.ranges_of(flat.len());
                ranks.spread(flat.rounded_mut(), &ranges)
            }
            false => Ok(()),
        }
    }

    /// Everything a run needs to go on after `step` steps, by name, in host memory. Of several ranks all have to ask for it.
    ///
    /// # Errors
    /// If the device or a rank fails.
    pub(super) fn content(&self, step: u64, model: &Declared, ranks: &Ranks) -> Result<Content> {
        let mut content = Content { step, skipped: self.skipped, model: Vec::new(), optimizer: Vec::new() };
        self.gather(ranks, |of, role, flat| {
            let inside = model.layout.specs().iter().filter(|s| s.range().end <= flat.len());
            let named = inside.map(|s| (format!("{role}.{}", s.name), flat.view(s.offset, &s.shape)));
            match of {
                Gathered::Weights => content.model.extend(named),
                Gathered::Moment => content.optimizer.extend(named),
            }
        })?;
        for (loss, state) in model.losses.iter().zip(&self.loss_state) {
            for (name, value) in state {
                content.optimizer.push((format!("state.{}.{name}", loss.name), value.to(Device::Cpu)));
            }
        }
        Ok(content)
    }

    /// Gives `take` all flat memory of a checkpoint, one role after the other: of several ranks each has a part of some.
    pub(super) fn gather(&self, ranks: &Ranks, mut take: impl FnMut(Gathered, &str, Tensor)) -> Result<()> {
        let device = self.grads.device();
        let _step = cuda::step_scope();
        let of_named = self.named.iter().map(|(name, flat)| (role_of(name), flat));
        let models = [("student".to_string(), &self.student)].into_iter();
        let models = models.chain(self.teacher.iter().map(|flat| ("teacher".to_string(), flat))).chain(of_named);
        for (role, flat) in models {
            let mut host = flat.to_host()?;
            if flat.is_spread() {
                host = host.into_unique();
                ranks.spread_on_host(&mut host, &self.parts.ranges_of(flat.len()), device)?;
            }
            take(Gathered::Weights, &role, host);
        }
        let (own, len) = (self.parts.own(), self.student.len());
        for (i, name) in self.moment_names.iter().enumerate() {
            let mut moment = self.moment(i).to(Device::Cpu);
            if own.len() < len {
                let mut whole = Device::Cpu.with(|| Tensor::zeros(&[len], moment.dtype()));
                write_range(&mut whole, own.clone(), &moment)?;
                ranks.spread_on_host(&mut whole, self.parts.ranges(), device)?;
                moment = whole;
            }
            take(Gathered::Moment, name, moment);
        }
        Ok(())
    }

    /// Takes everything from a checkpoint of the same recipe.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, from: &Checkpoint, model: &Declared) -> Result<()> {
        let layout = &model.layout;
        let whole = |source: &NamedTensors, role: &str, layout: &Layout, flat: &mut Tensor| {
            load(layout, (flat, 0), |name| source.get(&format!("{role}.{name}")).cloned(), &from.path)
        };
        self.student.change(|flat| whole(&from.model, "student", layout, flat))?;
        if let Some(teacher) = &mut self.teacher {
            teacher.change(|flat| whole(&from.model, "teacher", layout, flat))?;
        }
        for (name, flat) in &mut self.named {
            flat.change(|flat| whole(&from.model, &role_of(name), &layout.part("backbone."), flat))?;
        }
        for (i, name) in self.moment_names.clone().into_iter().enumerate() {
            self.change_moment(i, |part| {
                let get = |param: &str| from.optimizer.get(&format!("{name}.{param}")).cloned();
                load(layout, part, get, &from.path)
            })?;
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
            load(part, (&mut *flat, 0), get, path)
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

/// [`load_part`] into a buffer wherever it is.
pub(super) fn load(
    layout: &Layout,
    (part, start): (&mut Tensor, usize),
    source: impl Fn(&str) -> Option<Tensor>,
    path: &Path,
) -> Result<()> {
    let Device::Cuda(_) = part.device() else { return load_part(layout, (part, start), source, path) };
    let mut host = part.to(Device::Cpu);
    Device::Cpu.with(|| load_part(layout, (&mut host, start), source, path))?;
    part.copy_from(&host)
}
