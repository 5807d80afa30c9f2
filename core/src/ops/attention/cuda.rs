//! Attention on a GPU: which kernels run, and how their work is divided.
//!
//! bf16 with head dimensions 16, 32 .. 128 runs on tensor cores (`tiles.cuh`, `forward.cu`, `backward.cu`, compiled for
//! each head dimension); f32 and other dimensions run in `plain.cu`.

use std::cmp::Reverse;

use bytemuck::{Pod, Zeroable};

use super::{Attention, Saved, BIAS_PARTS};
use crate::cuda::{args, Arg, Gpu, Source};
use crate::tensor::Grads;
use crate::{cuda_source, DType, Error, Result, Tensor};

/// Segments of a launch.
const MAX_SEGMENTS: usize = 4;

/// `Segment` of `items.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct SegmentArg {
    sin: u64,
    cos: u64,
    bias: u64,
    images: i32,
    tokens: i32,
    prefix: i32,
    first_row: i32,
    first_item: i32,
    rows_per_item: i32,
    heads_per_item: i32,
    chunk: i32,
    slots: i32,
    unused: i32,
}

/// `Segments` of `items.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct SegmentsArg {
    at: [SegmentArg; MAX_SEGMENTS],
    count: i32,
    heads: i32,
    head_dim: i32,
    images_per_part: i32,
}

impl From<SegmentsArg> for Arg {
    fn from(value: SegmentsArg) -> Self {
        Self::plain(value)
    }
}

cuda_source! { static ROTATE = "attention_rotate" { include_str!("items.cuh"), include_str!("rotate.cu") } }
cuda_source! { variant static PLAIN = "attention_plain" { include_str!("items.cuh"), include_str!("plain.cu") } }

/// The tensor-core source of each head dimension: without a score bias, and with one. Dimensions that are rare in
/// practice have the second only, which is right for both.
macro_rules! tiled {
    ($($d:literal, $biased:literal: $name:ident = $text:literal;)*) => {
        $(cuda_source! { variant static $name = $text {
            concat!("#define HEAD_DIM ", $d, "\n#define BIASED ", $biased, "\n"),
            include_str!("items.cuh"), include_str!("tiles.cuh"), include_str!("forward.cu"), include_str!("backward.cu"),
        } })*

        fn tiled(d: usize, biased: bool) -> Option<&'static Source> {
            match (d, i32::from(biased)) {
                $(($d, $biased) => Some(&$name),)*
                (_, 0) => tiled(d, true),
                _ => None,
            }
        }
    };
}

tiled! {
    16, 1: D16 = "attention_16";
    32, 1: D32 = "attention_32";
    48, 1: D48 = "attention_48";
    64, 0: D64 = "attention_64";
    64, 1: D64_BIASED = "attention_64_biased";
    80, 1: D80 = "attention_80";
    96, 1: D96 = "attention_96";
    112, 1: D112 = "attention_112";
    128, 0: D128 = "attention_128";
    128, 1: D128_BIASED = "attention_128_biased";
}

/// The source of attention without a score bias, for heads of `d` dimensions.
pub(crate) fn attention_kernels(d: usize, dtype: DType) -> &'static Source {
    tiled(d, false).filter(|_| dtype == DType::BF16).unwrap_or(&PLAIN)
}

/// The kernels for a storage type and head dimension.
struct Kernels {
    gpu: &'static Gpu,
    source: &'static Source,
    tiled: bool,
    dtype: DType,
    d: usize,
}

/// What a launch computes: each row of the result sweeps over all rows of the other side.
#[derive(Clone, Copy, PartialEq)]
enum Sweep {
    Forward,
    /// dQ, and delta.
    Queries,
    /// dK and dV.
    Keys,
}

