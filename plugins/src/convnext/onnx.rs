//! A ConvNeXt as a graph of ONNX: pixels of any size in, CLS and patches out.

use dinolab_core::weights::{ModelInfo, TensorFiles};
use dinolab_core::{Error, Result};

use super::block::KERNEL;
use super::model::squares;
use super::{ConvNextConfig, STAGES, STRIDE};
use crate::onnx::{check_size, Attribute, Dim, Graph, END};

use Attribute::{Int, Ints, Word};

/// The file of a ConvNeXt whose tensors are in `files` as `<prefix>backbone.<name>`: input `pixels` `[B, C, H, W]`, normalised;
/// outputs `cls` `[B, D]` and `patches` `[B, P, D]` after the final norm, row-major over the grid. Computed in f32.
///
/// # Errors
/// If patches are larger than the stride of the network, the model is too large for one file, or a tensor is missing or no
/// float.
pub(crate) fn write(model: &ModelInfo, files: &TensorFiles, prefix: &str) -> Result<Vec<u8>> {
    let config = ConvNextConfig::of(&model.backbone)?;
    check_size(&super::specs(model)?)?;
    if config.patch_size > STRIDE {
        let problem = format!(
            "its map is made smaller (backbone.patch_size = {}), and the anti-aliasing of ONNX is another",
            config.patch_size
        );
        return Err(Error::user(problem, "export it with --format safetensors"));
    }
    let mut graph = Graph::of(files, format!("{prefix}backbone."));
    let (images, dim) = (Dim::Any("images"), config.dims[STAGES - 1]);
    graph.input("pixels", &[images, Dim::Is(model.crops.channels()), Dim::Any("height"), Dim::Any("width")]);
    let mut x = "pixels".to_string();
    for stage in 0..STAGES {
        let place = |layer: usize| format!("downsample_layers.{stage}.{layer}");
        x = match stage {
            0 => {
                let map = graph.patchify(&place(0), &x, squares(stage))?;
                norm_of_map(&mut graph, &place(1), &map, &config)?
            }
            _ => {
                let map = norm_of_map(&mut graph, &place(0), &x, &config)?;
                graph.patchify(&place(1), &map, squares(stage))?
            }
        };
        for block in 0..config.depths[stage] {
            x = self::block(&mut graph, &format!("stages.{stage}.{block}"), &x, config.dims[stage], &config)?;
        }
    }
    let mean = graph.node("ReduceMean", &[&x], &[("axes", Ints(&[2, 3])), ("keepdims", Int(1))]);
    let map = on_patches(&mut graph, &x, config.patch_size);
    let [mean, map] = [mean, map].map(|x| {
        let flat = graph.reshape(&x, &[0, dim as i64, -1]);
        graph.node("Transpose", &[&flat], &[("perm", Ints(&[0, 2, 1]))])
    });
    let tokens = graph.node("Concat", &[&mean, &map], &[("axis", Int(1))]);
    let normed = graph.layer_norm("norm", &tokens, config.norm_eps)?;
    let (cls, axis) = (graph.slice(&normed, 1, 0, 1), graph.ints(&[1]));
    let cls = graph.node("Squeeze", &[&cls, &axis], &[]);
    let patches = graph.slice(&normed, 1, 1, END);
    graph.output("cls", &cls, &[images, Dim::Is(dim)]);
    graph.output("patches", &patches, &[images, Dim::Any("patches"), Dim::Is(dim)]);
    Ok(graph.encode("convnext", &model.crops, config.patch_size))
}

/// LayerNorm over the channels of `[B, C, h, w]`.
fn norm_of_map(graph: &mut Graph<'_>, name: &str, x: &str, config: &ConvNextConfig) -> Result<String> {
    let last = graph.node("Transpose", &[x], &[("perm", Ints(&[0, 2, 3, 1]))]);
    let normed = graph.layer_norm(name, &last, config.norm_eps)?;
    Ok(graph.node("Transpose", &[&normed], &[("perm", Ints(&[0, 3, 1, 2]))]))
}

fn block(graph: &mut Graph<'_>, name: &str, x: &str, dim: usize, config: &ConvNextConfig) -> Result<String> {
    let (side, pad) = ([KERNEL as i64; 2], [KERNEL as i64 / 2; 4]);
    let depthwise = [("group", Int(dim as i64)), ("kernel_shape", Ints(&side)), ("pads", Ints(&pad))];
    let y = graph.conv(&format!("{name}.dwconv"), x, &depthwise)?;
    let y = graph.node("Transpose", &[&y], &[("perm", Ints(&[0, 2, 3, 1]))]);
    let y = graph.layer_norm(&format!("{name}.norm"), &y, config.norm_eps)?;
    let y = graph.linear(&format!("{name}.pwconv1"), &y, true, false)?;
    let y = graph.gelu(&y);
    let mut y = graph.linear(&format!("{name}.pwconv2"), &y, true, false)?;
    if config.layer_scale != 0.0 {
        let gamma = graph.tensor(&format!("{name}.gamma"))?;
        y = graph.node("Mul", &[&y, &gamma], &[]);
    }
    let y = graph.node("Transpose", &[&y], &[("perm", Ints(&[0, 3, 1, 2]))]);
    Ok(graph.node("Add", &[x, &y], &[]))
}

/// The map on the grid of patches of the pixels: bilinear, as sampled by centres.
fn on_patches(graph: &mut Graph<'_>, map: &str, patch_size: usize) -> String {
    if patch_size == STRIDE {
        return map.to_string();
    }
    let pixels = graph.node("Shape", &["pixels"], &[]);
    let sides = graph.slice(&pixels, 0, 2, 4);
    let patch = graph.int(patch_size as i64);
    let grid = graph.node("Div", &[&sides, &patch], &[]);
    let of_map = graph.node("Shape", &[map], &[]);
    let images_and_dim = graph.slice(&of_map, 0, 0, 2);
    let size = graph.node("Concat", &[&images_and_dim, &grid], &[("axis", Int(0))]);
    graph.node("Resize", &[map, "", "", &size], &[("mode", Word("linear"))])
}
