//! The update on a GPU: clipping, the optimizer and EMA, all decided by numbers on the device.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::comm::Ranks;
use crate::contract::At;
use crate::cuda::{args, Gpu};
use crate::ops::{copy_if, EightBit, Place, ADAMW, EIGHT_BIT_BLOCK};
use crate::{DType, Device, Error, Result, Tensor};

use super::flat::Flat;
use super::optimizer::Groups;
use super::{Limits, Weights};

/// Parameters start at multiples of this many elements.
const UNIT: usize = 64;
/// Units that a block of the norm takes, and elements that a block of the update takes.
const UNITS_OF_BLOCK: usize = 512;
const ELEMENTS_OF_BLOCK: usize = 4096;
/// Elements of a block of the norm.
pub(super) const NUMBERS_OF_BLOCK: usize = UNITS_OF_BLOCK * UNIT;
/// Scales of moments in eight bits that a block takes.
const SCALES_OF_BLOCK: usize = 4;

/// The kernel's `Rule`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Rule {
    start: u32,
    len: u32,
    lr: f32,
    decays: f32,
    module: u32,
    last_layer: u32,
    moments: u32,
}

/// The kernel's `Numbers`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Numbers {
    lr: f32,
    weight_decay: f32,
    momentum: f32,
    rest_momentum: f32,
    last_layer_lr: f32,
    max_norm: f32,
    longest_gradient: f32,
    greatest_loss: f32,
}

/// Numbers of a [`Numbers`], of the kernel's `AdamW` and of a [`Rule`].
const NUMBERS: usize = size_of::<Numbers>() / 4;
const OF_ADAMW: usize = 7;
const OF_RULE: usize = size_of::<Rule>() / 4;

/// The parameters of one pass of AdamW: their rules, and how many there are.
struct Pass {
    whole: (Tensor, usize),
    /// Those whose moments are in eight bits.
    eight: (Tensor, usize),
}

/// The optimizer's tables on a GPU.
pub(crate) struct DeviceUpdate {
    gpu: &'static Gpu,
    /// Those of every parameter that the optimizer directs, in their order.
    rules: Tensor,
    adamw: Vec<Pass>,
    /// What codes of eight bits stand for, and how many blocks of them there are.
    values: Tensor,
    blocks: usize,
    modules: Tensor,
    module_count: usize,
    norm_blocks: usize,
    /// Those of every rank.
    own_blocks: Vec<Range<usize>>,
    /// The element that the gradients begin at.
    grads_start: usize,
    /// What changes from step to step: a [`Numbers`], a kernel's `AdamW` for each pass, and the optimizer's own.
    numbers: Tensor,
}

impl DeviceUpdate {
    pub(crate) fn new(gpu: &'static Gpu, groups: &Groups) -> Result<Self> {
        let unit = |offset: usize| u32::try_from(offset / UNIT).expect("fewer than 2^38 parameters");
        let rule = |i: &usize| {
            let (r, placed) = (&groups.rules[*i], &groups.storage.places[*i]);
            Rule {
                start: unit(placed.range.start),
                len: u32::try_from(placed.range.len()).expect("a parameter has fewer than 2^32 elements"),
                lr: r.lr_multiplier as f32,
                decays: f32::from(u8::from(r.decays)),
                module: r.module as u32,
                last_layer: u32::from(r.last_layer),
                moments: match placed.place {
                    Place::Whole(at) => unit(at),
                    Place::Eight(first) => u32::try_from(first).expect("fewer than 2^40 parameters"),
                },
            }
        };
        let rules_of = |places: &[usize]| places.iter().map(rule).collect::<Vec<Rule>>();
        let (norm_blocks, counts) = groups.norm_blocks(NUMBERS_OF_BLOCK);
        let mut modules: Vec<[u32; 3]> = Vec::new();
        let mut before = 0;
        for (range, count) in groups.module_ranges().zip(counts) {
            let (start, end) = (unit(range.start), unit(range.end.next_multiple_of(UNIT)));
            modules.push([start, end - start, before]);
            before += count as u32;
        }
        let table = |bytes: &[u8]| Tensor::from_slice::<u32>(bytemuck::cast_slice(bytes), &[bytes.len() / 4]);
        let own = groups.numbers(At { step: 0, total: 1 }, 1).len();
        Device::Cuda(gpu.ordinal()).with(|| {
            let pass = |(_, places): &(_, Vec<usize>)| {
                let is_eight = |i: &usize| matches!(groups.storage.places[*i].place, Place::Eight(_));
                let (eight, whole): (Vec<usize>, Vec<usize>) = groups.own(places).partition(is_eight);
                let of = |some: &[usize]| table(bytemuck::cast_slice(&rules_of(some))).map(|rules| (rules, some.len()));
                Ok(Pass { whole: of(&whole)?, eight: of(&eight)? })
            };
            Ok(Self {
                gpu,
                rules: table(bytemuck::cast_slice(&rules_of(&groups.own(&groups.directed).collect::<Vec<_>>())))?,
                adamw: groups.adamw.iter().map(pass).collect::<Result<_>>()?,
                values: table(bytemuck::cast_slice(&EightBit::values()))?,
                blocks: groups.storage.blocks,
                modules: table(bytemuck::cast_slice(&modules))?,
                module_count: modules.len(),
                norm_blocks: norm_blocks.len(),
                own_blocks: groups.parts.blocks(&norm_blocks),
                grads_start: groups.gradients().start,
                numbers: Tensor::zeros(&[NUMBERS + OF_ADAMW * groups.adamw.len() + own], DType::F32),
            })
        })
    }

