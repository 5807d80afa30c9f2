//! The batches of any step, as a pure function of (seed, step).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use rayon::prelude::*;

use super::augment::{CropMaker, Views};
use super::batch::{views_of_images, Batch, StepBatches};
use super::deal::deal;
use super::masks::{draw_masks, Masks};
use super::order::Order;
use crate::contract::{Augmentation, BatchImage, CropContext, Dataset, FieldSpec, Grid, ImagePlan, Masking, Sample};
use crate::recipe::{BatchConfig, CropConfig, CropsEntry, Resolution};
use crate::registry::Chosen;
use crate::rng::{Rng, Stream};
use crate::{DType, Device, Error, Result, Tensor};

/// Samples read in place of a broken one before the run gives up.
const REPLACEMENTS: u64 = 100;

/// What a [`Pipeline`] and a [`Loader`](super::Loader) are made from: parts of a recipe.
#[derive(Clone, Debug)]
pub struct LoaderSpec {
    /// Images a step and how they are read.
    pub batch: BatchConfig,
    /// Which of the micro-batches are made: those of this process.
    pub part: Range<usize>,
    /// Views cut from every image, and how they are distorted.
    pub crops: CropsEntry,
    /// Further augmentations whose crops are read, by name.
    pub augmentations: Vec<(String, Chosen<dyn Augmentation>)>,
    /// Which patches are hidden from the student.
    pub masking: Chosen<dyn Masking>,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side in pixels of teachers' own crops; `None`: they get none.
    pub teacher_crop_size: Option<usize>,
    /// The run's seed.
    pub seed: u64,
    /// Where the crops are made.
    pub device: Device,
    /// The step's type: that of mask weights on the CPU, of crops on a GPU; the others are f32.
    pub dtype: DType,
    /// First step that is made.
    pub start_step: u64,
    /// Steps of the run: the last one made is one before.
    pub total_steps: u64,
    /// Data that is left out: from a step on, so many steps' images. A step then has what is drawn for a later one.
    pub left_out: Vec<(u64, u64)>,
}

/// A sample that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BrokenSample {
    /// Its index in the dataset.
    pub index: usize,
    /// Where it comes from.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Makes the batches of any step. Work is spread over the current rayon pool; the result does not depend on it.
#[derive(Debug)]
pub struct Pipeline {
    dataset: Arc<dyn Dataset>,
    spec: LoaderSpec,
    order: Order,
    masking: Box<dyn Masking>,
    variants: Vec<Variant>,
    fields: Vec<FieldSpec>,
}

/// The crop sizes of some of the steps.
#[derive(Debug)]
struct Variant {
    sizes: Resolution,
    augmentation: Box<dyn Augmentation>,
    context: CropContext,
    /// Further ones, by name.
    further: Vec<(String, Box<dyn Augmentation>)>,
    maker: CropMaker,
    grid: Grid,
}

/// The images of a step, and what is drawn for them: what a device makes crops from.
pub(crate) struct RawStep {
    pub(super) step: u64,
    pub(super) images: Vec<RawImage>,
    /// Of each micro-batch.
    pub(super) masks: Vec<Masks>,
    pub(super) broken: Vec<BrokenSample>,
}

/// An image as it was read.
pub(super) struct RawImage {
    pub(super) source: BatchImage,
    pub(super) sample: Sample,
    pub(super) plan: ImagePlan,
    /// Those of further augmentations.
    pub(super) further: Vec<ImagePlan>,
}

/// What is left of an image when its crops are made.
#[derive(Default)]
struct Made {
    source: BatchImage,
    label: u32,
    fields: Vec<Vec<f32>>,
    broken: Vec<BrokenSample>,
}

/// A micro-batch: the places of its images in the whole batch, and their masks.
struct Part {
    places: Vec<usize>,
    masks: Masks,
}

/// The crops of one micro-batch, while they are made.
struct Crops {
    global: Tensor,
    local: Option<Tensor>,
    teacher: Option<Tensor>,
    further: Vec<Tensor>,
}

