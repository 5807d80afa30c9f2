//! From crops to features.

use std::fmt;

use super::pos_encoding::Grid;
use crate::params::{ParamBuilder, Params};
use crate::rng::Rng;
use crate::tensor::greatest;
use crate::{Error, Result, Tensor};

/// Crops of one size: the global ones, the local ones, or a teacher's own.
#[derive(Clone, Debug)]
pub struct Crops {
    /// `[B, C, height, width]`, normalised; crop-major: crop 0 of every image, then crop 1.
    pub pixels: Tensor,
    /// Patches replaced by the mask token: `[B * P]` of 0 and 1 in row-major order, u32.
    pub masks: Option<Tensor>,
    /// Whether these are local crops (which may have a norm of their own for the CLS token).
    pub local: bool,
    /// Numbers of blocks after which the tokens are also returned: see [`Features::layers`].
    pub layers: Vec<usize>,
}

impl Crops {
    /// Unmasked global crops.
    pub fn global(pixels: Tensor) -> Self {
        Self { pixels, masks: None, local: false, layers: Vec::new() }
    }

    /// The same, their tokens after so many blocks wanted as well.
    pub fn with_layers(self, layers: Vec<usize>) -> Self {
        Self { layers, ..self }
    }
}

/// The random numbers of one training forward, drawn before it begins.
///
/// They are data, not a generator: a step can be replayed with the draws of another implementation. A forward pass reads
/// them as tensors ([`position`](Self::position), [`kept`](Self::kept)). On a GPU these tensors have fixed addresses, so
/// that a recorded step finds the next step's draws there.
#[derive(Clone, Debug, Default)]
pub struct Draws {
    /// Position augmentation, `[block][kind of crop]`: see
    /// [`PosEncoding::draw`](super::PosEncoding::draw).
    pub position: Vec<Vec<Vec<f64>>>,
    /// Stochastic depth by sample subset, `[block][kind of crop][branch]`: the images that are kept, out of that kind's
    /// `B`. Empty: nothing is dropped.
    pub kept: Vec<Vec<[Vec<u32>; 2]>>,
    /// What each loss drew ([`Loss::draw`](super::Loss::draw)), in their order.
    pub losses: Vec<Vec<f64>>,
    /// What each loss drew for every image ([`Loss::draw_image`](super::Loss::draw_image)), in their order.
    pub images: Vec<Vec<f64>>,
    /// For every loss and every one of its [views](super::Loss::views): the plan of
    /// [`Tensor::tiles`](crate::Tensor::tiles).
    pub tiles: Vec<Vec<Vec<u32>>>,
    /// All of `position`, `losses` and `images`, and all of `kept` and `tiles`, one after the other, where the forward runs.
    placed: Option<(Tensor, Tensor)>,
}

impl Draws {
    /// Without stochastic depth where `kept` is empty.
    pub fn new(position: Vec<Vec<Vec<f64>>>, kept: Vec<Vec<[Vec<u32>; 2]>>) -> Self {
        Self { position, kept, ..Self::default() }
    }

    /// The numbers of [`PosEncoding::draw`](super::PosEncoding::draw) for a block and kind of crop, f64; `None` if there
    /// are none.
    ///
    /// # Errors
    /// If the device fails.
    pub fn position(&self, block: usize, kind: usize) -> Result<Option<Tensor>> {
        let Some(numbers) = self.position.get(block).and_then(|b| b.get(kind)).filter(|n| !n.is_empty()) else {
            return Ok(None);
        };
        let before = self.position[..block].iter().flatten().chain(&self.position[block][..kind]);
        let start = before.map(Vec::len).sum();
        match &self.placed {
            Some((position, _)) => Ok(Some(position.view(start, &[numbers.len()]))),
            None => Tensor::from_slice(numbers, &[numbers.len()]).map(Some),
        }
    }

    /// The images of a kind that a block's branch keeps: `[s]`, u32; `None` if it keeps all.
    ///
    /// # Errors
    /// If the device fails.
    pub fn kept(&self, block: usize, kind: usize, branch: usize) -> Result<Option<Tensor>> {
        let Some(branches) = self.kept.get(block).and_then(|b| b.get(kind)) else { return Ok(None) };
        let images = &branches[branch];
        let before = self.kept[..block].iter().flatten().chain(&self.kept[block][..kind]).flatten();
        let start = before.chain(&branches[..branch]).map(Vec::len).sum();
        match &self.placed {
            Some((_, kept)) => Ok(Some(kept.view(start, &[images.len()]))),
            None => Tensor::from_slice(images, &[images.len()]).map(Some),
        }
    }

