//! Parameters in flat buffers.
//!
//! A [`Layout`] names and places every parameter of a model once; a [`Params`] looks named tensors up in one flat
//! buffer of that layout. Student, teachers, gradients and optimizer moments are each one buffer, so
//! the optimizer, EMA, clipping and checkpoints walk flat memory and know no layer.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::rng::{Rng, Stream};
use crate::tensor::{copy_elements, Real, Tape};
use crate::{dispatch_real, DType, Error, Result, Tensor};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All the given value (LayerScale).
    Constant(f64),
    /// Normal with this standard deviation, cut at two absolute units as timm's `trunc_normal_` does.
    TruncatedNormal(f64),
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform in `[-a, a]`.
    Uniform(f64),
}

/// A named parameter: shape, start, and how the optimizer treats it.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// The full dotted name, `backbone.blocks.0.norm1.weight`: the reference's state-dict names.
    pub name: String,
    /// Its shape; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Depth for layer-wise learning-rate decay: 0 embeddings and tokens, `i + 1` block i, `depth + 1` final norms;
    /// `None` for parameters without decay over depth (heads).
    pub layer: Option<usize>,
    /// Whether weight decay acts on it.
    pub decays: bool,
    /// What else the optimizer knows it as.
    pub role: Option<ParamRole>,
    /// Matrices of one shape that lie in it one under the other: 3 for the map to queries, keys and values.
    pub stacked: usize,
    /// Where it begins in the flat buffer.
    pub offset: usize,
}

/// Parameters that an optimizer treats in a way of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// Pixels to the first features: `patch_embed_lr_mult`.
    PatchEmbed,
    /// The map to prototypes: `freeze_last_layer_steps`, `last_layer_lr`.
    LastLayer,
    /// The map to what is predicted: classes, pixels.
    Output,
}

impl ParamSpec {
    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset.saturating_add(self.shape.iter().fold(1, |all: usize, n| all.saturating_mul(*n)))
    }

    /// The sub-model it belongs to (`backbone`, `dino_head`, ...): its name up to the first dot.
    pub fn module(&self) -> &str {
        self.name.split('.').next().unwrap_or_default()
    }
}

/// A parameter of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamId(usize);

/// Names, shapes and places of all parameters of a model.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    specs: Vec<ParamSpec>,
    len: usize,
}

/// Parameters begin at multiples of this many elements, so that every one is aligned for vector loads.
pub(crate) const ALIGN: usize = 64;

impl Layout {
    /// All parameters in order.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Elements of the flat buffer, padding included; the greatest number there is if they are more than can be counted.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no parameter.
    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    /// Trainable numbers, padding not counted.
    pub fn count(&self) -> usize {
        self.specs.iter().fold(0, |all: usize, s| all.saturating_add(s.range().len()))
    }

    /// The parameter of that name.
    pub fn find(&self, name: &str) -> Option<&ParamSpec> {
        self.specs.iter().find(|s| s.name == name)
    }

    /// The flat range of all parameters whose name starts with `prefix` (parameters of one sub-model are neighbours).
    pub fn range_of(&self, prefix: &str) -> Range<usize> {
        let mut inside = self.specs.iter().filter(|s| s.name.starts_with(prefix)).map(ParamSpec::range);
        let Some(first) = inside.next() else { return 0..0 };
        inside.fold(first, |all, r| all.start..r.end)
    }

    /// The parameters whose name starts with `prefix`, at the same places.
    pub fn part(&self, prefix: &str) -> Layout {
        let specs = self.specs.iter().filter(|s| s.name.starts_with(prefix)).cloned().collect();
        Layout { specs, len: self.len }
    }

    /// The names up to the first dot, in order: the sub-models (`backbone`, `dino_head`, ...).
    pub fn modules(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for spec in &self.specs {
            let module = spec.module();
            if names.last().is_none_or(|n| n != module) {
                names.push(module.to_string());
            }
        }
        names
    }

    /// A freshly initialised flat buffer. Every parameter has its own stream of draws, so that adding one changes no
    /// other, and arms of an ablation with the same seed start equal wherever they agree.
    pub fn init(&self, seed: u64, dtype: DType) -> Result<Tensor> {
        draw(&self.specs, 0..self.len, seed, dtype)
    }

