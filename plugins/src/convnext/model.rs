//! The forward pass: four stages, each a downsampling and its blocks; then mean, resize and final norm.

use dinolab_core::contract::{Backbone, BackboneContext, Cost, Crops, Draws, Features, Grid, Mode};
use dinolab_core::nn::{Norm, PatchEmbed};
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::scope;
use dinolab_core::{Error, Result, Tensor};

use super::block::{Block, INIT, KERNEL};
use super::{ConvNextConfig, STAGES, STRIDE};

/// A ConvNeXt: which parameter is where, and how crops become features.
#[derive(Debug)]
pub(crate) struct ConvNext {
    config: ConvNextConfig,
    channels: usize,
    stages: Vec<Stage>,
    norm: Norm,
}

/// A downsampling (the stem: 4x4 convolution, then norm; later: norm, then 2x2 convolution) and its blocks.
#[derive(Debug)]
struct Stage {
    conv: PatchEmbed,
    norm: Norm,
    blocks: Vec<Block>,
}

/// Side of a downsampling's squares.
pub(super) fn squares(stage: usize) -> usize {
    if stage == 0 {
        4
    } else {
        2
    }
}

impl ConvNext {
    /// Declares all parameters under the reference's names.
    pub(crate) fn build(config: ConvNextConfig, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        let (dims, channels) = (config.dims, context.channels);
        let p: &mut ParamBuilder = context.params;
        let mut first = 0;
        let stages = (0..STAGES).map(|i| {
            let from = if i == 0 { channels } else { dims[i - 1] };
            let conv = |p: &mut ParamBuilder| PatchEmbed::declare(p, from, squares(i), dims[i], INIT);
            let norm = |p: &mut ParamBuilder, dim| Norm::decayed_layer(p, dim, config.norm_eps);
            let (conv, norm) = p.layer(if i == 0 { 0 } else { first + 1 }, |p| {
                // These norms decay in the reference, whose rule goes by names.
                p.scope(format!("downsample_layers.{i}"), |p| match i {
                    0 => (p.scope("0", conv), p.scope("1", |p| norm(p, dims[0]))),
                    _ => {
                        let norm = p.scope("0", |p| norm(p, from));
                        (p.scope("1", conv), norm)
                    }
                })
            });
            let block = |j: usize| {
                p.layer(first + j + 1, |p| p.scope(format!("stages.{i}.{j}"), |p| Block::declare(p, dims[i], &config)))
            };
            let blocks = (0..config.depths[i]).map(block).collect();
            first += config.depths[i];
            Stage { conv, norm, blocks }
        });
        let stages = stages.collect();
        let norm = p.layer(first + 1, |p| p.scope("norm", |p| Norm::layer(p, dims[STAGES - 1], config.norm_eps)));
        Ok(Box::new(Self { config, channels, stages, norm }))
    }

    /// The last stage's map `[B, rows * columns, C]` and its grid. `kept[block]` are the images of a block that are not
    /// dropped.
    fn map(&self, params: &Params<'_>, pixels: &Tensor, kept: &[Tensor]) -> Result<(Tensor, (usize, usize))> {
        let &[images, channels, height, width] = pixels.shape() else {
            return Err(Error::shape("convnext", format!("crops are [B, C, H, W], not {:?}", pixels.shape())));
        };
        if channels != self.channels || height < STRIDE || width < STRIDE {
            let problem = format!(
                "{channels} channels of {height}x{width} pixels: it needs {} of at least {STRIDE}",
                self.channels
            );
            return Err(Error::shape("convnext", problem));
        }
        let mut x = pixels.cast(params.dtype())?;
        let mut grid = (height, width);
        let mut kept = kept.iter();
        for (i, stage) in self.stages.iter().enumerate() {
            let _scope = scope::enter(format!("stages.{i}"));
            let convolved = |planes: &Tensor| {
                let rows = stage.conv.forward(params, planes)?;
                rows.reshape(&[images, rows.dim(0) / images, rows.dim(1)])
            };
            x = match i {
                0 => stage.norm.forward(params, &convolved(&x)?)?,
                _ => {
                    let dim = x.last_dim();
                    let planes = stage.norm.forward(params, &x)?.transpose()?;
                    convolved(&planes.reshape(&[images, dim, grid.0, grid.1])?)?
                }
            };
            grid = (grid.0 / squares(i), grid.1 / squares(i));
            for (j, block) in stage.blocks.iter().enumerate() {
                let _scope = scope::enter(j.to_string());
                x = block.forward(params, &x, grid, kept.next())?;
            }
        }
        Ok((x, grid))
    }

