//! A step's images, masks and jobs in one upload, made by the loader's threads.

use rayon::prelude::*;

use super::jobs::{Image, Jobs};
use super::{Shapes, ALIGN};
use crate::contract::{BatchImage, Pixels};
use crate::cuda::Staging;
use crate::data::pipeline::{labels, BrokenSample, Pipeline, RawImage, RawStep};
use crate::data::Masks;
use crate::{Result, Tensor};

/// Pieces of memory that are uploaded together.
#[derive(Default)]
pub(super) struct Pack<'a> {
    parts: Vec<(usize, &'a [u8])>,
    end: usize,
}

impl<'a> Pack<'a> {
    /// Adds a piece; gives its offset.
    pub(super) fn put(&mut self, bytes: &'a [u8]) -> u64 {
        let at = self.end;
        self.parts.push((at, bytes));
        self.end = (at + bytes.len()).next_multiple_of(ALIGN);
        at as u64
    }

    /// Writes all pieces to pinned memory, on the threads of the current pool.
    pub(super) fn write(&self, staging: &mut Staging) -> Result<()> {
        let (mut rest, mut start) = (staging.host(self.end)?, 0);
        let mut targets = Vec::with_capacity(self.parts.len());
        for &(at, bytes) in &self.parts {
            let (target, behind) = rest[at - start..].split_at_mut(bytes.len());
            targets.push((target, bytes));
            (rest, start) = (behind, at + bytes.len());
        }
        targets.into_par_iter().for_each(|(target, bytes)| target.copy_from_slice(bytes));
        Ok(())
    }
}

/// A step on its way to the device.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(super) staging: Staging,
    pub(super) micros: Vec<Micro>,
    /// Values of a pixel.
    pub(super) channels: usize,
    /// Where the normalisation is: factors of values of 8 bits, of 16, and summands, one a channel.
    pub(super) normal: u64,
    pub(crate) step: u64,
    pub(crate) broken: Vec<BrokenSample>,
}

impl Staged {
    /// Images in it.
    pub(crate) fn images(&self) -> usize {
        self.micros.iter().map(|m| m.sources.len()).sum()
    }
}

/// Where a micro-batch's parts are in the upload.
#[derive(Debug)]
pub(super) struct Micro {
    pub(super) shapes: Shapes,
    /// Whether all images are 8-bit RGB, which has kernels of its own.
    pub(super) rgb: bool,
    pub(super) repaint: Section,
    pub(super) cut: Section,
    /// Into global, local and the teachers' crops, and into those of each further augmentation.
    pub(super) finish: Vec<Section>,
    pub(super) tables: u64,
    /// Masks and labels, then fields.
    pub(super) lists: Vec<u64>,
    /// Bytes of scratch memory.
    pub(super) scratch: usize,
    /// That of the masks.
    pub(super) share: f64,
    pub(super) sources: Vec<BatchImage>,
}

/// Jobs of one kind.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) at: u64,
    pub(super) jobs: usize,
    /// Size of the largest job: pixels, bytes, or the side of a crop.
    pub(super) most: usize,
    /// Bytes that all jobs together write.
    pub(super) bytes: f64,
}

