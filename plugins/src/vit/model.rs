//! The forward pass: tokens, blocks, final norms.

use std::collections::BTreeMap;

use dinolab_core::contract::{
    Backbone, BackboneContext, Cost, Crops, Draws, Features, Grid, Mode, PosContext, PosEncoding, PosTables,
};
use dinolab_core::nn;
use dinolab_core::params::{Init, ParamBuilder, ParamId, ParamRole, Params};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::scope;
use dinolab_core::{Error, Result, Tensor};

use super::block::{declare_norm, Block, Layer};
use super::{Checkpointing, Ffn, VitConfig};

/// A vision transformer: which parameter is where, and how crops become features.
#[derive(Debug)]
pub(crate) struct Vit {
    config: VitConfig,
    channels: usize,
    cls_token: ParamId,
    register_tokens: Option<ParamId>,
    mask_token: ParamId,
    patch_embed: nn::PatchEmbed,
    position: Box<dyn PosEncoding>,
    blocks: Vec<Block>,
    norm: nn::Norm,
    cls_norm: Option<nn::Norm>,
    local_cls_norm: Option<nn::Norm>,
}

/// One kind of crop inside the packed tokens.
struct Kind {
    images: usize,
    tokens: usize,
    grid: Grid,
    local: bool,
}

impl Vit {
    /// Declares all parameters under the reference's names.
    pub(crate) fn build(config: VitConfig, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        check(&config)?;
        let (dim, channels) = (config.dim, context.channels);
        let side = context.global_size / config.patch_size;
        let grid = Grid { height: side, width: side };
        let mut position = config.pos_encoding.build(&mut ())?;
        let p: &mut ParamBuilder = context.params;
        let (cls_token, register_tokens, mask_token, patch_embed, declared) = p.layer(0, |p| {
            let cls = p.add("cls_token", &[1, 1, dim], Init::Normal(0.02));
            let registers = (config.registers > 0)
                .then(|| p.add("storage_tokens", &[1, config.registers, dim], Init::Normal(0.02)));
            let mask = p.add("mask_token", &[1, dim], Init::Zeros);
            // PyTorch's default for a convolution: uniform within 1 / sqrt(fan in).
            let fan_in = channels * config.patch_size * config.patch_size;
            let init = Init::Uniform(1.0 / (fan_in as f64).sqrt());
            let embed = p.role(ParamRole::PatchEmbed, |p| {
                p.scope("patch_embed.proj", |p| {
                    nn::PatchEmbed::declare(p, channels, config.patch_size, dim, [init, init])
                })
            });
            let context = PosContext { dim, heads: config.heads, grid };
            let declared = p.scope("pos_encoding", |p| position.declare(p, context));
            (cls, registers, mask, embed, declared)
        });
        declared?;
        let blocks = (0..config.depth)
            .map(|i| p.layer(i + 1, |p| p.scope(format!("blocks.{i}"), |p| Block::declare(p, &config))))
            .collect();
        let (norm, cls_norm, local_cls_norm) = p.layer(config.depth + 1, |p| {
            let norm = declare_norm(p, "norm", &config);
            let cls = config.untie_cls_and_patch_norms.then(|| declare_norm(p, "cls_norm", &config));
            let local = config.untie_global_and_local_cls_norm.then(|| declare_norm(p, "local_cls_norm", &config));
            (norm, cls, local)
        });
        Ok(Box::new(Self {
            config,
            channels,
            cls_token,
            register_tokens,
            mask_token,
            patch_embed,
            position,
            blocks,
            norm,
            cls_norm,
            local_cls_norm,
        }))
    }

    /// CLS and register tokens of an image.
    fn prefix(&self) -> usize {
        1 + self.config.registers
    }

