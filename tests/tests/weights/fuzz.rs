//! Files of others, damaged at random: headers, indexes, configurations, checkpoints. Each is read equal to the original,
//! or refused with the file's name; never a panic, a hang, or memory for what only a number claims.
//!
//! Every case is a function of its number. `FUZZ_CASES=20` does twenty times as many.

use std::fs;
use std::path::{Path, PathBuf};

use dinolab_core::checkpoint::load;
use dinolab_core::files::read_tensors;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::train::Trained;
use dinolab_core::weights::{Source, TensorFiles};
use dinolab_core::{Error, Tensor};
use dinolab_plugins::published::import;
use dinolab_tests::program::{root, Folder};
use serde_json::{json, Value};

/// Cases in this run, of which `few` are done in CI.
fn cases(few: u64) -> u64 {
    few * std::env::var("FUZZ_CASES").ok().and_then(|n| n.parse::<u64>().ok()).unwrap_or(1)
}

struct Dice(Rng);

impl Dice {
    fn of(case: u64) -> Self {
        Self(Rng::new(0, Stream::Plugin, 0, case))
    }

    fn below(&mut self, n: usize) -> usize {
        self.0.below(n)
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Bytes with a few of them changed, cut off, doubled or overwritten.
    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..1 + self.below(3) {
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes.truncate(at),
                2 => bytes.insert(at, self.below(256) as u8),
                3 => drop(bytes.drain(at..(at + 1 + self.below(8)).min(bytes.len()))),
                _ => bytes[at] = *self.one(b"09-\"{}[],:eNn\0\xff"),
            }
            if bytes.is_empty() {
                return;
            }
        }
    }
}