/// Packs a step for the device and starts its upload.
pub(crate) fn pack(pipeline: &Pipeline, raw: RawStep, mut staging: Staging) -> Result<Staged> {
    let images = raw.images.len() / raw.masks.len();
    let (maker, sizes) = pipeline.of_step(raw.step);
    let channels = maker.shift.len();
    let normal: Vec<f32> = maker.scales.iter().chain([&maker.shift]).flatten().copied().collect();
    let of_part = |part: &[RawImage]| labels(part.iter().map(|image| pipeline.label(&image.sample)));
    let labels: Vec<Tensor> = raw.images.chunks(images).map(of_part).collect();
    let of_part = |part: &[RawImage]| pipeline.fields(part.iter().map(|image| image.sample.fields.as_slice()));
    let fields: Vec<Vec<(String, Tensor)>> = raw.images.chunks(images).map(of_part).collect();
    let mut pack = Pack::default();
    let places: Vec<Vec<u64>> = raw.images.iter().map(|image| put_image(&mut pack, image)).collect();
    // Weights of a thousand resizes take a while: one micro-batch's are made in parallel with another's.
    let of_micro = |(part, at): (&[RawImage], &[Vec<u64>])| {
        let mut jobs = Jobs { finish: vec![Vec::new(); 3 + pipeline.names().count()], ..Jobs::default() };
        for (i, (image, at)) in part.iter().zip(at).enumerate() {
            let sample = &image.sample;
            let wide = matches!(sample.pixels, Pixels::U16(_));
            let on_device = |at| Image { at, size: (sample.width, sample.height), channels, wide };
            jobs.add(maker, &image.plan, on_device(at[0]), i, images);
            for (k, (plan, &at)) in image.further.iter().zip(&at[1..]).enumerate() {
                jobs.add_further(k, plan, on_device(at), sizes.global_size, (i, images));
            }
        }
        jobs
    };
    let jobs: Vec<Jobs> = raw.images.par_chunks(images).zip(places.par_chunks(images)).map(of_micro).collect();
    let locals = maker.config.local_count;
    let mut micros = Vec::with_capacity(jobs.len());
    for (i, ((jobs, masks), part)) in jobs.iter().zip(&raw.masks).zip(raw.images.chunks(images)).enumerate() {
        let crops = |count: usize, side: usize| [count * images, channels, side, side];
        let Masks { masks, indices, unmasked, weights, share } = masks;
        let fields = &fields[i];
        let lists = [masks, indices, unmasked, weights, &labels[i]].into_iter();
        let lists: Vec<&Tensor> = lists.chain(fields.iter().map(|(_, field)| field)).collect();
        micros.push(Micro {
            shapes: Shapes {
                global: crops(2, sizes.global_size),
                local: (locals > 0).then(|| crops(locals, sizes.local_size)),
                teacher: sizes.teacher_size.map(|side| crops(2, side)),
                further: pipeline.names().map(|name| (name, crops(2, sizes.global_size))).collect(),
                lists: [masks, indices, unmasked, weights, &labels[i]].map(Tensor::len),
                fields: fields.iter().map(|(name, field)| (name.clone(), field.shape().to_vec())).collect(),
            },
            rgb: channels == 3 && part.iter().all(|image| matches!(image.sample.pixels, Pixels::U8(_))),
            repaint: section(&mut pack, &jobs.repaint, |j| j.pixels as usize, |j| (channels as u64 * j.pixels) as f64),
            cut: resizes(&mut pack, &jobs.cut, channels),
            finish: jobs.finish.iter().map(|f| section(&mut pack, f, |j| j.out as usize, |_| 0.0)).collect(),
            tables: pack.put(bytemuck::cast_slice(&jobs.tables)),
            lists: lists.into_iter().map(|t| pack.put(t.as_bytes())).collect(),
            scratch: jobs.scratch,
            share: *share,
            sources: part.iter().map(|image| image.source.clone()).collect(),
        });
    }
    let normal = pack.put(bytemuck::cast_slice(&normal));
    pack.write(&mut staging)?;
    staging.send()?;
    Ok(Staged { staging, micros, channels, normal, step: raw.step, broken: raw.broken })
}

/// Where an image lies for each of its plans. Colours of a whole image are changed in place, so that such a plan, and the
/// others beside it, have the image for themselves.
fn put_image<'a>(pack: &mut Pack<'a>, image: &'a RawImage) -> Vec<u64> {
    let own = pack.put(image.sample.pixels.as_bytes());
    let mut shared = image.plan.shared_color.is_none().then_some(own);
    let further = image.further.iter().map(|plan| match plan.shared_color {
        Some(_) => pack.put(image.sample.pixels.as_bytes()),
        None => *shared.get_or_insert_with(|| pack.put(image.sample.pixels.as_bytes())),
    });
    let further: Vec<u64> = further.collect();
    [own].into_iter().chain(further).collect()
}

fn section<'a, J: bytemuck::NoUninit>(
    pack: &mut Pack<'a>,
    jobs: &'a [J],
    most: impl Fn(&J) -> usize,
    bytes: impl Fn(&J) -> f64,
) -> Section {
    let (most, bytes) = (jobs.iter().map(most).max().unwrap_or(0), jobs.iter().map(bytes).sum());
    Section { at: pack.put(bytemuck::cast_slice(jobs)), jobs: jobs.len(), most, bytes }
}

fn resizes<'a>(pack: &mut Pack<'a>, jobs: &'a [super::jobs::Resize], channels: usize) -> Section {
    let size = |j: &super::jobs::Resize| channels * (j.side * j.columns.max(j.side)) as usize;
    section(pack, jobs, size, |j| size(j) as f64)
}