    /// What loss `index` drew, f64; `None` if that is nothing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn of_loss(&self, index: usize) -> Result<Option<Tensor>> {
        let before = self.position.iter().flatten().chain(&self.losses[..index.min(self.losses.len())]);
        self.numbers(before.map(Vec::len).sum(), self.losses.get(index))
    }

    /// What loss `index` drew for the images, one after the other, f64; `None` if that is nothing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn of_images(&self, index: usize) -> Result<Option<Tensor>> {
        let before = self.position.iter().flatten().chain(&self.losses);
        let before = before.chain(&self.images[..index.min(self.images.len())]);
        self.numbers(before.map(Vec::len).sum(), self.images.get(index))
    }

    fn numbers(&self, start: usize, numbers: Option<&Vec<f64>>) -> Result<Option<Tensor>> {
        let Some(numbers) = numbers.filter(|n| !n.is_empty()) else { return Ok(None) };
        match &self.placed {
            Some((placed, _)) => Ok(Some(placed.view(start, &[numbers.len()]))),
            None => Tensor::from_slice(numbers, &[numbers.len()]).map(Some),
        }
    }

    /// The plan of view `view` of loss `index`: `[tiles, 4]`, u32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn tiles(&self, index: usize, view: usize) -> Result<Tensor> {
        let plan = &self.tiles[index][view];
        let shape = [plan.len() / 4, 4];
        let kept = self.kept.iter().flatten().flatten();
        let before = self.tiles[..index].iter().flatten().chain(&self.tiles[index][..view]);
        let start = kept.map(Vec::len).sum::<usize>() + before.map(Vec::len).sum::<usize>();
        match &self.placed {
            Some((_, placed)) => Ok(placed.view(start, &shape)),
            None => Tensor::from_slice(plan, &shape),
        }
    }

    /// Without those kinds of crops that are not kept.
    pub(crate) fn keep_kinds(&mut self, kept: &[bool]) {
        let keep = |k: usize| kept.get(k).copied().unwrap_or(true);
        fn only<T>(kinds: &mut Vec<T>, keep: impl Fn(usize) -> bool) {
            let mut k = 0..;
            kinds.retain(|_| k.next().is_some_and(&keep));
        }
        self.position.iter_mut().for_each(|block| only(block, keep));
        self.kept.iter_mut().for_each(|block| only(block, keep));
    }

    /// With the draws of a forward over further kinds of crops behind these.
    pub(crate) fn with_kinds(mut self, more: Self) -> Self {
        let join = |own: &mut Vec<Vec<Vec<f64>>>, more: Vec<Vec<Vec<f64>>>| match own.is_empty() {
            true => *own = more,
            false => own.iter_mut().zip(more).for_each(|(own, more)| own.extend(more)),
        };
        join(&mut self.position, more.position);
        match self.kept.is_empty() {
            true => self.kept = more.kept,
            false => self.kept.iter_mut().zip(more.kept).for_each(|(own, more)| own.extend(more)),
        }
        self
    }

    /// All numbers in the order of [`place`](Self::place).
    pub(crate) fn flat(&self) -> (Vec<f64>, Vec<u32>) {
        let kept = self.kept.iter().flatten().flatten().chain(self.tiles.iter().flatten());
        let numbers = self.position.iter().flatten().chain(&self.losses).chain(&self.images);
        (numbers.flatten().copied().collect(), kept.flatten().copied().collect())
    }

    /// Draws whose numbers are in these tensors (f64, u32) when the forward runs.
    pub(crate) fn place(&mut self, position: Tensor, kept: Tensor) {
        self.placed = Some((position, kept));
    }
}

/// Whether a forward trains.
#[derive(Clone, Copy, Debug)]
pub enum Mode<'a> {
    /// Evaluation: no augmentation inside the model, the teacher's and the probes' way.
    Eval,
    /// Training, with the draws of this step.
    Train(&'a Draws),
}

