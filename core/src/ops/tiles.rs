//! Images put together from squares of others: the pixels of a loss's [views](crate::contract::View).

use crate::cuda::{args, Arg};
use crate::tensor::blocks::*;
use crate::tensor::{Grads, Op};
use crate::{cuda_source, dispatch_real, DType, Error, Result, Tensor};

cuda_source! { static TILES = "tiles" { include_str!("tiles.cu") } }

impl Tensor {
    /// Images of `tiles x tiles` squares of `tile` pixels, each a square of one of these images, turned by quarter turns:
    /// `[N, C, H, W]` to `[M, C, tiles * tile, tiles * tile]`.
    ///
    /// `plan` has a row for every tile of every image, row by row: the number of the image it is cut from, its first
    /// column and row there, and its quarter turns counter-clockwise (0 to 3): `[M * tiles * tiles, 4]`, u32. Whoever
    /// makes it holds it inside the images. Pixels get no gradient.
    ///
    /// # Errors
    /// If this is not `[N, C, H, W]`, or `plan` is not a whole number of images' tiles.
    pub fn tiles(&self, plan: &Tensor, tiles: usize, tile: usize) -> Result<Tensor> {
        let [_, channels, height, width] = self.shape()[..] else {
            return Err(Error::shape("tiles", format!("{:?} is not [N, C, H, W]", self.shape())));
        };
        let of_image = tiles * tiles;
        if plan.dtype() != DType::U32 || plan.rank() != 2 || plan.dim(1) != 4 || of_image * tile == 0 {
            let problem = format!("a plan {:?} of {:?} for {tiles} x {tiles} tiles", plan.shape(), plan.dtype());
            return Err(Error::shape("tiles", format!("{problem}: expected [M * tiles * tiles, 4], u32")));
        }
        let images = plan.dim(0) / of_image;
        if !plan.dim(0).is_multiple_of(of_image) {
            let problem = format!("{} tiles are no whole number of images of {of_image}", plan.dim(0));
            return Err(Error::shape("tiles", problem));
        }
        if u32::try_from(images * channels * of_image * tile * tile).is_err() {
            return Err(Error::shape("tiles", format!("{images} images are more pixels than are made at once")));
        }
        Tiles { images, channels, height, width, tiles, tile }.apply(&[&self.detach(), plan])
    }
}

struct Tiles {
    images: usize,
    channels: usize,
    height: usize,
    width: usize,
    tiles: usize,
    tile: usize,
}

impl Op for Tiles {
    fn name(&self) -> &'static str {
        "tiles"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let Self { images, channels, height, width, tiles, tile } = *self;
        let side = tiles * tile;
        let mut out = Tensor::uninit(&[images, channels, side, side], inputs[0].dtype());
        if let Some(gpu) = out.gpu() {
            let (n, bytes) = (out.len(), 2 * out.len() * out.dtype().size());
            let shape = Arg::plain([channels, height, width, tiles, tile].map(|n| n as u32));
            let launch = gpu.kernel(&TILES, "tiles", out.dtype())?.over(n).work(0.0, bytes as f64);
            launch.launch(args![&mut out, inputs[0], inputs[1], &shape, n as u32])?;
            return Ok(out);
        }
        let plan = inputs[1].as_slice::<u32>();
        dispatch_real!("tiles", out.dtype(), T => {
            let pixels = inputs[0].as_slice::<T>();
            let of_image = tiles * tiles;
            let planes = out.as_mut_slice::<T>().par_chunks_mut((side * side).max(1)).enumerate();
            planes.for_each(|(i, plane)| {
                let (image, channel) = (i / channels, i % channels);
                for (t, from) in plan[4 * image * of_image..][..4 * of_image].chunks_exact(4).enumerate() {
                    let [source, x, y, turns] = [0, 1, 2, 3].map(|k| from[k] as usize);
                    let source = &pixels[(source * channels + channel) * height * width..][..height * width];
                    for r in 0..tile {
                        let start = (t / tiles * tile + r) * side + t % tiles * tile;
                        for (c, to) in plane[start..start + tile].iter_mut().enumerate() {
                            let last = tile - 1;
                            let (dy, dx) = match turns {
                                0 => (r, c),
                                1 => (c, last - r),
                                2 => (last - r, last - c),
                                _ => (last - c, r),
                            };
                            *to = source[(y + dy) * width + x + dx];
                        }
                    }
                }
            });
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, _: Tensor, _: &mut Grads<'_>) -> Result<()> {
        unreachable!("pixels are not tracked")
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    /// A 3 x 3 image with the digits 1 to 9, and one with 10 more.
    fn images() -> Tensor {
        let pixels: Vec<f32> = (1..10).chain(11..20).map(|x| x as f32).collect();
        Tensor::from_slice(&pixels, &[2, 1, 3, 3]).unwrap()
    }

    #[test]
    fn turns_are_counter_clockwise() {
        let plan: Vec<u32> = (0..4).flat_map(|turns| [0, 0, 0, turns]).collect();
        let turned = images().tiles(&Tensor::from_slice(&plan, &[4, 4]).unwrap(), 1, 3).unwrap();
        let want = [
            [1., 2., 3., 4., 5., 6., 7., 8., 9.],
            [3., 6., 9., 2., 5., 8., 1., 4., 7.],
            [9., 8., 7., 6., 5., 4., 3., 2., 1.],
            [7., 4., 1., 8., 5., 2., 9., 6., 3.],
        ];
        assert_eq!(turned.as_slice::<f32>(), want.concat());
    }

    #[test]
    fn tiles_of_any_place_are_put_together_row_by_row() {
        let plan: [u32; 16] = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 2, 0, 0, 1, 1];
        let made = images().tiles(&Tensor::from_slice(&plan, &[4, 4]).unwrap(), 2, 2).unwrap();
        assert_eq!(made.shape(), [1, 1, 4, 4]);
        let want = [5., 6., 11., 12., 8., 9., 14., 15., 16., 15., 5., 8., 13., 12., 4., 7.];
        assert_eq!(made.as_slice::<f32>(), want);
    }

    #[test]
    fn a_plan_of_half_an_image_is_refused() {
        let plan = Tensor::from_slice(&[0u32; 12], &[3, 4]).unwrap();
        assert!(images().tiles(&plan, 2, 1).unwrap_err().to_string().contains("no whole number"));
    }
}
