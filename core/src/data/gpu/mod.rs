//! Batches on a GPU, at addresses that do not change from step to step, so that a recorded step finds them.
//!
//! Decoded images go up once, as they are; all crops are cut from them there, by the plans that the CPU would
//! follow ([`pack`]). Resizes, colours and blur round to whole numbers where the CPU's do, so crops are the same numbers
//! (f32; in bf16 those numbers rounded).

mod jobs;
mod pack;

use crate::cuda::{self, args, Gpu, Launch, Staging};
use crate::data::batch::Batch;
use crate::data::Masks;
use crate::scope;
use crate::{cuda_source, DType, Device, Error, Result, Tensor};

use jobs::{Finish, Paint};
pub(super) use pack::{pack, Staged};
use pack::{Micro, Section};

cuda_source! { static AUGMENT = "augment" { include_str!("augment.cu") } }

/// Blocks along the second axis of a grid, at most. The kernels' loops take what is left.
const MOST_BLOCKS: usize = 65_535;

/// Parts of an upload begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// The shapes of a micro-batch's tensors, in the order of [`Batch::tensors`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shapes {
    global: [usize; 4],
    local: Option<[usize; 4]>,
    teacher: Option<[usize; 4]>,
    further: Vec<(String, [usize; 4])>,
    /// Masks and labels.
    lists: [usize; 5],
    fields: Vec<(String, Vec<usize>)>,
}

impl Shapes {
    fn of(batch: &Batch) -> Self {
        let crops = |t: &Tensor| -> [usize; 4] { t.shape().try_into().expect("crops are [N, C, H, W]") };
        let Masks { masks, indices, unmasked, weights, .. } = &batch.masks;
        Self {
            global: crops(&batch.global),
            local: batch.local.as_ref().map(crops),
            teacher: batch.teacher.as_ref().map(crops),
            further: batch.further.iter().map(|(name, t)| (name.clone(), crops(t))).collect(),
            lists: [masks, indices, unmasked, weights, &batch.labels].map(Tensor::len),
            fields: batch.fields.iter().map(|(name, field)| (name.clone(), field.shape().to_vec())).collect(),
        }
    }

    /// A batch of these shapes, of memory that is given in the order of [`Batch::tensors`].
    fn make(&self, dtype: DType, mut take: impl FnMut(&[usize], DType) -> Tensor) -> Batch {
        let mut crops = |shape: &[usize; 4]| take(shape, dtype);
        let (global, local) = (crops(&self.global), self.local.as_ref().map(&mut crops));
        let teacher = self.teacher.as_ref().map(&mut crops);
        let further = self.further.iter().map(|(name, shape)| (name.clone(), crops(shape))).collect();
        let [masks, indices, unmasked, weights, labels] = self.lists;
        let mut list = |n: usize| take(&[n], DType::U32);
        let (masks, indices, unmasked) = (list(masks), list(indices), list(unmasked));
        let weights = take(&[weights], DType::F32);
        let labels = take(&[labels], DType::U32);
        let fields = self.fields.iter().map(|(name, shape)| (name.clone(), take(shape, DType::F32))).collect();
        let masks = Masks { masks, indices, unmasked, weights, share: 0.0 };
        Batch { global, local, teacher, further, masks, labels, fields, sources: Vec::new() }
    }
}

/// The micro-batches of the step that runs, on a GPU. A tensor lies where that of the step before lay, unless it is larger than any
/// before it: those of a step are gone when the next one's are made.
#[derive(Debug)]
pub struct DeviceBatches {
    gpu: &'static Gpu,
    dtype: DType,
    /// For finished crops: one is copied while the work that reads the other goes on.
    staging: [Staging; 2],
    turn: usize,
    /// Memory of each tensor of each micro-batch, in their order.
    rooms: Vec<Tensor>,
    made: Vec<Batch>,
}

