//! What a step gets: crops, masks, and where they came from.

use std::time::Duration;

use super::augment::Views;
use super::masks::Masks;
use super::pipeline::BrokenSample;
use crate::contract::BatchImage;
use crate::Tensor;

/// The images of one micro-batch, `B` of them, of `C` channels. Crops are crop-major: crop 0 of every image, then crop 1.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Global crops: `[2B, C, G, G]`, f32, normalised.
    pub global: Tensor,
    /// Local crops: `[L*B, C, l, l]`; `None` if there are none.
    pub local: Option<Tensor>,
    /// Teachers' own crops, of the same boxes as `global`: `[2B, C, T, T]`; `None` if no teacher has a size of its own.
    pub teacher: Option<Tensor>,
    /// Crops of further augmentations by name, as `global`: `[2B, C, S, S]`.
    pub further: Vec<(String, Tensor)>,
    /// Which patches of the global crops are hidden from the student. How many there are, `M`, is the same from step to
    /// step, in a whole batch and (nearly always) in each of its parts.
    pub masks: Masks,
    /// Class of each image: `[B]`, u32; the dataset's number of classes where an image has none.
    pub labels: Tensor,
    /// What the dataset adds to its samples: `[B, ..]`, f32, by name.
    pub fields: Vec<(String, Tensor)>,
    /// Which images they are, and where their crops were cut: `B`.
    pub sources: Vec<BatchImage>,
}

impl Batch {
    /// The number of images, `B`.
    pub fn images(&self) -> usize {
        self.sources.len()
    }

    /// Index in the dataset of each image.
    pub fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        self.sources.iter().map(|image| image.index)
    }

    /// All tensors, in a fixed order: crops, masks, labels, fields.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let Masks { masks, indices, unmasked, weights, .. } = &self.masks;
        let crops = [Some(&self.global), self.local.as_ref(), self.teacher.as_ref()];
        crops
            .into_iter()
            .flatten()
            .chain(self.further.iter().map(|(_, crops)| crops))
            .chain([masks, indices, unmasked, weights, &self.labels])
            .chain(self.fields.iter().map(|(_, field)| field))
    }

    /// The same batch with every tensor replaced by `f` of it.
    pub fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        let Masks { masks, indices, unmasked, weights, share } = &self.masks;
        Self {
            global: f(&self.global),
            local: self.local.as_ref().map(&f),
            teacher: self.teacher.as_ref().map(&f),
            further: self.further.iter().map(|(name, crops)| (name.clone(), f(crops))).collect(),
            masks: Masks {
                masks: f(masks),
                indices: f(indices),
                unmasked: f(unmasked),
                weights: f(weights),
                share: *share,
            },
            labels: f(&self.labels),
            fields: self.fields.iter().map(|(name, field)| (name.clone(), f(field))).collect(),
            sources: self.sources.clone(),
        }
    }
}

/// The micro-batches of one step.
#[derive(Clone, Debug)]
pub struct StepBatches {
    /// The step.
    pub step: u64,
    /// Its micro-batches, in order.
    pub batches: Vec<Batch>,
    /// How long the step waited for them.
    pub waited: Duration,
    /// Samples that could not be read and were replaced.
    pub broken: Vec<BrokenSample>,
}

/// Hands every image of a batch its slices of crop-major buffers (`images` images a buffer).
pub fn views_of_images<'a>(
    images: usize,
    global: &'a mut [f32],
    local: Option<(&'a mut [f32], usize)>,
    teacher: Option<&'a mut [f32]>,
    further: Vec<&'a mut [f32]>,
) -> Vec<Views<'a>> {
    let split = |buffer: &'a mut [f32], crops: usize| -> Vec<Vec<&'a mut [f32]>> {
        let mut of_image: Vec<Vec<_>> = (0..images).map(|_| Vec::with_capacity(crops)).collect();
        let side = buffer.len() / (crops * images);
        for (i, crop) in buffer.chunks_exact_mut(side).enumerate() {
            of_image[i % images].push(crop);
        }
        of_image
    };
    let none = || (0..images).map(|_| Vec::new()).collect::<Vec<_>>();
    let globals = split(global, 2);
    let locals = local.map_or_else(none, |(buffer, crops)| split(buffer, crops));
    let teacher = teacher.map_or_else(none, |buffer| split(buffer, 2));
    let views = globals.into_iter().zip(locals).zip(teacher);
    let views = views.map(|((globals, locals), teacher)| Views { globals, locals, teacher, further: Vec::new() });
    let mut views: Vec<Views<'a>> = views.collect();
    for buffer in further {
        views.iter_mut().zip(split(buffer, 2)).for_each(|(views, crops)| views.further.push(crops));
    }
    views
}