    /// Mean and map after the final norm; the map on the grid of the patch size.
    fn finish(&self, params: &Params<'_>, map: &Tensor, from: (usize, usize), grid: Grid) -> Result<Features> {
        let _scope = scope::enter("norm");
        let (images, dim, patches) = (map.dim(0), map.dim(2), grid.patches());
        let cls = map.mean_axis(1)?;
        let to = (grid.height, grid.width);
        let map = if from == to { map.clone() } else { map.resize_bilinear(from, to)? };
        // The mean in front of each image's patches, as tokens are.
        let rows = Tensor::cat(&[&cls, &map.reshape(&[images * patches, dim])?])?;
        let row = |i: usize| match (i / (1 + patches), i % (1 + patches)) {
            (image, 0) => image as u32,
            (image, p) => (images + image * patches + p - 1) as u32,
        };
        let order: Vec<u32> = (0..images * (1 + patches)).map(row).collect();
        let prenorm = rows.gather_rows(&Tensor::from_slice(&order, &[order.len()])?)?;
        let normed = self.norm.forward(params, &prenorm)?;
        let (cls, patches) = normed.split_tokens(images, 1)?;
        Ok(Features {
            cls: cls.reshape(&[images, dim])?,
            registers: Tensor::zeros(&[images, 0, dim], params.dtype()),
            prenorm: prenorm.reshape(&[images, 1 + grid.patches(), dim])?,
            layers: Vec::new(),
            patches,
            grid,
        })
    }
}

impl Backbone for ConvNext {
    fn dim(&self) -> usize {
        self.config.dims[STAGES - 1]
    }

    fn patch_size(&self) -> usize {
        self.config.patch_size
    }

    fn smallest_crop(&self) -> usize {
        STRIDE
    }

    fn depth(&self) -> usize {
        self.config.depths.iter().sum()
    }

    fn architecture(&self) -> serde_json::Value {
        let ConvNextConfig { depths, dims, norm_eps, layer_scale, .. } = &self.config;
        serde_json::json!({ "depths": depths, "dims": dims, "norm_eps": norm_eps, "layer_scale": *layer_scale != 0.0 })
    }

    fn hides_masked_patches(&self) -> bool {
        false
    }

    fn draw(&self, rng: &dyn Fn(Stream, u64) -> Rng, images: &[usize]) -> Draws {
        if self.config.drop_path == 0.0 {
            return Draws::default();
        }
        let kinds = images.len();
        let last = (self.depth() - 1).max(1);
        let kept = (0..self.depth()).map(|block| {
            let rate = self.config.drop_path * block as f64 / last as f64;
            let keep = |(k, &n): (usize, &usize)| {
                let count = ((n as f64 * (1.0 - rate)) as usize).max(1);
                let order = rng(Stream::DropPath, (block * kinds + k) as u64).permutation(n);
                // A block has one branch.
                [order[..count].to_vec(), Vec::new()]
            };
            images.iter().enumerate().map(keep).collect()
        });
        Draws::new(Vec::new(), kept.collect())
    }

    fn forward(&self, params: &Params<'_>, crops: &[Crops], mode: Mode<'_>) -> Result<Vec<Features>> {
        let kind = |(k, crop): (usize, &Crops)| {
            let kept = match mode {
                Mode::Eval => Vec::new(),
                Mode::Train(draws) => {
                    (0..self.depth()).map_while(|block| draws.kept(block, k, 0).transpose()).collect::<Result<_>>()?
                }
            };
            let (map, from) = self.map(params, &crop.pixels, &kept)?;
            let patch = self.config.patch_size;
            let grid = Grid { height: crop.pixels.dim(2) / patch, width: crop.pixels.dim(3) / patch };
            self.finish(params, &map, from, grid)
        };
        crops.iter().enumerate().map(kind).collect()
    }

    fn cost(&self, crops: &[(usize, Grid)]) -> Cost {
        let mut cost = Cost::default();
        for &(count, grid) in crops {
            let pixels = (count * grid.patches() * self.config.patch_size.pow(2)) as f64;
            let mut stride = 1;
            for (i, (&dim, &depth)) in self.config.dims.iter().zip(&self.config.depths).enumerate() {
                stride *= squares(i);
                let (places, c) = (pixels / (stride * stride) as f64, dim as f64);
                let from = if i == 0 { self.channels } else { self.config.dims[i - 1] };
                let down = (from * squares(i).pow(2)) as f64;
                let taps = (KERNEL * KERNEL) as f64;
                cost.forward_flops += 2.0 * places * c * (down + depth as f64 * (taps + 8.0 * c));
                // Kept for backward, a place and block: its input, the norm's input and the hidden layer; beside them the
                // gradients of its result and of the hidden layer, and this after its activation.
                cost.activations += places * (down + c + depth as f64 * 6.0 * c);
                cost.working = cost.working.max(places * 9.0 * c);
            }
        }
        cost
    }
}
