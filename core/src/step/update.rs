//! The update on a GPU: clipping, the optimizer and EMA, all decided by numbers on the device.

use std::collections::BTreeMap;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::comm::Ranks;
use crate::contract::At;
use crate::cuda::{args, Gpu};
use crate::ops::{copy_if, EightBit, Place, ADAMW, EIGHT_BIT_BLOCK};
use crate::{DType, Device, Error, Result, Tensor};

use super::flat::Flat;
use super::fused::ByLayer;
use super::optimizer::{blocks_of, Cohort, Gradients, Groups};
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
    block: u32,
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

/// The parameters of one pass of AdamW.
struct Pass {
    whole: Rules,
    /// Those whose moments are in eight bits.
    eight: Rules,
}

/// Rules on the device and on the host, in the order of the layout, and how many blocks they have: of the kernel, or of moments in
/// eight bits.
struct Rules {
    table: Tensor,
    rules: Vec<Rule>,
    blocks: u32,
}

/// Some of these rules, one behind the other, and their blocks.
struct Part {
    table: Tensor,
    count: usize,
    blocks: Range<u32>,
}

impl Rules {
    /// Those of parameters that lie in a range of flat memory; nothing if there are none.
    fn inside(&self, range: &Range<usize>, first_block: impl Fn(&Rule) -> u32) -> Option<Part> {
        let before = |at: usize| self.rules.partition_point(|rule| (rule.start as usize * UNIT) < at);
        let (first, end) = (before(range.start), before(range.end));
        let count = end - first;
        let blocks = first_block(self.rules.get(first)?)..self.rules.get(end).map_or(self.blocks, first_block);
        let part = || Part { table: self.table.view(first * OF_RULE, &[count * OF_RULE]), count, blocks };
        (count > 0).then(part)
    }
}

