//! The numbers of a model in flat memory: as wide as they are updated, and as wide as a step computes with them.
//!
//! Where features are bf16, a number of f32 is kept as two halves of 16 bits: itself rounded to bf16, which the step reads as it
//! is, and its lower bits. Both together are the f32, exactly, for every pattern of bits: 4 bytes a number in place of 6.
//! Numbers half way between two of bf16 are rounded away from zero, since from a number rounded to even the upper bits could
//! not be told. Only updates need the lower bits, so they may lie in host memory ([`OptimizerConfig`]'s `offload`), and each of
//! several ranks has those of the part that it updates ([`parts`](super::parts)). Of a teacher that is sharded it has nothing else:
//! what a step computes with is [gathered](super::gathered).
//!
//! [`OptimizerConfig`]: crate::recipe::OptimizerConfig

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::cuda::{args, Arg};
use crate::ops::Ema;
use crate::params::Layout;
use crate::tensor::{copy_elements, greatest};
use crate::{cuda_source, ops, DType, Device, Error, Result, Tensor};

use super::parts::{within, Share};

cuda_source! { static HALVES = "halves" { include_str!("halves.cu") } }

/// Numbers that are drawn before they are brought to the device.
const DRAWN_TOGETHER: usize = 1 << 26;

/// Numbers of one task of the CPU.
const CHUNK: usize = 1 << 16;

/// Flat numbers: f32 or f64, or f32 in halves.
pub struct Flat {
    kept: Kept,
    len: usize,
    /// Those that are here: all, or this rank's part.
    held: Range<usize>,
    spread: Spread,
}

/// What each of several ranks has of its part alone. The part of one may be all of a small model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    Nothing,
    /// The lower halves.
    Lower,
    /// Everything.
    All,
}

/// How a rank keeps numbers.
pub(super) struct Keeping {
    /// Those that it updates, from and to even ones.
    pub(super) own: Range<usize>,
    /// Which of the ranks it is.
    pub(super) share: Share,
    /// Whether lower halves are in host memory.
    pub(super) offload: bool,
    /// Whether those of each rank are nowhere else.
    pub(super) sharded: bool,
}

enum Kept {
    Wide(Tensor),
    /// The lower halves, two to a word of u32, are those of the elements `own`.
    Halves {
        rounded: Tensor,
        lower: Tensor,
        own: Range<usize>,
    },
}

/// Lower halves from `start` on, which is even, of those that lie two to a word.
fn read_lower(lower: &Tensor, start: usize, len: usize) -> Vec<u16> {
    let words = lower.view(start / 2, &[len.div_ceil(2)]).to(Device::Cpu);
    bytemuck::cast_slice(words.as_slice::<u32>())[..len].to_vec()
}

/// Writes them; an odd last one takes its neighbour with it, which belongs to no number.
fn write_lower(to: &mut Tensor, start: usize, lower: &[u16]) -> Result<()> {
    let mut words = Device::Cpu.with(|| Tensor::zeros(&[lower.len().div_ceil(2)], DType::U32));
    bytemuck::cast_slice_mut(words.as_mut_slice::<u32>())[..lower.len()].copy_from_slice(lower);
    copy_elements(to, start / 2, &words, 0..words.len())
}

/// The number rounded to bf16, and its lower half.
fn split(x: f32) -> (bf16, u16) {
    let bits = x.to_bits();
    (bf16::from_bits((bits.wrapping_add(0x8000) >> 16) as u16), bits as u16)
}

/// The number of these halves.
fn join(rounded: bf16, lower: u16) -> f32 {
    let upper = rounded.to_bits().wrapping_sub(lower >> 15);
    f32::from_bits(u32::from(upper) << 16 | u32::from(lower))
}

impl From<Tensor> for Flat {
    fn from(wide: Tensor) -> Self {
        Self { len: wide.len(), held: 0..wide.len(), kept: Kept::Wide(wide), spread: Spread::Nothing }
    }
}