impl Pipeline {
    /// # Errors
    /// If the dataset is empty, or the numbers of `spec` do not fit together.
    pub fn new(dataset: Arc<dyn Dataset>, spec: LoaderSpec) -> Result<Self> {
        check(&spec)?;
        if dataset.is_empty() {
            return Err(Error::user("the dataset has no samples", "point [data] at some images"));
        }
        let (channels, expected) = (dataset.channels(), spec.crops.channels());
        if channels != expected {
            let problem = format!("images of {channels} channels, and crops.mean has {expected} numbers");
            return Err(Error::user(problem, format!("set crops.mean and crops.std to {channels} numbers each")));
        }
        let variant = |sizes: Resolution| {
            let side = sizes.global_size / spec.patch_size;
            let crops =
                CropConfig { global_size: sizes.global_size, local_size: sizes.local_size, ..spec.crops.own.clone() };
            let maker = CropMaker::new(&crops, sizes.teacher_size);
            let (augmentation, context) = spec.crops.build(&sizes, spec.patch_size)?;
            let mut without_locals = CropContext { local_count: 0, ..context };
            let build = |(name, chosen): &(String, Chosen<dyn Augmentation>)| {
                Ok((name.clone(), chosen.build(&mut without_locals)?))
            };
            let further = spec.augmentations.iter().map(build).collect::<Result<_>>()?;
            Ok(Variant { sizes, augmentation, context, further, maker, grid: Grid { height: side, width: side } })
        };
        let variants: Result<_> = spec.crops.variants(spec.teacher_crop_size).into_iter().map(variant).collect();
        let variants = variants?;
        let masking = spec.masking.build(&mut ())?;
        let fields = dataset.fields();
        Ok(Self { order: Order::new(spec.seed, dataset.len()), masking, variants, fields, dataset, spec })
    }

    /// The crop sizes of `step`, drawn by their shares.
    fn variant(&self, step: u64) -> &Variant {
        let total: f64 = self.variants.iter().map(|v| v.sizes.share).sum();
        let mut left = total * Rng::new(self.spec.seed, Stream::Resolution, step, 0).unit();
        let drawn = self.variants.iter().find(|v| {
            left -= v.sizes.share;
            left < 0.0
        });
        drawn.unwrap_or(&self.variants[self.variants.len() - 1])
    }

    /// What it was made from.
    pub fn spec(&self) -> &LoaderSpec {
        &self.spec
    }

    /// How many patches are masked in the micro-batches of `step` together: `M`.
    pub fn masked_patches(&self, step: u64) -> usize {
        let grid = self.variant(self.data_step(step)).grid;
        self.masking.masked(2 * self.spec.batch.size, grid)
    }

    /// The step whose draws `step` gets.
    fn data_step(&self, step: u64) -> u64 {
        step + self.spec.left_out.iter().filter(|(from, _)| step >= *from).map(|(_, steps)| steps).sum::<u64>()
    }

    /// Images of a micro-batch.
    fn images(&self) -> usize {
        self.spec.batch.images()
    }

    /// The batches of `step`.
    ///
    /// # Errors
    /// If no readable sample is found in place of a broken one.
    pub fn step(&self, step: u64) -> Result<StepBatches> {
        self.step_unless(step, &AtomicBool::new(false))
    }

