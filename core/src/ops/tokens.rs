//! Patch embeddings to the token rows of a transformer: mask token in, prefix (CLS and registers) in front.

use crate::cuda::{args, Arg, Gpu};
use crate::ops::{same_dtype, with_grad};
use crate::tensor::blocks::*;
use crate::tensor::columns::{sum_rows, Partial, COLUMN_SUMS};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static TOKENS = "tokens" { COLUMN_SUMS, include_str!("tokens.cu") } }

impl Tensor {
    /// Tokens of `images` images: patch embeddings `[B P, D]` and a prefix `[1 + R, D]` (CLS and registers, the same
    /// for every image) to `[B (1 + R + P), D]`, the prefix in front of each image's patches.
    ///
    /// With `mask` = (mask token `[D]` or `[1, D]`; u32 `[B P]`, 0 or 1), patches with a 1 are replaced by the token.
    /// Gradients go to the patches that are not masked, the prefix and the mask token.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn assemble_tokens(&self, prefix: &Tensor, images: usize, mask: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
        let inputs: Vec<&Tensor> = [self, prefix].into_iter().chain(mask.map(|(token, _)| token)).collect();
        Assemble { images, mask: mask.map(|(_, mask)| mask.detach()), sizes: None }.apply(&inputs)
    }

    /// The inverse: `[B (prefix + P), D]` to the prefix tokens `[B, prefix, D]` and the patches `[B, P, D]`.
    ///
    /// # Errors
    /// If the rows are not those of `images` images.
    pub fn split_tokens(&self, images: usize, prefix: usize) -> Result<(Tensor, Tensor)> {
        let rows = if self.rank() == 2 { self.dim(0) } else { 0 };
        if images == 0 || rows % images != 0 || rows / images < prefix {
            let problem = format!("{:?} is not [B (prefix + P), D] with B {images}, prefix {prefix}", self.shape());
            return Err(Error::shape("split_tokens", problem));
        }
        let tokens = rows / images;
        let by_image = self.reshape(&[images, tokens, self.dim(1)])?;
        Ok((by_image.narrow_axis(1, 0, prefix)?, by_image.narrow_axis(1, prefix, tokens - prefix)?))
    }
}

/// The rows of some images of packed tokens: for each part (images u32 `[s]`, the part's first row, tokens of an image)
/// the rows of its images' tokens; all parts one after the other, u32. The images are not checked.
///
/// # Errors
/// If the images are not u32.
pub fn rows_of_images(parts: &[(Tensor, usize, usize)]) -> Result<Tensor> {
    if let Some((images, ..)) = parts.iter().find(|(images, ..)| images.dtype() != DType::U32) {
        return Err(Error::shape("rows_of_images", format!("images are {:?}, not u32", images.dtype())));
    }
    let total = parts.iter().map(|(images, _, tokens)| images.len() * tokens).sum();
    let mut rows = Tensor::uninit(&[total], DType::U32);
    let mut start = 0;
    for (images, first, tokens) in parts {
        let count = images.len() * tokens;
        if let Some(gpu) = rows.gpu() {
            let place = Arg::from(rows.device_address() + 4 * start as u64);
            let launch = gpu.kernel(&TOKENS, "rows_of_images", DType::U32)?.over(count);
            launch.launch(args![&place, images, *first as u32, *tokens as u32, count as u32])?;
        } else {
            let out = rows.as_mut_slice::<u32>()[start..start + count].chunks_exact_mut(*tokens);
            for (out, &image) in out.zip(images.as_slice::<u32>()) {
                let row = *first as u32 + image * *tokens as u32;
                out.iter_mut().zip(row..).for_each(|(out, row)| *out = row);
            }
        }
        start += count;
    }
    Ok(rows)
}

struct Assemble {
    images: usize,
    mask: Option<Tensor>,
    sizes: Option<Sizes>,
}

/// In elements: of one image's prefix, of its patches, and of a row.
#[derive(Clone, Copy)]
struct Sizes {
    prefix: usize,
    patches: usize,
    d: usize,
}

