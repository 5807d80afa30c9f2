//! What probes share: which samples, their pixels and masks at the probe's size, and their features.

use dinolab_core::contract::{Dataset, Grid, ImageSize, ProbeContext, Sample};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Error, Result, Tensor};
use rayon::prelude::*;

use crate::pixels::{cropped, normalized, resized};

/// Images whose features are computed together.
const BATCH: usize = 64;

/// Two sets of samples, `train` of the training data and `test` of the held-out data, drawn with the run's seed and
/// never overlapping: when nothing was held out, both are taken from the same dataset.
pub(crate) fn draw_two(context: &ProbeContext<'_>, train: usize, test: usize) -> [Vec<usize>; 2] {
    let draw = |n: usize, k: usize, index: u64| distinct(Rng::new(context.seed, Stream::Probe, 0, index), n, k);
    let (train_len, test_len) = (context.train.len(), context.test.len());
    if !(std::ptr::addr_eq(context.train, context.test) && train_len == test_len) {
        return [draw(train_len, train, 0), draw(test_len, test, 1)];
    }
    // Of too few samples each set gets its share.
    let wanted = train + test;
    let both = draw(train_len, wanted, 0);
    let (train, test) = both.split_at(both.len() * train / wanted.max(1));
    [train.to_vec(), test.to_vec()]
}

/// Samples of the held-out data, drawn with the run's seed.
pub(crate) fn draw_test(context: &ProbeContext<'_>, count: usize) -> Vec<usize> {
    distinct(Rng::new(context.seed, Stream::Probe, 0, 1), context.test.len(), count)
}

/// `k` different numbers of `0..n` (all of them if there are fewer), in random order, without touching the others: a
/// dataset may have billions.
fn distinct(mut rng: Rng, n: usize, k: usize) -> Vec<usize> {
    // Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", 1987).
    let mut seen = std::collections::BTreeSet::new();
    let mut drawn = Vec::with_capacity(k.min(n));
    for top in n.saturating_sub(k)..n {
        let candidate = rng.below(top + 1);
        let new = if seen.contains(&candidate) { top } else { candidate };
        seen.insert(new);
        drawn.push(new);
    }
    rng.shuffle(&mut drawn);
    drawn
}

/// What is known about images besides their pixels.
pub(crate) struct Truth {
    /// Class of the image.
    pub label: Option<u32>,
    /// Class of every pixel at the probe's size, row-major.
    pub mask: Option<Vec<u8>>,
    /// Its depth.
    pub depth: Option<Vec<f32>>,
}

/// Features of images, in order.
pub(crate) struct Features {
    /// `[N, D]`, f32.
    pub cls: Tensor,
    /// `[N, P, D]`, f32; without images where only CLS was asked for.
    pub patches: Tensor,
    /// The patch grid.
    pub grid: Grid,
    /// Labels and masks, one an image.
    pub truth: Vec<Truth>,
    /// Which sample of the dataset each is, and the size of its middle part that was looked at.
    pub sources: Vec<(usize, ImageSize)>,
}

/// What is done to the middle part of sample `index` before it is brought to the model's size.
pub(crate) type Change<'a> = &'a (dyn Fn(usize, Sample) -> Sample + Sync);

/// Which images are looked at, and for what.
pub(crate) struct Look<'a> {
    /// Of which dataset.
    pub dataset: &'a dyn Dataset,
    /// Which of its samples.
    pub indices: &'a [usize],
    /// What is done to them first; they have no masks then.
    pub change: Option<Change<'a>>,
    /// Whether patches are kept: of many images they need much memory.
    pub patches: bool,
}

impl<'a> Look<'a> {
    /// At samples as they are, for CLS and patches.
    pub fn at(dataset: &'a dyn Dataset, indices: &'a [usize]) -> Self {
        Self { dataset, indices, change: None, patches: true }
    }

    /// For CLS alone.
    pub fn cls(dataset: &'a dyn Dataset, indices: &'a [usize]) -> Self {
        Self { patches: false, ..Self::at(dataset, indices) }
    }

    /// At changed samples.
    pub fn changed(self, change: Change<'a>) -> Self {
        Self { change: Some(change), ..self }
    }

    /// Reads samples and computes their features. Samples that cannot be read are left out, which is said.
    ///
    /// # Errors
    /// If none of them can be read, or the model fails.
    pub fn features(self, context: &ProbeContext<'_>) -> Result<Features> {
        look(context, self)
    }
}