    /// The batches of `step`; content is unspecified once `stop` is set.
    pub(super) fn step_unless(&self, step: u64, stop: &AtomicBool) -> Result<StepBatches> {
        let data_step = self.data_step(step);
        let (images, variant) = (self.images(), self.variant(data_step));
        let parts = self.parts(variant, data_step)?;
        let places: Vec<usize> = parts.iter().flat_map(|part| part.places.clone()).collect();
        let mut crops: Vec<Crops> = parts.iter().map(|_| self.allocate(variant)).collect();
        let views: Vec<Views<'_>> = crops.iter_mut().flat_map(|crops| self.views(crops)).collect();
        // One image a task: images differ in size, so larger blocks would leave threads idle at the end of a step.
        let make = |(i, mut views): (usize, Views<'_>)| {
            if stop.load(Ordering::Relaxed) {
                let blank = |field: &FieldSpec| vec![0.0; field.shape.iter().product()];
                return Ok(Made { fields: self.fields.iter().map(blank).collect(), ..Made::default() });
            }
            self.image(variant, data_step, places[i], &mut views, stop)
        };
        let made: Vec<Result<Made>> = views.into_par_iter().enumerate().with_max_len(1).map(make).collect();
        let made: Vec<Made> = made.into_iter().collect::<Result<_>>()?;

        let batches = parts.into_iter().zip(crops).zip(made.chunks(images)).map(|((part, crops), made)| Batch {
            global: crops.global,
            local: crops.local,
            teacher: crops.teacher,
            further: self.names().zip(crops.further).collect(),
            masks: part.masks,
            labels: labels(made.iter().map(|image| image.label)),
            fields: self.fields(made.iter().map(|image| image.fields.as_slice())),
            sources: made.iter().map(|image| image.source.clone()).collect(),
        });
        let batches = batches.collect();
        let broken = made.into_iter().flat_map(|image| image.broken).collect();
        Ok(StepBatches { step, batches, waited: Duration::ZERO, broken })
    }

    /// The images of `step`; nothing if `stop` is set before all are read.
    pub(super) fn raw_unless(&self, step: u64, stop: &AtomicBool) -> Result<Option<RawStep>> {
        let data_step = self.data_step(step);
        let variant = self.variant(data_step);
        let parts = self.parts(variant, data_step)?;
        let read = |&place: &usize| {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.draw(variant, data_step, place, stop).map(Some)
        };
        let places: Vec<usize> = parts.iter().flat_map(|part| part.places.clone()).collect();
        let read: Result<Option<Vec<_>>> =
            places.par_iter().with_max_len(1).map(read).collect::<Result<Vec<_>>>().map(|r| r.into_iter().collect());
        let Some(read) = read? else { return Ok(None) };
        let (images, broken): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        let masks = parts.into_iter().map(|part| part.masks).collect();
        Ok(Some(RawStep { step, images, masks, broken: broken.concat() }))
    }

    /// What makes the crops of `step`, and their sizes.
    pub(super) fn of_step(&self, step: u64) -> (&CropMaker, &Resolution) {
        let variant = self.variant(self.data_step(step));
        (&variant.maker, &variant.sizes)
    }

    /// Deals the images of a step, and the masks that are drawn for its whole batch, to its micro-batches; gives this process's.
    fn parts(&self, variant: &Variant, data_step: u64) -> Result<Vec<Part>> {
        let size = self.spec.batch.size;
        let mut rng = Rng::new(self.spec.seed, Stream::Mask, data_step, 0);
        let (masking, name) = (self.masking.as_ref(), self.spec.masking.name());
        let rows = draw_masks(masking, name, &mut rng, 2 * size, variant.grid)?;
        let masked = |row: usize| rows[row].iter().filter(|&&m| m).count();
        let of_images: Vec<usize> = (0..size).map(|i| masked(i) + masked(size + i)).collect();
        let share = of_images.iter().sum::<usize>() as f64 / self.spec.batch.micro_batches as f64;
        let dtype = if self.spec.device == Device::Cpu { self.spec.dtype } else { DType::F32 };
        let part = |places: Vec<usize>| {
            let of_crop = |crop: usize| places.iter().map(move |i| crop * size + i);
            let own: Vec<&[bool]> = of_crop(0).chain(of_crop(1)).map(|row| rows[row].as_slice()).collect();
            Ok(Part { masks: Masks { share, ..Masks::from_rows(&own, dtype)? }, places })
        };
        let dealt = deal(&of_images, self.spec.batch.micro_batches).into_iter().enumerate();
        dealt.filter(|(micro, _)| self.spec.part.contains(micro)).map(|(_, places)| part(places)).collect()
    }

    fn allocate(&self, variant: &Variant) -> Crops {
        let (images, locals, sizes) = (self.images(), self.spec.crops.local_count, &variant.sizes);
        let channels = self.spec.crops.channels();
        let tensor = |count: usize, side: usize| Tensor::uninit(&[count * images, channels, side, side], DType::F32);
        Crops {
            global: tensor(2, sizes.global_size),
            local: (locals > 0).then(|| tensor(locals, sizes.local_size)),
            teacher: sizes.teacher_size.map(|side| tensor(2, side)),
            further: self.names().map(|_| tensor(2, sizes.global_size)).collect(),
        }
    }

