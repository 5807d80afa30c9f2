//! Multi-head self attention on packed tokens (Vaswani et al., arXiv:1706.03762), with rotary positions (Su et al.,
//! arXiv:2104.09864) or a score bias between patches.
//!
//! For every image and head, with `s = 1 / sqrt(D / H)` and R the rotation of patch tokens:
//! S = s R(Q) R(K)^T + bias, P = softmax(S), O = P V. Backward, with the row sums `delta = sum(dO O) = sum(dP P)`:
//! dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dbias = dS, dR(Q) = s dS R(K), dR(K) = s dS^T R(Q).
//!
//! P is never kept: forward saves the logarithm of each row's normaliser, and backward computes P again, a block of
//! query rows at a time (Dao, arXiv:2307.08691). Memory is therefore linear in the number of tokens.

mod cuda;
mod head;

pub(crate) use cuda::attention_kernels;

use std::ops::Range;

use self::head::Head;
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::columns::sum_rows;
use crate::tensor::parallel::Parts;
use crate::tensor::{Grads, Op, Real};
use crate::{dispatch_real, DType, Error, Result, Tensor};

/// A run of rows that hold images with equally many tokens: all global crops, or all local crops.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Images in the run.
    pub images: usize,
    /// Tokens of each: CLS and registers first, then the P patches.
    pub tokens: usize,
    /// Sine and cosine of each patch's angles, `[P, D / H]` each; the tokens before the patches are not rotated.
    /// The tables are constants: no gradient flows to them.
    pub rotary: Option<(Tensor, Tensor)>,
    /// Added to the scores between patches, `[H, P, P]`; it receives a gradient if it is tracked.
    pub bias: Option<Tensor>,
}

impl Tensor {
    /// Self attention inside each image: packed `[T, 3D]` (queries, keys, values, each `heads` times `D / heads`) to
    /// `[T, D]`. The segments are consecutive runs of rows and cover all T. On a GPU, queries and keys are rotated in
    /// place if this is the only handle to them.
    ///
    /// # Errors
    /// If a shape does not fit, or the tokens are rotated and `D / heads` is odd.
    pub fn attention(self, heads: usize, segments: &[Segment]) -> Result<Tensor> {
        let biases: Vec<&Tensor> = segments.iter().filter_map(|s| s.bias.as_ref()).collect();
        let detach = |s: &Segment| Segment { bias: s.bias.as_ref().map(Tensor::detach), ..s.clone() };
        let op = Attention { heads, segments: segments.iter().map(detach).collect(), saved: None };
        op.check(&[&[&self], &biases[..]].concat())?;
        let qkv = op.rotate(self)?;
        op.apply(&[&[&qkv], &biases[..]].concat())
    }
}

struct Attention {
    heads: usize,
    segments: Vec<Segment>,
    saved: Option<Saved>,
}

struct Saved {
    /// As the sweeps read it: on tensor cores, rotated.
    qkv: Tensor,
    out: Tensor,
    /// The logarithm of each softmax row's sum, for each image `[H, tokens]`.
    log_sum: Tensor,
}

/// Images of one segment and one head, computed in order by one task.
struct Task {
    segment: usize,
    head: usize,
    images: Range<usize>,
    /// The row of the segment's first token.
    first_row: usize,
    /// Where the task sums its part of the segment's dbias.
    part: usize,
}

/// Partial sums of the gradient of a score bias: few, as each is as large as the bias.
const BIAS_PARTS: usize = 8;

impl Attention {
    fn check(&self, inputs: &[&Tensor]) -> Result<()> {
        let qkv = inputs[0];
        let fail = |problem: String| Err(Error::shape("attention", problem));
        if qkv.rank() != 2 || self.heads == 0 || qkv.dim(1) == 0 || !qkv.dim(1).is_multiple_of(3 * self.heads) {
            return fail(format!("qkv {:?} is not [T, 3D] with D a multiple of {} heads", qkv.shape(), self.heads));
        }
        let rows: usize = self.segments.iter().map(|s| s.images * s.tokens).sum();
        if rows != qkv.dim(0) {
            return fail(format!("the segments have {rows} rows, qkv {:?}", qkv.shape()));
        }
        let d = qkv.dim(1) / (3 * self.heads);
        for segment in &self.segments {
            let patches = segment.patches();
            if patches > segment.tokens {
                return fail(format!("positions for {patches} patches, but images have {} tokens", segment.tokens));
            }
            for table in segment.rotary.iter().flat_map(|(sin, cos)| [sin, cos]) {
                if table.shape() != [patches, d] || !d.is_multiple_of(2) || table.dtype() != qkv.dtype() {
                    let (shape, dtype) = (table.shape(), qkv.dtype());
                    return fail(format!("rotary table {shape:?}, expected [{patches}, {d}] {dtype:?}, width even"));
                }
            }
            if segment.bias.as_ref().is_some_and(|b| b.shape() != [self.heads, patches, patches]) {
                let bias = segment.bias.as_ref().map(|b| b.shape());
                return fail(format!("bias {bias:?}, expected [{}, {patches}, {patches}]", self.heads));
            }
        }
        same_dtype("attention", inputs)
    }

    /// The work in independent tasks; images of a segment share a task where `shared(segment)`, at most
    /// [`BIAS_PARTS`] tasks a head.
    fn tasks(&self, shared: impl Fn(usize) -> bool) -> Vec<Task> {
        let mut tasks = Vec::new();
        let mut first_row = 0;
        for (segment, s) in self.segments.iter().enumerate() {
            let step = if shared(segment) { s.images.div_ceil(BIAS_PARTS) } else { 1 };
            for (part, start) in (0..s.images).step_by(step.max(1)).enumerate() {
                let images = start..(start + step).min(s.images);
                tasks.extend((0..self.heads).map(|head| Task {
                    segment,
                    head,
                    images: images.clone(),
                    first_row,
                    part,
                }));
            }
            first_row += s.images * s.tokens;
        }
        tasks
    }