/// What a backbone gives for one kind of crop.
#[derive(Clone, Debug)]
pub struct Features {
    /// CLS token after the final norm: `[B, D]`.
    pub cls: Tensor,
    /// Register (storage) tokens after the final norm: `[B, R, D]`.
    pub registers: Tensor,
    /// Patch tokens after the final norm, row-major over the grid: `[B, P, D]`.
    pub patches: Tensor,
    /// All tokens before the final norm: `[B, 1 + R + P, D]`.
    pub prenorm: Tensor,
    /// All tokens after each of [`Crops::layers`], before any norm: `[B, 1 + R + P, D]`, in their order.
    pub layers: Vec<Tensor>,
    /// The patch grid.
    pub grid: Grid,
}

impl Features {
    /// The same on the host, bf16 as f32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<Self> {
        self.map(|x| Ok(x.cast(x.dtype().wide())?.to(crate::Device::Cpu)))
    }

    /// The same features with every tensor replaced by `f` of it.
    ///
    /// # Errors
    /// That of `f`.
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            cls: f(&self.cls)?,
            registers: f(&self.registers)?,
            patches: f(&self.patches)?,
            prenorm: f(&self.prenorm)?,
            layers: self.layers.iter().map(&f).collect::<Result<_>>()?,
            grid: self.grid,
        })
    }

    /// These, for probes: of features that are not finite, scores would be numbers all the same.
    ///
    /// # Errors
    /// If one is not finite.
    pub fn finite(self) -> Result<Self> {
        for tensor in self.tensors() {
            if !greatest(tensor)?.is_finite() {
                return Err(Error::user("the features are not finite", "the run diverged: see its health lines"));
            }
        }
        Ok(self)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.len() * tensor.dtype().size()).sum()
    }

    /// All tensors, in a fixed order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.cls, &self.registers, &self.patches, &self.prenorm].into_iter().chain(&self.layers)
    }
}

/// What a model costs: what `dinolab recipe check --cost` adds up (see [`cost`](crate::resolved::cost)).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations of one forward over the given tokens.
    pub forward_flops: f64,
    /// Numbers kept from forward to backward, for one image's tokens. A number of a fixed type is counted as if
    /// features were bf16: f32 as two.
    pub activations: f64,
    /// Numbers of the [`Features`] of one image.
    pub features: f64,
    /// Most numbers that the backward pass of one layer has beside what is kept, for one image's tokens.
    pub working: f64,
}

/// What a backbone is built with.
pub struct BackboneContext<'a> {
    /// Where it declares its parameters.
    pub params: &'a mut ParamBuilder,
    /// Side in pixels of a global crop.
    pub global_size: usize,
    /// Channels of the images.
    pub channels: usize,
}

/// From crops to features: a vision transformer, or anything else that gives a global and dense features.
///
/// A backbone owns no weights. It declares its parameters when it is built (see [`BackboneContext`]) and every call passes it
/// a flat buffer with their values, so that one object serves student and teachers.
///
/// All kinds of crops go through one call, so that an implementation can pack their tokens for its linear layers.
///
/// ```
/// use dinolab_core::contract::{Backbone, Cost, Crops, Draws, Features, Grid, Mode};
/// use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
/// use dinolab_core::{Result, Tensor};
///
/// /// One linear layer over patches; its CLS is the mean patch.
/// #[derive(Debug)]
/// struct Linear {
///     weight: ParamId,
///     patch: usize,
///     dim: usize,
/// }
///
/// impl Linear {
///     fn new(params: &mut ParamBuilder, patch: usize, dim: usize) -> Self {
///         let weight = params.add("weight", &[dim, 3 * patch * patch], Init::TruncatedNormal(0.02));
///         Self { weight, patch, dim }
///     }
/// }
///
/// impl Backbone for Linear {
///     fn dim(&self) -> usize {
///         self.dim
///     }
///     fn patch_size(&self) -> usize {
///         self.patch
///     }
///     fn forward(&self, params: &Params<'_>, crops: &[Crops], _: Mode<'_>) -> Result<Vec<Features>> {
///         crops.iter().map(|c| {
///             let (b, h, w) = (c.pixels.dim(0), c.pixels.dim(2) / self.patch, c.pixels.dim(3) / self.patch);
///             let rows = c.pixels.patchify(self.patch)?.cast(params.dtype())?;
///             let patches = rows.linear(&params.get(self.weight), None)?.reshape(&[b, h * w, self.dim])?;
///             let cls = patches.mean_axis(1)?;
///             let registers = Tensor::zeros(&[b, 0, self.dim], params.dtype());
///             let prenorm = patches.clone();
///             Ok(Features { cls, registers, patches, prenorm, layers: vec![], grid: Grid { height: h, width: w } })
///         }).collect()
///     }
///     fn cost(&self, _: &[(usize, Grid)]) -> Cost {
///         Cost::default()
///     }
/// }
///
/// let mut params = ParamBuilder::new();
/// let model = Linear::new(&mut params, 4, 8);
/// let layout = params.finish();
/// let flat = layout.init(0, dinolab_core::DType::F32)?;
/// let crops = Crops::global(Tensor::zeros(&[2, 3, 8, 12], dinolab_core::DType::F32));
/// let features = model.forward(&Params::frozen(&layout, &flat), &[crops], Mode::Eval)?;
/// assert_eq!(features[0].patches.shape(), [2, 6, 8]);
/// # Ok::<(), dinolab_core::Error>(())
/// ```
pub trait Backbone: fmt::Debug + Send + Sync {
    /// Width `D` of the features.
    fn dim(&self) -> usize;

