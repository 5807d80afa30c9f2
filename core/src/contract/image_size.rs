//! The size of an image in pixels, as recipes and command lines have it: 64, or "96x64".

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{json_schema, JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Width and height of an image in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl ImageSize {
    /// The longest side that may be asked for.
    const MOST: usize = 16_384;

    /// As wide as high.
    pub fn square(side: usize) -> Self {
        Self { width: side, height: side }
    }

    /// Width times height.
    pub fn pixels(self) -> usize {
        self.width * self.height
    }

    /// Width, if it is the height too.
    pub fn side(self) -> Option<usize> {
        (self.width == self.height).then_some(self.width)
    }

    /// The largest part of this shape that fits into an image of `width` x `height` pixels; at least a pixel.
    pub fn within(self, width: usize, height: usize) -> Self {
        // Twice the exact number and one, halved: to the nearest.
        let round = |side: usize, by: usize, over: usize| ((2 * side * by + over) / (2 * over)).max(1);
        match width * self.height > height * self.width {
            true => Self { width: round(height, self.width, self.height), height },
            false => Self { width, height: round(width, self.height, self.width) },
        }
    }

    /// Why a model with patches of this size cannot take an image of this size, and what to do; `least` is the smallest side
    /// that it accepts.
    pub fn unfit(self, patch: usize, least: usize) -> Option<(String, String)> {
        let fits = |side: usize| side >= least && side.is_multiple_of(patch) && side > 0;
        if fits(self.width) && fits(self.height) {
            return None;
        }
        let least = least.max(1).next_multiple_of(patch);
        let below = |side: usize| (side / patch * patch).max(least);
        let low = Self { width: below(self.width), height: below(self.height) };
        let high = Self { width: low.width + patch, height: low.height + patch };
        let problem =
            format!("images of {self} pixels: a side is a multiple of {patch}, the patch, and at least {least}");
        Some((problem, format!("{low} or {high}")))
    }
}

/// `64`, or `96x64`: width and height.
impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.side() {
            Some(side) => write!(f, "{side}"),
            None => write!(f, "{}x{}", self.width, self.height),
        }
    }
}

impl FromStr for ImageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (width, height) = text.split_once('x').unwrap_or((text, text));
        let side = |side: &str| side.parse().ok().filter(|side| (1..=Self::MOST).contains(side));
        let size = side(width).zip(side(height)).map(|(width, height)| Self { width, height });
        size.ok_or_else(|| format!("{text:?} is no size: 64, or 96x64 (width x height), of 1 to {} pixels", Self::MOST))
    }
}

impl Serialize for ImageSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.side() {
            Some(side) => serializer.serialize_u64(side as u64),
            None => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for ImageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Side(usize),
            Text(String),
        }
        let text = match Written::deserialize(deserializer) {
            Ok(Written::Side(side)) => side.to_string(),
            Ok(Written::Text(text)) => text,
            Err(_) => return Err(D::Error::custom("a size is a number of pixels, or \"96x64\" (width x height)")),
        };
        text.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for ImageSize {
    fn schema_name() -> Cow<'static, str> {
        "ImageSize".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "integer", "minimum": 1, "maximum": Self::MOST },
            { "type": "string", "pattern": "^[1-9][0-9]*x[1-9][0-9]*$", "description": "width x height" },
        ] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        let wide = ImageSize { width: 96, height: 64 };
        for (size, text, json) in [(wide, "96x64", "\"96x64\""), (ImageSize::square(64), "64", "64")] {
            assert_eq!((text.parse(), size.to_string().as_str()), (Ok(size), text));
            assert_eq!(serde_json::to_string(&size).unwrap(), json);
            assert_eq!(serde_json::from_str::<ImageSize>(json).unwrap(), size);
        }
        for wrong in ["0", "x", "96x", "96x0", "-3", "20000", "1x2x3"] {
            assert!(wrong.parse::<ImageSize>().is_err_and(|e| e.contains(wrong)), "{wrong}");
        }
    }

    #[test]
    fn the_largest_part_of_a_shape_has_a_side_of_the_image() {
        let within = |width, height, w, h| ImageSize { width, height }.within(w, h).to_string();
        assert_eq!(within(64, 64, 100, 70), "70");
        assert_eq!(within(96, 64, 100, 100), "100x67");
        assert_eq!(within(64, 96, 100, 100), "67x100");
        assert_eq!(within(64, 32, 90, 50), "90x45");
        assert_eq!(within(1000, 1, 3, 3), "3x1");
    }

    #[test]
    fn a_size_that_does_not_go_with_patches_is_told_of_its_neighbours() {
        assert_eq!(ImageSize { width: 96, height: 64 }.unfit(16, 0), None);
        let (_, help) = ImageSize { width: 96, height: 50 }.unfit(8, 32).unwrap();
        assert_eq!(help, "96x48 or 104x56");
        assert_eq!(ImageSize::square(5).unfit(8, 0).unwrap().1, "8 or 16");
    }
}