    /// Names of further augmentations.
    pub(super) fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.spec.augmentations.iter().map(|(name, _)| name.clone())
    }

    fn views<'a>(&self, crops: &'a mut Crops) -> Vec<Views<'a>> {
        let local = crops.local.as_mut().map(|t| (t.as_mut_slice(), self.spec.crops.local_count));
        let teacher = crops.teacher.as_mut().map(Tensor::as_mut_slice);
        let further = crops.further.iter_mut().map(Tensor::as_mut_slice).collect();
        views_of_images(self.images(), crops.global.as_mut_slice(), local, teacher, further)
    }

    /// Makes the crops of the image at `place` of a step's batch.
    fn image(
        &self,
        variant: &Variant,
        data_step: u64,
        place: usize,
        views: &mut Views<'_>,
        stop: &AtomicBool,
    ) -> Result<Made> {
        let (RawImage { source, sample, plan, further }, broken) = self.draw(variant, data_step, place, stop)?;
        variant.maker.apply(&sample, &plan, views);
        for (plan, globals) in further.iter().zip(std::mem::take(&mut views.further)) {
            variant.maker.apply(&sample, plan, &mut Views::of_globals(globals));
        }
        Ok(Made { source, label: self.label(&sample), fields: sample.fields, broken })
    }

    /// The class of a sample; the number of classes if it has none.
    pub(super) fn label(&self, sample: &Sample) -> u32 {
        sample.label.unwrap_or(self.dataset.classes() as u32)
    }

    /// Reads the image at `place` of a step's batch and draws its plan.
    fn draw(
        &self,
        variant: &Variant,
        data_step: u64,
        place: usize,
        stop: &AtomicBool,
    ) -> Result<(RawImage, Vec<BrokenSample>)> {
        let first = self.order.sample(data_step * self.spec.batch.size as u64 + place as u64);
        let (index, sample, broken) = self.read(first, stop)?;
        let rng = |crop: u64| Rng::new(self.spec.seed, Stream::Augment, data_step, (place as u64) << 16 | crop);
        let size = (sample.width, sample.height);
        let drawn = |name: &str, augmentation: &dyn Augmentation, context: &CropContext, rng: &dyn Fn(u64) -> Rng| {
            let plan = augmentation.plan(size, rng);
            let Some(fault) = plan.fault(size, context) else { return Ok(plan) };
            let problem = format!("the augmentation `{name}` {fault}, for an image of {}x{} pixels", size.0, size.1);
            Err(Error::user(problem, "correct the plugin's `plan`"))
        };
        let name = self.spec.crops.plugin.name();
        let plan = drawn(name, variant.augmentation.as_ref(), &variant.context, &rng)?;
        let further = variant.further.iter().map(|(name, augmentation)| {
            let own =
                |crop: u64| Rng::named(self.spec.seed, Stream::Augment, data_step, &format!("{name}/{place}/{crop}"));
            let context = CropContext { local_count: 0, ..variant.context };
            drawn(name, augmentation.as_ref(), &context, &own)
        });
        let further = further.collect::<Result<_>>()?;
        let [globals, locals] = plan.boxes(variant.sizes.global_size, variant.sizes.local_size);
        Ok((RawImage { source: BatchImage { index, place, globals, locals }, sample, plan, further }, broken))
    }

    /// The fields of a micro-batch: `[B, ..]`.
    pub(super) fn fields<'a>(&self, of_images: impl Iterator<Item = &'a [Vec<f32>]> + Clone) -> Vec<(String, Tensor)> {
        let field = |(i, FieldSpec { name, shape }): (usize, &FieldSpec)| {
            let numbers: Vec<f32> = of_images.clone().flat_map(|fields| fields[i].iter().copied()).collect();
            let shape: Vec<usize> = [of_images.clone().count()].into_iter().chain(shape.iter().copied()).collect();
            (name.clone(), Tensor::from_slice(&numbers, &shape).expect("every sample was held to the shapes"))
        };
        self.fields.iter().enumerate().map(field).collect()
    }

    /// Sample `first`, or the first readable one of its replacements. No other is tried once `stop` is set.
    fn read(&self, first: usize, stop: &AtomicBool) -> Result<(usize, Sample, Vec<BrokenSample>)> {
        let mut broken: Vec<BrokenSample> = Vec::new();
        for attempt in 0..=REPLACEMENTS {
            if attempt > 0 && stop.load(Ordering::Relaxed) {
                break;
            }
            let index = if attempt == 0 { first } else { self.order.replacement(first, attempt) };
            match self.read_one(index) {
                Ok(sample) => return Ok((index, sample, broken)),
                Err(reason) => broken.push(BrokenSample { index, name: self.dataset.describe(index), reason }),
            }
        }
        Err(Error::user(
            format!("{} samples in a row cannot be read, such as\n{}", broken.len(), list(&broken)),
            "check that [data] points at readable images",
        ))
    }

    fn read_one(&self, index: usize) -> Result<Sample, String> {
        let sample = self.dataset.get_image(index).map_err(|e| e.problem_of(&self.dataset.describe(index)))?;
        let (width, height, patch) = (sample.width, sample.height, self.spec.patch_size);
        if width.min(height) < patch {
            return Err(format!("{width}x{height} pixels are less than a patch of {patch}x{patch}"));
        }
        let (values, channels) = (sample.pixels.len(), self.spec.crops.channels());
        if values != channels * width * height {
            return Err(format!("{values} values are not {width}x{height} pixels of {channels} channels"));
        }
        if sample.fields.len() != self.fields.len() {
            return Err(format!("it has {} fields, and the dataset says {}", sample.fields.len(), self.fields.len()));
        }
        for (FieldSpec { name, shape }, numbers) in self.fields.iter().zip(&sample.fields) {
            if numbers.len() != shape.iter().product::<usize>() {
                return Err(format!("{} numbers are not the field `{name}` of shape {shape:?}", numbers.len()));
            }
        }
        Ok(sample)
    }
}

