//! Weights as people have them: wrapped names, other types, caches, settings of other programs, files that are something
//! else. Each comes out equal to the model that it is of, or is refused by name with what to do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::weights::Source;
use dinolab_core::{Error, Tensor};
use dinolab_plugins::published::{import, Imported};
use dinolab_tests::program::{root, Folder};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{json, Value};

type Tensors = BTreeMap<String, Tensor>;

/// The small published model, in memory.
fn model() -> (Tensors, Value) {
    let golden = root().join("tests/golden/hf_mlp");
    let file = read_tensors(&golden.join("model.safetensors")).unwrap();
    let tensors = file.names().map(|name| (name.to_string(), file.get(name).unwrap().clone())).collect();
    (tensors, serde_json::from_str(&fs::read_to_string(golden.join("config.json")).unwrap()).unwrap())
}

/// A download: tensors, if any, and files.
fn download(folder: &Folder, tensors: &Tensors, files: &[(&str, &str)]) -> PathBuf {
    let path = folder.path("download");
    fs::create_dir_all(&path).unwrap();
    for (name, text) in files {
        fs::write(path.join(name), text).unwrap();
    }
    if !tensors.is_empty() {
        let list: Vec<(String, Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t.clone())).collect();
        write_tensors(&path.join("model.safetensors"), &list, &[]).unwrap();
    }
    path
}

fn imported(tensors: &Tensors, files: &[(&str, &str)]) -> Result<(Imported, String, Folder), Error> {
    let folder = Folder::new();
    let imported = import(&download(&folder, tensors, files), &folder.path("weights"))?;
    // What follows the comments.
    let says =
        folder.read("weights/weights.toml").lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>().join("\n");
    Ok((imported, says, folder))
}

/// The import of a download is the model, to the bit but for the type.
fn is_the_model(tensors: &Tensors, files: &[(&str, &str)]) -> Imported {
    let (good, config) = model();
    let (_, expected, good_folder) = imported(&good, &[("config.json", &config.to_string())]).unwrap();
    let (found, says, folder) = imported(tensors, files).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(says, expected);
    let [a, b] = [&folder, &good_folder].map(|f| Source::at(&f.path("weights")).unwrap().tensors().unwrap());
    for name in b.names() {
        assert_eq!(a.get(name).unwrap().to_f64_vec(), b.get(name).unwrap().to_f64_vec(), "{name}");
    }
    found
}

/// The import of a download is refused, saying all of `parts`, and leaves nothing behind.
fn is_refused(tensors: &Tensors, files: &[(&str, &str)], parts: &[&str]) {
    let folder = Folder::new();
    let from = download(&folder, tensors, files);
    let said = import(&from, &folder.path("weights")).map(|i| i.title).expect_err("it is refused").to_string();
    for part in parts {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
    assert!(said.contains("help: "), "{said}");
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1, "only the download is there");
}

fn with(config: &Value, changes: Value) -> String {
    let mut config = config.clone();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    config.to_string()
}

#[test]
fn names_that_programs_put_around_a_model_are_taken_off_and_said() {
    let (good, config) = model();
    let config = config.to_string();
    for prefix in [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "dinov3_vit.",
        "model.backbone.",
        "teacher.backbone.",
        "encoder.",
    ] {
        let wrapped = good.iter().map(|(name, t)| (format!("{prefix}{name}"), t.clone())).collect();
        let found = is_the_model(&wrapped, &[("config.json", &config)]);
        let first = prefix.split('.').next().unwrap();
        assert!(
            found.notes.iter().any(|n| n.contains("taken off") && n.contains(first)),
            "{prefix}: {:?}",
            found.notes
        );
    }
    // torch.compile of single blocks.
    let inside = good.iter().map(|(name, t)| (name.replace("layer.1.", "layer.1._orig_mod."), t.clone())).collect();
    is_the_model(&inside, &[("config.json", &config)]);
}