    /// The same in parts of at most so many elements, or of one parameter: the element that each begins at, in order.
    pub(crate) fn init_parts(
        &self,
        seed: u64,
        dtype: DType,
        most: usize,
    ) -> impl Iterator<Item = (usize, Result<Tensor>)> + '_ {
        let (mut specs, mut start) = (self.specs.as_slice(), 0);
        std::iter::from_fn(move || {
            let many = specs.partition_point(|spec| spec.range().end <= start + most).max(1).min(specs.len());
            let (part, rest) = specs.split_at(many);
            let end = rest.first().map_or(self.len, |next| next.offset);
            (specs, start) = (rest, end);
            part.first().map(|first| (first.offset, draw(part, first.offset..end, seed, dtype)))
        })
    }
}

/// A range of a flat buffer, with these parameters in it.
fn draw(specs: &[ParamSpec], range: Range<usize>, seed: u64, dtype: DType) -> Result<Tensor> {
    let mut flat = Tensor::zeros(&[range.len()], dtype);
    dispatch_real!("init", dtype, T => {
        let mut rest = flat.as_mut_slice::<T>();
        let mut at = range.start;
        let mut places = Vec::new();
        for spec in specs {
            let (place, behind) = rest[spec.offset - at..].split_at_mut(spec.range().len());
            places.push((spec, place));
            (rest, at) = (behind, spec.range().end);
        }
        places.into_par_iter().for_each(|(spec, place)| {
            spec.init.fill(&Rng::named(seed, Stream::Init, 0, &spec.name), place);
        });
        Ok(flat)
    })
}

/// Draws of a truncated normal before it is taken for a uniform one: with a deviation of 1 all of them are outside the
/// cuts with probability 1e-86, and one of 20, outside in 90 of 100 draws, is uniform between the cuts to half a percent.
const TRIES: usize = 64;
/// Where a truncated normal is cut, on both sides.
const CUT: f64 = 2.0;

/// Numbers that one thread draws at a time: even, since two uniform ones share a block of the generator.
const DRAWN_AT_ONCE: usize = 1 << 14;

impl Init {
    /// Draws one number after the other from `rng`, in parallel where it is known beforehand where a number's draws begin.
    fn fill<T: Real>(self, rng: &Rng, place: &mut [T]) {
        // Of a normal number half a block is never left; of those that are rejected it is not known how many there are.
        let blocks_for = |numbers: usize| match self {
            Self::Normal(_) => Some(numbers),
            Self::TruncatedNormal(std) if std.abs() * Rng::GREATEST_NORMAL <= CUT => Some(numbers),
            Self::Uniform(_) => Some(numbers / 2),
            Self::TruncatedNormal(_) => None,
            Self::Zeros | Self::Ones | Self::Constant(_) => Some(0),
        };
        let at_once = if blocks_for(0).is_some() { DRAWN_AT_ONCE } else { usize::MAX };
        place.par_chunks_mut(at_once).enumerate().for_each(|(i, chunk)| {
            let mut rng = rng.after_blocks(blocks_for(i * DRAWN_AT_ONCE).unwrap_or(0));
            chunk.iter_mut().for_each(|x| *x = T::of(self.draw(&mut rng)));
        });
    }

    fn draw(self, rng: &mut Rng) -> f64 {
        match self {
            Self::Zeros => 0.0,
            Self::Ones => 1.0,
            Self::Constant(value) => value,
            Self::Normal(std) => std * rng.normal(),
            Self::TruncatedNormal(std) => {
                let drawn = (0..TRIES).map(|_| std * rng.normal()).find(|x| x.abs() <= CUT);
                // So wide a normal distribution is flat between the cuts.
                drawn.unwrap_or_else(|| rng.uniform(-CUT, CUT))
            }
            Self::Uniform(a) => rng.uniform(-a, a),
        }
    }
}