impl Flat {
    /// `len` zeros for features of type `features`.
    ///
    /// # Errors
    /// If there is not that much host memory.
    pub(super) fn zeros(
        len: usize,
        features: DType,
        Keeping { own, share, offload, sharded }: Keeping,
    ) -> Result<Self> {
        let spread = match (share.world() > 1, sharded) {
            (false, _) => Spread::Nothing,
            (true, true) => Spread::All,
            (true, false) if features == DType::BF16 => Spread::Lower,
            (true, false) => Spread::Nothing,
        };
        let held = if spread == Spread::All { own.clone() } else { 0..len };
        if features != DType::BF16 {
            let kept = Kept::Wide(Tensor::zeros(&[held.len()], features));
            return Ok(Self { kept, len, held, spread });
        }
        let rounded = Tensor::zeros(&[held.len()], DType::BF16);
        let lower = match rounded.gpu().filter(|_| offload) {
            Some(gpu) => Tensor::zeros_beside(gpu, &[own.len() / 2], DType::U32)?,
            None => Tensor::zeros(&[own.len() / 2], DType::U32),
        };
        Ok(Self { kept: Kept::Halves { rounded, lower, own }, len, held, spread })
    }

    /// How many numbers they are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The type in which they are updated.
    pub fn dtype(&self) -> DType {
        self.here().dtype().wide()
    }

    /// What a step computes with: all numbers are here.
    pub(super) fn rounded(&self) -> &Tensor {
        assert!(!self.is_sharded(), "a sharded model is gathered");
        self.here()
    }

    /// What a step computes with, of the numbers that are here.
    pub(super) fn here(&self) -> &Tensor {
        match &self.kept {
            Kept::Wide(wide) => wide,
            Kept::Halves { rounded, .. } => rounded,
        }
    }

    /// Which they are: all, or of a teacher that is sharded this rank's part.
    pub fn held(&self) -> &Range<usize> {
        &self.held
    }

    /// Whether each rank has its part of them alone.
    pub fn is_sharded(&self) -> bool {
        self.spread == Spread::All
    }

    /// Those of others that are here.
    fn here_of(&self, other: &Tensor, others: &Range<usize>) -> Tensor {
        let start = self.held.start.max(others.start) - others.start;
        other.view(start, &[self.held.len()])
    }

