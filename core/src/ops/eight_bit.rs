//! Moments in eight bits a number, and AdamW on them: a quarter of the memory.
//!
//! Block-wise dynamic quantisation of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861).
//! The greatest size among [`BLOCK`] neighbouring numbers is their scale; each number divided by it becomes the nearest of
//! 256 values that are closer together the smaller they are. An update reads a block, computes in f32 and writes it again.
//!
//! Two differences to the paper's map. The greatest value is 1 on both sides, so what is read from a block gives the same block when
//! it is written again: a checkpoint holds plain numbers. And a square that is not zero does not become zero: the update divides
//! by its root. As in the paper, rounding is to the nearest value: a square that grows by less than half a step stays as it is.

use std::sync::LazyLock;

use crate::tensor::blocks::*;
use crate::tensor::{copy_elements, parallel};
use crate::{simd, DType, Device, Error, Result, Tensor};

use super::adamw::{same_layout, Ema, FromElement, Group, Moments, Update};
use super::AdamW;

/// Numbers that share a scale.
pub const BLOCK: usize = 256;

/// Blocks that one task takes.
const AT_ONCE: usize = 64;

/// No scale is smaller: products with the least values would lose digits. Smaller numbers with a sign are zero, squares are not.
const LEAST_SCALE: f32 = f32::from_bits(27 << 23); // 2^-100

/// The values of both maps, ascending from 0 to 1: sizes of signed numbers, and numbers without a sign.
///
/// Decade e of 7, from 1e-6 times 0.1 to 1, is 2^e equal intervals (twice as many without a sign); a value is the middle of one.
static VALUES: LazyLock<[Vec<f32>; 2]> = LazyLock::new(|| {
    let values = |first: usize| {
        let decade = |e: i32| {
            let n = first << e;
            (0..n).map(move |j| (10f64.powi(e - 6) * (0.1 + 0.9 * (j as f64 + 0.5) / n as f64)) as f32)
        };
        let mut values: Vec<f32> = std::iter::once(0.0).chain((0..7).flat_map(decade)).collect();
        // Without a sign there is room for one value more.
        values.truncate(if first == 1 { 127 } else { 255 });
        values.push(1.0);
        values
    };
    [values(1), values(2)]
});

/// Which numbers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// Of both signs: means of gradients. Seven bits are the size's place, the eighth is set below zero.
    Signed,
    /// None below zero: means of squares.
    Unsigned,
}

impl Map {
    fn values(self) -> &'static [f32] {
        &VALUES[self as usize]
    }

    fn decode(self, code: u8) -> f32 {
        match self {
            Map::Signed if code & 0x80 != 0 => -self.values()[usize::from(code & 0x7f)],
            Map::Signed | Map::Unsigned => self.values()[usize::from(code)],
        }
    }

    /// The code of the value that is nearest to x, of size 1 at most; of two the smaller.
    fn encode(self, x: f32) -> u8 {
        let (values, size) = (self.values(), x.abs());
        let mut at = 0;
        for bit in (0..if self == Map::Signed { 7 } else { 8 }).rev() {
            let next = at | 1 << bit;
            if size > 0.5 * (values[next - 1] + values[next]) {
                at = next;
            }
        }
        match self {
            Map::Signed if x < 0.0 && at > 0 => at as u8 | 0x80,
            Map::Unsigned if x > 0.0 => at.max(1) as u8,
            Map::Signed | Map::Unsigned => at as u8,
        }
    }

    /// Numbers of a block; `to` may be shorter.
    fn read(self, codes: &[u8], scale: f32, to: &mut [f32]) {
        to.iter_mut().zip(codes).for_each(|(x, &code)| *x = self.decode(code) * scale);
    }

    /// Numbers to a block; gives its scale.
    fn write(self, numbers: &[f32], codes: &mut [u8]) -> f32 {
        let greatest = numbers.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        codes.fill(0);
        let scale = match self {
            Map::Signed if greatest < LEAST_SCALE => 0.0,
            Map::Unsigned if greatest > 0.0 => greatest.max(LEAST_SCALE),
            Map::Signed | Map::Unsigned => greatest,
        };
        if scale == 0.0 {
            return 0.0;
        }
        codes.iter_mut().zip(numbers).for_each(|(code, x)| *code = self.encode(x / scale));
        scale
    }
}