fn look(context: &ProbeContext<'_>, of: Look<'_>) -> Result<Features> {
    let Look { dataset, indices, change, patches: with_patches } = of;
    let (size, normalization) = (context.image_size, context.normalization);
    let channels = normalization.0.len();
    let (mut cls, mut patches, mut truth, mut sources) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut grid = Grid { height: 0, width: 0 };
    let mut failures = Vec::new();
    for chunk in indices.chunks(BATCH) {
        let read = |&index: &usize| {
            let sample = dataset.get(index)?;
            if sample.channels() != channels {
                let problem = format!("it has {} channels, and the model sees {channels}", sample.channels());
                return Err(Error::content(dataset.describe(index), problem, "choose data of as many channels"));
            }
            let part = size.within(sample.width, sample.height);
            let (pixels, known) = prepare(sample, size, normalization, change.map(|change| (index, change)));
            Ok((pixels, known, part))
        };
        let read: Vec<Result<(Vec<f32>, Truth, ImageSize)>> = chunk.par_iter().map(read).collect();
        let mut pixels = Vec::with_capacity(chunk.len() * channels * size.pixels());
        let known = truth.len();
        for (&index, sample) in chunk.iter().zip(read) {
            match sample {
                Ok((image, known, part)) => {
                    pixels.extend(image);
                    truth.push(known);
                    sources.push((index, part));
                }
                Err(error) => failures.push((index, error)),
            }
        }
        let images = truth.len() - known;
        if images == 0 {
            continue;
        }
        let features = (context.features)(&Tensor::from_slice(&pixels, &[images, channels, size.height, size.width])?)?;
        cls.push(features.cls.detach().cast(DType::F32)?);
        if with_patches {
            patches.push(features.patches.detach().cast(DType::F32)?);
        }
        grid = features.grid;
    }
    let join = |parts: Vec<Tensor>| Tensor::cat(&parts.iter().collect::<Vec<_>>());
    if let Some((index, error)) = failures.first().filter(|_| !truth.is_empty()) {
        let (left, all, name) = (failures.len(), indices.len(), dataset.describe(*index));
        let why = error.problem_of(&name);
        (context.warn)(format!("{left} of {all} samples were left out, such as {name}: {why}"));
    }
    if truth.is_empty() {
        let none = Error::user("a probe has no sample to measure", "let it have 1 or more samples");
        return Err(failures.into_iter().next().map_or(none, |(_, error)| error));
    }
    let patches = if with_patches { join(patches)? } else { Tensor::zeros(&[0], DType::F32) };
    Ok(Features { cls: join(cls)?, patches, grid, truth, sources })
}

