//! Position encoding `my_plugin`.

use dinolab_core::contract::{Grid, PosEncoding, PosTables};
use dinolab_core::params::Params;
use dinolab_core::{plugin, DType, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A penalty on the attention between patches that grows with their distance in rows plus columns: ALiBi
/// (arXiv:2108.12409) in two dimensions. Head h of H has the slope `2^(-range (h + 1) / H)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// The slopes of the heads lie between 1 and 2 to the power of minus this.
    pub range: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { range: 8.0 }
    }
}

impl PosEncoding for MyPlugin {
    fn tables(&self, _: &Params<'_>, grid: Grid, _: Option<&Tensor>, heads: usize, dtype: DType) -> Result<PosTables> {
        let patches = grid.patches();
        let at = |i: usize| ((i / grid.width) as f64, (i % grid.width) as f64);
        let mut bias = Vec::with_capacity(heads * patches * patches);
        for head in 0..heads {
            let slope = 2f64.powf(-self.range * (head + 1) as f64 / heads as f64);
            for (i, j) in (0..patches).flat_map(|i| (0..patches).map(move |j| (i, j))) {
                let distance = (at(i).0 - at(j).0).abs() + (at(i).1 - at(j).1).abs();
                bias.push(-slope * distance);
            }
        }
        let bias = Tensor::from_f64(&bias, &[heads, patches, patches], dtype)?;
        Ok(PosTables { bias: Some(bias), ..PosTables::default() })
    }
}

plugin!(PosEncoding, "my_plugin", MyPlugin);
