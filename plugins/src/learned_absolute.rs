//! Position encoding `learned_absolute`: one learned vector a patch.

use dinolab_core::contract::{Grid, PosContext, PosEncoding};
use dinolab_core::params::{Init, ParamBuilder, ParamId, Params};
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One learned vector a patch of a global crop, added to the patch embeddings: the encoding of ViT (arXiv:2010.11929)
/// and DINOv2.
///
/// The table `pos_embed` `[P, D]` starts truncated normal with standard deviation 0.02. For another grid it is resized
/// bicubically, without anti-aliasing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LearnedAbsoluteConfig {}

/// The plugin `learned_absolute`.
#[derive(Debug)]
struct LearnedAbsolute {
    /// The table and its grid; empty until declared.
    table: Option<(ParamId, Grid)>,
}

impl PosEncoding for LearnedAbsolute {
    fn declare(&mut self, params: &mut ParamBuilder, context: PosContext) -> Result<()> {
        let shape = [context.grid.patches(), context.dim];
        let id = params.add("pos_embed", &shape, Init::TruncatedNormal(0.02));
        self.table = Some((id, context.grid));
        Ok(())
    }

    fn absolute(&self, params: &Params<'_>, grid: Grid) -> Result<Option<Tensor>> {
        let (id, own) = self.table.expect("a backbone declares its position encoding before it uses it");
        let table = params.get(id);
        if grid == own {
            return Ok(Some(table));
        }
        let dim = table.last_dim();
        let table = table.reshape(&[1, own.patches(), dim])?;
        let resized = table.resize_bicubic((own.height, own.width), (grid.height, grid.width), false)?;
        resized.reshape(&[grid.patches(), dim]).map(Some)
    }
}

plugin!(PosEncoding, "learned_absolute", LearnedAbsoluteConfig, |_: LearnedAbsoluteConfig, _: &mut _| {
    Ok(Box::new(LearnedAbsolute { table: None }) as Box<dyn PosEncoding>)
});