    /// Writes the numbers of the step at `at`, whose moments see update number `updates`; without `momentum` the teacher
    /// does not follow in this update.
    ///
    /// # Errors
    /// If the optimizer has more numbers than at first, or fewer, or the device fails.
    pub(super) fn write(
        &self,
        at: At,
        groups: &Groups,
        updates: u64,
        limits: Limits,
        momentum: Option<f64>,
    ) -> Result<()> {
        let momentum = momentum.unwrap_or(1.0);
        let numbers = Numbers {
            lr: groups.lr(at) as f32,
            weight_decay: groups.weight_decay(at) as f32,
            momentum: momentum as f32,
            rest_momentum: (1.0 - momentum) as f32,
            last_layer_lr: groups.last_layer_lr(at) as f32,
            max_norm: groups.config().clip_grad.max(0.0) as f32,
            longest_gradient: limits.gradient as f32,
            greatest_loss: limits.loss as f32,
        };
        let mut all: Vec<f32> = bytemuck::cast_slice(bytemuck::bytes_of(&numbers)).to_vec();
        all.extend(groups.adamw.iter().flat_map(|(adamw, _)| adamw.on_gpu(updates)));
        all.extend(groups.numbers(at, updates).into_iter().map(|x| x as f32));
        if all.len() != self.numbers.len() {
            let problem = format!("{} numbers of an update, and {} of the first", all.len(), self.numbers.len());
            return Err(Error::shape("optimizer", problem));
        }
        self.gpu.upload(self.numbers.device_address(), bytemuck::cast_slice(&all))
    }

    /// 1 if a step is taken, 0 if not: rank 0. `values` are `losses` losses, the norms of all sub-models, and other numbers
    /// that have to be finite; loss number `total` has a limit.
    pub(super) fn verdict(&self, values: &Tensor, losses: usize, total: Option<usize>) -> Result<Tensor> {
        let mut taken = Tensor::uninit(&[], DType::F32);
        let [count, first, modules] = [values.len(), losses, self.module_count].map(|n| n as i32);
        let total = total.map_or(-1, |i| i as i32);
        let launch = self.gpu.kernel(&ADAMW, "verdict", DType::F32)?.grid(1, 256);
        launch.launch(args![&mut taken, values, count, first, modules, total, &self.numbers])?;
        Ok(taken)
    }

    /// L2 norm of every sub-model's gradient, of which this rank has its part: `[modules]`, f32, squares summed in double
    /// precision.
    pub(super) fn norms(&self, grads: &Tensor, ranks: &Ranks) -> Result<Tensor> {
        let own = &self.own_blocks[ranks.rank()];
        let mut partial = Tensor::uninit(&[self.norm_blocks], DType::F64);
        let mut norms = Tensor::uninit(&[self.module_count], DType::F32);
        let count = self.module_count as i32;
        let kernel = |name| self.gpu.kernel(&ADAMW, name, DType::F32);
        if !own.is_empty() {
            let bytes = 4.0 * grads.len() as f64 * own.len() as f64 / self.norm_blocks as f64;
            let squares = kernel("square_sums")?.grid(own.len(), 256).work(0.0, bytes);
            let grads = self.grads_of_first(grads);
            squares.launch(args![&mut partial, grads, &self.modules, count, own.start as i32])?;
        }
        ranks.spread(&mut partial, &self.own_blocks)?;
        let roots = kernel("norms")?.grid(self.module_count, 256);
        roots.launch(args![&mut norms, &partial, &self.modules, count, self.norm_blocks as i32])?;
        Ok(norms)
    }

