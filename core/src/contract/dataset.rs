//! Where images come from.

use std::fmt;

use crate::Result;

/// One image with what is known about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// 8-bit RGB, row-major, interleaved: `3 * width * height` bytes.
    pub rgb: Vec<u8>,
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
///         let rgb = vec![index as u8; 3 * 32 * 32];
///         Ok(Sample { width: 32, height: 32, rgb, label: Some(u32::from(index >= 128)), ..Sample::default() })
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
            n => format!(" in {n} classes"),
        };
        let held_out = self.held_out().map(|part| format!(", {} held out for probes", part.len()));
        let content = format!("{} images{classes}{}", self.len(), held_out.unwrap_or_default());
        Summary { content, notes: Vec::new() }
    }

    /// What the recipe does not say of the data: a hash of what the folder holds. `None` if the recipe says it all.
    fn fingerprint(&self) -> Option<String> {
        None
    }

    /// Samples set aside for probes, never trained on; `None`: probes take theirs from this dataset.
    fn held_out(&self) -> Option<std::sync::Arc<dyn Dataset>> {
        None
    }
}