/// Declares parameters while a model is built.
#[derive(Debug, Default)]
pub struct ParamBuilder {
    layout: Layout,
    names: HashSet<String>,
    /// The first name that was declared twice.
    twice: Option<String>,
    prefix: Vec<String>,
    layer: Option<usize>,
    keeps: bool,
    role: Option<ParamRole>,
    stacked: Option<usize>,
}

impl ParamBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares inside `name.`; scopes nest.
    pub fn scope<R>(&mut self, name: impl Into<String>, f: impl FnOnce(&mut Self) -> R) -> R {
        self.prefix.push(name.into());
        let result = f(self);
        self.prefix.pop();
        result
    }

    /// Declares inside layer `layer` for learning-rate decay over depth.
    pub fn layer<R>(&mut self, layer: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.layer.replace(layer);
        let result = f(self);
        self.layer = outer;
        result
    }

    /// Declares parameters on which weight decay does not act: biases, the weights of norms, LayerScale.
    pub fn without_decay<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let outer = std::mem::replace(&mut self.keeps, true);
        let result = f(self);
        self.keeps = outer;
        result
    }

    /// Declares parameters of a role.
    pub fn role<R>(&mut self, role: ParamRole, f: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.role.replace(role);
        let result = f(self);
        self.role = outer;
        result
    }

    /// Declares parameters in each of which `n` matrices of one shape lie one under the other.
    pub fn stacked<R>(&mut self, n: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.stacked.replace(n);
        let result = f(self);
        self.stacked = outer;
        result
    }

    /// Declares one parameter; weight decay acts on it. A name that was declared before is what [`check`](Self::check) says.
    pub fn add(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        let name = self.prefix.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(".");
        if !self.names.insert(name.clone()) {
            self.twice.get_or_insert_with(|| name.clone());
        }
        let spec = ParamSpec {
            name,
            shape: shape.to_vec(),
            init,
            layer: self.layer,
            decays: !self.keeps,
            role: self.role,
            stacked: self.stacked.unwrap_or(1),
            offset: self.layout.len,
        };
        let padded = spec.range().len().checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX);
        self.layout.len = self.layout.len.saturating_add(padded);
        self.layout.specs.push(spec);
        ParamId(self.layout.specs.len() - 1)
    }

    /// Declares a bias, the weight of a norm, or a LayerScale: [`add`](Self::add) [`without_decay`](Self::without_decay).
    pub fn add_plain(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.without_decay(|params| params.add(name, shape, init))
    }

    /// Fails if a parameter was declared twice.
    ///
    /// # Errors
    /// Which: the plugin that declares it is wrong.
    pub fn check(&self) -> Result<()> {
        let help = "this is a fault of the plugin that declares it: give each layer a `scope` of its own";
        let wrong = |name: &String| Err(Error::user(format!("the parameter `{name}` is declared twice"), help));
        self.twice.as_ref().map_or(Ok(()), wrong)
    }

    /// The finished layout.
    pub fn finish(self) -> Arc<Layout> {
        Arc::new(self.layout)
    }
}

/// What has parameters that are not in one flat buffer.
pub(crate) trait Elsewhere {
    /// A parameter, by its place in the layout.
    fn get(&self, param: usize, spec: &ParamSpec) -> Tensor;
}

/// Named tensors looked up in one flat buffer; tracked if a tape is given.
pub struct Params<'a> {
    layout: &'a Arc<Layout>,
    /// Of those that are elsewhere, some.
    flat: &'a Tensor,
    elsewhere: Option<&'a dyn Elsewhere>,
    tape: Option<&'a Tape>,
    tracked: RefCell<Vec<Option<Tensor>>>,
    uses: Option<Noted>,
}

/// Who notes that a parameter is used: each does so once.
struct Noted {
    uses: Uses,
    seen: RefCell<Vec<bool>>,
}

/// How many tapes add to the gradient of each parameter: that of the model, and those of parts that are computed again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uses(Arc<Mutex<Vec<usize>>>);

impl Uses {
    /// The counts, in the order of the layout.
    pub(crate) fn counts(&self) -> Vec<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, param: usize) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() <= param {
            counts.resize(param + 1, 0);
        }
        counts[param] += 1;
    }
}

