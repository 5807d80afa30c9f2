//! The values of an image.

use std::borrow::Cow;

/// The values of an image's pixels, row-major and interleaved: all channels of the first pixel, then those of the next.
///
/// ```
/// use dinolab_core::contract::Pixels;
///
/// let rgb: Pixels = vec![0u8, 128, 255].into();
/// assert_eq!(rgb.get(2), 1.0);
/// let infrared: Pixels = vec![65535u16].into();
/// assert_eq!(infrared.get(0), 1.0);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// Of 8 bits: 255 is 1.
    U8(Vec<u8>),
    /// Of 16 bits: 65535 is 1.
    U16(Vec<u16>),
}

impl Default for Pixels {
    fn default() -> Self {
        Self::U8(Vec::new())
    }
}

impl From<Vec<u8>> for Pixels {
    fn from(values: Vec<u8>) -> Self {
        Self::U8(values)
    }
}

impl From<Vec<u16>> for Pixels {
    fn from(values: Vec<u16>) -> Self {
        Self::U16(values)
    }
}

impl FromIterator<u8> for Pixels {
    fn from_iter<I: IntoIterator<Item = u8>>(values: I) -> Self {
        Self::U8(values.into_iter().collect())
    }
}

impl FromIterator<u16> for Pixels {
    fn from_iter<I: IntoIterator<Item = u16>>(values: I) -> Self {
        Self::U16(values.into_iter().collect())
    }
}

impl Pixels {
    /// How many values there are: channels times width times height.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::U16(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Value `i` in [0, 1].
    ///
    /// # Panics
    /// If there are not so many.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::U8(values) => f32::from(values[i]) / 255.0,
            Self::U16(values) => f32::from(values[i]) / 65535.0,
        }
    }

    /// The values as they lie in memory.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::U8(values) => values,
            Self::U16(values) => bytemuck::cast_slice(values),
        }
    }

    /// Pixels of `channels` values in 8-bit RGB, to be looked at: of three or more channels the first three, of fewer the first
    /// as grey; of 16 bits the upper 8.
    pub(super) fn to_rgb(&self, channels: usize) -> Cow<'_, [u8]> {
        match self {
            Self::U8(values) if channels == 3 => Cow::Borrowed(values),
            Self::U8(values) => rgb(values, channels, |v| v),
            Self::U16(values) => rgb(values, channels, |v| (v >> 8) as u8),
        }
    }
}

fn rgb<T: Copy>(values: &[T], channels: usize, upper: impl Fn(T) -> u8) -> Cow<'static, [u8]> {
    let shown = if channels < 3 { [0; 3] } else { [0, 1, 2] };
    values.chunks_exact(channels.max(1)).flat_map(|pixel| shown.map(|c| upper(pixel[c]))).collect()
}
