//! The update on a GPU: clipping, AdamW, EMA and the bf16 copies, all decided by numbers on the device.

use bytemuck::{Pod, Zeroable};

use crate::contract::At;
use crate::cuda::{args, Gpu};
use crate::ops::ADAMW;
use crate::{DType, Device, Result, Tensor};

use super::optimizer::AdamW;
use super::weights::Narrow;
use super::{Limits, Weights};

/// Parameters start at multiples of this many elements.
const UNIT: usize = 64;
/// Units that a block of the norm takes, and elements that a block of the update takes.
const UNITS_OF_BLOCK: usize = 512;
const ELEMENTS_OF_BLOCK: usize = 4096;

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
}

/// The kernel's `Numbers`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Numbers {
    lr: f32,
    weight_decay: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    eps: f32,
    correction1: f32,
    inverse_root: f32,
    momentum: f32,
    rest_momentum: f32,
    last_layer_lr: f32,
    max_norm: f32,
    longest_gradient: f32,
    greatest_loss: f32,
}

/// The optimizer's tables on a GPU.
pub(super) struct DeviceUpdate {
    gpu: &'static Gpu,
    rules: Tensor,
    rule_count: usize,
    modules: Tensor,
    module_count: usize,
    norm_blocks: usize,
    numbers: Tensor,
}

impl DeviceUpdate {
    pub(super) fn new(gpu: &'static Gpu, optimizer: &AdamW) -> Result<Self> {
        let unit = |offset: usize| u32::try_from(offset / UNIT).expect("fewer than 2^38 parameters");
        let rule = |r: &super::ParamRule| Rule {
            start: unit(r.range.start),
            len: u32::try_from(r.range.len()).expect("a parameter has fewer than 2^32 elements"),
            lr: r.lr_multiplier as f32,
            decays: f32::from(u8::from(r.decays)),
            module: r.module as u32,
            last_layer: u32::from(r.last_layer),
        };
        let rules: Vec<Rule> = optimizer.rules.iter().map(rule).collect();
        let mut blocks = 0;
        let mut modules: Vec<[u32; 3]> = Vec::new();
        for range in optimizer.module_ranges() {
            let (start, end) = (unit(range.start), unit(range.end.next_multiple_of(UNIT)));
            modules.push([start, end - start, blocks as u32]);
            blocks += ((end - start) as usize).div_ceil(UNITS_OF_BLOCK);
        }
        let table = |bytes: &[u8]| Tensor::from_slice::<u32>(bytemuck::cast_slice(bytes), &[bytes.len() / 4]);
        Device::Cuda(gpu.ordinal()).with(|| {
            Ok(Self {
                gpu,
                rules: table(bytemuck::cast_slice(&rules))?,
                rule_count: rules.len(),
                modules: table(bytemuck::cast_slice(&modules))?,
                module_count: modules.len(),
                norm_blocks: blocks,
                numbers: table(bytemuck::bytes_of(&Numbers::default()))?,
            })
        })
    }

    /// Writes the numbers of the step at `at`, whose moments see update number `updates`; without `momentum` the teacher does not follow in this update.
    pub(super) fn write(
        &self,
        at: At,
        optimizer: &AdamW,
        updates: u64,
        limits: Limits,
        momentum: Option<f64>,
    ) -> Result<()> {
        let config = optimizer.config();
        let [beta1, beta2] = config.betas;
        let correction = |beta: f64| 1.0 - beta.powf(updates as f64);
        let momentum = momentum.unwrap_or(1.0);
        let numbers = Numbers {
            lr: optimizer.lr(at) as f32,
            weight_decay: optimizer.weight_decay(at) as f32,
            beta1: beta1 as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            eps: config.eps as f32,
            correction1: (1.0 / correction(beta1)) as f32,
            inverse_root: (1.0 / correction(beta2).sqrt()) as f32,
            momentum: momentum as f32,
            rest_momentum: (1.0 - momentum) as f32,
            last_layer_lr: optimizer.last_layer_lr(at) as f32,
            max_norm: config.clip_grad.max(0.0) as f32,
            longest_gradient: limits.gradient as f32,
            greatest_loss: limits.loss as f32,
        };
        self.gpu.upload(self.numbers.device_address(), bytemuck::bytes_of(&numbers))
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

    /// L2 norm of every sub-model's gradient: `[modules]`, f32, squares summed in double precision.
    pub(super) fn norms(&self, grads: &Tensor) -> Result<Tensor> {
        let mut partial = Tensor::uninit(&[self.norm_blocks], DType::F64);
        let mut norms = Tensor::uninit(&[self.module_count], DType::F32);
        let count = self.module_count as i32;
        let kernel = |name| self.gpu.kernel(&ADAMW, name, DType::F32);
        let squares = kernel("square_sums")?.grid(self.norm_blocks, 256).work(0.0, 4.0 * grads.len() as f64);
        squares.launch(args![&mut partial, grads, &self.modules, count])?;
        let roots = kernel("norms")?.grid(self.module_count, 256);
        roots.launch(args![&mut norms, &partial, &self.modules, count, self.norm_blocks as i32])?;
        Ok(norms)
    }

    /// One update of all weights, if `finite` is not 0; the teacher follows where `follows`.
    pub(super) fn apply(
        &self,
        weights: &mut Weights,
        grads: &Tensor,
        norms: &Tensor,
        finite: &Tensor,
        follows: bool,
    ) -> Result<()> {
        let n = weights.student.len();
        let Weights { student, teacher, exp_avg, exp_avg_sq, narrow, .. } = weights;
        let (narrow_student, narrow_teacher) = match narrow {
            Some(Narrow { student, teacher, .. }) => (Some(&*student), Some(&*teacher)),
            None => (None, None),
        };
        let ema = follows.then_some(&*teacher);
        let numbers = if follows { 38.0 } else { 30.0 };
        let launch = self.gpu.kernel(&ADAMW, "adamw", DType::F32)?.grid(n.div_ceil(ELEMENTS_OF_BLOCK), 256);
        launch.work(0.0, numbers * n as f64).launch(args![
            student,
            grads,
            exp_avg,
            exp_avg_sq,
            ema,
            narrow_student,
            narrow_teacher,
            &self.rules,
            self.rule_count as i32,
            &self.numbers,
            norms,
            finite,
            n
        ])
    }
}
