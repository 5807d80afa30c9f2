//! What surfaces look like: patterns between two colours.

use dinolab_core::rng::Rng;

/// A pattern; lengths are in shares of the scene's shorter side, so that a scene looks the same at any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Gradient,
    Stripes,
    Checks,
    Dots,
    Clouds,
    Grain,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Self; 6] = [Self::Gradient, Self::Stripes, Self::Checks, Self::Dots, Self::Clouds, Self::Grain];
}

/// A pattern with its direction, scale and two colours.
pub struct Texture {
    pattern: Pattern,
    /// Unit of the pattern in pixels.
    period: f32,
    direction: [f32; 2],
    origin: [f32; 2],
    lattice: Vec<u8>,
    /// Colour where the pattern is 0 and where it is 1, linear in 0..=255.
    pub colors: [[f32; 3]; 2],
}

/// Side of the noise lattice; it repeats beyond.
const LATTICE: usize = 16;

impl Texture {
    /// `scale` is the scene's shorter side in pixels; `colors` the two colours.
    pub fn draw(rng: &mut Rng, pattern: Pattern, scale: f32, colors: [[f32; 3]; 2]) -> Self {
        let period = match pattern {
            Pattern::Gradient => rng.uniform(0.7, 1.4),
            Pattern::Stripes => rng.uniform(0.06, 0.16),
            Pattern::Checks => rng.uniform(0.1, 0.2),
            Pattern::Dots => rng.uniform(0.07, 0.14),
            Pattern::Clouds => rng.uniform(0.12, 0.3),
            Pattern::Grain => rng.uniform(0.025, 0.05),
        };
        let angle = rng.uniform(0.0, std::f64::consts::TAU);
        let lattice = match pattern {
            Pattern::Clouds | Pattern::Grain => {
                (0..LATTICE * LATTICE / 4).flat_map(|_| rng.u32().to_le_bytes()).collect()
            }
            _ => Vec::new(),
        };
        Self {
            pattern,
            period: (period as f32 * scale).max(1.0),
            direction: [angle.cos() as f32, angle.sin() as f32],
            origin: [rng.unit() as f32, rng.unit() as f32],
            lattice,
            colors,
        }
    }

    /// The pattern in [0, 1] at the pixels `first..first + out.len()` of row `y`.
    #[inline(always)]
    pub fn row(&self, y: usize, first: usize, out: &mut [f32]) {
        let ([c, s], [ou, ov], inverse) = (self.direction, self.origin, 1.0 / self.period);
        let y = y as f32;
        let turned = move |i: usize| {
            let x = (first + i) as f32;
            ((x * c + y * s) * inverse + ou, (y * c - x * s) * inverse + ov)
        };
        // Edges are one pixel wide.
        let soft = self.period;
        let pixels = out.iter_mut().enumerate();
        match self.pattern {
            Pattern::Gradient => pixels.for_each(
                #[inline(always)]
                |(i, t)| *t = 2.0 * wave(0.5 * turned(i).0),
            ),
            Pattern::Stripes => {
                pixels.for_each(
                    #[inline(always)]
                    |(i, t)| *t = ((wave(turned(i).0) - 0.25) * soft + 0.5).clamp(0.0, 1.0),
                );
            }
            Pattern::Checks => pixels.for_each(
                #[inline(always)]
                |(i, t)| {
                    let (u, v) = turned(i);
                    let product = (wave(u) - 0.25) * (wave(v) - 0.25) * 4.0;
                    *t = (product * soft + 0.5).clamp(0.0, 1.0);
                },
            ),
            Pattern::Dots => pixels.for_each(
                #[inline(always)]
                |(i, t)| {
                    let (u, v) = turned(i);
                    let (u, v) = (wave(u), wave(v));
                    *t = ((0.3 - (u * u + v * v).sqrt()) * soft + 0.5).clamp(0.0, 1.0);
                },
            ),
            Pattern::Clouds => {
                out.fill(0.0);
                self.add_noise(y * inverse, first as f32 * inverse, inverse, 1.12, smooth, out);
                self.add_noise(y * inverse * 2.1, first as f32 * inverse * 2.1, inverse * 2.1, 0.48, smooth, out);
                out.iter_mut().for_each(
                    #[inline(always)]
                    |t| *t = (*t - 0.3).clamp(0.0, 1.0),
                );
            }
            Pattern::Grain => {
                out.fill(0.0);
                self.add_noise(y * inverse, first as f32 * inverse, inverse, 1.0, |t| t, out);
            }
        }
    }

    /// Adds value noise: interpolation along `curve` between random values in [0, amplitude] on a lattice.
    #[inline(always)]
    fn add_noise(&self, v: f32, u: f32, step: f32, amplitude: f32, curve: impl Fn(f32) -> f32, out: &mut [f32]) {
        let line = v.floor();
        let weight = curve(v - line);
        let (top, bottom) = (line as usize % LATTICE * LATTICE, (line as usize + 1) % LATTICE * LATTICE);
        let mut values = [0.0f32; LATTICE + 1];
        for (i, value) in values.iter_mut().enumerate() {
            let (a, b) = (self.lattice[top + i % LATTICE], self.lattice[bottom + i % LATTICE]);
            let (a, b) = (f32::from(a), f32::from(b));
            *value = (a + (b - a) * weight) * (amplitude / 255.0);
        }
        for (i, t) in out.iter_mut().enumerate() {
            let u = u + i as f32 * step;
            let cell = u as usize;
            let (a, b) = (values[cell % LATTICE], values[cell % LATTICE + 1]);
            *t += a + (b - a) * curve(u - cell as f32);
        }
    }
}

/// Distance to the nearest whole number.
#[inline(always)]
fn wave(u: f32) -> f32 {
    (u - (u + 0.5).floor()).abs()
}

/// From 0 to 1 without corners.
#[inline(always)]
fn smooth(t: f32) -> f32 {
    t * t * (3.0 - 2.0 * t)
}

/// A colour from hue, saturation and value in [0, 1], as red, green and blue in 0..=255.
pub fn hsv(hue: f64, saturation: f64, value: f64) -> [f32; 3] {
    [5.0, 3.0, 1.0].map(|offset| {
        let k = (offset + hue.rem_euclid(1.0) * 6.0) % 6.0;
        (255.0 * value * (1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0))) as f32
    })
}