impl<'a> Params<'a> {
    /// Plain weights: nothing is recorded (teachers, evaluation).
    pub fn frozen(layout: &'a Arc<Layout>, flat: &'a Tensor) -> Self {
        Self { layout, flat, elsewhere: None, tape: None, tracked: Default::default(), uses: None }
    }

    /// The same, of weights of which `here` are some, and `elsewhere` gives any.
    pub(crate) fn gathered(layout: &'a Arc<Layout>, here: &'a Tensor, elsewhere: &'a dyn Elsewhere) -> Self {
        Self { elsewhere: Some(elsewhere), ..Self::frozen(layout, here) }
    }

    /// The same, where `uses` is told which of them are used.
    pub(crate) fn noted(layout: &'a Arc<Layout>, flat: &'a Tensor, uses: Uses) -> Self {
        let seen = RefCell::new(vec![false; layout.specs.len()]);
        Self { uses: Some(Noted { uses, seen }), ..Self::frozen(layout, flat) }
    }

    /// Weights followed by `tape`: gradients land at the same places of a flat gradient buffer.
    pub fn tracked(layout: &'a Arc<Layout>, flat: &'a Tensor, tape: &'a Tape) -> Self {
        let tracked = RefCell::new(vec![None; layout.specs.len()]);
        Self { tape: Some(tape), tracked, ..Self::noted(layout, flat, Uses::default()) }
    }

    /// Weights that are tensors already, in the order of the layout, followed or not.
    pub(crate) fn given(layout: &'a Arc<Layout>, flat: &'a Tensor, tensors: Vec<Tensor>) -> Self {
        let tracked = RefCell::new(tensors.into_iter().map(Some).collect());
        Self { tracked, ..Self::frozen(layout, flat) }
    }

    /// The parameter `id`.
    pub fn get(&self, id: ParamId) -> Tensor {
        if let Some(Some(known)) = self.tracked.borrow().get(id.0) {
            return known.clone();
        }
        if let Some(Noted { uses, seen }) = &self.uses {
            if !std::mem::replace(&mut seen.borrow_mut()[id.0], true) {
                uses.note(id.0);
            }
        }
        let spec = &self.layout.specs[id.0];
        if let Some(elsewhere) = self.elsewhere {
            return elsewhere.get(id.0, spec);
        }
        let view = || self.flat.view(spec.offset, &spec.shape);
        let Some(tape) = self.tape else { return view() };
        let tracked = tape.param(&view(), spec.range());
        self.tracked.borrow_mut()[id.0] = Some(tracked.clone());
        tracked
    }

    /// The type of the weights.
    pub fn dtype(&self) -> DType {
        self.flat.dtype()
    }

    /// Names and places of all parameters.
    pub(crate) fn layout(&self) -> &Arc<Layout> {
        self.layout
    }

    /// The flat buffer.
    pub(crate) fn flat(&self) -> &Tensor {
        self.flat
    }

    /// Where it is noted which of them are used.
    pub(crate) fn uses(&self) -> Uses {
        self.uses.as_ref().map(|noted| noted.uses.clone()).unwrap_or_default()
    }

    /// The tape that follows these weights.
    pub fn tape(&self) -> Option<&Tape> {
        self.tape
    }
}

/// Copies every parameter of `layout` from `source` by name; anything missing or of another shape is listed.
///
/// # Errors
/// If a parameter is missing or has another shape; the message lists all of them.
pub fn load_named(
    layout: &Layout,
    flat: &mut Tensor,
    source: impl Fn(&str) -> Option<Tensor>,
    origin: &std::path::Path,
) -> Result<()> {
    let found: Vec<Option<Tensor>> = layout.specs.iter().map(|spec| source(&spec.name)).collect();
    check_shapes(layout, found.iter().map(|tensor| tensor.as_ref().map(Tensor::shape)), origin)?;
    for (spec, tensor) in layout.specs.iter().zip(found.into_iter().flatten()) {
        copy_elements(flat, spec.offset, &tensor.cast(flat.dtype())?, 0..spec.range().len())?;
    }
    Ok(())
}

