//! What the values of a pixel are: whole numbers of 8 or 16 bits.

use bytemuck::Pod;
use fast_image_resize::pixels::{U16x3, U8x3, U16, U8};
use fast_image_resize::PixelTrait;

/// A value of 8 or 16 bits.
pub(super) trait Value: Pod {
    /// The greatest, which is 1 in pixels of [0, 1].
    const TOP: f32;
    /// A pixel of one of them, for a resize.
    type One: PixelTrait;
    /// A pixel of three.
    type Three: PixelTrait;

    /// The same whole number.
    fn to_f32(self) -> f32;

    /// The same of a whole number.
    fn of_f32(x: f32) -> Self;
}

impl Value for u8 {
    const TOP: f32 = 255.0;
    type One = U8;
    type Three = U8x3;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.into()
    }

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        x as Self
    }
}

impl Value for u16 {
    const TOP: f32 = 65535.0;
    type One = U16;
    type Three = U16x3;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.into()
    }

    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        x as Self
    }
}