/// Blocks of numbers in eight bits each.
#[derive(Clone, Debug)]
pub struct EightBit {
    map: Map,
    /// Four a word: [`BLOCK`] for each block.
    codes: Tensor,
    /// One a block.
    scales: Tensor,
}

impl EightBit {
    /// So many blocks of zeros.
    pub fn zeros(map: Map, blocks: usize) -> Self {
        let (codes, scales) = (Tensor::zeros(&[blocks * BLOCK / 4], DType::U32), Tensor::zeros(&[blocks], DType::F32));
        Self { map, codes, scales }
    }

    /// As many zeros, on the current device.
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        Self::zeros(self.map, self.scales.len())
    }

    /// What a block takes of memory.
    pub(crate) const BYTES: usize = BLOCK + 4;

    /// Blocks that so many numbers take.
    pub fn blocks(len: usize) -> usize {
        len.div_ceil(BLOCK)
    }

    /// Codes and scales, as kernels read and write them.
    pub(crate) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.codes, &self.scales)
    }

    /// The scales: the greatest of them is the size of the greatest number.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// So many numbers from block `first` on; to be read, not changed.
    pub(crate) fn part(&self, first: usize, len: usize) -> Self {
        let blocks = Self::blocks(len);
        let (codes, scales) = (&self.codes, &self.scales);
        let words = BLOCK / 4;
        Self {
            map: self.map,
            codes: codes.view(first * words, &[blocks * words]),
            scales: scales.view(first, &[blocks]),
        }
    }

    /// Takes blocks, wherever they are, from block `first` on.
    pub(crate) fn put(&mut self, first: usize, blocks: &Self) -> Result<()> {
        copy_elements(&mut self.codes, first * BLOCK / 4, &blocks.codes, 0..blocks.codes.len())?;
        copy_elements(&mut self.scales, first, &blocks.scales, 0..blocks.scales.len())
    }

    /// The same on another device.
    #[must_use]
    pub fn to(&self, device: Device) -> Self {
        Self { map: self.map, codes: self.codes.to(device), scales: self.scales.to(device) }
    }

    /// Codes and scale of each block from `first` on, to be written, in host memory.
    fn blocks_mut(&mut self, first: usize) -> impl Blocks<Piece = (&mut [u8], &mut f32)> {
        let codes: &mut [u8] = bytemuck::cast_slice_mut(self.codes.as_mut_slice::<u32>());
        let scales = &mut self.scales.as_mut_slice::<f32>()[first..];
        codes[first * BLOCK..].par_chunks_mut(BLOCK).zip(scales.par_iter_mut()).with_min_len(AT_ONCE)
    }

    /// The numbers from block `first` on, in host memory.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&self, first: usize, to: &mut [f32]) {
        let codes: &[u8] = bytemuck::cast_slice(self.codes.as_slice::<u32>());
        let scales = &self.scales.as_slice::<f32>()[first..];
        let blocks = codes[first * BLOCK..].par_chunks(BLOCK).zip(scales.par_iter());
        let blocks = to.par_chunks_mut(BLOCK).zip(blocks).with_min_len(AT_ONCE);
        blocks.for_each(|(to, (codes, &scale))| self.map.read(codes, scale, to));
    }

    /// Writes numbers from block `first` on, in host memory.
    ///
    /// # Panics
    /// If there is no room.
    pub fn write(&mut self, first: usize, numbers: &[f32]) {
        let map = self.map;
        let blocks = numbers.par_chunks(BLOCK).zip(self.blocks_mut(first));
        blocks.for_each(|(numbers, (codes, scale))| *scale = map.write(numbers, codes));
    }

    /// The values of both maps as kernels look them up: 128 of sizes with a sign, and 256.
    pub(crate) fn values() -> Vec<f32> {
        VALUES.concat()
    }
}

