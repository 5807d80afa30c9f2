//! A scene being composed: a part of a photograph, and cut-outs over it.

use image::imageops::{crop_imm, flip_horizontal_in_place, FilterType};
use image::{RgbImage, RgbaImage};

use crate::pixels::{rgb_resized, rgba_resized};

/// Where and how an object stands.
pub(super) struct Pose {
    /// Its middle in pixels.
    pub centre: [f32; 2],
    /// Its longer side in pixels.
    pub side: f32,
    /// How far it is turned, in radians, clockwise.
    pub angle: f32,
    /// Whether left and right change places.
    pub mirrored: bool,
}

/// A scene being composed.
pub(super) struct Canvas {
    width: usize,
    height: usize,
    /// 8-bit RGB, row-major, interleaved.
    pub rgb: Vec<u8>,
    /// The object that covers more than half of every pixel, the nearest of those; 0: none.
    pub ids: Vec<u8>,
}

impl Canvas {
    /// A part of a photograph, of the scene's aspect ratio: `part` of the largest there is, with its corner at shares `corner` of the room.
    pub fn new([width, height]: [usize; 2], photo: &RgbImage, part: f64, corner: [f64; 2], mirrored: bool) -> Self {
        let (w, h) = (f64::from(photo.width()), f64::from(photo.height()));
        let scale = (w / width as f64).min(h / height as f64) * part;
        let sides = [width, height].map(|side| ((side as f64 * scale) as u32).max(1));
        let room = [photo.width() - sides[0], photo.height() - sides[1]];
        let [x, y] = [0, 1].map(|i| (f64::from(room[i]) * corner[i]).round() as u32);
        let part = crop_imm(photo, x, y, sides[0], sides[1]).to_image();
        let mut scene = rgb_resized(part, width as u32, height as u32, FilterType::Triangle);
        if mirrored {
            flip_horizontal_in_place(&mut scene);
        }
        Self { width, height, rgb: scene.into_raw(), ids: vec![0; width * height] }
    }

    /// Pastes a cut-out, whose colours are multiplied by its opacity, over what is there.
    pub fn paste(&mut self, cut_out: &RgbaImage, pose: &Pose, id: u8) {
        let factor = pose.side / cut_out.width().max(cut_out.height()) as f32;
        let [w, h] = [cut_out.width(), cut_out.height()].map(|side| ((side as f32 * factor).round() as u32).max(1));
        let mut object = rgba_resized(cut_out.clone(), w, h, FilterType::Triangle);
        if pose.mirrored {
            flip_horizontal_in_place(&mut object);
        }
        let (sin, cos) = pose.angle.sin_cos();
        let half = [w, h].map(|side| side as f32 / 2.0);
        // The box around the turned object.
        let reach = [half[0] * cos.abs() + half[1] * sin.abs(), half[0] * sin.abs() + half[1] * cos.abs()];
        let range = |i: usize, side: usize| {
            let from = (pose.centre[i] - reach[i] - 1.0).floor().max(0.0) as usize;
            from..((pose.centre[i] + reach[i] + 1.0).ceil().max(0.0) as usize).min(side)
        };
        for y in range(1, self.height) {
            for x in range(0, self.width) {
                let (dx, dy) = (x as f32 + 0.5 - pose.centre[0], y as f32 + 0.5 - pose.centre[1]);
                let (u, v) = (dx * cos + dy * sin + half[0] - 0.5, dy * cos - dx * sin + half[1] - 0.5);
                let [r, g, b, a] = sample(&object, u, v);
                if a <= 0.0 {
                    continue;
                }
                let at = y * self.width + x;
                for (under, over) in self.rgb[3 * at..3 * at + 3].iter_mut().zip([r, g, b]) {
                    *under = (over + f32::from(*under) * (1.0 - a / 255.0) + 0.5).min(255.0) as u8;
                }
                if a > 127.5 {
                    self.ids[at] = id;
                }
            }
        }
    }
}

/// The pixel at `(u, v)`, in between by both neighbours in both directions; nothing outside.
fn sample(image: &RgbaImage, u: f32, v: f32) -> [f32; 4] {
    let (left, top) = (u.floor(), v.floor());
    let (right, bottom) = (u - left, v - top);
    let mut sum = [0.0; 4];
    for (dx, dy, weight) in [
        (0, 0, (1.0 - right) * (1.0 - bottom)),
        (1, 0, right * (1.0 - bottom)),
        (0, 1, (1.0 - right) * bottom),
        (1, 1, right * bottom),
    ] {
        let (x, y) = (left as i64 + dx, top as i64 + dy);
        let inside = (0..i64::from(image.width())).contains(&x) && (0..i64::from(image.height())).contains(&y);
        if inside {
            let pixel = image.get_pixel(x as u32, y as u32).0;
            sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * f32::from(value));
        }
    }
    sum
}