/// What an item and a block of a launch are.
struct Division {
    /// Rows of the result that a warp owns: 32 in the forward pass where a sequence does not fit into shared memory.
    tile: usize,
    warps: usize,
    /// Rows of an image that an item computes.
    rows: usize,
    heads_per_item: usize,
    /// Rows in shared memory at a time, and how many such chunks there is room for.
    chunk: usize,
    slots: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// A launch's division into work items.
struct Plan {
    segments: SegmentsArg,
    items: usize,
    /// Whether it is the forward kernel of long sequences.
    long: bool,
    threads: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
    /// Scores of all images and heads.
    scores: f64,
}

impl Attention {
    /// For the tensor-core kernels, which read each row several times, qkv with its patches' queries and keys rotated:
    /// where they lie if nobody else holds qkv, else in a copy.
    pub(super) fn rotate(&self, qkv: Tensor) -> Result<Tensor> {
        let Some(gpu) = qkv.gpu() else { return Ok(qkv) };
        let kernels = self.kernels(gpu, &qkv)?;
        if !kernels.tiled || self.segments.iter().all(|s| s.rotary.is_none()) {
            return Ok(qkv);
        }
        let mut rotated = qkv.into_unique();
        for some in self.segment_args().chunks(MAX_SEGMENTS) {
            let of_patch = (2 * self.heads).div_ceil(ROTATE_HEADS) * (kernels.d / 2 / ROTATE_PAIRS);
            let threads = some.iter().map(|s| (s.images * (s.tokens - s.prefix)) as usize * of_patch).max();
            let kernel = gpu.kernel(&ROTATE, "attention_rotate", kernels.dtype)?;
            let blocks = threads.unwrap_or(0).div_ceil(ROTATE_THREADS);
            let launch = kernel.grid((blocks, some.len(), 1), ROTATE_THREADS as u32);
            let bytes = 2 * 2 * rotated.len() * kernels.dtype.size() / 3;
            launch.work(0.0, bytes as f64).launch(args![&mut rotated, self.segments_arg(&kernels, some)])?;
        }
        Ok(rotated)
    }

    pub(super) fn forward_on(&mut self, gpu: &'static Gpu, qkv: &Tensor, save: bool) -> Result<Tensor> {
        let kernels = self.kernels(gpu, qkv)?;
        let rows = qkv.dim(0);
        let mut out = Tensor::uninit(&[rows, qkv.dim(1) / 3], qkv.dtype());
        let mut log_sum = Tensor::uninit(&[rows * self.heads], DType::F32);
        for plan in self.plans(&kernels, Sweep::Forward) {
            let name = if plan.long { "attention_forward_long" } else { "attention_forward" };
            kernels.launch(name, &plan, 2, args![qkv, &mut out, &mut log_sum, plan.segments])?;
        }
        if save {
            self.saved = Some(Saved { qkv: qkv.detach(), out: out.clone(), log_sum });
        }
        Ok(out)
    }

    pub(super) fn backward_on(&self, gpu: &'static Gpu, dy: &Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Saved { qkv, out, log_sum } = self.saved.as_ref().expect("saved by forward");
        let kernels = self.kernels(gpu, qkv)?;
        let mut dqkv = Tensor::uninit(qkv.shape(), qkv.dtype());
        let mut delta = Tensor::uninit(log_sum.shape(), DType::F32);
        // The first finds delta, which the others need. Scores are computed in both: counted once, as one of 5 products.
        let sweeps = [(Sweep::Queries, "attention_backward_queries", 2), (Sweep::Keys, "attention_backward_keys", 3)];
        for (sweep, name, products) in sweeps {
            for plan in self.plans(&kernels, sweep) {
                let args = args![qkv, out, dy, log_sum, &mut delta, &mut dqkv, plan.segments];
                kernels.launch(name, &plan, products, args)?;
            }
        }
        for (input, segment) in self.bias_inputs().filter(|&(input, _)| grads.needs(input)).collect::<Vec<_>>() {
            let (patches, images) = (self.segments[segment].patches(), self.segments[segment].images);
            let images_per_part = images.div_ceil(BIAS_PARTS).max(1);
            let parts = images.div_ceil(images_per_part);
            let mut partial = Tensor::uninit(&[parts, self.heads, patches, patches], DType::F32);
            let mut segments = self.segments_arg(&kernels, &self.segment_args()[segment..=segment]);
            segments.images_per_part = int(images_per_part);
            let args = args![qkv, out, dy, log_sum, &delta, &mut dqkv, segments, &mut partial];
            kernels.launch_bias(parts, self.heads, patches, args)?;
            grads.accumulate(input, |mut dbias| {
                let n = self.heads * patches * patches;
                let sum = gpu.kernel(&PLAIN, "attention_sum_bias", DType::F32)?.over(n);
                sum.launch(args![&partial, int(parts), int(n), &mut dbias])
            })?;
        }
        grads.add(0, dqkv)
    }