#[test]
fn a_classifier_is_left_out_and_said() {
    let (good, config) = model();
    let config = with(&config, json!({ "architectures": ["DINOv3ViTForImageClassification"], "num_labels": 10 }));
    for prefix in ["dinov3_vit.", ""] {
        let mut tensors: Tensors = good.iter().map(|(name, t)| (format!("{prefix}{name}"), t.clone())).collect();
        tensors.insert("classifier.weight".into(), Tensor::zeros(&[10, 128], dinolab_core::DType::F32));
        let found = is_the_model(&tensors, &[("config.json", &config)]);
        assert!(found.notes.iter().any(|n| n.contains("left out") && n.contains("classifier.*")), "{:?}", found.notes);
    }
}

#[test]
fn of_several_models_in_a_file_the_teacher_is_taken() {
    let (good, config) = model();
    let mut both: Tensors = good.iter().map(|(name, t)| (format!("teacher.backbone.{name}"), t.clone())).collect();
    both.extend(good.iter().map(|(name, t)| (format!("student.backbone.{name}"), t.scale(2.0).unwrap())));
    is_the_model(&both, &[("config.json", &config.to_string())]);
    let mut both: Tensors = good.iter().map(|(name, t)| (format!("a.{name}"), t.clone())).collect();
    both.extend(good.iter().map(|(name, t)| (format!("b.{name}"), t.clone())));
    is_refused(&both, &[("config.json", &config.to_string())], &["several models", "`a.*`", "`b.*`"]);
}

/// The model under the names of the reference, with its buffers.
fn reference() -> Tensors {
    let (good, _) = model();
    let mut all = Tensors::new();
    let zero = Tensor::zeros(&[64], dinolab_core::DType::F32);
    for (name, tensor) in &good {
        let name = name.replace("layer.", "blocks.");
        let name = name.strip_prefix("embeddings.").unwrap_or(&name).to_string();
        let mut named = name.clone();
        for (theirs, ours) in [
            ("register_tokens", "storage_tokens"),
            ("patch_embeddings", "patch_embed.proj"),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("mlp.up_proj", "mlp.fc1"),
            ("mlp.down_proj", "mlp.fc2"),
        ] {
            named = named.replace(theirs, ours);
        }
        let tensor = if name == "mask_token" { tensor.reshape(&[1, 64]).unwrap() } else { tensor.clone() };
        if !named.contains("attention.") {
            all.insert(named, tensor);
        }
    }
    for block in 0..3 {
        let get = |p: &str, kind: &str| good.get(&format!("layer.{block}.attention.{p}_proj.{kind}"));
        let rows = ["q", "k", "v"].map(|p| get(p, "weight").unwrap());
        let biases = ["q", "k", "v"].map(|p| get(p, "bias").unwrap_or(&zero).reshape(&[64, 1]).unwrap());
        let whole = |parts: &[&Tensor]| Tensor::cat(parts).unwrap();
        all.insert(format!("blocks.{block}.attn.qkv.weight"), whole(&rows));
        let bias = whole(&biases.each_ref()).reshape(&[192]).unwrap();
        all.insert(format!("blocks.{block}.attn.qkv.bias"), bias);
        let mask: Vec<f32> = (0..192).map(|i| if (64..128).contains(&i) { 0.0 } else { 1.0 }).collect();
        all.insert(format!("blocks.{block}.attn.qkv.bias_mask"), Tensor::from_slice(&mask, &[192]).unwrap());
    }
    let periods: Vec<f32> = (0..4).map(|j| 100f32.powf(j as f32 / 4.0)).collect();
    all.insert("rope_embed.periods".into(), Tensor::from_slice(&periods, &[4]).unwrap());
    all
}

