//! Where images come from.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::{ImageSize, Pixels};
use crate::Result;

/// One image with what is known about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// The pixels, of 8 or 16 bits, row-major, interleaved: `width * height` times [`Dataset::channels`] values.
    pub pixels: Pixels,
    /// Class of the image.
    pub label: Option<u32>,
    /// Class of every pixel, row-major: `width * height` bytes, below [`Dataset::mask_classes`]; or 255 for a pixel that counts
    /// nowhere ("void", "ignore").
    pub mask: Option<Vec<u8>>,
    /// Distance of every pixel in metres, row-major: `width * height` numbers; 0 or NaN where it is not known.
    pub depth: Option<Vec<f32>>,
    /// What else is known about it: the numbers of each of [`Dataset::fields`], row-major.
    pub fields: Vec<Vec<f32>>,
}

impl Sample {
    /// Values of a pixel.
    pub fn channels(&self) -> usize {
        self.pixels.len() / (self.width * self.height).max(1)
    }

    /// The image in 8-bit RGB, to be looked at: of three or more channels the first three, of fewer the first as grey; of 16 bits
    /// the upper 8.
    pub fn rgb(&self) -> Cow<'_, [u8]> {
        self.pixels.to_rgb(self.channels())
    }
}

/// Numbers that a dataset adds to its samples for losses that ask for them: an embedding of a caption, a pose, metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldSpec {
    /// Its name, by which a loss asks for it.
    pub name: String,
    /// Its shape in one sample.
    pub shape: Vec<usize>,
}

/// What a dataset holds, to be told before a run starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// What there is: `54 images in 2 classes (cat, dog), 6 held out for probes`.
    pub content: String,
    /// What a user may not expect, a sentence each: files that were passed over, labels that are missing.
    pub notes: Vec<String>,
}

/// What a dataset is built with.
#[derive(Clone, Copy, Debug)]
pub struct DataContext {
    /// The run's seed, for generated data.
    pub seed: u64,
}

/// Where images come from. Reading is a pure function of the index, so any thread may read any sample at any time.
///
/// ```
/// use dinolab_core::contract::{Dataset, Sample};
/// use dinolab_core::Result;
///
/// /// Grey images, darker to lighter.
/// #[derive(Debug)]
/// struct Greys;
///
/// impl Dataset for Greys {
///     fn len(&self) -> usize {
///         256
///     }
///     fn get(&self, index: usize) -> Result<Sample> {
///         let pixels = vec![index as u8; 3 * 32 * 32].into();
///         Ok(Sample { width: 32, height: 32, pixels, label: Some(u32::from(index >= 128)), ..Sample::default() })
///     }
///     fn classes(&self) -> usize {
///         2
///     }
/// }
///
/// assert_eq!(Greys.get(200)?.label, Some(1));
/// # Ok::<(), dinolab_core::Error>(())
/// ```
pub trait Dataset: fmt::Debug + Send + Sync {
    /// How many samples there are; at least 1.
    fn len(&self) -> usize;

    /// Never: a dataset without samples is an error when it is built.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sample `index`, `0..len()`.
    ///
    /// # Errors
    /// If this sample cannot be read. The loader names and counts it and takes another in its place.
    fn get(&self, index: usize) -> Result<Sample>;

    /// The same without its mask and depth, where they take time: training reads neither.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn get_image(&self, index: usize) -> Result<Sample> {
        self.get(index)
    }

    /// Channels of every image: 3 for RGB. A recipe with another number has as many numbers in `crops.mean` and `crops.std`.
    fn channels(&self) -> usize {
        3
    }

    /// Number of image classes; 0 if images carry no label.
    fn classes(&self) -> usize {
        0
    }

    /// Number of pixel classes (background included); 0 if there are no masks.
    fn mask_classes(&self) -> usize {
        0
    }

    /// Whether its samples have a depth.
    fn has_depth(&self) -> bool {
        false
    }

    /// The names of the image classes, in order; none if they have none.
    fn class_names(&self) -> Vec<String> {
        Vec::new()
    }

    /// The names of the pixel classes, in order; none if they have none.
    fn mask_class_names(&self) -> Vec<String> {
        Vec::new()
    }

    /// What every sample has beside pixels, label and mask.
    fn fields(&self) -> Vec<FieldSpec> {
        Vec::new()
    }

    /// Where sample `index` comes from, for messages: a path.
    fn describe(&self, index: usize) -> String {
        format!("sample {index}")
    }

    /// What there is, and what a user may not expect of it.
    fn summary(&self) -> Summary {
        let classes = match self.classes() {
            0 => String::new(),
            1 => " in 1 class".into(),
            n => format!(" in {n} classes"),
        };
        let held_out = self.held_out().map(|part| format!(", {} held out for probes", part.len()));
        let content = format!("{} images{classes}{}", self.len(), held_out.unwrap_or_default());
        Summary { content, notes: Vec::new() }
    }

    /// Identifies the data beyond what the recipe says: a hash of the folder's contents. `None` if the recipe
    /// determines the data.
    fn fingerprint(&self) -> Option<String> {
        None
    }

    /// A hash of when the files of the data were last written, where there are files. If it changes while the
    /// [`fingerprint`](Self::fingerprint) stays the same, files were copied or overwritten: the fingerprint does not read
    /// their content.
    fn stamp(&self) -> Option<String> {
        None
    }

    /// The same samples at another size, with their held-out part, where they are drawn rather than stored.
    fn at_size(&self, _: ImageSize) -> Option<Arc<dyn Dataset>> {
        None
    }

    /// Samples set aside for probes, never trained on; `None`: probes take theirs from this dataset.
    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        None
    }
}

/// Training and held-out part: redrawn at this size if they are drawn, unchanged otherwise. If both are one dataset,
/// they stay one.
pub fn at_size(train: &Arc<dyn Dataset>, test: &Arc<dyn Dataset>, size: ImageSize) -> [Arc<dyn Dataset>; 2] {
    let drawn = |data: &Arc<dyn Dataset>| data.at_size(size).unwrap_or_else(|| data.clone());
    let first = drawn(train);
    let second = if Arc::ptr_eq(train, test) { first.clone() } else { drawn(test) };
    [first, second]
}
