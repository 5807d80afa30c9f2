//! What of a learner goes into a checkpoint, and how it comes back: a parameter at a time, so that the host needs no room for a
//! whole model.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::{self, Checkpoint, Content, Give, Set, Written};
use crate::comm::Ranks;
use crate::files::TensorFiles;
use crate::params::{check_shapes, Layout, ParamSpec};
use crate::tensor::{catch_out_of_memory, copy_elements};
use crate::{cuda, DType, Device, Error, Result, Tensor};

use super::flat::{Flat, Spread};
use super::optimizer::Began;
use super::parts::within;
use super::spikes::Spikes;
use super::weights::{adapted, is_adapted, role_of, Weights};
use super::{Declared, Learner};

impl Learner {
    /// Everything a run needs to go on after `step` steps, in host memory. Of several ranks all have to ask for it, or
    /// [give what they have](Self::hand_over).
    ///
    /// # Errors
    /// If the device or a rank fails.
    pub fn content(&self, step: u64) -> Result<Content> {
        catch_out_of_memory(|| Saved::new(self, step).whole(true))
    }

    /// Gives ranks that ask for all [`content`](Self::content) what this one has of it.
    ///
    /// # Errors
    /// If the device or a rank fails.
    pub fn hand_over(&self) -> Result<()> {
        catch_out_of_memory(|| Saved::new(self, 0).whole(false).map(drop))
    }

    /// Writes this rank's files of a checkpoint after `step` steps, as [`checkpoint::write`] does.
    pub(crate) fn write(&self, step: u64, folder: &Path, most: u64) -> Result<Result<Vec<Written>>> {
        let share = (self.ranks.rank(), self.ranks.world());
        catch_out_of_memory(|| checkpoint::write(folder, &Saved::new(self, step), most, share))
    }

    /// Whether all of several ranks write files of a checkpoint, or rank 0 alone.
    pub(crate) fn all_write(&self, most: u64) -> bool {
        self.ranks.world() > 1 && checkpoint::is_split(&Saved::new(self, 0), most)
    }

    /// Takes what is neither weights nor moments from a checkpoint; one that was written without begins anew.
    pub(super) fn restore_rest(&mut self, from: &TensorFiles) -> Result<()> {
        for module in self.optimizer.modules() {
            if let Some(norm) = from.read(&format!("{CLIP_NORM}{module}"))? {
                self.last_norms.insert(module.into(), norm.item());
            }
        }
        self.spikes.as_mut().map_or(Ok(()), |spikes| spikes.restore(from))
    }

    /// The gradients of the last step in the student's layout, in host memory. Of several ranks, each of which has those of its
    /// part, all have to ask for them.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn gradients(&self) -> Result<Tensor> {
        let own = self.weights.grads.to(Device::Cpu);
        if self.ranks.world() == 1 {
            return Ok(own);
        }
        let _step = cuda::step_scope();
        let (parts, start) = (&self.optimizer.parts, self.optimizer.gradients().start);
        let mut all = Device::Cpu.with(|| Tensor::zeros(&[self.model.layout.len()], own.dtype()));
        let part = parts.own().clone();
        copy_elements(&mut all, part.start, &own, part.start - start..part.end - start)?;
        self.ranks.spread_on_host(&mut all, parts.ranges(), self.device)?;
        Ok(all)
    }
}

/// A learner's tensors by their names in a checkpoint.
struct Saved<'a> {
    step: u64,
    weights: &'a Weights,
    model: &'a Declared,
    ranks: &'a Ranks,
    sets: [Vec<Entry<'a>>; 2],
}

/// What the names begin with of the norms that the next step's gradients are clipped by, by sub-model.
const CLIP_NORM: &str = "clip.norm.";

/// The same of the updates before a sub-model's moments began.
const BEGAN: &str = "began.";

/// A number in host memory.
fn number(value: f64) -> Tensor {
    Device::Cpu.with(|| Tensor::scalar(value, DType::F64))
}

/// The sub-models whose moments began late, as a checkpoint says.
pub(super) fn began(from: &TensorFiles) -> Result<Began> {
    let modules = from.names().filter_map(|name| name.strip_prefix(BEGAN));
    let modules: Vec<String> = modules.map(String::from).collect();
    let began = |module: String| Ok(from.read(&format!("{BEGAN}{module}"))?.map(|began| (module, began.item() as u64)));
    modules.into_iter().filter_map(|module| began(module).transpose()).collect()
}

struct Entry<'a> {
    name: String,
    from: Origin<'a>,
}

