//! The numbers of a model in flat memory: as wide as they are updated, and as wide as a step computes with them.
//!
//! Where features are bf16, a number of f32 is kept as two halves of 16 bits: itself rounded to bf16, which the step reads as it
//! is, and its lower bits. Both together are the f32, exactly, for every pattern of bits: 4 bytes a number in place of 6.
//! Numbers half way between two of bf16 are rounded away from zero, since from a number rounded to even the upper bits could
//! not be told.

use half::bf16;
use rayon::prelude::*;

use crate::cuda::{args, Arg};
use crate::tensor::{greatest, greatest_of_halves};
use crate::{cuda_source, ops, DType, Device, Error, Result, Tensor};

cuda_source! { static HALVES = "halves" { include_str!("halves.cu") } }

/// Numbers of one task of the CPU.
const CHUNK: usize = 1 << 16;

/// Flat numbers: f32 or f64, or f32 in halves.
pub struct Flat(Kept);

enum Kept {
    Wide(Tensor),
    Halves {
        rounded: Tensor,
        /// Two to a word of u32.
        lower: Tensor,
    },
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

impl Flat {
    /// `len` zeros, an even number, for features of type `features`.
    pub(super) fn zeros(len: usize, features: DType) -> Self {
        Self(match features {
            DType::BF16 => Kept::Halves {
                rounded: Tensor::zeros(&[len], DType::BF16),
                lower: Tensor::zeros(&[len / 2], DType::U32),
            },
            wide => Kept::Wide(Tensor::zeros(&[len], wide)),
        })
    }

    /// How many numbers they are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.rounded().len()
    }

    /// The type in which they are updated.
    pub fn dtype(&self) -> DType {
        self.rounded().dtype().wide()
    }

    /// What a step computes with.
    pub(super) fn rounded(&self) -> &Tensor {
        match &self.0 {
            Kept::Wide(wide) => wide,
            Kept::Halves { rounded, .. } => rounded,
        }
    }

    /// Where they are on a GPU, for the kernels of `adamw.cu`.
    pub(super) fn place(&self) -> Arg {
        Arg::plain(match &self.0 {
            Kept::Wide(wide) => [wide.device_address(), 0, 0],
            Kept::Halves { rounded, lower } => [0, rounded.device_address(), lower.device_address()],
        })
    }

    /// No numbers, for the same kernels.
    pub(super) fn no_place() -> Arg {
        Arg::plain([0u64; 3])
    }

    /// Those of a CPU, to be updated.
    pub(super) fn wide_mut(&mut self) -> &mut Tensor {
        match &mut self.0 {
            Kept::Wide(wide) => wide,
            Kept::Halves { .. } => unreachable!("features on a CPU are as wide as weights"),
        }
    }

    /// All of them in host memory.
    pub fn to_host(&self) -> Tensor {
        match &self.0 {
            Kept::Wide(wide) => wide.to(Device::Cpu),
            Kept::Halves { rounded, lower } => Device::Cpu.with(|| {
                let (rounded, lower) = (rounded.to(Device::Cpu), lower.to(Device::Cpu));
                let mut out = Tensor::uninit(rounded.shape(), DType::F32);
                let lower: &[u16] = bytemuck::cast_slice(lower.as_slice::<u32>());
                let halves = rounded.as_slice::<bf16>().par_iter().zip(lower).with_min_len(CHUNK);
                out.as_mut_slice::<f32>().par_iter_mut().zip(halves).for_each(|(x, (r, l))| *x = join(*r, *l));
                out
            }),
        }
    }

