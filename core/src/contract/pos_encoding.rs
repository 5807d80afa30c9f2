//! How a transformer knows where a patch is.

use std::fmt;

use crate::params::{ParamBuilder, Params};
use crate::rng::Rng;
use crate::{DType, Result, Tensor};

/// The patch grid of a crop: rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Rows of patches.
    pub height: usize,
    /// Columns of patches.
    pub width: usize,
}

impl Grid {
    /// Patches: `height * width`.
    pub fn patches(self) -> usize {
        self.height * self.width
    }
}

/// What a position encoding is built for.
#[derive(Clone, Copy, Debug)]
pub struct PosContext {
    /// Width of a token.
    pub dim: usize,
    /// Attention heads.
    pub heads: usize,
    /// The grid of a global crop: what learned tables are sized for.
    pub grid: Grid,
}

/// What a position encoding gives one block for one kind of crop.
#[derive(Clone, Debug, Default)]
pub struct PosTables {
    /// Rotation of queries and keys: `(sin, cos)`, each `[P, D/H]`, in the half-split layout of the reference
    /// (`x * cos + rotate_half(x) * sin`). CLS and register tokens are not rotated.
    pub rotary: Option<(Tensor, Tensor)>,
    /// Added to the attention scores between patches: `[H, P, P]`. CLS and register tokens get none.
    pub bias: Option<Tensor>,
}

/// How a transformer knows where a patch is: by rotating queries and keys, by a bias on the scores, or by something
/// added to the tokens. A plugin gives any of the three; the defaults give nothing.
///
/// Training-time augmentation (jitter of the box) is drawn by [`draw`](Self::draw) on the host and handed to
/// [`tables`](Self::tables) as numbers, so that a step can be replayed with given draws.
///
/// ```
/// use dinolab_core::contract::{Grid, PosContext, PosEncoding, PosTables};
/// use dinolab_core::params::Params;
/// use dinolab_core::{DType, Result, Tensor};
///
/// /// The same distance penalty for every head: -|i - j| in rows plus columns.
/// #[derive(Debug)]
/// struct Manhattan;
///
/// impl PosEncoding for Manhattan {
///     fn tables(&self, _: &Params<'_>, grid: Grid, _: Option<&Tensor>, heads: usize, dtype: DType) -> Result<PosTables> {
///         let p = grid.patches();
///         let at = |i: usize| ((i / grid.width) as f64, (i % grid.width) as f64);
///         let score = |i, j| -((at(i).0 - at(j).0).abs() + (at(i).1 - at(j).1).abs());
///         let bias: Vec<f64> = (0..heads * p * p).map(|k| score(k / p % p, k % p)).collect();
///         Ok(PosTables { bias: Some(Tensor::from_f64(&bias, &[heads, p, p], dtype)?), ..PosTables::default() })
///     }
/// }
/// ```
pub trait PosEncoding: fmt::Debug + Send + Sync {
    /// Declares learned parameters and learns the model's widths, once, when the backbone is built.
    ///
    /// # Errors
    /// If the encoding does not fit the model.
    fn declare(&mut self, params: &mut ParamBuilder, context: PosContext) -> Result<()> {
        let _ = (params, context);
        Ok(())
    }

    /// What decides positions in evaluation, by the keys of a recipe: part of
    /// [`Backbone::architecture`](super::Backbone::architecture).
    fn architecture(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Draws the training-time augmentation of one table, as the numbers that will be applied; empty if there is none.
    fn draw(&self, rng: &mut Rng) -> Vec<f64> {
        let _ = rng;
        Vec::new()
    }

    /// Whether the draw is made anew for every block and kind of crop (the reference's way), or once a step for each kind of crop.
    fn draws_per_block(&self) -> bool {
        true
    }

    /// Rotation and bias for one block and one kind of crop. `draw` is what [`draw`](Self::draw) gave, as f64 where the
    /// forward runs, `None` in evaluation. An encoding that looks at its numbers on the host keeps a step on a GPU from
    /// being recorded; one that computes with them there does not.
    fn tables(
        &self,
        params: &Params<'_>,
        grid: Grid,
        draw: Option<&Tensor>,
        heads: usize,
        dtype: DType,
    ) -> Result<PosTables> {
        let _ = (params, grid, draw, heads, dtype);
        Ok(PosTables::default())
    }

    /// Added to the patch embeddings before the first block: `[P, D]`.
    fn absolute(&self, params: &Params<'_>, grid: Grid) -> Result<Option<Tensor>> {
        let _ = (params, grid);
        Ok(None)
    }
}