enum Origin<'a> {
    /// A parameter of a model, by its place in the layout.
    Weights(&'a Flat, usize),
    /// A moment of a parameter.
    Moment(usize, usize),
    /// What rank 0 has, whoever else has it too.
    Small(Tensor),
}

impl<'a> Saved<'a> {
    fn new(learner: &'a Learner, step: u64) -> Self {
        let Learner { weights, model, ranks, spikes, .. } = learner;
        let norms = learner.last_norms.iter().filter(|_| learner.optimizer.config().is_fused());
        let norms = norms.map(|(module, norm)| (format!("{CLIP_NORM}{module}"), number(*norm)));
        let specs = || model.layout.specs().iter().enumerate();
        let of_named = weights.named.iter().map(|(name, flat)| (role_of(name), flat));
        let models = [("student".to_string(), &weights.student)].into_iter();
        let models = models.chain(weights.teacher.iter().map(|flat| ("teacher".to_string(), flat))).chain(of_named);
        let of_model = |(role, flat): (String, &'a Flat)| -> Vec<Entry<'a>> {
            let inside = specs().filter(|(_, spec)| spec.range().end <= flat.len());
            let entry = |(i, spec): (usize, &ParamSpec)| Entry {
                name: format!("{role}.{}", spec.name),
                from: Origin::Weights(flat, i),
            };
            inside.map(entry).collect()
        };
        let of_moment = |(moment, name): (usize, &&str)| -> Vec<Entry<'a>> {
            let entry = |(i, spec): (usize, &ParamSpec)| Entry {
                name: format!("{name}.{}", spec.name),
                from: Origin::Moment(moment, i),
            };
            specs().map(entry).collect()
        };
        let state = model.losses.iter().zip(&weights.loss_state);
        let state = state.flat_map(|(loss, state)| {
            state.iter().map(|(name, value)| (format!("state.{}.{name}", loss.name), value.clone()))
        });
        let began = learner.optimizer.began().iter().filter(|(_, began)| **began > 0);
        let began = began.map(|(module, began)| (format!("{BEGAN}{module}"), number(*began as f64)));
        let small = state
            .chain(began)
            .chain(spikes.iter().flat_map(Spikes::content).chain(norms))
            .map(|(name, value)| Entry { name, from: Origin::Small(value) });
        let moments = weights.moment_names.iter().enumerate().flat_map(of_moment);
        Self {
            step,
            weights,
            model,
            ranks,
            sets: [models.flat_map(of_model).collect(), moments.chain(small).collect()],
        }
    }

    /// All of it, if this rank keeps it.
    fn whole(&self, keep: bool) -> Result<Content> {
        let [model, optimizer] = [Set::Model, Set::Optimizer].map(|set| {
            let all = 0..self.sets[set as usize].len();
            self.tensors(set, all, keep)
        });
        let (step, skipped) = self.steps();
        Ok(Content { step, skipped, model: model?, optimizer: optimizer? })
    }

    fn spec(&self, i: usize) -> &'a ParamSpec {
        &self.model.layout.specs()[i]
    }

    /// One tensor, if this rank keeps it.
    fn tensor(&self, from: &Origin<'_>, keep: bool) -> Result<Option<Tensor>> {
        let _step = cuda::step_scope();
        let (part, i) = match from {
            Origin::Small(tensor) => return Ok(keep.then(|| tensor.to(Device::Cpu))),
            Origin::Weights(flat, i) if flat.spread() == Spread::Nothing => {
                let spec = self.spec(*i);
                let read = || Ok(flat.read(spec.range())?.view(0, &spec.shape));
                return keep.then(read).transpose();
            }
            Origin::Weights(flat, i) => (flat.read(within(&self.spec(*i).range(), self.weights.parts.own()))?, *i),
            Origin::Moment(moment, i) => (self.weights.moment(*moment, *i), *i),
        };
        let spec = self.spec(i);
        if part.len() == spec.range().len() && self.ranks.world() == 1 {
            return Ok(keep.then(|| part.view(0, &spec.shape)));
        }
        let own = |part: &Range<usize>| {
            let inside = within(&spec.range(), part);
            inside.start - spec.offset..inside.end - spec.offset
        };
        let ranges: Vec<Range<usize>> = self.weights.parts.ranges().iter().map(own).collect();
        let mut whole = Device::Cpu.with(|| Tensor::zeros(&spec.shape, part.dtype()));
        copy_elements(&mut whole, ranges[self.ranks.rank()].start, &part, 0..part.len())?;
        self.ranks.spread_on_host(&mut whole, &ranges, self.weights.device())?;
        Ok(keep.then_some(whole))
    }
}

