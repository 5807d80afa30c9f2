//! Randomness as a pure function: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! Every draw is a function of (seed, stream, step, index): nothing is stored or shared, so a resumed run, another
//! number of loader threads and another device see the same crops, masks, jitter and dropped paths.

/// What a random number is for. Each purpose has its own stream, so that drawing more of one never shifts another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Parameter initialisation; index: parameter.
    Init = 1,
    /// The order of samples; step: epoch.
    Order = 2,
    /// Crop geometry and colour distortion; index: sample and crop.
    Augment = 3,
    /// Masked patches; index: image.
    Mask = 4,
    /// Position-encoding jitter; index: block and crop kind.
    Position = 5,
    /// Dropped paths; index: block and crop kind.
    DropPath = 6,
    /// Content of generated images; index: image.
    Scene = 7,
    /// Probes: training order, patches shown.
    Probe = 8,
    /// Which crop sizes a step has.
    Resolution = 11,
    /// What a loss draws; index: its name.
    Loss = 12,
    /// For plugins outside this repository.
    Plugin = 9,
    /// Resampling in a report.
    Statistics = 10,
}

/// Draws that may be rejected before zero is taken: all of them are with a probability below 2^-64.
const REJECTIONS: usize = 64;

/// A sequence of draws for one (seed, stream, step, index).
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// The sequence of `(seed, stream, step, index)`.
    pub fn new(seed: u64, stream: Stream, step: u64, index: u64) -> Self {
        // The counter's first word counts blocks of four draws. Step and index are folded to 48 bits of counter each
        // by splitting: 32 bits each in the counter, their high halves mixed into the key with the stream.
        let high = ((step >> 32) as u32).rotate_left(16) ^ ((index >> 32) as u32);
        let key = [(seed as u32) ^ ((stream as u32) << 24), ((seed >> 32) as u32) ^ high];
        Self { key, counter: [0, stream as u32, step as u32, index as u32], block: [0; 4], used: 4 }
    }

    /// The sequence of what is called `name`: it depends on no other thing that is drawn for.
    pub fn named(seed: u64, stream: Stream, step: u64, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let index = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        Self::new(seed, stream, step, index)
    }

    /// What comes after that many blocks of four 32-bit integers, counted from the start of the sequence: a normal number
    /// takes one block, two uniform ones share one.
    pub(crate) fn after_blocks(&self, blocks: usize) -> Self {
        let [_, stream, step, index] = self.counter;
        Self { counter: [blocks as u32, stream, step, index], block: [0; 4], used: 4, ..*self }
    }

    /// No [`normal`](Self::normal) number is as large: `sqrt(-2 ln 2^-53)` is 8.572.
    pub(crate) const GREATEST_NORMAL: f64 = 8.6;

    /// Uniform over all 32-bit integers.
    #[inline]
    pub fn u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn unit(&mut self) -> f64 {
        let high = u64::from(self.u32()) << 32;
        let bits = (high | u64::from(self.u32())) >> 11;
        bits as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Log-uniform in [low, high).
    pub fn log_uniform(&mut self, low: f64, high: f64) -> f64 {
        self.uniform(low.ln(), high.ln()).exp()
    }

    /// Uniform in 0..n, without bias.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "there is no integer below 0");
        let n = n as u64;
        let wide = n > 1 << 32;
        // Rejection of the incomplete last interval, which is less than half of all.
        let limit = if wide { u64::MAX - u64::MAX % n } else { (1u64 << 32) - (1u64 << 32) % n };
        let mut draw = || match wide {
            true => u64::from(self.u32()) << 32 | u64::from(self.u32()),
            false => u64::from(self.u32()),
        };
        let drawn = (0..REJECTIONS).map(|_| draw()).find(|&x| x < limit);
        (drawn.unwrap_or(0) % n) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.unit()).cos()
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// A random order of 0..n.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        self.shuffle(&mut order);
        order
    }
}

/// Ten rounds of Philox4x32.
#[inline]
pub fn philox4x32_10(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of the Random123 distribution (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_equals_the_published_vectors() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([0xffff_ffff; 4], [0xffff_ffff; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_depend_on_every_coordinate_and_nothing_else() {
        let draw = |seed, stream, step, index| Rng::new(seed, stream, step, index).u32();
        let base = draw(1, Stream::Augment, 2, 3);
        assert_eq!(base, draw(1, Stream::Augment, 2, 3));
        for other in [
            draw(2, Stream::Augment, 2, 3),
            draw(1 << 40, Stream::Augment, 2, 3),
            draw(1, Stream::Mask, 2, 3),
            draw(1, Stream::Augment, 3, 3),
            draw(1, Stream::Augment, 2 | 1 << 33, 3),
            draw(1, Stream::Augment, 2, 4),
            draw(1, Stream::Augment, 2, 3 | 1 << 35),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn integers_below_any_bound_are_drawn() {
        let mut rng = Rng::new(3, Stream::Probe, 0, 0);
        for n in [1, 2, 3, (1 << 31) + 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, usize::MAX / 2 + 2, usize::MAX] {
            assert!((0..1000).all(|_| rng.below(n) < n), "{n}");
        }
        let high = (0..1000).filter(|_| rng.below(1 << 40) >= 1 << 39).count();
        assert!((400..600).contains(&high), "{high} of 1000 are in the upper half");
    }

    #[test]
    fn uniform_moments_are_right() {
        let mut rng = Rng::new(7, Stream::Probe, 0, 0);
        let n = 200_000;
        let x: Vec<f64> = (0..n).map(|_| rng.unit()).collect();
        let mean = x.iter().sum::<f64>() / n as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0f64 / n as f64).sqrt(), "mean {mean}");
        assert!((var - 1.0 / 12.0).abs() < 1e-3, "variance {var}");
    }
}