    /// Crops to packed tokens `[sum of B * N, D]`: patch embedding, mask token, position, CLS and registers.
    fn embed(&self, params: &Params<'_>, crops: &[Crops]) -> Result<(Tensor, Vec<Kind>)> {
        let _scope = scope::enter("patch_embed");
        let (dim, patch) = (self.config.dim, self.config.patch_size);
        let matrix = self.patch_embed.matrix(params)?;
        let cls = params.get(self.cls_token).reshape(&[1, dim])?;
        let prefix = match self.register_tokens {
            Some(id) => Tensor::cat(&[&cls, &params.get(id).reshape(&[self.config.registers, dim])?])?,
            None => cls,
        };
        let mut parts = Vec::new();
        let mut kinds = Vec::new();
        for crop in crops {
            let &[images, channels, height, width] = crop.pixels.shape() else {
                return Err(Error::shape("vit", format!("crops are [B, C, H, W], not {:?}", crop.pixels.shape())));
            };
            let grid = Grid { height: height / patch, width: width / patch };
            if channels != self.channels || grid.patches() == 0 {
                let problem = format!("{channels} channels of {height}x{width} pixels, patches of {patch} pixels");
                return Err(Error::shape("vit", problem));
            }
            let mut patches = self.patch_embed.apply(&matrix, &crop.pixels)?;
            let mask_token = params.get(self.mask_token);
            let mask = crop.masks.as_ref().map(|masks| (&mask_token, masks));
            let absolute = self.position.absolute(params, grid)?;
            if absolute.is_some() && mask.is_some() {
                // The position is added to the mask token as well, so masking comes first.
                let none = Tensor::zeros(&[0, dim], params.dtype());
                patches = patches.assemble_tokens(&none, images, mask)?;
            }
            let mask = mask.filter(|_| absolute.is_none());
            if let Some(position) = absolute {
                let rows: Vec<u32> = (0..patches.dim(0)).map(|row| (row % grid.patches()) as u32).collect();
                patches = patches.add(&position.gather_rows(&Tensor::from_slice(&rows, &[rows.len()])?)?)?;
            }
            parts.push(patches.assemble_tokens(&prefix, images, mask)?);
            kinds.push(Kind { images, tokens: self.prefix() + grid.patches(), grid, local: crop.local });
        }
        Ok((Tensor::cat(&parts.iter().collect::<Vec<_>>())?, kinds))
    }

    /// Position tables of block `i` for every kind of crop; those without draws are shared between blocks.
    fn tables(
        &self,
        params: &Params<'_>,
        kinds: &[Kind],
        block: usize,
        draws: Option<&Draws>,
        shared: &mut Vec<Option<PosTables>>,
    ) -> Result<Vec<PosTables>> {
        shared.resize(kinds.len(), None);
        let table = |(k, kind): (usize, &Kind)| {
            let draw = draws.map(|d| d.position(block, k)).transpose()?.flatten();
            if let (None, Some(tables)) = (&draw, &shared[k]) {
                return Ok(tables.clone());
            }
            let draw = draw.as_ref();
            let tables = self.position.tables(params, kind.grid, draw, self.config.heads, params.dtype())?;
            if draw.is_none() {
                shared[k] = Some(tables.clone());
            }
            Ok(tables)
        };
        kinds.iter().enumerate().map(table).collect()
    }

    /// Final norms, and the packed tokens taken apart.
    fn finish(&self, params: &Params<'_>, x: &Tensor, kinds: &[Kind], train: bool) -> Result<Vec<Features>> {
        let _scope = scope::enter("norm");
        let (dim, prefix) = (self.config.dim, self.prefix());
        let normed = self.norm.forward(params, x)?;
        let mut start = 0;
        let mut features = Vec::new();
        for kind in kinds {
            let rows = kind.images * kind.tokens;
            let shape = [kind.images, kind.tokens, dim];
            let prenorm = x.narrow(start, rows)?.reshape(&shape)?;
            let all = normed.narrow(start, rows)?.reshape(&shape)?;
            let own = match (&self.local_cls_norm, &self.cls_norm) {
                (Some(local), _) if train && kind.local => Some(local),
                (_, cls) => cls.as_ref(),
            };
            let head = match own {
                Some(norm) => norm.forward(params, &prenorm.narrow_axis(1, 0, prefix)?)?,
                None => all.narrow_axis(1, 0, prefix)?,
            };
            features.push(Features {
                cls: head.narrow_axis(1, 0, 1)?.reshape(&[kind.images, dim])?,
                registers: head.narrow_axis(1, 1, prefix - 1)?,
                patches: all.narrow_axis(1, prefix, kind.tokens - prefix)?,
                prenorm,
                layers: Vec::new(),
                grid: kind.grid,
            });
            start += rows;
        }
        Ok(features)
    }