/// Values that no configuration has.
fn odd_values() -> Vec<Value> {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    vec![
        Value::Null,
        json!(-1),
        json!(0),
        json!(0.5),
        json!(1),
        json!(7),
        json!(1e30),
        json!(1e-300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!("text"),
        json!(""),
        json!(true),
        json!(false),
        json!([]),
        json!([8, 8]),
        json!([1, 2, 3, 4, 5]),
        json!({}),
        json!({ "rope_theta": 7.0 }),
        deep,
    ]
}

fn golden() -> PathBuf {
    root().join("tests/golden/hf_mlp")
}

/// A refusal is one of input, and names the file.
fn names(error: &Error, file: &str) {
    let said = error.to_string();
    assert!(matches!(error, Error::Content { .. } | Error::Io { .. }), "{said}");
    assert!(said.contains(file), "no {file} in: {said}");
}

/// What a small image gives with the weights in `folder`.
fn features(folder: &Path) -> Vec<f64> {
    let trained = Trained::open(folder).unwrap_or_else(|e| panic!("what was imported can be used: {e}"));
    let side = 2 * trained.backbone.patch_size();
    let pixels: Vec<f32> = (0..3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
    let pixels = Tensor::from_slice(&pixels, &[1, 3, side, side]).unwrap();
    trained.features(&pixels).unwrap().patches.to_f64_vec()
}

#[test]
fn no_header_is_believed_before_it_is_held_against_the_file() {
    let folder = Folder::new();
    let file = folder.path("model.safetensors");
    // Two tensors: a header that damage hits often.
    let (a, b) = (Tensor::from_slice(&[1f32, 2.0, 3.0], &[3]).unwrap(), Tensor::from_slice(&[4f64], &[1, 1]).unwrap());
    dinolab_core::files::write_tensors(&file, &[("a.weight".into(), a), ("b.weight".into(), b)], &[]).unwrap();
    let whole = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let lengths =
        [0, 1, 7, header as u64, whole.len() as u64, 1 << 20, 1 << 27, 1 << 32, 1 << 62, u64::MAX - 8, u64::MAX];
    let types = ["\"F99\"", "\"F4\"", "\"F8_E4M3\"", "\"I64\"", "32"];
    let odd_names = ["", "\\u0000", "../b", "\\ud800", "__metadata__"];
    let (mut read, all) = (0, cases(2000));
    for case in 0..all {
        let mut dice = Dice::of(case);
        let (mut head, body) = (whole[8..header].to_vec(), &whole[header..]);
        let mut length = None;
        let text = String::from_utf8(head.clone()).unwrap();
        match dice.below(8) {
            0 => length = Some(*dice.one(&lengths)),
            1 => length = Some(dice.below(whole.len() + 9) as u64),
            // Numbers, types and names in it.
            2 => {
                let numbers =
                    ["-1", "18446744073709551615", "9223372036854775808", "1e30", "4294967296", "null", "0", "[]"];
                let found = *dice.one(&["[3]", "[1,1]", "[0,8]", "[8,20]", "[0,12]", "[12,20]"]);
                head = text.replace(found, &format!("[{},{}]", dice.one(&numbers), dice.one(&numbers))).into_bytes();
            }
            3 => head = text.replace("\"F32\"", dice.one::<&str>(&types)).into_bytes(),
            4 => head = text.replace("b.weight", "a.weight").into_bytes(),
            5 => head = text.replace("b.weight", dice.one::<&str>(&odd_names)).into_bytes(),
            _ => dice.damage(&mut head),
        }
        let length = length.unwrap_or(head.len() as u64);
        let mut bytes = [&length.to_le_bytes()[..], &head, body].concat();
        match dice.below(10) {
            0 => bytes.truncate(dice.below(bytes.len())),
            1 => bytes.extend([0; 5]),
            _ => {}
        }
        fs::write(&file, &bytes).unwrap();
        match TensorFiles::open(&file) {
            Err(error) => names(&error, "model.safetensors"),
            Ok(files) => {
                read += 1;
                // Whatever the names are now, the bytes are those of the file, each once.
                let sizes = files.names().map(|name| {
                    let t = files.get(name).unwrap();
                    assert_eq!(t.bytes.len() * 8, t.shape.iter().product::<usize>() * t.dtype.bitsize(), "case {case}");
                    t.bytes.len()
                });
                assert_eq!(sizes.sum::<usize>(), body.len(), "case {case}");
            }
        }
        if let Err(error) = read_tensors(&file) {
            names(&error, "model.safetensors");
        }
    }
    println!("{all} headers: {read} are whole, the rest is refused");
    assert!(read < all / 4);
}

#[test]
fn an_index_names_every_tensor_and_plain_files_beside_it_or_is_refused() {
    let folder = Folder::new();
    let (from, out) = (folder.path("sharded"), folder.path("weights"));
    fs::create_dir(&from).unwrap();
    fs::copy(golden().join("config.json"), from.join("config.json")).unwrap();
    let whole = read_tensors(&golden().join("model.safetensors")).unwrap();
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut map = serde_json::Map::new();
    for (k, shard) in shards.into_iter().enumerate() {
        let part: Vec<(String, Tensor)> = whole
            .names()
            .enumerate()
            .filter(|(i, _)| i % 2 == k)
            .map(|(_, name)| (name.to_string(), whole.get(name).unwrap().clone()))
            .collect();
        part.iter().for_each(|(name, _)| drop(map.insert(name.clone(), shard.into())));
        dinolab_core::files::write_tensors(&from.join(shard), &part, &[]).unwrap();
    }
    // Files that an index has no business with.
    fs::copy(from.join(shards[0]), folder.path("secret.safetensors")).unwrap();
    std::os::unix::fs::symlink("../secret.safetensors", from.join("link.safetensors")).unwrap();
    let absolute = folder.path("secret.safetensors").display().to_string();
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    let index_file = from.join("model.safetensors.index.json");
    fs::write(&index_file, index.to_string()).unwrap();
    import(&from, &out).unwrap();
    let expected = fs::read(out.join("model.safetensors")).unwrap();
    let names_of: Vec<String> = map.keys().cloned().collect();
    let (mut read, all) = (0, cases(150));
    for case in 0..all {
        let mut dice = Dice::of(case);
        let mut changed = index.clone();
        let places =
            [shards[0], shards[1], "../secret.safetensors", &absolute, "link.safetensors", "./x/../y.safetensors"];
        let others =
            ["", ".", "..", "config.json", "gone.safetensors", "model.safetensors.index.json", "a\0.safetensors"];
        let target = if dice.below(2) == 0 { *dice.one(&places) } else { *dice.one(&others) };
        let tensor = dice.one(&names_of).clone();
        let mut bytes = match dice.below(6) {
            0 => {
                // All tensors of a shard go elsewhere.
                let moved = *dice.one(&shards);
                changed["weight_map"]
                    .as_object_mut()
                    .unwrap()
                    .values_mut()
                    .filter(|v| **v == moved)
                    .for_each(|v| *v = target.into());
                changed.to_string().into_bytes()
            }
            1 => {
                changed["weight_map"][&tensor] = dice.one(&odd_values()).clone();
                changed.to_string().into_bytes()
            }
            2 => {
                changed["weight_map"].as_object_mut().unwrap().remove(&tensor);
                changed.to_string().into_bytes()
            }
            3 => {
                changed[*dice.one(&["weight_map", "metadata", "wieght_map"])] = dice.one(&odd_values()).clone();
                changed.to_string().into_bytes()
            }
            4 => {
                changed["weight_map"][&tensor] = target.into();
                changed.to_string().into_bytes()
            }
            _ => index.to_string().into_bytes(),
        };
        if bytes == index.to_string().as_bytes() {
            dice.damage(&mut bytes);
        }
        fs::write(&index_file, &bytes).unwrap();
        fs::remove_dir_all(&out).unwrap_or_default();
        match import(&from, &out) {
            Err(error) => names(&error, "sharded"),
            Ok(_) => {
                read += 1;
                assert!(fs::read(out.join("model.safetensors")).unwrap() == expected, "case {case}");
            }
        }
    }
    println!("{all} indexes: {read} are whole, the rest is refused");
}

/// Keys of `config.json` that the features do not depend on.
const OF_TRAINING: [&str; 7] = [
    "attention_dropout",
    "drop_path_rate",
    "layerscale_value",
    "pos_embed_jitter",
    "pos_embed_rescale",
    "pos_embed_shift",
    "image_size",
];
/// Keys whose numbers no tensor shows: others are the file's word, and have to be usable.
const UNSEEN: [&str; 3] = ["layer_norm_eps", "num_attention_heads", "rope_theta"];
/// Keys of the library and of heads.
const HARMLESS: [&str; 9] = [
    "apply_layernorm",
    "architectures",
    "dtype",
    "initializer_range",
    "out_features",
    "out_indices",
    "reshape_hidden_states",
    "stage_names",
    "transformers_version",
];

#[test]
fn every_key_of_a_configuration_counts_or_is_refused() {
    let folder = Folder::new();
    let (from, out) = (folder.path("download"), folder.path("weights"));
    fs::create_dir(&from).unwrap();
    fs::copy(golden().join("model.safetensors"), from.join("model.safetensors")).unwrap();
    let good: Value = serde_json::from_str(&fs::read_to_string(golden().join("config.json")).unwrap()).unwrap();
    let attempt = |config: &str| {
        fs::write(from.join("config.json"), config).unwrap();
        fs::remove_dir_all(&out).unwrap_or_default();
        import(&from, &out).map(|_| features(&out))
    };
    let expected = attempt(&good.to_string()).unwrap();
    let (mut read, mut refused) = (0, 0);
    for key in good.as_object().unwrap().keys() {
        let mut changes: Vec<(String, Value)> = odd_values()
            .into_iter()
            .map(|v| {
                (format!("{key} = {v}"), {
                    let mut config = good.clone();
                    config[key] = v;
                    config
                })
            })
            .collect();
        let mut without = good.clone();
        let value = without.as_object_mut().unwrap().remove(key).unwrap();
        changes.push((format!("no {key}"), without.clone()));
        without[format!("{key}x")] = value.clone();
        changes.push((format!("{key} misspelt"), without));
        let mut both = good.clone();
        both[format!("x{key}")] = value;
        changes.push((format!("{key} twice, once misspelt"), both));
        for (what, config) in changes {
            match attempt(&config.to_string()) {
                Err(error) => {
                    refused += 1;
                    names(&error, "config.json");
                    assert!(!HARMLESS.contains(&key.as_str()) || what.contains("misspelt"), "{what}: {error}");
                }
                Ok(features) => {
                    read += 1;
                    assert!(!what.contains("misspelt"), "{what} was passed over");
                    assert!(features.iter().all(|x| x.is_finite()), "{what}");
                    let unseen = UNSEEN.contains(&key.as_str()) && config.get(key).is_some_and(Value::is_number);
                    let known = OF_TRAINING.contains(&key.as_str()) || HARMLESS.contains(&key.as_str());
                    assert!(unseen || features == expected, "{what}: other features");
                    assert!(
                        unseen || known || config[key] == good[key] || what.contains("[8,8]"),
                        "{what} was passed over"
                    );
                }
            }
        }
    }
    println!("configurations: {read} read, {refused} refused");
    let text = good.to_string();
    for case in 0..cases(100) {
        let mut bytes = text.clone().into_bytes();
        Dice::of(case).damage(&mut bytes);
        fs::write(from.join("config.json"), &bytes).unwrap();
        fs::remove_dir_all(&out).unwrap_or_default();
        match import(&from, &out) {
            Err(error) => names(&error, "config.json"),
            Ok(_) => assert!(features(&out).iter().all(|x| x.is_finite()), "case {case}"),
        }
    }
}

#[test]
fn every_key_of_a_processor_counts_or_is_refused() {
    let folder = Folder::new();
    let (from, out) = (folder.path("download"), folder.path("weights"));
    fs::create_dir(&from).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden().join(name), from.join(name)).unwrap();
    }
    let good = json!({
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "size": { "height": 32, "width": 32 }, "do_resize": true, "resample": 2,
    });
    let attempt = |processor: &Value| {
        fs::write(from.join("preprocessor_config.json"), processor.to_string()).unwrap();
        fs::remove_dir_all(&out).unwrap_or_default();
        import(&from, &out).map(|found| (found.notes.join("\n"), Trained::open(&out).unwrap().normalization))
    };
    let (notes, expected) = attempt(&good).unwrap();
    assert_eq!((expected.0.clone(), notes.contains("assumed")), (vec![0.4, 0.5, 0.6], false));
    for key in good.as_object().unwrap().keys() {
        for value in odd_values() {
            let mut changed = good.clone();
            changed[key] = value.clone();
            match attempt(&changed) {
                Err(error) => names(&error, "preprocessor_config.json"),
                Ok((notes, (mean, std))) => {
                    let numbers =
                        mean.iter().all(|x| (0.0..=1.0).contains(x)) && std.iter().all(|&x| x > 0.0 && x <= 1.0);
                    assert!(numbers, "{key} = {value}: {mean:?} {std:?}");
                    let same = (mean, std) == expected;
                    let used = ["image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize"]
                        .contains(&key.as_str());
                    assert!(same || used, "{key} = {value}");
                    assert!(!value.is_null() || same || notes.contains("assumed"), "{key} = {value}: {notes}");
                }
            }
        }
        let mut misspelt = good.clone();
        let value = misspelt.as_object_mut().unwrap().remove(key).unwrap();
        misspelt[format!("{key}x")] = value;
        names(&attempt(&misspelt).expect_err("a misspelt key is refused"), "preprocessor_config.json");
    }
}

