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

#[cfg(test)]
mod tests {
    use super::*;
    use dinolab_core::tensor::Tape;
    use dinolab_core::DType;

    #[test]
    fn its_own_grid_gets_the_table_and_another_a_resized_one() {
        let own = Grid { height: 3, width: 4 };
        let mut encoding = LearnedAbsolute { table: None };
        let mut params = ParamBuilder::new();
        encoding.declare(&mut params, PosContext { dim: 5, heads: 1, grid: own }).unwrap();
        let layout = params.finish();
        let flat = layout.init(0, DType::F64).unwrap();
        let tape = Tape::new();
        let params = Params::tracked(&layout, &flat, &tape);
        let table = encoding.absolute(&params, own).unwrap().unwrap();
        assert_eq!(table.as_slice::<f64>(), &flat.as_slice::<f64>()[layout.specs()[0].range()]);
        let resized = encoding.absolute(&params, Grid { height: 2, width: 6 }).unwrap().unwrap();
        assert_eq!(resized.shape(), [12, 5]);
        // Weights of a resize sum to 1 in every output, so the gradient of the sum has as much mass as there are outputs.
        let mut grads = Tensor::zeros(&[layout.len()], DType::F64);
        tape.backward(&resized.sum().unwrap(), 1.0, Some(&mut grads)).unwrap();
        assert!((grads.sum().unwrap().item() - resized.len() as f64).abs() < 1e-9);
    }
}