    fn kernels(&self, gpu: &'static Gpu, qkv: &Tensor) -> Result<Kernels> {
        let (dtype, d) = (qkv.dtype(), qkv.dim(1) / (3 * self.heads));
        let biased = self.segments.iter().any(|s| s.bias.is_some());
        let source = tiled(d, biased).filter(|_| dtype == DType::BF16);
        let kernels = Kernels { gpu, source: source.unwrap_or(&PLAIN), tiled: source.is_some(), dtype, d };
        let (needed, room) = (kernels.plain_shared(Sweep::Keys), shared_memory(gpu, 1));
        if !kernels.tiled && needed > room {
            let problem = format!("a head dimension of {d} takes {needed} bytes of shared memory; the GPU has {room}");
            return Err(Error::user(problem, "take more heads, so that each has at most 128 dimensions"));
        }
        Ok(kernels)
    }

    /// The segments as kernels see them, with nothing yet said about work items.
    fn segment_args(&self) -> Vec<SegmentArg> {
        let address = |x: Option<&Tensor>| x.map_or(0, Tensor::device_address);
        let mut first_row = 0;
        let each = self.segments.iter().map(|s| {
            let rotary = s.rotary.as_ref().filter(|_| s.patches() > 0);
            let arg = SegmentArg {
                sin: address(rotary.map(|(sin, _)| sin)),
                cos: address(rotary.map(|(_, cos)| cos)),
                bias: address(s.bias.as_ref()),
                images: int(s.images),
                tokens: int(s.tokens),
                prefix: int(s.tokens - s.patches()),
                first_row: int(first_row),
                rows_per_item: 1,
                heads_per_item: 1,
                ..SegmentArg::default()
            };
            first_row += s.images * s.tokens;
            arg
        });
        each.collect()
    }

    fn segments_arg(&self, kernels: &Kernels, some: &[SegmentArg]) -> SegmentsArg {
        let mut at = [SegmentArg::default(); MAX_SEGMENTS];
        at[..some.len()].copy_from_slice(some);
        SegmentsArg { at, count: int(some.len()), heads: int(self.heads), head_dim: int(kernels.d), images_per_part: 0 }
    }

    /// The launches of a sweep, longest sequences first: one for each length, so that blocks and shared memory fit it.
    fn plans(&self, kernels: &Kernels, sweep: Sweep) -> Vec<Plan> {
        let mut all = self.segment_args();
        all.retain(|s| s.images > 0 && s.tokens > 0);
        all.sort_by_key(|s| Reverse(s.tokens));
        let plan = |some: &[SegmentArg]| kernels.divide(self.segments_arg(kernels, some), sweep);
        all.chunk_by(|a, b| a.tokens == b.tokens).flat_map(|same| same.chunks(MAX_SEGMENTS)).map(plan).collect()
    }
}

impl Kernels {
    /// Says which rows and heads an item computes, and what a block is. All segments have equally many tokens.
    fn divide(&self, mut segments: SegmentsArg, sweep: Sweep) -> Plan {
        let (heads, tokens) = (segments.heads as usize, segments.at[0].tokens as usize);
        let Division { tile, warps, rows, heads_per_item, chunk, slots, shared } = if self.tiled {
            self.tiles(sweep, heads, tokens)
        } else {
            let shared = self.plain_shared(sweep);
            Division {
                tile: 1,
                warps: PLAIN_THREADS / 32,
                rows: PLAIN_ROWS,
                heads_per_item: 1,
                chunk: PLAIN_ROWS,
                slots: 1,
                shared,
            }
        };
        let (mut items, mut scores) = (0, 0.0);
        for s in &mut segments.at[..segments.count as usize] {
            s.first_item = int(items);
            (s.rows_per_item, s.heads_per_item) = (int(rows), int(heads_per_item));
            (s.chunk, s.slots) = (int(chunk), int(slots));
            items += s.images as usize * tokens.div_ceil(rows) * heads.div_ceil(heads_per_item);
            scores += (s.images as usize * heads) as f64 * (tokens as f64).powi(2);
        }
        Plan { segments, items, long: tile == LONG_TILE, threads: 32 * warps, shared, scores }
    }