    /// A teacher of a CPU that follows in the update.
    pub(super) fn ema(&mut self, momentum: f64) -> Ema<'_> {
        let start = self.held.start;
        Ema { params: self.wide_mut(), start, momentum }
    }

    /// Where they are on a GPU, for the kernels of `adamw.cu`.
    pub(super) fn place(&self) -> Arg {
        // Kernels count from the first element.
        let first = |of: &Tensor| of.device_address().wrapping_sub((of.dtype().size() * self.held.start) as u64);
        Arg::plain(match &self.kept {
            Kept::Wide(wide) => [first(wide), 0, 0],
            Kept::Halves { rounded, lower, own } => [0, first(rounded), lower_of_first(lower, own)],
        })
    }

    /// What a step computes with, to be given by the ranks that updated it to the others.
    pub(super) fn rounded_mut(&mut self) -> &mut Tensor {
        assert!(!self.is_sharded(), "a sharded model is gathered");
        match &mut self.kept {
            Kept::Wide(wide) => wide,
            Kept::Halves { rounded, .. } => rounded,
        }
    }

    /// No numbers, for the same kernels.
    pub(super) fn no_place() -> Arg {
        Arg::plain([0u64; 3])
    }

    /// Those of a CPU, to be updated.
    pub(super) fn wide_mut(&mut self) -> &mut Tensor {
        match &mut self.kept {
            Kept::Wide(wide) => wide,
            Kept::Halves { .. } => unreachable!("features on a CPU are as wide as weights"),
        }
    }

    /// All of them in host memory; those whose lower halves are on other ranks, rounded.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<Tensor> {
        self.read(0..self.len())
    }

    /// The same of those of a range, which begins at an even one and is here.
    pub(super) fn read(&self, range: Range<usize>) -> Result<Tensor> {
        if range.is_empty() {
            return Ok(Device::Cpu.with(|| Tensor::zeros(&[0], self.dtype())));
        }
        let part = |flat: &Tensor| flat.view(range.start - self.held.start, &[range.len()]).to(Device::Cpu);
        let (rounded, lower, own) = match &self.kept {
            Kept::Wide(wide) => return Ok(part(wide)),
            Kept::Halves { rounded, lower, own } => (part(rounded), lower, own),
        };
        let mut out = Device::Cpu.with(|| rounded.cast(DType::F32))?;
        let own_part = within(&range, own);
        if own_part.is_empty() {
            return Ok(out);
        }
        let lower = read_lower(lower, own_part.start - own.start, own_part.len());
        let place = own_part.start - range.start..own_part.end - range.start;
        let halves = rounded.as_slice::<bf16>()[place.clone()].par_iter().zip(&lower).with_min_len(CHUNK);
        let out_part = out.as_mut_slice::<f32>()[place].par_iter_mut();
        out_part.zip(halves).for_each(|(x, (r, l))| *x = join(*r, *l));
        Ok(out)
    }

    /// What each rank has of its part alone.
    pub(super) fn spread(&self) -> Spread {
        self.spread
    }

    /// All of them, widened.
    ///
    /// # Panics
    /// If the device fails, as [`Tensor::to_f64_vec`].
    pub fn to_f64_vec(&self) -> Vec<f64> {
        self.to_host().unwrap_or_else(|e| panic!("{e}")).to_f64_vec()
    }

    /// Those from `start` on as a tensor of this shape, where they are; to be read, not changed. They are of this rank's part.
    ///
    /// # Errors
    /// If the device fails.
    pub fn view(&self, start: usize, shape: &[usize]) -> Result<Tensor> {
        assert!(!self.is_sharded(), "what is updated is whole");
        match &self.kept {
            Kept::Wide(wide) => Ok(wide.view(start, shape)),
            Kept::Halves { rounded, lower, own } => {
                let gpu = rounded.gpu().expect("halves are on a GPU");
                let mut out = rounded.device().with(|| Tensor::uninit(shape, DType::F32));
                let n = out.len();
                assert!(own.start <= start && start + n <= own.end, "{start}+{n} is in the part {own:?}");
                let launch = gpu.kernel(&HALVES, "join", DType::F32)?.over(n).work(0.0, 8.0 * n as f64);
                launch.launch(args![&mut out, rounded, lower_of_first(lower, own), start, n])?;
                Ok(out)
            }
        }
    }

    /// Takes the numbers of a tensor in host memory. All ranks have to take the same.
    ///
    /// # Errors
    /// If it has more numbers or fewer, or the device fails.
    pub fn set(&mut self, numbers: &Tensor) -> Result<()> {
        if numbers.len() != self.len() {
            return Err(Error::shape("set", format!("{} numbers for {}", numbers.len(), self.len())));
        }
        self.write(0, numbers)
    }

    /// Takes the start of a layout, drawn from a seed.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn draw(&mut self, layout: &Layout, seed: u64) -> Result<()> {
        let dtype = self.dtype();
        // The parts go on one after the other, and are drawn each by all cores.
        let mut parts = layout.init_parts(seed, dtype, DRAWN_TOGETHER);
        while let Some((start, part)) = Device::Cpu.with(|| parts.next()) {
            self.write(start, &part?)?;
        }
        Ok(())
    }

    /// The same of those from `start` on, which is even.
    pub(super) fn write(&mut self, start: usize, numbers: &Tensor) -> Result<()> {
        let numbers = Device::Cpu.with(|| numbers.cast(self.dtype()))?;
        let here = within(&(start..start + numbers.len()), &self.held);
        if here.is_empty() {
            return Ok(());
        }
        let (from, at) = (here.start - start..here.end - start, here.start - self.held.start);
        let (rounded, lower, own) = match &mut self.kept {
            Kept::Wide(wide) => return copy_elements(wide, at, &numbers, from),
            Kept::Halves { rounded, lower, own } => (rounded, lower, own.clone()),
        };
        let mut of_rounded = Device::Cpu.with(|| Tensor::uninit(numbers.shape(), DType::BF16));
        let numbers = numbers.as_slice::<f32>();
        let all = of_rounded.as_mut_slice::<bf16>().par_iter_mut().zip(numbers).with_min_len(CHUNK);
        all.for_each(|(rounded, x)| *rounded = split(*x).0);
        copy_elements(rounded, at, &of_rounded, from)?;
        let part = within(&(start..start + numbers.len()), &own);
        if part.is_empty() {
            return Ok(());
        }
        let of_part = numbers[part.start - start..part.end - start].par_iter().with_min_len(CHUNK);
        let halves: Vec<u16> = of_part.map(|x| split(*x).1).collect();
        write_lower(lower, part.start - own.start, &halves)
    }

    /// Takes the first numbers of others, which are kept alike.
    pub(super) fn copy_from(&mut self, other: &Flat) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let theirs = self.here_of(other.here(), &other.held);
        match (&mut self.kept, &other.kept) {
            (Kept::Wide(own), Kept::Wide(_)) => own.copy_from(&theirs),
            (Kept::Halves { rounded, lower, .. }, Kept::Halves { lower: others_lower, .. }) => {
                rounded.copy_from(&theirs)?;
                lower.copy_from(&others_lower.view(0, &[lower.len()]))
            }
            _ => unreachable!("all weights of a run are kept alike"),
        }
    }

    /// `self = momentum self + (1 - momentum) other`, by the first numbers of others, which are kept alike; of those that are
    /// spread over ranks, this rank's part.
    pub(super) fn average(&mut self, other: &Flat, momentum: f64) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let (theirs, held, others) = (self.here_of(other.here(), &other.held), self.held.start, other.held.start);
        match (&mut self.kept, &other.kept) {
            (Kept::Wide(own), Kept::Wide(_)) => ops::ema_update(own, &theirs, momentum),
            (Kept::Halves { own, .. }, _) if Range::is_empty(own) => Ok(()),
            (Kept::Halves { rounded, lower, own }, Kept::Halves { rounded: of_others, lower: others_lower, .. }) => {
                let gpu = rounded.gpu().expect("halves are on a GPU");
                let n = own.len();
                let [rounded, others] =
                    [(&*rounded, held), (of_others, others)].map(|(of, start)| of.view(own.start - start, &[n]));
                let launch = gpu.kernel(&HALVES, "average", DType::F32)?.over(n).work(0.0, 12.0 * n as f64);
                launch.launch(args![&rounded, &*lower, &others, others_lower, momentum as f32, n])
            }
            _ => unreachable!("all weights of a run are kept alike"),
        }
    }

    /// A number that no `|x|` is greater than; NaN if there is one.
    pub(super) fn bound(&self) -> Result<f64> {
        if self.held.is_empty() {
            return Ok(0.0);
        }
        match &self.kept {
            Kept::Wide(wide) => greatest(wide),
            // Rounding takes away less than a part in 256.
            Kept::Halves { rounded, .. } => Ok(greatest(rounded)? * (1.0 + 1.0 / 256.0)),
        }
    }
}