impl DeviceBatches {
    /// With crops in `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// If the device gives no memory for copies, or `dtype` is another.
    pub fn new(gpu: &'static Gpu, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16) {
            return Err(Error::shape("batches", format!("crops on a GPU are f32 or bf16, not {dtype:?}")));
        }
        Ok(Self {
            gpu,
            dtype,
            staging: [Staging::new(gpu)?, Staging::new(gpu)?],
            turn: 0,
            rooms: Vec::new(),
            made: Vec::new(),
        })
    }

    /// Copies finished micro-batches of a step, from the host or from elsewhere on the device, behind all work given
    /// before: what the step before reads is overwritten when it is done. The host does not wait.
    ///
    /// # Errors
    /// If crops or mask weights are of another type than f32 (on the device crops may be of the step's), or the device
    /// fails.
    pub fn upload(&mut self, batches: &[Batch]) -> Result<&[Batch]> {
        self.make(batches.iter().map(Shapes::of));
        let mut packed = pack::Pack::default();
        let pairs = batches.iter().flat_map(Batch::tensors).zip(self.made.iter().flat_map(Batch::tensors));
        let copies: Vec<(&Tensor, u64, &Tensor)> = pairs
            .map(|(source, target)| match source.dtype() {
                same if same == target.dtype() => Ok((source, target)),
                DType::F32 => Ok((source, target)),
                other => Err(Error::shape("batches", format!("{other:?} cannot be uploaded as {:?}", target.dtype()))),
            })
            .map(|pair| {
                pair.map(|(source, target)| match source.gpu() {
                    Some(_) => (source, source.device_address(), target),
                    None => (source, packed.put(source.as_bytes()), target),
                })
            })
            .collect::<Result<_>>()?;
        let staging = &mut self.staging[self.turn];
        self.turn = 1 - self.turn;
        packed.write(staging)?;
        staging.send()?;
        let base = staging.receive()?;
        let gpu = self.gpu;
        for (source, at, target) in copies {
            let from = if source.gpu().is_some() { at } else { base + at };
            let n = target.len();
            if n == 0 || from == target.device_address() {
                continue;
            }
            if source.dtype() == target.dtype() {
                gpu.copy(target.device_address(), from, n * source.dtype().size())?;
            } else {
                let bytes = (n * (source.dtype().size() + target.dtype().size())) as f64;
                let kernel = gpu.kernel(&AUGMENT, "unpack", target.dtype())?;
                kernel.over(n).work(0.0, bytes).launch(args![target, from, n])?;
            }
        }
        staging.release()?;
        for (batch, source) in self.made.iter_mut().zip(batches) {
            batch.sources.clone_from(&source.sources);
            batch.masks.share = source.masks.share;
        }
        Ok(&self.made)
    }

    /// Makes the crops of a step from its images, behind all work given before. Gives back what they were uploaded with.
    pub(super) fn augment(&mut self, staged: Staged) -> Result<(&[Batch], Staging)> {
        let _scope = scope::enter("augmentation");
        let Staged { mut staging, micros, channels, normal, .. } = staged;
        self.make(micros.iter().map(|m| m.shapes.clone()));
        let base = staging.receive()?;
        for (micro, batch) in micros.iter().zip(&self.made) {
            self.crops(micro, batch, base, channels, base + normal)?;
            let Masks { masks, indices, unmasked, weights, .. } = &batch.masks;
            let lists = [masks, indices, unmasked, weights, &batch.labels].into_iter();
            for (target, &at) in lists.chain(batch.fields.iter().map(|(_, field)| field)).zip(&micro.lists) {
                if !target.is_empty() {
                    self.gpu.copy(target.device_address(), base + at, target.len() * 4)?;
                }
            }
        }
        staging.release()?;
        for (batch, micro) in self.made.iter_mut().zip(micros) {
            (batch.sources, batch.masks.share) = (micro.sources, micro.share);
        }
        Ok((&self.made, staging))
    }

    fn crops(&self, micro: &Micro, batch: &Batch, base: u64, channels: usize, normal: u64) -> Result<()> {
        let gpu = self.gpu;
        // Scratch memory is taken where steps take theirs, which is free before the step begins.
        let _step = cuda::step_scope();
        let here = Device::Cuda(gpu.ordinal());
        let memory = |bytes: usize| here.with(|| Tensor::uninit(&[bytes.div_ceil(4)], DType::U32));
        let jobs = |section: &Section| base + section.at;
        let tables = base + micro.tables;
        let scratch = memory(micro.scratch);
        // Images of another kind than 8-bit RGB have kernels that are told how many channels there are.
        let kernel = |of_rgb: &'static str, of_any: &'static str, dtype: DType| {
            gpu.kernel(&AUGMENT, if micro.rgb { of_rgb } else { of_any }, dtype)
        };
        let n = channels as i32;
        let means = |section: &Section, from: u64, job_bytes: usize| -> Result<Tensor> {
            let means = memory(4 * section.jobs);
            let kernel = kernel("mean_grey", "mean_grey_any", DType::U32)?.grid(section.jobs, 512);
            kernel.launch(args![jobs(section), job_bytes as i32, from, &means, n])?;
            Ok(means)
        };
        // Threads take several pixels each, so that small crops beside large ones leave few blocks without work.
        let launch = |of_rgb, of_any, section: &Section| -> Result<Launch> {
            let blocks = section.most.div_ceil(256 * 8).min(MOST_BLOCKS);
            let kernel = kernel(of_rgb, of_any, DType::U32)?.grid((section.jobs, blocks), 256);
            Ok(kernel.work(0.0, section.bytes))
        };
        if micro.repaint.jobs > 0 {
            let means = means(&micro.repaint, base, size_of::<Paint>())?;
            launch("repaint", "repaint_any", &micro.repaint)?.launch(args![jobs(&micro.repaint), base, &means, n])?;
        }
        launch("resize_columns", "resize_columns_any", &micro.cut)?.launch(args![
            jobs(&micro.cut),
            tables,
            base,
            &scratch,
            n
        ])?;
        launch("resize_rows", "resize_rows_any", &micro.cut)?.launch(args![jobs(&micro.cut), tables, &scratch, n])?;
        let finish = |section: &Section, out: &Tensor| -> Result<()> {
            let means = means(section, scratch.device_address(), size_of::<Finish>())?;
            let kernel = kernel("finish", "finish_any", out.dtype())?;
            let launch = kernel.grid((section.jobs, section.most.div_ceil(32).pow(2)), 256);
            let launch = launch.work(0.0, (out.len() * (1 + out.dtype().size())) as f64);
            launch.launch(args![out, jobs(section), &scratch, &means, normal, n])
        };
        let [global, local, teacher, further @ ..] = &micro.finish[..] else { unreachable!("it has three kinds") };
        finish(global, &batch.global)?;
        further.iter().zip(&batch.further).try_for_each(|(section, (_, out))| finish(section, out))?;
        batch.teacher.iter().try_for_each(|out| finish(teacher, out))?;
        batch.local.iter().try_for_each(|out| finish(local, out))
    }

    /// Makes batches of these shapes.
    fn make(&mut self, shapes: impl Iterator<Item = Shapes>) {
        let Self { gpu, dtype, rooms, .. } = self;
        let mut next = 0;
        let mut take = |shape: &[usize], dtype: DType| {
            let len = shape.iter().product();
            if next == rooms.len() {
                rooms.push(Tensor::uninit(&[0], dtype));
            }
            let room = &mut rooms[next];
            next += 1;
            if room.len() < len || room.dtype() != dtype {
                // The lengths of lists may change a little from step to step.
                let most = if shape.len() == 1 { len.next_power_of_two() } else { len };
                *room = Tensor::uninit(&[most], dtype);
            }
            room.view(0, shape)
        };
        self.made = Device::Cuda(gpu.ordinal()).with(|| shapes.map(|s| s.make(*dtype, &mut take)).collect());
    }
}
