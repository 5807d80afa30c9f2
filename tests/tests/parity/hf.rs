//! A checkpoint in the published Hugging Face layout, through the importer.

use dinolab_core::contract::{Crops, Features, Mode};
use dinolab_core::params::{load_named, ParamBuilder, Params};
use dinolab_core::weights::Source;
use dinolab_core::{DType, Tensor};
use dinolab_plugins::published;

use crate::golden::{Comparison, Golden};

/// All tokens after the final norm, `[B, 1 + R + P, D]`.
fn hidden_state(features: &Features) -> Vec<f64> {
    let &[images, tokens, dim] = features.prenorm.shape() else { panic!("tokens are [B, N, D]") };
    let parts = [&features.cls, &features.registers, &features.patches].map(Tensor::to_f64_vec);
    let image =
        |i: usize| parts.iter().flat_map(move |part| part[i * part.len() / images..][..part.len() / images].iter());
    let all: Vec<f64> = (0..images).flat_map(image).copied().collect();
    assert_eq!(all.len(), images * tokens * dim);
    all
}

pub fn published_layout(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("weights");
    published::import(&g.path.with_file_name(g.options["folder"].as_str().unwrap()), &weights).unwrap();
    let model = Source::at(&weights).unwrap().known_model().unwrap();
    let mut params = ParamBuilder::new();
    let backbone = model.build(&mut params).unwrap();
    let layout = params.finish();
    let mut flat = Tensor::zeros(&[layout.len()], dtype);
    let read = Source::at(&weights).unwrap().tensors().unwrap();
    load_named(&layout, &mut flat, |name| read.get(name).cloned(), &weights).unwrap();
    let params = Params::frozen(&layout, &flat);

    let plain = Crops::global(g.tensor("pixel_values", dtype));
    let evaluate =
        |crops: &Crops| backbone.forward(&params, std::slice::from_ref(crops), Mode::Eval).unwrap().remove(0);
    let features = evaluate(&plain);
    c.check_values("last_hidden_state", &hidden_state(&features));
    c.check("pooler_output", &features.cls);
    if g.has("bool_masked_pos") {
        let masks: Vec<u32> = g.values("bool_masked_pos").iter().map(|&m| m as u32).collect();
        let masks = Some(Tensor::from_slice(&masks, &[masks.len()]).unwrap());
        let features = evaluate(&Crops { masks, ..plain.clone() });
        c.check_values("masked.last_hidden_state", &hidden_state(&features));
    }
    // State i is what block i gives, counted from 1.
    let blocks = backbone.intermediate(&params, &plain, backbone.depth()).unwrap();
    for (name, i) in g.names().filter_map(|name| Some((name, name.strip_prefix("hidden_state_")?))) {
        let i: usize = i.parse().unwrap_or_else(|_| panic!("{name} has no number"));
        c.check(name, &blocks[i - 1].prenorm);
    }
}