/// Where the lower half of element 0 would be, with those of `own` at their place: kernels count from the first element.
fn lower_of_first(lower: &Tensor, own: &Range<usize>) -> u64 {
    lower.device_address().wrapping_sub(2 * own.start as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_the_number_whatever_its_bits() {
        // Every pattern of the upper half with the lower ones around which rounding changes.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (rounded, rest) = split(x);
                assert_eq!(join(rounded, rest).to_bits(), x.to_bits());
            }
        }
        // Every lower half.
        for lower in 0..=u16::MAX {
            let x = f32::from_bits(0x3fa5_0000 | u32::from(lower));
            let (rounded, rest) = split(x);
            assert_eq!(join(rounded, rest), x);
            assert!(
                (rounded.to_f32() - x).abs() <= (bf16::from_f32(x).to_f32() - x).abs(),
                "{x} is rounded to {rounded}"
            );
        }
    }

    #[test]
    fn numbers_half_way_are_rounded_away_from_zero() {
        let half_way = f32::from_bits(0x3f80_8000);
        assert_eq!(split(half_way).0.to_bits(), 0x3f81);
        assert_eq!(split(-half_way).0.to_bits(), 0xbf81);
        assert_eq!(split(f32::INFINITY).0, bf16::INFINITY);
    }
}
