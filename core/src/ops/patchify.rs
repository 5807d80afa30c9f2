//! Images to rows of pixels, so that the patch embedding is a linear layer.

use crate::cuda::{args, Arg};
use crate::tensor::blocks::*;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static PATCHIFY = "patchify" { include_str!("patchify.cu") } }

impl Tensor {
    /// Square patches of `patch` pixels: `[B, C, H, W]` to `[B P, C patch patch]` with P = (H / patch) (W / patch),
    /// patches in row-major order, elements in the order of convolution weights (channel, row, column).
    /// Pixels at the right and bottom that do not fill a patch are ignored; their gradient is 0.
    ///
    /// # Errors
    /// If this is not `[B, C, H, W]`, or `patch` is 0.
    pub fn patchify(&self, patch: usize) -> Result<Tensor> {
        let [images, channels, height, width] = self.shape()[..] else {
            return Err(Error::shape("patchify", format!("{:?} is not [B, C, H, W]", self.shape())));
        };
        if patch == 0 {
            return Err(Error::shape("patchify", "a patch has at least one pixel"));
        }
        if self.gpu().is_some() && u32::try_from(self.len()).is_err() {
            return Err(Error::shape(
                "patchify",
                format!("{:?} are more pixels than a GPU is given at once", self.shape()),
            ));
        }
        Patchify { images, channels, height, width, patch }.apply(&[self])
    }
}

struct Patchify {
    images: usize,
    channels: usize,
    height: usize,
    width: usize,
    patch: usize,
}

impl Patchify {
    /// Calls `f(where in an image, where in its patches)` for every run of `patch` pixels.
    #[inline(always)]
    fn runs(&self, mut f: impl FnMut(usize, usize)) {
        let (p, rows, columns) = (self.patch, self.height / self.patch, self.width / self.patch);
        for row in 0..rows {
            for channel in 0..self.channels {
                for y in 0..p {
                    let image = (channel * self.height + row * p + y) * self.width;
                    for column in 0..columns {
                        let patches = (((row * columns + column) * self.channels + channel) * p + y) * p;
                        f(image + column * p, patches);
                    }
                }
            }
        }
    }

    /// The kernel's `Images`.
    fn images_arg(&self) -> Arg {
        Arg::plain([self.channels, self.height, self.width, self.patch].map(|n| n as i32))
    }

    /// Pixels of an image, and of its patches.
    fn sizes(&self) -> (usize, usize) {
        let count = (self.height / self.patch) * (self.width / self.patch);
        (self.channels * self.height * self.width, count * self.channels * self.patch * self.patch)
    }
}

impl Op for Patchify {
    fn name(&self) -> &'static str {
        "patchify"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let (image_len, patches_len) = self.sizes();
        let (p, row) = (self.patch, self.channels * self.patch * self.patch);
        let rows = self.images * (self.height / p) * (self.width / p);
        let mut out = Tensor::uninit(&[rows, row], inputs[0].dtype());
        if let Some(gpu) = out.gpu() {
            let n = out.len();
            let launch = gpu.kernel(&PATCHIFY, "patchify", out.dtype())?.over((n * out.dtype().size()).div_ceil(16));
            let bytes = (2 * n * out.dtype().size()) as f64;
            launch.work(0.0, bytes).launch(args![&mut out, inputs[0], &self.images_arg(), n as u32])?;
            return Ok(out);
        }
        dispatch_real!("patchify", out.dtype(), T => {
            let images = inputs[0].as_slice::<T>().par_chunks(image_len.max(1));
            out.as_mut_slice::<T>().par_chunks_mut(patches_len.max(1)).zip(images).for_each(|(patches, image)| {
                self.runs(|i, o| patches[o..o + p].copy_from_slice(&image[i..i + p]));
            });
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (image_len, patches_len) = self.sizes();
        let p = self.patch;
        if let Some(gpu) = dy.gpu() {
            // Zeros where no patch reaches; each pixel belongs to one patch.
            let mut dx = Tensor::zeros(&[grads.input_len(0)], dy.dtype());
            let launch = gpu
                .kernel(&PATCHIFY, "patchify_backward", dy.dtype())?
                .over((dy.len() * dy.dtype().size()).div_ceil(16));
            launch.launch(args![&Arg::gradient(&mut dx), &dy, &self.images_arg(), dy.len() as u32])?;
            return grads.add(0, dx);
        }
        dispatch_real!("patchify", dy.dtype(), T => grads.accumulate(0, |mut dx| {
            let add = dx.add;
            if !add {
                dx.as_mut_slice::<T>().fill(T::ZERO);
            }
            let patches = dy.as_slice::<T>().par_chunks(patches_len.max(1));
            dx.as_mut_slice::<T>().par_chunks_mut(image_len.max(1)).zip(patches).for_each(|(image, patches)| simd!(T, {
                self.runs(|i, o| image[i..i + p].iter_mut().zip(&patches[o..o + p]).for_each(|(d, &g)| *d += g));
            }));
            Ok(())
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn patches_are_row_major_and_ragged_pixels_are_ignored() {
        // Two channels of 2 x 5 pixels: two patches of 2 x 2, the last column does not fill a patch.
        let x: Vec<f32> = (0..20).map(|i| i as f32).collect();
        let y = Tensor::from_slice(&x, &[1, 2, 2, 5]).unwrap().patchify(2).unwrap();
        assert_eq!(y.shape(), [2, 8]);
        let want = [0., 1., 5., 6., 10., 11., 15., 16., 2., 3., 7., 8., 12., 13., 17., 18.];
        assert_eq!(y.as_slice::<f32>(), want);
    }
}