/// Fails if the shapes that a file has for the parameters of `layout`, in its order, are not theirs.
///
/// # Errors
/// Every parameter that is missing or has another shape.
pub(crate) fn check_shapes<'a>(
    layout: &Layout,
    found: impl Iterator<Item = Option<&'a [usize]>>,
    origin: &std::path::Path,
) -> Result<()> {
    let problem = |(spec, found): (&ParamSpec, Option<&[usize]>)| match found {
        None => Some(format!("missing {} {:?}", spec.name, spec.shape)),
        Some(shape) if shape != spec.shape => {
            Some(format!("{}: {shape:?} in the file, {:?} in the model", spec.name, spec.shape))
        }
        Some(_) => None,
    };
    let problems: Vec<String> = layout.specs.iter().zip(found).filter_map(problem).collect();
    if problems.is_empty() {
        return Ok(());
    }
    let shown = problems.iter().take(12).map(|p| format!("\n    {p}")).collect::<String>();
    let more = problems.len().saturating_sub(12);
    let more = if more > 0 { format!("\n    and {more} more") } else { String::new() };
    Err(Error::content(
        origin,
        format!("does not fit the model: {} of {} tensors{shown}{more}", problems.len(), layout.specs.len()),
        "use a checkpoint of the same architecture, or set the tables of the backbone and of the losses' heads to those of the checkpoint",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_drawn_in_parallel_are_those_of_one_thread() {
        let n = 2 * DRAWN_AT_ONCE + 77;
        let mut builder = ParamBuilder::new();
        let starts = [
            Init::TruncatedNormal(0.02),
            Init::TruncatedNormal(CUT / Rng::GREATEST_NORMAL),
            Init::TruncatedNormal(1.0),
            Init::TruncatedNormal(f64::NAN),
            Init::Normal(3.0),
            Init::Uniform(0.5),
            Init::Constant(1e-5),
            Init::Ones,
            Init::Zeros,
        ];
        let ids = starts.map(|init| builder.add(&format!("{init:?}"), &[n], init));
        let layout = builder.finish();
        let flat = layout.init(5, DType::F32).unwrap();
        for most in [1, 2 * n + 300, usize::MAX / 2] {
            let (mut end, mut parts) = (0, 0);
            for (start, part) in layout.init_parts(5, DType::F32, most) {
                let part = part.unwrap();
                assert!(start == end && part.as_bytes() == flat.view(start, &[part.len()]).as_bytes());
                (end, parts) = (start + part.len(), parts + 1);
            }
            assert!(
                end == flat.len()
                    && parts
                        == if most == 1 {
                            9
                        } else if most < 3 * n {
                            5
                        } else {
                            1
                        }
            );
        }
        for (id, init) in ids.into_iter().zip(starts) {
            let spec = &layout.specs()[id.0];
            let mut rng = Rng::named(5, Stream::Init, 0, &spec.name);
            let one_by_one: Vec<f32> = (0..n).map(|_| init.draw(&mut rng) as f32).collect();
            let drawn = &flat.as_slice::<f32>()[spec.range()];
            assert!(drawn.iter().zip(&one_by_one).all(|(a, b)| a.to_bits() == b.to_bits()), "{init:?}");
        }
    }

    #[test]
    fn a_truncated_normal_of_any_deviation_is_drawn_and_stays_between_its_cuts() {
        let mut rng = Rng::new(1, Stream::Init, 0, 0);
        for std in [0.0, 1e-300, 0.02, 1.0, 3.0, 100.0, 1e30, f64::MAX, f64::INFINITY, f64::NAN] {
            let drawn: Vec<f64> = (0..2000).map(|_| Init::TruncatedNormal(std).draw(&mut rng)).collect();
            assert!(drawn.iter().all(|x| x.abs() <= 2.0), "{std}");
            let square = drawn.iter().map(|x| x * x).sum::<f64>() / 2000.0;
            // Uniform in [-2, 2] has a variance of 4 / 3.
            if std >= 100.0 {
                assert!((square - 4.0 / 3.0).abs() < 0.15, "{std}: {square}");
            }
        }
    }
}