    /// Where the gradient of element 0 would be: kernels count from the first element.
    fn grads_of_first(&self, grads: &Tensor) -> u64 {
        grads.device_address().wrapping_sub((grads.dtype().size() * self.grads_start) as u64)
    }

    /// One update of this rank's part of all weights, if `taken` is not 0; the teacher follows where `follows`.
    pub(super) fn apply(
        &self,
        groups: &Groups,
        weights: &mut Weights,
        grads: &Tensor,
        norms: &Tensor,
        taken: &Tensor,
        follows: bool,
    ) -> Result<()> {
        let products = weights.student().dtype();
        let (n, part) = (weights.student.len(), groups.parts.own());
        let Weights { student, teacher, moments, eight, .. } = weights;
        let ema = teacher.as_ref().filter(|_| follows);
        let grads_at = self.grads_of_first(grads);
        let (student_at, ema_at) = (student.place(), ema.map_or_else(Flat::no_place, Flat::place));
        let bytes = if follows { 36.0 } else { 28.0 };
        let eight_bit = self.blocks * EIGHT_BIT_BLOCK;
        let wide = part.len().saturating_sub(eight_bit);
        let number = |start: usize, len: &[usize]| self.numbers.view(start, len);
        for (i, pass) in self.adamw.iter().enumerate() {
            let of_adamw = number(NUMBERS + i * OF_ADAMW, &[OF_ADAMW]);
            if let (rules, count @ 1..) = &pass.whole {
                let launch = self.gpu.kernel(&ADAMW, "adamw", DType::F32)?.grid(n.div_ceil(ELEMENTS_OF_BLOCK), 256);
                launch.work(0.0, bytes * wide as f64).launch(args![
                    student_at,
                    ema_at,
                    grads_at,
                    &moments[0],
                    &moments[1],
                    rules,
                    *count as i32,
                    &self.numbers,
                    &of_adamw,
                    norms,
                    taken,
                    n
                ])?;
            }
            if let ((rules, count @ 1..), [mean, square]) = (&pass.eight, &eight[..]) {
                let [(mean, mean_scales), (square, square_scales)] = [mean.parts(), square.parts()];
                let launch = self.gpu.kernel(&ADAMW, "adamw_8bit", DType::F32)?;
                let launch = launch.grid(self.blocks.div_ceil(SCALES_OF_BLOCK), 256);
                launch.work(0.0, (bytes - 12.0) * eight_bit as f64).launch(args![
                    student_at,
                    ema_at,
                    grads_at,
                    mean,
                    mean_scales,
                    square,
                    square_scales,
                    rules,
                    *count as i32,
                    &self.values,
                    &self.numbers,
                    &of_adamw,
                    norms,
                    taken,
                    self.blocks as u32
                ])?;
            }
        }
        if groups.directed.is_empty() {
            return Ok(());
        }
        let mut clips = Tensor::uninit(&[self.module_count], DType::F32);
        let launch = self.gpu.kernel(&ADAMW, "clips", DType::F32)?.grid(1, 256);
        launch.launch(args![&mut clips, norms, &self.numbers, self.module_count as i32])?;
        let first = NUMBERS + OF_ADAMW * self.adamw.len();
        let own: Vec<Tensor> = (first..self.numbers.len()).map(|i| number(i, &[])).collect();
        for (rule, i) in groups.own(&groups.directed).enumerate() {
            let range = &groups.storage.places[i].range;
            let gradient = groups.gradient(i, grads).mul(&clips.view(groups.rules[i].module, &[]))?;
            let new = groups.direction(i, gradient, (student, moments), own.clone(), products)?;
            let len = range.len();
            let launch = self.gpu.kernel(&ADAMW, "descend", DType::F32)?.over(len);
            launch.work(0.0, (bytes - 16.0) * len as f64).launch(args![
                student_at,
                ema_at,
                &new.direction,
                &self.rules.view(rule * OF_RULE, &[OF_RULE]),
                &self.numbers,
                taken
            ])?;
            for (flat, new) in moments.iter().zip(&new.moments) {
                copy_if(&flat.view(range.start - part.start, &[len]), new, taken)?;
            }
        }
        Ok(())
    }
}