/// Labels of a micro-batch: `[B]`.
pub(super) fn labels(of_images: impl Iterator<Item = u32>) -> Tensor {
    let labels: Vec<u32> = of_images.collect();
    Tensor::from_slice(&labels, &[labels.len()]).expect("a list has one axis")
}

/// The first few broken samples, one a line.
pub(super) fn list<'a>(broken: impl IntoIterator<Item = &'a BrokenSample>) -> String {
    let lines = broken.into_iter().take(5).map(|b| format!("  {}: {}", b.name, b.reason));
    lines.collect::<Vec<_>>().join("\n")
}

/// Fails if the numbers of `spec` do not fit together.
fn check(spec: &LoaderSpec) -> Result<()> {
    let LoaderSpec { batch, crops, patch_size, teacher_crop_size, .. } = spec;
    let user = |problem: String, help: &str| Err(Error::user(problem, help));
    if batch.size == 0 || batch.micro_batches == 0 || batch.size % batch.micro_batches != 0 {
        let (size, parts) = (batch.size, batch.micro_batches);
        let help = "let batch.size be a positive multiple of batch.micro_batches";
        return user(format!("a batch of {size} images cannot be split into {parts} equal parts"), help);
    }
    let sides = crops.variants(*teacher_crop_size).into_iter().flat_map(|sizes| {
        let local = (crops.local_count > 0).then_some(("crops.local_size", sizes.local_size));
        let teacher = sizes.teacher_size.map(|size| ("crop_size of a teacher", size));
        [Some(("crops.global_size", sizes.global_size)), local, teacher].into_iter().flatten()
    });
    for (name, size) in sides {
        if *patch_size == 0 || size == 0 || size % patch_size != 0 {
            let help = "choose a positive multiple of the patch size";
            return user(format!("{name} = {size} is not a multiple of the patch size {patch_size}"), help);
        }
    }
    Ok(())
}
