//! All weights of a run, each role one flat buffer, and how they are loaded, copied and saved.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::comm::Ranks;
use crate::contract::{At, Follow, Role, State, TeacherPolicy};
use crate::files::TensorFiles;
use crate::ops::{EightBit, Map, Place};
use crate::params::{check_shapes, Layout, ParamSpec};
use crate::recipe::{InitRole, Recipe};
use crate::tensor::{catch_out_of_memory, copy_elements};
use crate::weights::Source;
use crate::{cuda, DType, Device, Error, Result, Tensor};

use super::bounds::{Bounds, Reach};
use super::flat::{Flat, Keeping, Spread};
use super::layers::Layers;
use super::moments::{Placed, Storage};
use super::optimizer::Groups;
use super::parts::Parts;
use super::saved::Stored;
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
    pub(super) parts: Arc<Parts>,
    /// Their names.
    pub(super) moment_names: Vec<&'static str>,
    /// By loss: its state by name.
    pub loss_state: Vec<State>,
    /// Steps whose update was skipped.
    pub skipped: u64,
    /// Gradients of the last step: those of [`Groups::gradients`].
    pub(super) grads: Tensor,
    /// The layers in which teachers that are sharded are gathered.
    pub(super) gather: Option<Layers>,
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
        let parts = optimizer.parts.clone();
        let (share, offload) = (parts.share(), optimizer.config().offload);
        let shards = optimizer.config().shard_teachers;
        let zeros =
            |len, sharded| Flat::zeros(len, features, Keeping { own: parts.own_of(len), share, offload, sharded });
        let named = named.into_iter().map(|name| Ok((name.to_string(), zeros(backbone_len(layout), shards)?)));
        let (storage, offload_moments) = (optimizer.storage.clone(), optimizer.config().offload_moments);
        // AdamW's two: others are refused when the groups are made.
        let eight = if storage.blocks == 0 { &[][..] } else { &[Map::Signed, Map::Unsigned] };
        let eight = eight.iter().map(|map| EightBit::zeros(*map, storage.blocks)).collect();
        Ok(Self {
            student: zeros(layout.len(), false)?,
            teacher: teacher.then(|| zeros(layout.len(), shards)).transpose()?,
            named: named.collect::<Result<_>>()?,
            moments: optimizer
                .moments()
                .iter()
                .map(|_| storage.whole(dtype, offload_moments))
                .collect::<Result<_>>()?,
            eight,
            storage,
            parts: parts.clone(),
            moment_names: optimizer.moments().to_vec(),
            loss_state: Vec::new(),
            skipped: 0,
            grads: Tensor::zeros(&[optimizer.gradients().len()], dtype),
            gather: shards.then(|| Layers::of(layout)),
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
    pub(super) fn evaluated(&self) -> &Flat {
        self.teacher.as_ref().unwrap_or(&self.student)
    }

    /// What a teacher of `[teachers]` computes with.
    pub(super) fn named(&self, i: usize) -> &Flat {
        &self.named[i].1
    }

    /// Moment `moment` of what this rank has of a parameter, by its place in the layout, in host memory.
    pub(super) fn moment(&self, moment: usize, param: usize) -> Tensor {
        let Placed { range, place } = &self.storage.places[param];
        match (*place, self.eight.get(moment)) {
            _ if range.is_empty() => Device::Cpu.with(|| Tensor::zeros(&[0], self.moments[moment].dtype())),
            (Place::Eight(first), Some(eight)) => {
                let mut numbers = Device::Cpu.with(|| Tensor::zeros(&[range.len()], DType::F32));
                eight.part(first, range.len()).to(Device::Cpu).read(0, numbers.as_mut_slice());
                numbers
            }
            (Place::Whole(at) | Place::Eight(at), _) => self.moments[moment].view(at, &[range.len()]).to(Device::Cpu),
        }
    }

    /// Writes what this rank has of a parameter to moment `moment`; `numbers`, in host memory, are of the whole parameter.
    pub(super) fn write_moment(
        &mut self,
        moment: usize,
        param: usize,
        spec: &ParamSpec,
        numbers: &Tensor,
    ) -> Result<()> {
        let Placed { range, place } = &self.storage.places[param];
        if range.is_empty() {
            return Ok(());
        }
        let to = &mut self.moments[moment];
        let numbers = Device::Cpu.with(|| numbers.view(range.start - spec.offset, &[range.len()]).cast(to.dtype()))?;
        match (*place, self.eight.get_mut(moment)) {
            (Place::Eight(first), Some(eight)) => {
                let mut part = Device::Cpu.with(|| eight.part(first, range.len()).zeros_like());
                part.write(0, numbers.as_slice());
                eight.put(first, &part)
            }
            (Place::Whole(at) | Place::Eight(at), _) => copy_elements(to, at, &numbers, 0..range.len()),
        }
    }

    /// The start of a run, whose student was drawn from the seed: what the recipe names is read.
    pub(super) fn start(
        &mut self,
        recipe: &Recipe,
        model: &Declared,
        teacher: &dyn TeacherPolicy,
        named: &[Teacher],
    ) -> Result<()> {
        let layout = &model.layout;
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

    /// Where they are.
    pub(super) fn device(&self) -> Device {
        self.student.rounded().device()
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
        match teacher.as_mut().filter(|teacher| follows && !teacher.is_sharded()) {
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
        match flat.spread() {
            Spread::Lower => {
                let _step = cuda::step_scope();
                let ranges = parts.ranges_of(flat.len());
                ranks.spread(flat.rounded_mut(), &ranges)
            }
            Spread::Nothing | Spread::All => Ok(()),
        }
    }
}

/// Weights of the same model.
fn read_model(path: &Path, model: &Declared) -> Result<TensorFiles> {
    let source = Source::at(path)?;
    source.check_same_model(model.backbone.as_ref())?;
    source.files()
}

/// Loads a model from the first of `prefixes` under which the file has a backbone. A head that the file does not have
/// at all keeps its start: published weights come without heads.
fn load_role(layout: &Layout, flat: &mut Flat, files: &TensorFiles, prefixes: &[&str], path: &Path) -> Result<()> {
    let (prefix, parts) = parts_in(layout, |prefix| files.has(prefix), prefixes, path)?;
    let stored = Stored { files, prefix: prefix.into(), path, adapt: true };
    parts.iter().try_for_each(|part| stored.load(layout, part, |_, spec, tensor| flat.write(spec.offset, tensor)))
}

/// The first of `prefixes` under which a file has a backbone, and the sub-models that it has there.
fn parts_in<'a>(
    layout: &Layout,
    has: impl Fn(&str) -> bool,
    prefixes: &[&'a str],
    path: &Path,
) -> Result<(&'a str, Vec<String>)> {
    let Some(prefix) = prefixes.iter().copied().find(|p| has(&format!("{p}backbone."))) else {
        let wanted: Vec<String> = prefixes.iter().map(|prefix| format!("{prefix}backbone.*")).collect();
        let problem = format!("no tensors {} in it", wanted.join(" or "));
        return Err(Error::content(path, problem, "name a run, a checkpoint, or weights that dinolab wrote"));
    };
    let known = layout.modules().into_iter().filter(|m| m == "backbone" || has(&format!("{prefix}{m}.")));
    Ok((prefix, known.map(|module| format!("{module}.")).collect()))
}

/// The shapes of tensors by their names in files.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// Fails if [`load_role`] would not load from tensors of these shapes, which lie at `path`.
pub(super) fn check_role(layout: &Layout, shapes: &Shapes, prefixes: &[&str], path: &Path) -> Result<()> {
    let has = |prefix: &str| shapes.keys().any(|name| name.starts_with(prefix));
    let (prefix, parts) = parts_in(layout, has, prefixes, path)?;
    for part in parts {
        let part = layout.part(&part);
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
pub(super) fn adapted(tensor: Tensor, shape: &[usize]) -> Tensor {
    if !is_adapted(tensor.shape(), shape) {
        return tensor;
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
pub(super) fn is_adapted(from: &[usize], to: &[usize]) -> bool {
    let (&[_, RGB, height, width], &[rows, n, ..]) = (from, to) else { return false };
    n != RGB && to == [rows, n, height, width] && from[0] == rows
}