/// Writes tensors in another type, as other programs do: bf16 and f16 of f32 are rounded, the rest is exact.
fn write_as(path: &Path, tensors: &Tensors, dtype: impl Fn(&str) -> Dtype) {
    let convert = |name: &str, tensor: &Tensor| -> (Dtype, Vec<u8>) {
        let values = tensor.to_f64_vec().into_iter();
        let dtype = dtype(name);
        let bytes = match dtype {
            Dtype::F64 => values.flat_map(f64::to_le_bytes).collect(),
            Dtype::F32 => values.flat_map(|x| (x as f32).to_le_bytes()).collect(),
            Dtype::F16 => values.flat_map(|x| half::f16::from_f64(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.flat_map(|x| half::bf16::from_f64(x).to_le_bytes()).collect(),
            Dtype::I32 => values.flat_map(|x| (x as i32).to_le_bytes()).collect(),
            _ => values.map(|x| x as u8).collect(),
        };
        (dtype, bytes)
    };
    let all: Vec<_> = tensors.iter().map(|(name, t)| (name, t.shape().to_vec(), convert(name, t))).collect();
    let views = all
        .iter()
        .map(|(name, shape, (dtype, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn every_float_type_is_read_and_mixed_parts_become_the_widest() {
    let (good, config) = model();
    let floats = [Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16];
    let mixed = |wide: Dtype, narrow: Dtype| move |name: &str| if name.contains("k_proj") { narrow } else { wide };
    for (wide, narrow, expected) in floats.map(|dtype| (dtype, dtype, dtype)).into_iter().chain([
        (Dtype::F32, Dtype::F16, Dtype::F32),
        (Dtype::BF16, Dtype::F16, Dtype::F32),
        (Dtype::F16, Dtype::F64, Dtype::F64),
    ]) {
        let folder = Folder::new();
        let from = download(&folder, &Tensors::new(), &[("config.json", &config.to_string())]);
        write_as(&from.join("model.safetensors"), &good, mixed(wide, narrow));
        import(&from, &folder.path("weights")).unwrap_or_else(|e| panic!("{wide:?} {narrow:?}: {e}"));
        let bytes = fs::read(folder.path("weights/model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("backbone.blocks.0.attn.qkv.weight").unwrap().dtype(), expected, "{wide:?} {narrow:?}");
        let read = Source::at(&folder.path("weights")).unwrap().tensors().unwrap();
        let qkv = read.get("backbone.blocks.0.attn.qkv.weight").unwrap().to_f64_vec();
        for (i, part) in ["q", "k", "v"].into_iter().enumerate() {
            let whole = good[&format!("layer.0.attention.{part}_proj.weight")].to_f64_vec();
            let step = if [wide, narrow].contains(&Dtype::BF16) { 0.004 } else { 0.001 };
            let near = |(a, b): (&f64, &f64)| (a - b).abs() <= step * b.abs() + 1e-6;
            assert!(qkv[i * 4096..].iter().zip(&whole).all(near), "{wide:?} {narrow:?} {part}");
        }
    }
}

#[test]
fn the_reference_is_read_in_every_float_type_and_says_what_it_cannot_know() {
    for dtype in [Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16] {
        let folder = Folder::new();
        let from = download(&folder, &Tensors::new(), &[]);
        write_as(&from.join("model.safetensors"), &reference(), |_| dtype);
        let found = import(&from, &folder.path("weights")).unwrap_or_else(|e| panic!("{dtype:?}: {e}"));
        let says = folder.read("weights/weights.toml");
        assert!(says.contains("heads = 4") && says.contains("base = 100.0"), "{dtype:?}: {says}");
        let notes = found.notes.join("\n");
        for said in ["norm_eps", "mean", "ImageNet", "crops.mean", "weights.toml"] {
            assert!(notes.contains(said), "{said}: {notes}");
        }
        assert!(says.contains("are assumed"), "the folder says it too");
    }
    let mut satellite = reference();
    for kind in ["weight", "bias"] {
        satellite.insert(format!("local_cls_norm.{kind}"), satellite[&format!("norm.{kind}")].clone());
    }
    let (found, ..) = imported(&satellite, &[]).unwrap();
    assert!(found.notes.join("\n").contains("satellite"), "{:?}", found.notes);
    let mut odd = reference();
    odd.insert("blocks.1.attn.qkv.bias_mask".into(), Tensor::from_slice(&[1f32; 192], &[192]).unwrap());
    is_refused(&odd, &[], &["blocks.1.attn.qkv.bias_mask", "0 for keys"]);
}

#[test]
fn what_is_no_weight_is_named_tensor_by_tensor() {
    let (good, config) = model();
    for (dtype, said) in [(Dtype::I32, "norm.bias is of type I32"), (Dtype::F8_E4M3, "norm.bias is of type F8_E4M3")] {
        let folder = Folder::new();
        let from = download(&folder, &Tensors::new(), &[("config.json", &config.to_string())]);
        write_as(&from.join("model.safetensors"), &good, |name| if name == "norm.bias" { dtype } else { Dtype::F32 });
        let refused = import(&from, &folder.path("weights")).unwrap_err().to_string();
        assert!(refused.contains(said), "{refused}");
    }
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensors = good.clone();
        let mut values = vec![1f32; 64];
        (values[3], values[40]) = (odd, odd);
        tensors.insert("norm.weight".into(), Tensor::from_slice(&values, &[64]).unwrap());
        is_refused(
            &tensors,
            &[("config.json", &config.to_string())],
            &["norm.weight has 2 of 64 numbers", "not finite"],
        );
    }
}

#[test]
fn timm_and_dinov2_are_named_as_what_they_are() {
    let (good, config) = model();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, dinolab_core::DType::F32);
    let timm: Tensors =
        [("cls_token", zeros(&[1, 1, 64])), ("reg_token", zeros(&[1, 4, 64])), ("blocks.0.gamma_1", zeros(&[64]))]
            .map(|(name, t)| (name.to_string(), t))
            .into();
    let about = json!({ "architecture": "vit_small_patch16_dinov3", "num_classes": 0 }).to_string();
    is_refused(&timm, &[("config.json", &about)], &["timm", "vit_small_patch16_dinov3", "facebook/dinov3"]);
    is_refused(&timm, &[], &["timm"]);
    for kind in ["dinov2", "dinov2_with_registers"] {
        let about = with(&config, json!({ "model_type": kind }));
        is_refused(&good, &[("config.json", &about)], &["config.json", "model_type", "DINOv2"]);
    }
    let mut v2 = reference();
    v2.insert("pos_embed".into(), zeros(&[1, 1370, 64]));
    is_refused(&v2, &[], &["DINOv2", "learned table of positions"]);
    let about = with(&config, json!({ "model_type": "clip_vision_model" }));
    is_refused(&good, &[("config.json", &about)], &["`clip_vision_model`", "dinov3_vit"]);
    is_refused(
        &reference(),
        &[("config.json", &config.to_string())],
        &["names of the PyTorch reference", "config.json"],
    );
}

#[test]
fn rotary_settings_are_read_in_every_spelling_and_never_guessed() {
    let (good, config) = model();
    let moved = |key: &str, value: Value| with(&config, json!({ "rope_theta": null, key: value }));
    for about in [
        moved("rope_parameters", json!({ "rope_type": "default", "rope_theta": 50.0 })),
        moved("rope_scaling", json!({ "type": "default", "rope_theta": 50 })),
        with(&config, json!({ "rope_theta": 50.0, "rope_parameters": { "rope_theta": 50.0 } })),
    ] {
        let (_, says, _) = imported(&good, &[("config.json", &about)]).unwrap_or_else(|e| panic!("{about}: {e}"));
        assert!(says.contains("base = 50.0"), "{says}");
    }
    let scaled = |rope: Value| moved("rope_parameters", rope);
    for (about, said) in [
        (with(&config, json!({ "rope_theta": null })), "rope_theta: missing"),
        (with(&config, json!({ "rope_theta": null, "rope_tetha": 50.0 })), "rope_theta: missing"),
        (with(&config, json!({ "rope_tetha": 50.0 })), "rope_tetha = 50.0 (did you mean `rope_theta`?)"),
        (
            scaled(json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 50.0 })),
            "rope_parameters.rope_type: `linear`",
        ),
        (scaled(json!({ "rope_theta": 50.0, "factor": 2.0 })), "rope_parameters.factor = 2.0"),
        (with(&config, json!({ "rope_parameters": { "rope_theta": 50.0 } })), "50 contradicts the 100"),
        (with(&config, json!({ "rope_theta": -1.0 })), "rope_theta: -1"),
        (with(&config, json!({ "quantization_config": { "bits": 4 } })), "quantization_config = a table"),
        (with(&config, json!({ "hidden_act": "quick_gelu" })), "hidden_act: `quick_gelu`"),
        (with(&config, json!({ "num_channels": 4 })), "[64, 3, 8, 8], expected [64, 4, 8, 8]"),
        (with(&config, json!({ "num_attention_heads": 5 })), "config.json"),
        (with(&config, json!({ "hidden_size": 4_000_000_000u64 })), "hidden_size"),
        (with(&config, json!({ "num_hidden_layers": 1_000_000_000 })), "num_hidden_layers"),
        (with(&config, json!({ "patch_size": [8, 16] })), "patch_size: [8, 16] is no square"),
    ] {
        is_refused(&good, &[("config.json", &about)], &["config.json", said]);
    }
    is_the_model(&good, &[("config.json", &with(&config, json!({ "patch_size": [8, 8], "image_size": [32, 32] })))]);
}

#[test]
fn a_processor_is_taken_at_its_word_or_refused() {
    let (good, config) = model();
    let config = config.to_string();
    let processor =
        |value: &Value| imported(&good, &[("config.json", &config), ("preprocessor_config.json", &value.to_string())]);
    let third = 1.0 / 255.0;
    for (value, mean, std) in [
        (
            json!({ "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.25, 0.25], "rescale_factor": third }),
            "[0.5, 0.4, 0.3]",
            "[0.25, 0.25, 0.25]",
        ),
        (json!({ "image_mean": 0.5, "image_std": 0.5, "do_normalize": true }), "[0.5, 0.5, 0.5]", "[0.5, 0.5, 0.5]"),
        (
            json!({ "do_normalize": false, "image_mean": [0.1, 0.1, 0.1], "rescale_factor": third }),
            "[0.0, 0.0, 0.0]",
            "[1.0, 1.0, 1.0]",
        ),
        // Pixels from 0 to 2.
        (
            json!({ "image_mean": 1.0, "image_std": 0.5, "rescale_factor": 2.0 * third }),
            "[0.5, 0.5, 0.5]",
            "[0.25, 0.25, 0.25]",
        ),
        (
            json!({ "image_mean": [127.5, 127.5, 127.5], "image_std": [51.0, 51.0, 51.0], "do_rescale": false }),
            "[0.5, 0.5, 0.5]",
            "[0.2, 0.2, 0.2]",
        ),
    ] {
        let (found, says, _) = processor(&value).unwrap_or_else(|e| panic!("{value}: {e}"));
        assert!(says.contains(&format!("mean = {mean}")) && says.contains(&format!("std = {std}")), "{value}: {says}");
        assert!(!found.notes.join("").contains("assumed"), "{:?}", found.notes);
    }
    for (value, said) in [
        (json!({ "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4] }), "divide them by 255"),
        (json!({ "image_mean": [0.5, 0.5, 0.5, 0.5], "image_std": 0.5 }), "image_mean"),
        (json!({ "image_mean": "half", "image_std": 0.5 }), "image_mean"),
        (json!({ "image_mean": 0.5, "image_std": [0.5, 0.0, 0.5] }), "image_std"),
        (json!({ "image_mean": 0.5, "image_std": 0.5, "rescale_factor": -1.0 }), "rescale_factor"),
        (json!({ "image_mean": 0.5, "image_std": 0.5, "rescale_offset": true }), "rescale_offset = true"),
        (json!({ "image_maen": 0.5, "image_std": 0.5 }), "did you mean `image_mean`"),
        (json!({ "image_mean": 0.5, "image_std": 0.5, "do_flip_channel_order": true }), "do_flip_channel_order"),
        (json!([1, 2]), "expected a table"),
    ] {
        let said_ = processor(&value).map(|f| f.1).expect_err("it is refused").to_string();
        assert!(said_.contains("preprocessor_config.json") && said_.contains(said), "{value}: {said_}");
    }
    let (found, ..) = processor(&json!({ "do_normalize": true, "image_std": 0.5 })).unwrap();
    assert!(found.notes.join("").contains("has no image_mean") && found.notes.join("").contains("crops.mean"));
}

#[test]
fn a_file_that_is_something_else_is_named_as_that() {
    let (good, config) = model();
    let config = config.to_string();
    for (bytes, said) in [
        (&b""[..], "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 86437000\n", "Git LFS pointer"),
        (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"PK\x03\x04 a state dict", "zip archive, as PyTorch's .pth files are"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"Access to this resource is restricted", "a text"),
    ] {
        let folder = Folder::new();
        let from = download(&folder, &Tensors::new(), &[("config.json", &config)]);
        fs::write(from.join("model.safetensors"), bytes).unwrap();
        for said_ in
            [import(&from, &folder.path("out")).unwrap_err(), Source::at(&from.join("model.safetensors")).unwrap_err()]
        {
            let said_ = said_.to_string();
            assert!(said_.contains("model.safetensors") && said_.contains(said), "{said}: {said_}");
        }
    }
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 932\n";
    is_refused(&good, &[("config.json", pointer)], &["config.json", "Git LFS pointer"]);
    is_refused(&good, &[("config.json", "{\"model_type\": ")], &["config.json", "not JSON"]);
    is_refused(&Tensors::new(), &[("pytorch_model.bin", "PK")], &["not a PyTorch file"]);
    // Of several files the one with the usual name is meant, and without it none.
    let beside = [("optimizer.pt", "PK"), ("pytorch_model.bin", "PK")];
    is_refused(&Tensors::new(), &beside, &["pytorch_model.bin: this is not a PyTorch file"]);
    is_refused(&Tensors::new(), &[("a.pth", "PK"), ("b.pth", "PK")], &["several PyTorch files: a.pth, b.pth"]);
}

#[test]
fn files_of_weights_have_the_permissions_of_ordinary_ones() {
    let (good, config) = model();
    let (_, _, folder) = imported(&good, &[("config.json", &config.to_string())]).unwrap();
    folder.write("ordinary", "");
    let mode = |name: &str| fs::metadata(folder.path(name)).unwrap().permissions().mode();
    for name in ["weights/model.safetensors", "weights/weights.toml"] {
        assert_eq!(mode(name), mode("ordinary"), "{name}");
    }
}

#[test]
fn of_two_imports_at_once_one_wins_and_the_other_says_so() {
    let (good, config) = model();
    let folder = Folder::new();
    let from = download(&folder, &good, &[("config.json", &config.to_string())]);
    let out = folder.path("weights");
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| import(&from, &out).map(|_| ()))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|o| o.is_ok()).count(), 1);
    for said in outcomes.into_iter().filter_map(Result::err).map(|e| e.to_string()) {
        assert!(said.contains("another process has just written") || said.contains("something already"), "{said}");
    }
    let left: Vec<_> = fs::read_dir(folder.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // A writer that was killed leaves half a folder, which the next one clears.
    fs::create_dir(folder.path(".building-dead")).unwrap();
    folder.write(".building-dead/.lock", "");
    import(&from, &folder.path("again")).unwrap();
    assert!(!folder.path(".building-dead").exists());
}

#[test]
fn a_hub_cache_is_understood_by_its_root_its_snapshot_and_its_links() {
    let (good, config) = model();
    let folder = Folder::new();
    let from = download(&folder, &good, &[("config.json", &config.to_string())]);
    let root = folder.path("hub/models--facebook--tiny");
    fs::create_dir_all(root.join("blobs")).unwrap();
    for version in ["0123", "4567"] {
        let snapshot = root.join("snapshots").join(version);
        fs::create_dir_all(&snapshot).unwrap();
        for (i, name) in ["config.json", "model.safetensors"].into_iter().enumerate() {
            fs::copy(from.join(name), root.join(format!("blobs/{i}"))).unwrap();
            symlink(format!("../../blobs/{i}"), snapshot.join(name)).unwrap();
        }
    }
    let refused = import(&root, &folder.path("a")).unwrap_err().to_string();
    assert!(refused.contains("Hugging Face's cache") && refused.contains("snapshots/0123"), "{refused}");
    fs::create_dir(root.join("refs")).unwrap();
    fs::write(root.join("refs/main"), "4567").unwrap();
    let found = import(&root, &folder.path("a")).unwrap();
    assert!(found.notes[0].contains("snapshots/4567"), "{:?}", found.notes);
    import(&root.join("snapshots/0123"), &folder.path("b")).unwrap();
    let refused = import(&folder.path("hub"), &folder.path("c")).unwrap_err().to_string();
    assert!(refused.contains("models--facebook--tiny"), "{refused}");
    fs::remove_file(root.join("blobs/1")).unwrap();
    let refused = import(&root, &folder.path("c")).unwrap_err().to_string();
    assert!(refused.contains("a link to ../../blobs/1, where nothing is"), "{refused}");
}