impl Assemble {
    fn sizes(&self, inputs: &[&Tensor]) -> Result<Sizes> {
        let (patches, prefix, token) = (inputs[0], inputs[1], inputs.get(2));
        let d = patches.last_dim();
        let fits = patches.rank() == 2
            && prefix.rank() == 2
            && d > 0
            && prefix.dim(1) == d
            && self.images > 0
            && patches.dim(0) % self.images == 0
            && token.is_none_or(|t| t.len() == d && t.last_dim() == d)
            && self.mask.as_ref().is_none_or(|m| m.dtype() == DType::U32 && m.len() == patches.dim(0));
        if !fits {
            let (token, mask) = (token.map(|t| t.shape()), self.mask.as_ref().map(|m| m.shape()));
            let problem = format!(
                "patches {:?} of {} images, prefix {:?}, mask token {token:?}, mask {mask:?}",
                patches.shape(),
                self.images,
                prefix.shape()
            );
            return Err(Error::shape("assemble_tokens", problem));
        }
        same_dtype("assemble_tokens", inputs)?;
        Ok(Sizes { prefix: prefix.len(), patches: patches.len() / self.images, d })
    }

    /// The mask of image `image`.
    fn mask(&self, image: usize, patches: usize) -> Option<&[u32]> {
        self.mask.as_ref().map(|m| &m.as_slice::<u32>()[image * patches..][..patches])
    }
}

impl Op for Assemble {
    fn name(&self) -> &'static str {
        "assemble_tokens"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let sizes = self.sizes(inputs)?;
        let Sizes { prefix, patches, d } = sizes;
        self.sizes = Some(sizes);
        let image_len = prefix + patches;
        let mut out = Tensor::uninit(&[self.images * image_len / d, d], inputs[0].dtype());
        if let Some(gpu) = out.gpu() {
            let (rows, tokens) = (out.len() / d, image_len / d);
            let (token, mask) = (inputs.get(2).map(|t| &**t), self.mask.as_ref());
            let launch = gpu.kernel(&TOKENS, "assemble", out.dtype())?.rows(rows);
            let launch = launch.work(0.0, (2 * out.len() * out.dtype().size()) as f64);
            let before = (prefix / d) as i32;
            launch.launch(args![
                &mut out,
                inputs[0],
                inputs[1],
                token,
                mask,
                rows as i32,
                before,
                tokens as i32,
                d as i32
            ])?;
            return Ok(out);
        }
        dispatch_real!("assemble_tokens", out.dtype(), T => {
            let (x, first) = (inputs[0].as_slice::<T>(), inputs[1].as_slice::<T>());
            let token = inputs.get(2).map(|t| t.as_slice::<T>()).unwrap_or_default();
            out.as_mut_slice::<T>().par_chunks_mut(image_len.max(1)).enumerate().for_each(|(image, out)| {
                let (out_prefix, out) = out.split_at_mut(prefix);
                out_prefix.copy_from_slice(first);
                out.copy_from_slice(&x[image * patches..][..patches]);
                if let Some(mask) = self.mask(image, patches / d) {
                    out.chunks_exact_mut(d).zip(mask).filter(|(_, &m)| m != 0).for_each(|(o, _)| o.copy_from_slice(token));
                }
            });
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Sizes { prefix, patches, d } = self.sizes.expect("set by forward");
        let image_len = prefix + patches;
        if let Some(gpu) = dy.gpu() {
            return self.backward_on(gpu, &dy, grads);
        }
        dispatch_real!("assemble_tokens", dy.dtype(), T => {
            let mut dtoken = Tensor::zeros(&[self.images, d], dy.dtype());
            let dy = dy.as_slice::<T>();
            with_grad::<T>(grads, 0, self.images * patches, |dx, add| {
                let each = dx.par_chunks_mut(patches.max(1)).zip(dtoken.as_mut_slice::<T>().par_chunks_mut(d));
                each.enumerate().for_each(|(image, (dx, dtoken))| simd!(T, {
                    let dy = &dy[image * image_len + prefix..][..patches];
                    let mask = self.mask(image, patches / d);
                    for (i, (dx, dy)) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).enumerate() {
                        match (mask.is_some_and(|m| m[i] != 0), add) {
                            (true, _) => {
                                dtoken.iter_mut().zip(dy).for_each(|(t, &g)| *t += g);
                                if !add {
                                    dx.fill(T::ZERO);
                                }
                            }
                            (false, true) => dx.iter_mut().zip(dy).for_each(|(dx, &g)| *dx += g),
                            (false, false) => dx.copy_from_slice(dy),
                        }
                    }
                }));
            })?;
            grads.accumulate(1, |mut dprefix| {
                let add = dprefix.add;
                let dprefix = dprefix.as_mut_slice::<T>();
                if !add {
                    dprefix.fill(T::ZERO);
                }
                for dy in dy.chunks_exact(image_len.max(1)) {
                    dprefix.iter_mut().zip(dy).for_each(|(d, &g)| *d += g);
                }
                Ok(())
            })?;
            if grads.inputs() < 3 {
                return Ok(());
            }
            grads.accumulate(2, |mut total| {
                let add = total.add;
                sum_rows(total.as_mut_slice::<T>(), dtoken.as_slice::<T>(), add);
                Ok(())
            })
        })
    }
}