    /// All of them, widened.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        self.to_host().to_f64_vec()
    }

    /// Those from `start` on as a tensor of this shape, where they are; to be read, not changed.
    ///
    /// # Errors
    /// If the device fails.
    pub fn view(&self, start: usize, shape: &[usize]) -> Result<Tensor> {
        match &self.0 {
            Kept::Wide(wide) => Ok(wide.view(start, shape)),
            Kept::Halves { rounded, lower } => {
                let gpu = rounded.gpu().expect("halves are on a GPU");
                let mut out = rounded.device().with(|| Tensor::uninit(shape, DType::F32));
                let n = out.len();
                let launch = gpu.kernel(&HALVES, "join", DType::F32)?.over(n).work(0.0, 8.0 * n as f64);
                launch.launch(args![&mut out, rounded, lower, start, n])?;
                Ok(out)
            }
        }
    }

    /// Takes the numbers of a tensor, which is in host memory where they are kept in halves.
    ///
    /// # Errors
    /// If it has more numbers or fewer, or the device fails.
    pub fn set(&mut self, numbers: &Tensor) -> Result<()> {
        let (rounded, lower) = match &mut self.0 {
            Kept::Wide(wide) => return wide.copy_from(numbers),
            Kept::Halves { rounded, lower } => (rounded, lower),
        };
        if numbers.len() != rounded.len() {
            return Err(Error::shape("set", format!("{} numbers for {}", numbers.len(), rounded.len())));
        }
        let (of_rounded, of_lower) = Device::Cpu.with(|| {
            let mut of_rounded = Tensor::uninit(rounded.shape(), DType::BF16);
            let mut of_lower = Tensor::uninit(lower.shape(), DType::U32);
            let lower: &mut [u16] = bytemuck::cast_slice_mut(of_lower.as_mut_slice::<u32>());
            let halves = of_rounded.as_mut_slice::<bf16>().par_iter_mut().zip(lower).with_min_len(CHUNK);
            halves.zip(numbers.as_slice::<f32>()).for_each(|((r, l), x)| (*r, *l) = split(*x));
            (of_rounded, of_lower)
        });
        rounded.copy_from(&of_rounded)?;
        lower.copy_from(&of_lower)
    }

    /// Takes the first numbers of others, which are kept alike.
    pub(super) fn copy_from(&mut self, other: &Flat) -> Result<()> {
        let n = self.len();
        match (&mut self.0, &other.0) {
            (Kept::Wide(own), Kept::Wide(other)) => own.copy_from(&other.view(0, &[n])),
            (Kept::Halves { rounded, lower }, Kept::Halves { rounded: others, lower: others_lower }) => {
                rounded.copy_from(&others.view(0, &[n]))?;
                lower.copy_from(&others_lower.view(0, &[n / 2]))
            }
            _ => unreachable!("all weights of a run are kept alike"),
        }
    }

    /// Lets `f` change them, as wide as they are: those in halves in host memory.
    pub fn change<R>(&mut self, f: impl FnOnce(&mut Tensor) -> Result<R>) -> Result<R> {
        if let Kept::Wide(wide) = &mut self.0 {
            return f(wide);
        }
        let mut numbers = self.to_host();
        let done = Device::Cpu.with(|| f(&mut numbers))?;
        self.set(&numbers)?;
        Ok(done)
    }

    /// `self = momentum self + (1 - momentum) other`, by the first numbers of others, which are kept alike.
    pub(super) fn average(&mut self, other: &Flat, momentum: f64) -> Result<()> {
        let n = self.len();
        match (&mut self.0, &other.0) {
            (Kept::Wide(own), Kept::Wide(other)) => ops::ema_update(own, &other.view(0, &[n]), momentum),
            (Kept::Halves { rounded, lower }, Kept::Halves { rounded: others, lower: others_lower }) => {
                let gpu = rounded.gpu().expect("halves are on a GPU");
                let launch = gpu.kernel(&HALVES, "average", DType::F32)?.over(n).work(0.0, 12.0 * n as f64);
                launch.launch(args![rounded, lower, others, others_lower, momentum as f32, n])
            }
            _ => unreachable!("all weights of a run are kept alike"),
        }
    }

    /// `max |x|`; NaN if there is one.
    pub(super) fn greatest(&self) -> Result<f64> {
        match &self.0 {
            Kept::Wide(wide) => greatest(wide),
            Kept::Halves { rounded, lower } => greatest_of_halves(rounded, lower),
        }
    }
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