    /// All blocks; `visit(n, tokens)` sees the tokens after `n` blocks.
    fn run(
        &self,
        params: &Params<'_>,
        crops: &[Crops],
        mode: Mode<'_>,
        mut visit: impl FnMut(usize, &Tensor, &[Kind]) -> Result<()>,
    ) -> Result<()> {
        let (mut x, kinds) = self.embed(params, crops)?;
        let draws = match mode {
            Mode::Eval => None,
            Mode::Train(draws) => Some(draws),
        };
        visit(0, &x, &kinds)?;
        let mut shared = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let _scope = scope::enter(format!("blocks.{i}"));
            let tables = self.tables(params, &kinds, i, draws, &mut shared)?;
            let layers: Vec<Layer> = kinds
                .iter()
                .zip(tables)
                .map(|(kind, tables)| Layer { images: kind.images, tokens: kind.tokens, tables })
                .collect();
            let kept = draws.filter(|d| !d.kept.is_empty()).map(|draws| {
                let of_kind = |kind, branch| Ok(draws.kept(i, kind, branch)?.expect("every block has its own"));
                let of = |branch| (0..kinds.len()).map(|kind| of_kind(kind, branch)).collect::<Result<Vec<_>>>();
                Ok::<_, Error>([of(0)?, of(1)?])
            });
            let kept = kept.transpose()?;
            x = match self.config.checkpointing {
                Checkpointing::Full => block.recomputed(params, &x, layers, kept, &self.config)?,
                _ => block.forward(params, &x, &layers, kept.as_ref(), &self.config)?,
            };
            visit(i + 1, &x, &kinds)?;
        }
        Ok(())
    }
}

fn check(config: &VitConfig) -> Result<()> {
    let bad = |problem: String, help: &str| Err(Error::user(problem, help));
    if !config.dim.is_multiple_of(config.heads) {
        let help = "choose heads that divide dim; DINOv3 uses 64 or 128 numbers a head";
        return bad(format!("heads = {} does not divide dim = {}", config.heads, config.dim), help);
    }
    if config.hidden() == 0 {
        return bad("the feed-forward layer has no width".into(), "raise ffn_ratio");
    }
    Ok(())
}

impl Backbone for Vit {
    fn dim(&self) -> usize {
        self.config.dim
    }

    fn patch_size(&self) -> usize {
        self.config.patch_size
    }

    fn depth(&self) -> usize {
        self.config.depth
    }