#[test]
fn a_checkpoint_is_what_was_written_or_refused() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", "steps=2", "--set", "checkpoint.every=1"]);
    let step = |n: u64| folder.path(&format!("run/checkpoints/step-{n:08}"));
    // Copied out of its run, it is all there is.
    let copy = folder.path("copy");
    let fresh = || {
        fs::remove_dir_all(&copy).unwrap_or_default();
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(step(2)).unwrap().map(|e| e.unwrap()) {
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
    };
    fresh();
    let expected = features(&copy);
    // The copy's files change: these do not.
    let kept = folder.path("kept");
    fs::create_dir(&kept).unwrap();
    for entry in fs::read_dir(&copy).unwrap().map(|e| e.unwrap()) {
        fs::copy(entry.path(), kept.join(entry.file_name())).unwrap();
    }
    let whole = load(&kept).unwrap();
    let same = |what: &str| {
        match Source::at(&copy).and_then(|source| Ok((source.known_model()?, source.tensors()?))) {
            Err(error) => names(&error, "copy"),
            Ok((_, tensors)) => {
                let equal =
                    tensors.names().all(|n| tensors.get(n).unwrap().as_bytes() == whole.model.get(n).unwrap().bytes);
                assert!(equal && features(&copy) == expected, "{what}: other weights");
            }
        }
        match load(&copy) {
            Err(error) => names(&error, "copy"),
            Ok(read) => {
                assert_eq!((read.step, read.skipped), (whole.step, whole.skipped), "{what}");
                let equal = |n: &str| read.optimizer.get(n).unwrap().bytes == whole.optimizer.get(n).unwrap().bytes;
                assert!(read.optimizer.names().all(equal), "{what}: other moments");
            }
        }
    };
    let files: Vec<String> =
        fs::read_dir(&copy).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(files.len(), 4, "{files:?}");
    for name in &files {
        let bytes = fs::read(copy.join(name)).unwrap();
        fs::remove_file(copy.join(name)).unwrap();
        same(&format!("no {name}"));
        for share in [0, 1, 10, 50, 90, 99] {
            fs::write(copy.join(name), &bytes[..bytes.len() * share / 100]).unwrap();
            same(&format!("{share}% of {name}"));
        }
        fs::copy(step(1).join(name), copy.join(name)).unwrap();
        same(&format!("{name} of another step"));
        for other in files.iter().filter(|other| *other != name) {
            fs::copy(step(2).join(other), copy.join(name)).unwrap();
            same(&format!("{other} as {name}"));
        }
        for case in 0..cases(40) {
            let mut changed = bytes.clone();
            Dice::of(case).damage(&mut changed);
            fs::write(copy.join(name), &changed).unwrap();
            same(&format!("case {case} of {name}"));
        }
        fs::write(copy.join(name), &bytes).unwrap();
    }
    let state: Value = serde_json::from_str(&fs::read_to_string(copy.join("state.json")).unwrap()).unwrap();
    for key in state.as_object().unwrap().keys() {
        for value in odd_values() {
            let mut changed = state.clone();
            changed[key] = value.clone();
            fs::write(copy.join("state.json"), changed.to_string()).unwrap();
            same(&format!("{key} = {value}"));
        }
    }
}