    /// The division of images of so many tokens among warps that leaves the fewest of them idle, then that with the
    /// least shared memory.
    fn tiles(&self, sweep: Sweep, heads: usize, tokens: usize) -> Division {
        let (row_bytes, warp_bytes) = self.shared_bytes(sweep);
        let room = shared_memory(self.gpu, if self.d <= 64 { 2 } else { 1 });
        let capacity = |warps: usize| (room.saturating_sub(warps * warp_bytes) / row_bytes / 16 * 16).max(32);
        let whole = tokens.next_multiple_of(16);
        let tile = match sweep {
            Sweep::Forward if self.d <= 64 && whole > capacity(MOST_WARPS) => LONG_TILE,
            _ => TILE,
        };
        let divisions = (4..=MOST_WARPS).flat_map(|warps| {
            let capacity = capacity(warps);
            let division = move |heads_per_item: usize| {
                let (rows, chunk, slots) = if whole <= capacity {
                    (tokens, whole, heads_per_item)
                } else {
                    let most = (capacity / 2 / 32 * 32).max(16);
                    (tile * warps, tokens.div_ceil(tokens.div_ceil(most)).next_multiple_of(16), 2)
                };
                let shared = slots * chunk * row_bytes + warps * warp_bytes;
                Division { tile, warps, rows, heads_per_item, chunk, slots, shared }
            };
            (1..=(capacity / whole).clamp(1, heads)).map(division)
        });
        // Tiles that warps have the time for while all heads of an image are computed.
        let places = |x: &Division| {
            let of = |heads: usize| (heads * x.rows.div_ceil(tile)).div_ceil(x.warps) * x.warps;
            let (full, rest) = (heads / x.heads_per_item, heads % x.heads_per_item);
            tokens.div_ceil(x.rows) * (full * of(x.heads_per_item) + of(rest))
        };
        divisions.min_by_key(|x| (places(x), x.shared)).expect("there is a division into four warps")
    }

    /// Shared memory of the tensor-core kernels for each row of a chunk and for each warp.
    fn shared_bytes(&self, sweep: Sweep) -> (usize, usize) {
        let row = 2 * (self.d + 8);
        (2 * row + if sweep == Sweep::Keys { 8 } else { 0 }, 16 * row)
    }

    /// Shared memory of the kernels in `plain.cu`.
    fn plain_shared(&self, sweep: Sweep) -> usize {
        let tiles = match sweep {
            Sweep::Forward => 4,
            Sweep::Queries => 5,
            Sweep::Keys => 6,
        };
        tiles * PLAIN_ROWS * (self.d + 1) * 4
    }

    /// Launches a sweep that takes `products` matrix products with all scores.
    fn launch(&self, name: &'static str, plan: &Plan, products: usize, args: &mut [Arg]) -> Result<()> {
        let kernel = self.gpu.kernel(self.source, name, self.dtype)?;
        let flops = (2 * products * self.d) as f64 * plan.scores;
        kernel.grid(plan.items, plan.threads as u32).shared(plan.shared).work(flops, 0.0).launch(args)
    }

    /// Launches the sums of dbias over each part of the images.
    fn launch_bias(&self, parts: usize, heads: usize, patches: usize, args: &mut [Arg]) -> Result<()> {
        let kernel = self.gpu.kernel(self.source, "attention_backward_bias", self.dtype)?;
        if !self.tiled {
            let blocks = (heads * patches * patches).div_ceil(PLAIN_THREADS);
            return kernel.grid((blocks, 1, parts), PLAIN_THREADS as u32).launch(args);
        }
        let keys = if self.d <= 96 { 32 } else { 16 };
        let tiles = patches.div_ceil(16) * patches.div_ceil(keys);
        let shared = BIAS_WARPS * (32 + 2 * keys) * 2 * (self.d + 8);
        kernel.grid((tiles.div_ceil(BIAS_WARPS), heads, parts), 32 * BIAS_WARPS as u32).shared(shared).launch(args)
    }
}

/// Threads of a block in `rotate.cu`, heads of a thread, and pairs of columns of each head.
const ROTATE_THREADS: usize = 256;
const ROTATE_HEADS: usize = 4;
const ROTATE_PAIRS: usize = 8;

/// Rows of the result that a warp of the tensor-core kernels owns, those of the forward kernel of long sequences, and the most
/// warps of a block.
const TILE: usize = 16;
const LONG_TILE: usize = 32;
const MOST_WARPS: usize = 6;

/// Threads of a block, and rows of the result that it computes, in `plain.cu`.
const PLAIN_THREADS: usize = 256;
const PLAIN_ROWS: usize = 32;

/// Warps of a block that sums dbias.
const BIAS_WARPS: usize = 2;

/// The dynamic shared memory that a block may have when `blocks` are to run side by side on a multiprocessor: what the
/// CUDA C++ programming guide gives for the compute capability, less 1 KiB a block for the system and as much for
/// static variables.
fn shared_memory(gpu: &Gpu, blocks: usize) -> usize {
    let kib = match gpu.info().capability {
        (8, 0 | 7) => 164,
        (9..=11, _) => 228,
        _ => 100,
    };
    (kib / blocks - 2) << 10
}

fn int(x: usize) -> i32 {
    i32::try_from(x).expect("fewer rows and items than 2^31")
}