    fn head<'a, T: Real>(&'a self, qkv: &'a Tensor, task: &Task, image: usize) -> Head<'a, T> {
        let segment = &self.segments[task.segment];
        let patches = segment.patches();
        Head {
            qkv: qkv.as_slice(),
            width: qkv.dim(1) / 3,
            d: qkv.dim(1) / (3 * self.heads),
            column: task.head * (qkv.dim(1) / (3 * self.heads)),
            row: task.first_row + image * segment.tokens,
            tokens: segment.tokens,
            prefix: segment.tokens - patches,
            rotary: segment.rotary.as_ref().map(|(sin, cos)| (sin.as_slice(), cos.as_slice())),
            bias: segment.bias.as_ref().map(|b| &b.as_slice()[task.head * patches * patches..][..patches * patches]),
        }
    }

    /// Where a head's row sums are.
    fn log_sum_range(&self, task: &Task, image: usize) -> (usize, usize) {
        let tokens = self.segments[task.segment].tokens;
        ((task.first_row + image * tokens) * self.heads + task.head * tokens, tokens)
    }
}

impl Segment {
    /// Tokens that have a position; those before them are the prefix.
    fn patches(&self) -> usize {
        match (&self.rotary, &self.bias) {
            (Some((sin, _)), _) => sin.shape().first().copied().unwrap_or(0),
            (None, Some(bias)) => bias.last_dim(),
            (None, None) => 0,
        }
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let qkv = inputs[0];
        if let Some(gpu) = qkv.gpu() {
            return self.forward_on(gpu, qkv, save);
        }
        let rows = qkv.dim(0);
        let mut out = Tensor::uninit(&[rows, qkv.dim(1) / 3], qkv.dtype());
        let mut log_sum = Tensor::uninit(&[rows * self.heads], qkv.dtype());
        dispatch_real!("attention", qkv.dtype(), T => {
            let out = Parts::new(out.as_mut_slice::<T>());
            let log_sum = Parts::new(log_sum.as_mut_slice::<T>());
            self.tasks(|_| false).par_iter().for_each(|task| for image in task.images.clone() {
                let (start, len) = self.log_sum_range(task, image);
                // SAFETY: each image and head has its own range, and is the work of one task.
                let log_sum = unsafe { log_sum.part(start, len) };
                self.head::<T>(qkv, task, image).forward(&out, log_sum);
            });
            Ok(())
        })?;
        if save {
            self.saved = Some(Saved { qkv: qkv.detach(), out: out.clone(), log_sum });
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        if let Some(gpu) = dy.gpu() {
            return self.backward_on(gpu, &dy, grads);
        }
        let Saved { qkv, out, log_sum } = self.saved.as_ref().expect("saved by forward");
        let mut dqkv = Tensor::uninit(qkv.shape(), qkv.dtype());
        let mut dbias = self.partial_dbias(grads, qkv.dtype());
        dispatch_real!("attention", dy.dtype(), T => {
            let tasks = self.tasks(|segment| dbias[segment].is_some());
            let parts: Vec<_> = dbias.iter_mut().map(|b| b.as_mut().map(|b| Parts::new(b.as_mut_slice::<T>()))).collect();
            let dqkv_parts = Parts::new(dqkv.as_mut_slice::<T>());
            let (dy, out, log_sum) = (dy.as_slice::<T>(), out.as_slice::<T>(), log_sum.as_slice::<T>());
            tasks.par_iter().for_each(|task| {
                let size = self.segments[task.segment].patches().pow(2);
                let mut dbias = parts[task.segment].as_ref().map(|parts| {
                    // SAFETY: each task has a (part, head) of its own.
                    unsafe { parts.part((task.part * self.heads + task.head) * size, size) }
                });
                for image in task.images.clone() {
                    let (start, len) = self.log_sum_range(task, image);
                    let head = self.head::<T>(qkv, task, image);
                    head.backward(dy, out, &log_sum[start..][..len], &dqkv_parts, dbias.as_deref_mut());
                }
            });
            grads.add(0, dqkv)?;
            for (i, partial) in self.bias_inputs() {
                let Some(partial) = &dbias[partial] else { continue };
                grads.accumulate(i, |mut dbias| {
                    let add = dbias.add;
                    sum_rows(dbias.as_mut_slice::<T>(), partial.as_slice::<T>(), add);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }
}

impl Attention {
    /// (input, segment) of every bias.
    fn bias_inputs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let with_bias = self.segments.iter().enumerate().filter(|(_, s)| s.bias.is_some());
        with_bias.enumerate().map(|(i, (segment, _))| (i + 1, segment))
    }

    /// For every segment whose bias is tracked, zeros `[parts, H, P, P]`.
    fn partial_dbias(&self, grads: &Grads<'_>, dtype: DType) -> Vec<Option<Tensor>> {
        let mut partial: Vec<Option<Tensor>> = self.segments.iter().map(|_| None).collect();
        for (input, segment) in self.bias_inputs().filter(|&(input, _)| grads.needs(input)) {
            debug_assert!(grads.input_len(input) > 0);
            let Segment { images, .. } = self.segments[segment];
            let parts = images.div_ceil(images.div_ceil(BIAS_PARTS).max(1));
            let patches = self.segments[segment].patches();
            partial[segment] = Some(Tensor::zeros(&[parts, self.heads, patches, patches], dtype));
        }
        partial
    }
}