impl Assemble {
    fn backward_on(&self, gpu: &'static Gpu, dy: &Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Sizes { prefix, patches, d } = self.sizes.expect("set by forward");
        let (dtype, size) = (dy.dtype(), dy.dtype().size());
        let count = self.images * patches / d;
        let (before, tokens) = ((prefix / d) as i32, ((prefix + patches) / d) as i32);
        let mut sums = Partial::new(count, 1, d);
        let launch = sums.launch(gpu.kernel(&TOKENS, "assemble_backward", dtype)?, dtype);
        let launch = launch.work(0.0, (2 * count * d * size) as f64);
        let mut run = |dx: Arg| {
            let mask = self.mask.as_ref();
            launch.launch(args![&dx, sums.buffer(), dy, mask, count as i32, before, tokens, d as i32])
        };
        match grads.needs(0) {
            true => grads.accumulate(0, |mut dx| run(Arg::from(&mut dx)))?,
            false => run(Arg::no_gradient())?,
        }
        if prefix > 0 {
            grads.accumulate(1, |mut dprefix| {
                let mut sums = Partial::new(self.images, 1, prefix);
                let launch = sums.launch(gpu.kernel(&TOKENS, "prefix_sums", dtype)?, dtype);
                launch.launch(args![sums.buffer(), dy, self.images as i32, prefix + patches, prefix as i32])?;
                sums.sum(0).put(&mut dprefix)
            })?;
        }
        match grads.inputs() {
            3 => grads.accumulate(2, |mut dtoken| sums.sum(0).put(&mut dtoken)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn every_image_gets_the_prefix_and_masked_patches_the_mask_token() {
        let patches = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[4, 1]).unwrap();
        let prefix = Tensor::from_slice(&[-1.0f32, -2.0], &[2, 1]).unwrap();
        let token = Tensor::from_slice(&[9.0f32], &[1]).unwrap();
        let mask = Tensor::from_slice(&[0u32, 1, 0, 0], &[4]).unwrap();
        let tokens = patches.assemble_tokens(&prefix, 2, Some((&token, &mask))).unwrap();
        assert_eq!(tokens.as_slice::<f32>(), [-1., -2., 1., 9., -1., -2., 3., 4.]);
        let (prefix, patches) = tokens.split_tokens(2, 2).unwrap();
        assert_eq!((prefix.shape(), prefix.as_slice::<f32>()), (&[2, 2, 1][..], &[-1., -2., -1., -2.][..]));
        assert_eq!((patches.shape(), patches.as_slice::<f32>()), (&[2, 2, 1][..], &[1., 9., 3., 4.][..]));
    }
}