impl Give for Saved<'_> {
    fn steps(&self) -> (u64, u64) {
        (self.step, self.weights.skipped)
    }

    fn bytes(&self, set: Set) -> Vec<u64> {
        let width = self.weights.student.dtype().size();
        let bytes = |entry: &Entry<'_>| match entry.from {
            Origin::Weights(_, i) | Origin::Moment(_, i) => (self.spec(i).range().len() * width) as u64,
            Origin::Small(_) => 0,
        };
        self.sets[set as usize].iter().map(bytes).collect()
    }

    fn tensors(&self, set: Set, places: Range<usize>, keep: bool) -> Result<Vec<(String, Tensor)>> {
        let entries = &self.sets[set as usize][places];
        let tensor = |entry: &Entry<'_>| {
            let tensor = self.tensor(&entry.from, keep)?;
            Ok(tensor.map(|tensor| (entry.name.clone(), tensor)))
        };
        entries.iter().filter_map(|entry| tensor(entry).transpose()).collect()
    }
}

impl Weights {
    /// Takes everything from a checkpoint of the same recipe.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, from: &Checkpoint, model: &Declared) -> Result<()> {
        let (layout, path) = (model.layout.as_ref(), from.path.as_path());
        let stored = |role: &str| Stored { files: &from.model, prefix: format!("{role}."), path, adapt: false };
        stored("student").load(layout, "", |_, spec, tensor| self.student.write(spec.offset, tensor))?;
        if let Some(teacher) = &mut self.teacher {
            stored("teacher").load(layout, "", |_, spec, tensor| teacher.write(spec.offset, tensor))?;
        }
        for (name, flat) in &mut self.named {
            stored(&role_of(name)).load(layout, "backbone.", |_, spec, tensor| flat.write(spec.offset, tensor))?;
        }
        for (moment, name) in self.moment_names.clone().into_iter().enumerate() {
            let stored = Stored { files: &from.optimizer, prefix: format!("{name}."), path, adapt: false };
            stored.load(layout, "", |i, spec, tensor| self.write_moment(moment, i, spec, tensor))?;
        }
        for (loss, state) in model.losses.iter().zip(&mut self.loss_state) {
            for (name, value) in state {
                let name = format!("state.{}.{name}", loss.name);
                let found = from.optimizer.read(&name)?.filter(|t| t.shape() == value.shape());
                let missing = || Error::content(path, format!("no {name} {:?}", value.shape()), "start the run anew");
                value.copy_from(&found.ok_or_else(missing)?.cast(value.dtype())?)?;
            }
        }
        self.skipped = from.skipped;
        Ok(())
    }
}

/// Tensors in files, whose names begin with `prefix`; `path` is what was named.
pub(crate) struct Stored<'a> {
    pub(crate) files: &'a TensorFiles,
    pub(crate) prefix: String,
    pub(crate) path: &'a Path,
    /// Whether they may be of a model of other channels.
    pub(crate) adapt: bool,
}

impl Stored<'_> {
    /// All parameters in flat memory of the host.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub(crate) fn flat(&self, layout: &Layout, dtype: DType) -> Result<Tensor> {
        let mut flat = Device::Cpu.with(|| Tensor::zeros(&[layout.len()], dtype));
        self.load(layout, "", |_, spec, tensor| {
            copy_elements(&mut flat, spec.offset, &tensor.cast(dtype)?, 0..tensor.len())
        })?;
        Ok(flat)
    }

    /// Gives `take` the tensors of all parameters whose names begin with `part`, one after the other in host memory, with their
    /// places in the layout.
    ///
    /// # Errors
    /// If one is missing or has another shape, before any is read; the message lists all of them.
    pub(super) fn load(
        &self,
        layout: &Layout,
        part: &str,
        mut take: impl FnMut(usize, &ParamSpec, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let name = |spec: &ParamSpec| format!("{}{}", self.prefix, spec.name);
        let of_part = layout.part(part);
        let found = of_part.specs().iter().map(|spec| {
            let shape = self.files.shape(&name(spec))?;
            Some(if self.adapt && is_adapted(shape, &spec.shape) { &spec.shape } else { shape })
        });
        check_shapes(&of_part, found, self.path)?;
        let inside = layout.specs().iter().enumerate().filter(|(_, spec)| spec.name.starts_with(part));
        for (i, spec) in inside {
            let mut tensor = Device::Cpu.with(|| self.files.read(&name(spec)))?.expect("its shape was found");
            if self.adapt {
                tensor = adapted(tensor, &spec.shape);
            }
            take(i, spec, &tensor)?;
        }
        Ok(())
    }
}