/// Where the moments of a group are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In 32 bits, from this element on.
    Whole(usize),
    /// In eight bits, from this block on.
    Eight(usize),
}

/// The moments of all groups.
pub struct MixedMoments<'a> {
    /// Those in 32 bits, one behind the other.
    pub whole: Moments<'a>,
    /// Means of gradients in eight bits.
    pub mean: &'a mut EightBit,
    /// Means of their squares in eight bits.
    pub square: &'a mut EightBit,
}

/// The step of [`adamw_step`](super::adamw_step) on moments of which some are in eight bits: those of every group are where
/// its place says. In f32, in host memory.
///
/// # Errors
/// If buffers are of another type, or differ in length.
pub fn adamw_step_8bit(
    params: &mut Tensor,
    grads: &Tensor,
    moments: MixedMoments<'_>,
    ema: Option<Ema<'_>>,
    groups: &[(Group, Place)],
    config: AdamW,
    step: u64,
) -> Result<()> {
    same_layout("adamw", params, grads)?;
    adamw_part_8bit(params, FromElement { tensor: grads, start: 0 }, moments, ema, groups, config, step)
}

/// The same of a part of the parameters, in which all groups are.
pub(crate) fn adamw_part_8bit(
    params: &mut Tensor,
    grads: FromElement<'_>,
    moments: MixedMoments<'_>,
    mut ema: Option<Ema<'_>>,
    groups: &[(Group, Place)],
    config: AdamW,
    step: u64,
) -> Result<()> {
    if params.dtype() != DType::F32 {
        return Err(Error::shape("adamw", format!("moments in eight bits are those of f32, not {:?}", params.dtype())));
    }
    let MixedMoments { whole, mean, square } = moments;
    for (group, place) in groups {
        let update = Update::<f32>::new(group, config, ema.as_ref(), step);
        let range = group.range.clone();
        let (p, g) = (&mut params.as_mut_slice::<f32>()[range.clone()], grads.slice::<f32>(range.clone()));
        let ema = ema.as_mut().map(|ema| ema.slice::<f32>(range)).transpose()?;
        let numbers = p.len();
        let part = match place {
            Place::Whole(_) => parallel::BLOCK,
            Place::Eight(_) => BLOCK,
        };
        let mut ema: Vec<&mut [f32]> = match ema {
            Some(ema) => ema.chunks_mut(part).collect(),
            None => (0..numbers.div_ceil(part)).map(|_| <&mut [f32]>::default()).collect(),
        };
        let parts = p.par_chunks_mut(part).zip(g.par_chunks(part)).zip(ema.par_iter_mut());
        match *place {
            Place::Whole(at) => {
                let m = &mut whole.mean.as_mut_slice::<f32>()[at..at + numbers];
                let v = &mut whole.square.as_mut_slice::<f32>()[at..at + numbers];
                parts
                    .zip(m.par_chunks_mut(part).zip(v.par_chunks_mut(part)))
                    .for_each(|(((p, g), ema), (m, v))| simd!(f32, update.run(p, g, m, v, ema)));
            }
            Place::Eight(first) => {
                let (m, v) = (mean.blocks_mut(first), square.blocks_mut(first));
                parts.zip(m.zip(v)).for_each(|(((p, g), ema), ((m, of_m), (v, of_v)))| {
                    let (mut mean, mut square) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let (mean, square) = (&mut mean[..p.len()], &mut square[..p.len()]);
                    Map::Signed.read(m, *of_m, mean);
                    Map::Unsigned.read(v, *of_v, square);
                    simd!(f32, update.run(p, g, mean, square, ema));
                    *of_m = Map::Signed.write(mean, m);
                    *of_v = Map::Unsigned.write(square, v);
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAPS: [Map; 2] = [Map::Signed, Map::Unsigned];

    #[test]
    fn values_ascend_from_zero_to_one_by_the_steps_of_the_paper() {
        for (map, count, first, intervals) in [(Map::Signed, 128, 64, 64), (Map::Unsigned, 256, 127, 128)] {
            let values = map.values();
            assert_eq!((values.len(), values[0], values[count - 1]), (count, 0.0, 1.0));
            assert!(values.windows(2).all(|pair| pair[0] < pair[1]));
            // The last decade is 0.1 to 1, in equal steps.
            let step = 0.9 / intervals as f32;
            let last = &values[first..count - 1];
            assert!(last.windows(2).all(|pair| (pair[1] - pair[0] - step).abs() < 1e-6));
            assert!((last[0] - (0.1 + step / 2.0)).abs() < 1e-6);
        }
        // The least sizes: 1e-7 to 1e-6 in one interval, and in two.
        assert_eq!([Map::Signed.values()[1], Map::Unsigned.values()[1]], [5.5e-7, 3.25e-7]);
    }

    #[test]
    fn every_code_is_that_of_its_value() {
        for map in MAPS {
            // Minus zero is zero.
            for code in (0..=255).filter(|&code| map == Map::Unsigned || code != 0x80) {
                assert_eq!(map.encode(map.decode(code)), code, "{map:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_value_is_nearer_than_the_one_taken(x in -1.0f32..1.0, decades in 0..8i32) {
            for map in MAPS {
                let x = if map == Map::Signed { x } else { x.abs() } * 10f32.powi(-decades);
                let found = map.decode(map.encode(x));
                let nearest = map.values().iter().map(|v| (v - x.abs()).abs()).fold(f32::INFINITY, f32::min);
                // A square that is not zero takes the least value above it.
                let least = if map == Map::Unsigned && x > 0.0 { map.values()[1] - x } else { 0.0 };
                prop_assert!((found - x).abs() <= nearest.max(least) * 1.000_001, "{map:?} {x:e}: {found:e}");
                prop_assert!(map == Map::Signed || x == 0.0 || found > 0.0);
            }
        }

        /// What is read and written again is the same block: a checkpoint of plain numbers loses nothing.
        #[test]
        fn a_block_that_is_written_again_stays(
            size in -44..38i32, numbers in proptest::collection::vec((-1.0f32..1.0, -8..1i32), 1..3 * BLOCK),
        ) {
            let numbers: Vec<f32> = numbers.iter().map(|(x, e)| x * 10f32.powi(*e) * 10f32.powi(size)).collect();
            for map in MAPS {
                let numbers: Vec<f32> = numbers.iter().map(|x| if map == Map::Signed { *x } else { x.abs() }).collect();
                let mut first = EightBit::zeros(map, EightBit::blocks(numbers.len()) + 1);
                first.write(1, &numbers);
                let mut read = vec![f32::NAN; numbers.len()];
                first.read(1, &mut read);
                let most = numbers.chunks(BLOCK).map(|b| b.iter().fold(0.0f32, |m, x| m.max(x.abs())));
                let far = read.chunks(BLOCK).zip(numbers.chunks(BLOCK)).zip(most);
                for ((read, numbers), most) in far {
                    let farthest = read.iter().zip(numbers).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    // Half of the widest interval, which has the greatest number at its end.
                    prop_assert!(farthest <= most * 0.9 / 64.0 || most < LEAST_SCALE && farthest <= LEAST_SCALE);
                    let lost = |(read, x): (&f32, &f32)| map == Map::Unsigned && *x > 0.0 && *read == 0.0;
                    prop_assert!(!read.iter().zip(numbers).any(lost), "a square became zero");
                }
                let mut second = EightBit::zeros(map, EightBit::blocks(numbers.len()) + 1);
                second.write(1, &read);
                prop_assert_eq!(first.codes.as_bytes(), second.codes.as_bytes());
                prop_assert_eq!(first.scales.as_bytes(), second.scales.as_bytes());
            }
        }
    }
}