    fn gives_layers(&self) -> bool {
        true
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.config.dim / self.config.heads)
    }

    fn architecture(&self) -> serde_json::Value {
        let c = &self.config;
        serde_json::json!({
            "patch_size": c.patch_size,
            "dim": c.dim,
            "depth": c.depth,
            "heads": c.heads,
            "registers": c.registers,
            "ffn": c.ffn,
            "ffn_hidden": c.hidden(),
            "ffn_bias": c.ffn_bias,
            "qkv_bias": c.qkv_bias,
            "mask_k_bias": c.qkv_bias && c.mask_k_bias,
            "proj_bias": c.proj_bias,
            "norm": c.norm,
            "norm_eps": c.norm_eps,
            "layer_scale": c.layer_scale != 0.0,
            "untie_cls_and_patch_norms": c.untie_cls_and_patch_norms,
            "pos_encoding": { "plugin": c.pos_encoding.name(), "keys": self.position.architecture() },
        })
    }

    fn draw(&self, rng: &dyn Fn(Stream, u64) -> Rng, images: &[usize]) -> Draws {
        let kinds = images.len() as u64;
        let index = |block: usize, kind: usize| block as u64 * kinds + kind as u64;
        let position = (0..self.config.depth).map(|block| {
            let drawn = if self.position.draws_per_block() { block } else { 0 };
            let draw = |k| self.position.draw(&mut rng(Stream::Position, index(drawn, k)));
            (0..images.len()).map(draw).collect()
        });
        let kept = (0..self.config.depth).map(|block| {
            let keep = |(k, &n): (usize, &usize)| {
                let mut rng = rng(Stream::DropPath, index(block, k));
                let count = ((n as f64 * (1.0 - self.config.drop_path)) as usize).max(1);
                [(); 2].map(|()| rng.permutation(n)[..count].to_vec())
            };
            images.iter().enumerate().map(keep).collect()
        });
        Draws::new(position.collect(), if self.config.drop_path > 0.0 { kept.collect() } else { Vec::new() })
    }

    fn forward(&self, params: &Params<'_>, crops: &[Crops], mode: Mode<'_>) -> Result<Vec<Features>> {
        let mut features = Vec::new();
        let mut layers = vec![BTreeMap::new(); crops.len()];
        self.run(params, crops, mode, |n, x, kinds| {
            let mut start = 0;
            for ((kind, crops), layers) in kinds.iter().zip(crops).zip(&mut layers) {
                let rows = kind.images * kind.tokens;
                if crops.layers.contains(&n) {
                    let tokens = x.narrow(start, rows)?.reshape(&[kind.images, kind.tokens, self.config.dim])?;
                    layers.insert(n, tokens);
                }
                start += rows;
            }
            if n == self.config.depth {
                features = self.finish(params, x, kinds, matches!(mode, Mode::Train(_)))?;
            }
            Ok(())
        })?;
        for ((features, crops), layers) in features.iter_mut().zip(crops).zip(layers) {
            features.layers = crops.layers.iter().filter_map(|n| layers.get(n).cloned()).collect();
        }
        Ok(features)
    }

    fn intermediate(&self, params: &Params<'_>, crops: &Crops, n: usize) -> Result<Vec<Features>> {
        let mut features = Vec::new();
        self.run(params, std::slice::from_ref(crops), Mode::Eval, |blocks, x, kinds| {
            if blocks > 0 && blocks + n > self.config.depth {
                features.extend(self.finish(params, x, kinds, false)?);
            }
            Ok(())
        })?;
        Ok(features)
    }

    fn cost(&self, crops: &[(usize, Grid)]) -> Cost {
        let (d, l, h) = (self.config.dim as f64, self.config.depth as f64, self.config.hidden() as f64);
        let ffn = if self.config.ffn == Ffn::Mlp { 4.0 } else { 6.0 };
        // Kept for backward, a token and block: what the norms read (2 d), queries, keys and values (3 d), what attention
        // gives (d), and the feed-forward's hidden numbers before their activation (`inside` with its norm); in f32 two
        // numbers of each norm and one of each head.
        let hidden = if self.config.ffn == Ffn::Mlp { 1.0 } else { 2.0 };
        let inside = hidden * h + 4.0;
        let block = 6.0 * d + inside + 2.0 * self.config.heads as f64 + 4.0;
        // What is kept of it, and what is made again for one block at a time.
        let taken = 1.0 - self.config.drop_path;
        // Images whose path is dropped keep nothing, but a block that is made again keeps all that went into it.
        let (kept, again) = match self.config.checkpointing {
            Checkpointing::None => (block * taken, 0.0),
            Checkpointing::Selective => ((block - inside) * taken, inside),
            Checkpointing::Full => (d, block),
        };
        let pixels = (self.channels * self.config.patch_size.pow(2)) as f64;
        let mut cost = Cost::default();
        for &(count, grid) in crops {
            let n = (self.prefix() + grid.patches()) as f64;
            let tokens = count as f64 * n;
            cost.forward_flops += tokens * l * (8.0 * d * d + ffn * d * h + 4.0 * n * d);
            // The embedding keeps its patches, the last norm its tokens.
            cost.activations += tokens * l * kept;
            cost.activations += count as f64 * grid.patches() as f64 * pixels + tokens * (d + 4.0);
            cost.features += 2.0 * tokens * d;
            // The gradients of a block's result and of the hidden numbers, and these after the activation.
            cost.working += tokens * (d + (hidden + 1.0) * h + again);
        }
        cost
    }
}