/// A sample brought to `size`: normalised pixels `[channels, height, width]`, and what is known about it. A changed one has no mask.
fn prepare(
    mut sample: Sample,
    size: ImageSize,
    normalization: (&[f32], &[f32]),
    change: Option<(usize, Change<'_>)>,
) -> (Vec<f32>, Truth) {
    let (mut mask, mut depth, label) = (sample.mask.take(), sample.depth.take(), sample.label);
    let from = nearest_pixels(&sample, size);
    mask = mask.filter(|_| change.is_none()).map(|mask| (0..size.pixels()).map(|i| mask[from(i)]).collect());
    depth = depth.filter(|_| change.is_none()).map(|depth| (0..size.pixels()).map(|i| depth[from(i)]).collect());
    let image = middle(sample, size);
    let image = match change {
        Some((index, change)) => change(index, image),
        None => image,
    };
    (normalized(&resized(image, size), normalization), Truth { label, mask, depth })
}

/// Which pixel of a sample lies under the centre of each pixel of its largest middle part of this shape, brought to `size`.
pub(crate) fn nearest_pixels(sample: &Sample, size: ImageSize) -> impl Fn(usize) -> usize {
    let (width, height) = (sample.width, sample.height);
    let part = size.within(width, height);
    let (left, top) = ((width - part.width) / 2, (height - part.height) / 2);
    let row = |y: usize| (top + (2 * y + 1) * part.height / (2 * size.height)) * width;
    let column = |x: usize| left + (2 * x + 1) * part.width / (2 * size.width);
    let (rows, columns): (Vec<usize>, Vec<usize>) =
        ((0..size.height).map(row).collect(), (0..size.width).map(column).collect());
    move |i: usize| rows[i / size.width] + columns[i % size.width]
}

/// The largest middle part of a sample with the shape of `size`: its pixels alone.
pub(crate) fn middle(sample: Sample, size: ImageSize) -> Sample {
    let part = size.within(sample.width, sample.height);
    let corner = [(sample.width - part.width) / 2, (sample.height - part.height) / 2];
    cropped(&sample, corner, part)
}

/// The share of each class among the pixels of every patch of all images, `[N * P, classes]`: all 0 where an image has no mask,
/// or a patch no pixel of a known class.
pub(crate) fn class_shares(features: &Features, size: ImageSize, classes: usize) -> Vec<f32> {
    let of_image = |truth: &Truth| -> Vec<f32> {
        let Some(mask) = &truth.mask else { return vec![0.0; features.grid.patches() * classes] };
        let counts = class_counts(mask, size, features.grid, classes);
        let shares = counts.chunks(classes).flat_map(|patch| {
            let total = patch.iter().sum::<u32>().max(1) as f32;
            patch.iter().map(move |&n| n as f32 / total)
        });
        shares.collect()
    };
    features.truth.par_iter().map(of_image).collect::<Vec<_>>().concat()
}

/// The patch in which pixel `i` (row-major) lies.
pub(crate) fn patch_of(i: usize, size: ImageSize, grid: Grid) -> usize {
    let (row, column) = (i / size.width * grid.height / size.height, i % size.width * grid.width / size.width);
    row * grid.width + column
}

/// How many pixels of each class every patch has: `[P, classes]`. Classes of `classes` or more (a "void" label) count
/// nowhere.
pub(crate) fn class_counts(mask: &[u8], size: ImageSize, grid: Grid, classes: usize) -> Vec<u32> {
    let mut counts = vec![0; grid.patches() * classes];
    for (i, &class) in mask.iter().enumerate().filter(|(_, &class)| usize::from(class) < classes) {
        let patch = patch_of(i, size, grid);
        counts[patch * classes + usize::from(class)] += 1;
    }
    counts
}

/// The class with the most pixels in every patch, the least of equals; `None` where no pixel has one.
pub(crate) fn majority(counts: &[u32], classes: usize) -> Vec<Option<usize>> {
    let most = |patch: &[u32]| {
        let (class, n) = patch.iter().enumerate().rev().max_by_key(|(_, &n)| n)?;
        (*n > 0).then_some(class)
    };
    counts.chunks(classes).map(most).collect()
}

/// An image of one colour a class, for tests of probes; and a dataset of such images.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use dinolab_core::contract::{Features as ModelFeatures, Score};

    /// `width` x `height` images in two halves, left class `1 + i % 3` and right background (0), labelled `i % 3`.
    /// The red channel is the class of the pixel times 60.
    #[derive(Debug)]
    pub(crate) struct Halves {
        pub len: usize,
        pub width: usize,
        pub height: usize,
    }

    impl Dataset for Halves {
        fn len(&self) -> usize {
            self.len
        }
        fn get(&self, index: usize) -> Result<Sample> {
            let (width, height) = (self.width, self.height);
            let class = |i: usize| if i % width < width / 2 { 1 + (index % 3) as u8 } else { 0 };
            let mask: Vec<u8> = (0..width * height).map(class).collect();
            let rgb = mask.iter().flat_map(|&c| [60 * c, 0, 0]).collect::<Vec<u8>>().into();
            let unknown = |i: usize| i.is_multiple_of(11);
            let metres = |(i, &c): (usize, &u8)| if unknown(i) { 0.0 } else { 4.0 - 2.0 * f32::from(c.min(1)) };
            let depth = Some(mask.iter().enumerate().map(metres).collect());
            Ok(Sample {
                width,
                height,
                pixels: rgb,
                label: Some((index % 3) as u32),
                mask: Some(mask),
                depth,
                ..Sample::default()
            })
        }
        fn classes(&self) -> usize {
            3
        }
        fn mask_classes(&self) -> usize {
            4
        }
        fn has_depth(&self) -> bool {
            true
        }
    }

    /// Runs a probe at 32 pixels with patches of 8 on a model that sees the red channel of each patch as `[64 images]`.
    /// `model` gets the class of a patch (the CLS: the image's object class) and a generator that differs for every
    /// token, and fills the feature.
    pub(crate) fn run(
        probe: &dyn dinolab_core::contract::Probe,
        train: &dyn Dataset,
        test: &dyn Dataset,
        model: &dyn Fn(usize, &mut Rng, &mut [f32]),
    ) -> Vec<Score> {
        run_at(probe, train, test, model, ImageSize::square(32))
    }

    /// The same of images of another size; the model is shown 32 pixels all the same.
    pub(crate) fn run_at(
        probe: &dyn dinolab_core::contract::Probe,
        train: &dyn Dataset,
        test: &dyn Dataset,
        model: &dyn Fn(usize, &mut Rng, &mut [f32]),
        image_size: ImageSize,
    ) -> Vec<Score> {
        let grid = Grid { height: 4, width: 4 };
        let tokens = std::cell::Cell::new(0);
        let features = |pixels: &Tensor| -> Result<ModelFeatures> {
            let (n, dim) = (pixels.dim(0), 16);
            let red = |image: usize, y: usize, x: usize| pixels.as_slice::<f32>()[(image * 3 * 32 + y) * 32 + x];
            let class_at = |image, y, x| (red(image, y, x) * 255.0 / 60.0).round() as usize;
            let token = |class: usize| {
                tokens.set(tokens.get() + 1);
                let mut feature = vec![0.0; dim];
                model(class, &mut Rng::new(7, Stream::Plugin, 0, tokens.get()), &mut feature);
                feature
            };
            let cls: Vec<f32> = (0..n).flat_map(|i| token(class_at(i, 4, 4))).collect();
            let patches: Vec<f32> =
                (0..n * 16).flat_map(|i| token(class_at(i / 16, i % 16 / 4 * 8 + 4, i % 4 * 8 + 4))).collect();
            let (cls, patches) = (Tensor::from_slice(&cls, &[n, dim])?, Tensor::from_slice(&patches, &[n, 16, dim])?);
            let registers = Tensor::zeros(&[n, 0, dim], DType::F32);
            Ok(ModelFeatures { cls, registers, prenorm: patches.clone(), patches, layers: Vec::new(), grid })
        };
        let normalization: (&[f32], &[f32]) = (&[0.0; 3], &[1.0; 3]);
        let context = ProbeContext {
            features: &features,
            train,
            test,
            image_size,
            patch_size: 8,
            normalization,
            seed: 1,
            warn: &|_| (),
            show: None,
        };
        probe.run(&context).unwrap()
    }

    /// The feature of a class is its own axis.
    pub(crate) fn perfect(class: usize, _: &mut Rng, feature: &mut [f32]) {
        feature[class] = 1.0;
    }

    /// Features know nothing.
    pub(crate) fn random(_: usize, rng: &mut Rng, feature: &mut [f32]) {
        feature.fill_with(|| rng.normal() as f32);
    }

    #[test]
    fn sets_from_one_dataset_never_overlap() {
        let data = Halves { len: 50, width: 8, height: 8 };
        let none = |_: &Tensor| -> Result<ModelFeatures> { unreachable!("nothing is read") };
        let normalization: (&[f32], &[f32]) = (&[0.0; 3], &[1.0; 3]);
        let context = ProbeContext {
            features: &none,
            train: &data,
            test: &data,
            image_size: ImageSize::square(8),
            patch_size: 8,
            normalization,
            seed: 3,
            warn: &|_| (),
            show: None,
        };
        let [train, test] = draw_two(&context, 30, 10);
        assert_eq!((train.len(), test.len()), (30, 10));
        let all: std::collections::BTreeSet<usize> = train.iter().chain(&test).copied().collect();
        assert_eq!(all.len(), 40);
        // Of too few, both get their share.
        let [train, test] = draw_two(&context, 300, 100);
        assert_eq!((train.len(), test.len()), (37, 13));
    }

    #[test]
    fn masks_follow_the_middle_part() {
        let sample = Halves { len: 1, width: 80, height: 40 }.get(0).unwrap();
        let (pixels, truth) = prepare(sample, ImageSize::square(20), (&[0.0; 3], &[1.0; 3]), None);
        let mask = truth.mask.unwrap();
        for (i, (&class, red)) in mask.iter().zip(&pixels).enumerate() {
            assert_eq!(class, u8::from(i % 20 < 10), "pixel {i}");
            // The resize blurs the border between the halves.
            if !(8..12).contains(&(i % 20)) {
                assert!((red * 255.0 - 60.0 * f32::from(class)).abs() < 0.5, "pixel {i} is {red}");
            }
        }
        let grid = Grid { height: 2, width: 4 };
        let counts = class_counts(&mask, ImageSize::square(20), grid, 3);
        assert_eq!(majority(&counts, 3), [1, 1, 0, 0, 1, 1, 0, 0].map(Some));
        assert_eq!(counts.iter().sum::<u32>(), 400);

        // Of 40 x 80 pixels, wide: the middle 40 x 20.
        let sample = Halves { len: 1, width: 40, height: 80 }.get(0).unwrap();
        let size = ImageSize { width: 16, height: 8 };
        let (pixels, truth) = prepare(sample, size, (&[0.0; 3], &[1.0; 3]), None);
        let mask = truth.mask.unwrap();
        assert_eq!((pixels.len(), mask.len()), (3 * 16 * 8, 16 * 8));
        assert!(mask.iter().enumerate().all(|(i, &class)| class == u8::from(i % 16 < 8)));
        let counts = class_counts(&mask, size, Grid { height: 2, width: 4 }, 3);
        assert_eq!(majority(&counts, 3), [1, 1, 0, 0, 1, 1, 0, 0].map(Some));
    }
}