    /// Side of a patch in pixels.
    fn patch_size(&self) -> usize;

    /// Side in pixels of the smallest crop that it can see.
    fn smallest_crop(&self) -> usize {
        self.patch_size()
    }

    /// Blocks, for learning-rate decay over depth: block `i` declares its parameters in layer `i + 1`.
    fn depth(&self) -> usize {
        0
    }

    /// Whether it gives its tokens after a number of blocks, 0 to [`depth`](Self::depth): [`Crops::layers`].
    fn gives_layers(&self) -> bool {
        false
    }

    /// The options, besides names and shapes of parameters, that change what the model computes in evaluation: a table
    /// with the keys of a recipe. Weights are refused if their backbone has other values here (see
    /// [`Source::check_same_model`](crate::weights::Source::check_same_model)).
    fn architecture(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Dimensions of its attention heads, if it has any: a GPU's kernels for them are compiled before they are needed.
    fn head_dim(&self) -> Option<usize> {
        None
    }

    /// Whether [`Crops::masks`] hides patches from it. A backbone without a mask token sees masked patches, so a loss on
    /// masked patches is then computed on visible patches.
    fn hides_masked_patches(&self) -> bool {
        true
    }

    /// Draws the random numbers of one training forward over kinds of crops with these many images each: of a whole batch,
    /// or of one of its parts. `rng(stream, index)` is the generator for that purpose. It is the same in every part of a
    /// batch, so that splitting a batch does not change the draws. The exception is
    /// [`Stream::DropPath`](crate::rng::Stream::DropPath): images are chosen within a part.
    fn draw(&self, rng: &dyn Fn(crate::rng::Stream, u64) -> Rng, images: &[usize]) -> Draws {
        let _ = (rng, images);
        Draws::default()
    }

    /// Features of every kind of crop, in order.
    fn forward(&self, params: &Params<'_>, crops: &[Crops], mode: Mode<'_>) -> Result<Vec<Features>>;

    /// The features after each of the last `n` blocks, final norm applied, in evaluation; the default knows only the
    /// last.
    fn intermediate(&self, params: &Params<'_>, crops: &Crops, n: usize) -> Result<Vec<Features>> {
        let _ = n;
        self.forward(params, std::slice::from_ref(crops), Mode::Eval)
    }

    /// What one forward costs for one image with `crops`: (how many, grid of each).
    fn cost(&self, crops: &[(usize, Grid)]) -> Cost;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_for_probes_are_finite_in_every_part() {
        let of = |bad: usize, value: f32| {
            let part = |i: usize| Tensor::from_slice(&[1.0, if i == bad { value } else { 2.0 }], &[1, 1, 2]).unwrap();
            let grid = Grid { height: 1, width: 1 };
            let (cls, registers) = (part(0), part(1));
            Features { cls, registers, patches: part(2), prenorm: part(3), layers: vec![part(4)], grid }.finite()
        };
        assert!(of(9, 0.0).is_ok());
        for bad in 0..5 {
            for value in [f32::NAN, f32::INFINITY] {
                assert!(of(bad, value).err().unwrap().to_string().contains("the features are not finite"));
            }
        }
    }
}