/// The optimizer's tables on a GPU.
pub(crate) struct DeviceUpdate {
    gpu: &'static Gpu,
    /// Those of every parameter that the optimizer directs, cohort by cohort.
    rules: Tensor,
    adamw: Vec<Pass>,
    /// What codes of eight bits stand for.
    values: Tensor,
    /// The ranges in which squares of gradients are summed: sub-models, or layers that are updated one by one.
    ranges: Vec<[u32; 3]>,
    range_table: Tensor,
    modules: Tensor,
    module_count: usize,
    /// The sub-model of each range.
    module_of: Vec<usize>,
    norm_blocks: usize,
    /// Those of every rank.
    own_blocks: Vec<Range<usize>>,
    /// The element that the gradients begin at.
    grads_start: usize,
    /// What changes from step to step: a [`Numbers`], a kernel's `AdamW` for each pass, the norms of the last step, and the optimizer's
    /// own numbers.
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
                block: 0,
            }
        };
        let rules_of = |places: &[usize]| {
            let mut rules: Vec<Rule> = places.iter().map(rule).collect();
            let mut blocks = 0;
            for rule in &mut rules {
                rule.block = blocks;
                blocks += rule.len.div_ceil(ELEMENTS_OF_BLOCK as u32);
            }
            (rules, blocks)
        };
        let of_layers = match &groups.gradients {
            Gradients::Used(layers) => Some(layers.ranges().to_vec()),
            Gradients::Kept | Gradients::Summed(_) => None,
        };
        let of_modules: Vec<Range<usize>> = groups.module_ranges().cloned().collect();
        let all = of_layers.unwrap_or_else(|| of_modules.clone());
        let mut norm_blocks = Vec::new();
        let mut ranges: Vec<[u32; 3]> = Vec::new();
        for range in &all {
            let (start, end) = (unit(range.start), unit(range.end.next_multiple_of(UNIT)));
            ranges.push([start, end - start, norm_blocks.len() as u32]);
            norm_blocks.extend(blocks_of(range, NUMBERS_OF_BLOCK));
        }
        let module_of = |range: &Range<usize>| of_modules.iter().rposition(|module| module.start <= range.start);
        let module_of: Vec<usize> = all.iter().map(|range| module_of(range).expect("it is in one")).collect();
        let first = |module: usize| ranges[module_of.iter().position(|m| *m == module).expect("it has a layer")];
        let modules: Vec<[u32; 3]> = (0..of_modules.len()).map(first).collect();
        let table = |bytes: &[u8]| Tensor::from_slice::<u32>(bytemuck::cast_slice(bytes), &[bytes.len() / 4]);
        let own = groups.directed.len() * groups.number_count();
        Device::Cuda(gpu.ordinal()).with(|| {
            let of = |places: &[usize]| {
                let (rules, blocks) = rules_of(places);
                Ok::<_, Error>(Rules { table: table(bytemuck::cast_slice(&rules))?, rules, blocks })
            };
            let pass = |(_, cohort): &(_, Cohort)| {
                let is_eight = |i: &usize| matches!(groups.storage.places[*i].place, Place::Eight(_));
                let (eight, whole): (Vec<usize>, Vec<usize>) = groups.own(&cohort.places).partition(is_eight);
                Ok(Pass { whole: of(&whole)?, eight: Rules { blocks: groups.storage.blocks as u32, ..of(&eight)? } })
            };
            Ok(Self {
                gpu,
                rules: of(&groups.own_directed().map(|(_, i)| i).collect::<Vec<_>>())?.table,
                adamw: groups.adamw.iter().map(pass).collect::<Result<_>>()?,
                values: table(bytemuck::cast_slice(&EightBit::values()))?,
                range_table: table(bytemuck::cast_slice(&ranges))?,
                ranges,
                modules: table(bytemuck::cast_slice(&modules))?,
                module_count: modules.len(),
                module_of,
                norm_blocks: norm_blocks.len(),
                own_blocks: groups.parts.blocks(&norm_blocks),
                grads_start: groups.gradients().start,
                numbers: Tensor::zeros(&[NUMBERS + OF_ADAMW * groups.adamw.len() + modules.len() + own], DType::F32),
            })
        })
    }

    /// Writes the numbers of the step at `at`, whose moments see update number `updates`, after one with gradients of such norms;
    /// without `momentum` the teacher does not follow in this update.
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
        last_norms: &BTreeMap<String, f64>,
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
        all.extend(groups.adamw.iter().flat_map(|(adamw, cohort)| adamw.on_gpu(cohort.updates(updates))));
        all.extend(groups.modules().map(|name| last_norms.get(name).map_or(0.0, |norm| *norm as f32)));
        all.extend(groups.numbers(at, updates).into_iter().flatten().map(|x| x as f32));
        if all.len() != self.numbers.len() {
            let problem = format!("{} numbers of an update, and {} of the first", all.len(), self.numbers.len());
            return Err(Error::shape("optimizer", problem));
        }
        self.gpu.upload(self.numbers.device_address(), bytemuck::cast_slice(&all))
    }

    /// 1 if a step is taken, 0 if not: rank 0. `values` are losses, the norms of sub-models, and other numbers that have to be finite;
    /// loss number `total` has a limit.
    pub(super) fn verdict(&self, values: &Tensor, norms: Range<usize>, total: Option<usize>) -> Result<Tensor> {
        let mut taken = Tensor::uninit(&[], DType::F32);
        let [count, first, modules] = [values.len(), norms.start, norms.len()].map(|n| n as i32);
        let total = total.map_or(-1, |i| i as i32);
        let launch = self.gpu.kernel(&ADAMW, "verdict", DType::F32)?.grid(1, 256);
        launch.launch(args![&mut taken, values, count, first, modules, total, &self.numbers])?;
        Ok(taken)
    }

    /// L2 norm of every sub-model's gradient, of which this rank has its part: `[modules]`, f32, squares summed in double
    /// precision.
    pub(super) fn norms(&self, grads: &Tensor, ranks: &Ranks) -> Result<Tensor> {
        let own = &self.own_blocks[ranks.rank()];
        let mut squares = self.squares();
        if !own.is_empty() {
            let bytes = 4.0 * grads.len() as f64 * own.len() as f64 / self.norm_blocks as f64;
            self.square_sums(&squares, self.of_first(grads, self.grads_start), own, bytes)?;
        }
        ranks.spread(&mut squares, &self.own_blocks)?;
        self.norms_of(&squares)
    }

    /// Room for the sums of squares of all blocks.
    pub(super) fn squares(&self) -> Tensor {
        Tensor::uninit(&[self.norm_blocks], DType::F64)
    }

    /// Room for a flag a layer.
    pub(super) fn flags(&self) -> Tensor {
        Tensor::uninit(&[self.ranges.len()], DType::F32)
    }

    fn square_sums(&self, squares: &Tensor, grads: u64, blocks: &Range<usize>, bytes: f64) -> Result<()> {
        let launch = self.gpu.kernel(&ADAMW, "square_sums", DType::F32)?.grid(blocks.len(), 256).work(0.0, bytes);
        launch.launch(args![squares, grads, &self.range_table, self.ranges.len() as i32, blocks.start as i32])
    }

    /// L2 norm of every sub-model's gradient from the sums of squares of its blocks.
    pub(super) fn norms_of(&self, squares: &Tensor) -> Result<Tensor> {
        let mut norms = Tensor::uninit(&[self.module_count], DType::F32);
        let roots = self.gpu.kernel(&ADAMW, "norms", DType::F32)?.grid(self.module_count, 256);
        roots.launch(args![&mut norms, squares, &self.modules, self.module_count as i32, self.norm_blocks as i32])?;
        Ok(norms)
    }

    /// Where the gradient of element 0 would be, with that of `start` first: kernels count from the first element.
    fn of_first(&self, grads: &Tensor, start: usize) -> u64 {
        grads.device_address().wrapping_sub((grads.dtype().size() * start) as u64)
    }

    /// The norms of the last step.
    fn last_norms(&self) -> Tensor {
        self.numbers.view(NUMBERS + OF_ADAMW * self.adamw.len(), &[self.module_count])
    }

    /// Updates one of the layers, which lies in this range and has these gradients.
    pub(super) fn apply_to(
        &self,
        layer: usize,
        range: &Range<usize>,
        grads: &Tensor,
        with: &ByLayer<'_>,
    ) -> Result<()> {
        let grads_at = self.of_first(grads, range.start);
        let first_block = |layer: usize| self.ranges.get(layer).map_or(self.norm_blocks, |range| range[2] as usize);
        let blocks = first_block(layer)..first_block(layer + 1);
        self.square_sums(&with.squares, grads_at, &blocks, 4.0 * grads.len() as f64)?;
        let (flag, norms) = (with.flags.view(layer, &[]), self.last_norms());
        let norm = norms.view(self.module_of[layer], &[]);
        let launch = self.gpu.kernel(&ADAMW, "layer_verdict", DType::F32)?.grid(1, 256);
        let [begin, end] = [blocks.start, blocks.end].map(|block| block as i32);
        launch.launch(args![&flag, &with.squares, begin, end, &with.taken, &norm, &self.numbers])?;
        self.adamw(with.weights, range, grads_at, &norms, &flag, with.follows)
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
        let part = groups.parts.own();
        self.adamw(weights, part, self.of_first(grads, self.grads_start), norms, taken, follows)?;
        let Weights { student, teacher, moments, .. } = weights;
        let ema = teacher.as_ref().filter(|_| follows);
        let (student_at, ema_at) = (student.place(), ema.map_or_else(Flat::no_place, Flat::place));
        let bytes = if follows { 20.0 } else { 12.0 };
        if groups.directed.is_empty() {
            return Ok(());
        }
        let mut clips = Tensor::uninit(&[self.module_count], DType::F32);
        let launch = self.gpu.kernel(&ADAMW, "clips", DType::F32)?.grid(1, 256);
        launch.launch(args![&mut clips, norms, &self.numbers, self.module_count as i32])?;
        let first = NUMBERS + OF_ADAMW * self.adamw.len() + self.module_count;
        let numbers: Vec<Tensor> = (first..self.numbers.len()).map(|i| self.numbers.view(i, &[])).collect();
        let count = groups.number_count();
        for (rule, (cohort, i)) in groups.own_directed().enumerate() {
            let range = &groups.storage.places[i].range;
            let gradient = groups.gradient(i, grads).mul(&clips.view(groups.rules[i].module, &[]))?;
            let own = numbers[cohort * count..][..count].to_vec();
            let new = groups.direction(i, gradient, (student, moments), own, products)?;
            let len = range.len();
            let launch = self.gpu.kernel(&ADAMW, "descend", DType::F32)?.over(len);
            launch.work(0.0, bytes * len as f64).launch(args![
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

    /// AdamW's update of the parameters that it has in a range of flat memory, whose gradients, the first of all counted, are at
    /// `grads`.
    fn adamw(
        &self,
        weights: &Weights,
        range: &Range<usize>,
        grads: u64,
        norms: &Tensor,
        taken: &Tensor,
        follows: bool,
    ) -> Result<()> {
        let Weights { student, teacher, moments, eight, .. } = weights;
        let ema = teacher.as_ref().filter(|_| follows);
        let (student, ema) = (student.place(), ema.map_or_else(Flat::no_place, Flat::place));
        let bytes = if follows { 36.0 } else { 28.0 };
        for (i, pass) in self.adamw.iter().enumerate() {
            let of_adamw = self.numbers.view(NUMBERS + i * OF_ADAMW, &[OF_ADAMW]);
            if let Some(Part { table, count, blocks }) = pass.whole.inside(range, |rule| rule.block) {
                let launch = self.gpu.kernel(&ADAMW, "adamw", DType::F32)?.grid(blocks.len(), 256);
                launch.work(0.0, bytes * (blocks.len() * ELEMENTS_OF_BLOCK) as f64).launch(args![
                    student,
                    ema,
                    grads,
                    &moments[0],
                    &moments[1],
                    &table,
                    count as i32,
                    &self.numbers,
                    &of_adamw,
                    norms,
                    taken,
                    blocks.start
                ])?;
            }
            if let (Some(part), [mean, square]) = (pass.eight.inside(range, |rule| rule.moments), &eight[..]) {
                let [(mean, mean_scales), (square, square_scales)] = [mean.parts(), square.parts()];
                let launch = self.gpu.kernel(&ADAMW, "adamw_8bit", DType::F32)?;
                let launch = launch.grid(part.blocks.len().div_ceil(SCALES_OF_BLOCK), 256);
                launch.work(0.0, (bytes - 12.0) * (part.blocks.len() * EIGHT_BIT_BLOCK) as f64).launch(args![
                    student,
                    ema,
                    grads,
                    mean,
                    mean_scales,
                    square,
                    square_scales,
                    &part.table,
                    part.count as i32,
                    &self.values,
                    &self.numbers,
                    &of_adamw,
                    norms,
                    taken,
                    part.blocks.start,
                    part.blocks.end
                ])?;
            }
        }
        Ok(())
    }
}
