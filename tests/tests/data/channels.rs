//! Images of other channels than RGB, of 8 and 16 bits: from files to trained, scored and exported models.

use std::fs;
use std::path::Path;

use dinolab_core::contract::{ColorPlan, CropPlan, Cut, Dataset, ImagePlan, Jitter, JitterOp, Pixels, Rect, Sample};
use dinolab_core::data::{CropMaker, Views};
use dinolab_core::recipe::{CropConfig, Overrides};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::Learner;
use dinolab_core::train::Trained;
use dinolab_core::Tensor;
use dinolab_plugins::image_folder::{read_as, ImageFolder, ImageFolderConfig, Wanted};
use dinolab_tests::program::{assert_same_weights, json, Folder};
use image::{DynamicImage, ImageBuffer, Luma, LumaA, Rgb, Rgba};

const WIDTH: usize = 44;
const HEIGHT: usize = 40;

/// Value of a channel of a pixel of picture `i` of a class.
fn value(class: usize, i: usize, at: usize, channel: usize) -> u16 {
    let (x, y) = (at % WIDTH, at / WIDTH);
    (9000 * class + 1111 * i + 700 * x + 350 * y + 5000 * channel + x * y * (channel + 1)) as u16
}

fn values(class: usize, i: usize, channels: usize) -> Vec<u16> {
    (0..WIDTH * HEIGHT * channels).map(|k| value(class, i, k / channels, k % channels)).collect()
}

/// An uncompressed TIFF of 16 bits: channel by channel if `planar`, its colours called what `meaning` says.
fn tiff(values: &[u16], channels: usize, planar: bool, meaning: u16) -> Vec<u8> {
    let n = WIDTH * HEIGHT;
    let stored = |k: usize| if planar { values[k % n * channels + k / n] } else { values[k] };
    let data: Vec<u8> = (0..values.len()).flat_map(|k| stored(k).to_le_bytes()).collect();
    let strips = if planar { channels } else { 1 };
    let (lists, entries) = (8 + data.len(), 11);
    let list = |numbers: Vec<u32>| numbers.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
    let of_strip = (data.len() / strips) as u32;
    let starts = list((0..strips as u32).map(|strip| 8 + strip * of_strip).collect());
    let counts = list(vec![of_strip; strips]);
    let bits: Vec<u8> = (0..channels).flat_map(|_| 16u16.to_le_bytes()).collect();
    let (counts_at, bits_at) = (lists + starts.len(), lists + starts.len() + counts.len());
    let directory = (bits_at + bits.len()).next_multiple_of(2);
    let mut file = [b"II*\0", &(directory as u32).to_le_bytes()[..], &data, &starts, &counts, &bits].concat();
    file.resize(directory, 0);
    file.extend((entries as u16).to_le_bytes());
    let mut entry = |tag: u16, kind: u16, count: usize, value: u32| {
        file.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
        file.extend([(count as u32).to_le_bytes(), value.to_le_bytes()].concat());
    };
    // One number of a list lies in the entry itself.
    let at = |count: usize, place: usize, one: u32| if count == 1 { one } else { place as u32 };
    entry(256, 4, 1, WIDTH as u32);
    entry(257, 4, 1, HEIGHT as u32);
    entry(258, 3, channels, if channels <= 2 { 16 | (channels as u32 - 1) << 20 } else { bits_at as u32 });
    entry(259, 3, 1, 1);
    entry(262, 3, 1, meaning.into());
    entry(273, 4, strips, at(strips, lists, 8));
    entry(277, 3, 1, channels as u32);
    entry(278, 4, 1, HEIGHT as u32);
    entry(279, 4, strips, at(strips, counts_at, of_strip));
    entry(284, 3, 1, if planar { 2 } else { 1 });
    entry(339, 3, 1, 1);
    file.extend([0; 4]);
    file
}

fn npy<T: npyz::AutoSerialize + Copy>(shape: &[u64], numbers: &[T]) -> Vec<u8> {
    use npyz::WriterBuilder;
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd().unwrap();
    writer.extend(numbers.iter().copied()).unwrap();
    writer.finish().unwrap();
    bytes
}

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn grey_16(values: Vec<u16>) -> ImageBuffer<Luma<u16>, Vec<u16>> {
    ImageBuffer::from_raw(WIDTH as u32, HEIGHT as u32, values).unwrap()
}

/// The kinds of files that are trained on, with their channels.
const KINDS: [(&str, usize); 3] = [("tif", 4), ("png", 1), ("npy", 2)];

/// A picture as a file of a kind.
fn file(kind: &str, class: usize, i: usize) -> Vec<u8> {
    match kind {
        // By pixel and by channel, of samples without a meaning and of RGB with one more.
        "tif" => tiff(&values(class, i, 4), 4, i.is_multiple_of(2), if i.is_multiple_of(3) { 2 } else { 1 }),
        "png" => png(grey_16(values(class, i, 1))),
        _ => npy(&[HEIGHT as u64, WIDTH as u64, 2], &values(class, i, 2)),
    }
}

/// A folder `pictures` of two classes, and what a recipe has to say for it.
fn pictures(folder: &Folder, kind: &str, channels: usize) -> Vec<String> {
    for (class, name) in ["a", "b"].into_iter().enumerate() {
        fs::create_dir_all(folder.path("pictures").join(name)).unwrap();
        for i in 0..8 {
            fs::write(folder.path(&format!("pictures/{name}/{i}.{kind}")), file(kind, class, i)).unwrap();
        }
    }
    sets(channels)
}

fn sets(channels: usize) -> Vec<String> {
    let (mean, std) = (vec![0.4; channels], vec![0.25; channels]);
    let keys = [
        "data.plugin=image_folder".into(),
        "data.path=pictures".into(),
        "data.held_out=0.4".into(),
        format!("data.channels={channels}"),
        format!("crops.mean={mean:?}"),
        format!("crops.std={std:?}"),
        "crops.saturation=0".into(),
        "crops.hue=0".into(),
        "crops.grey_probability=0".into(),
    ];
    keys.into_iter().flat_map(|key| ["--set".to_string(), key]).collect()
}

fn with<'a>(args: &[&'a str], sets: &'a [String]) -> Vec<&'a str> {
    args.iter().copied().chain(sets.iter().map(String::as_str)).collect()
}

#[test]
fn every_kind_of_file_trains_resumes_is_scored_and_comes_back_from_an_export() {
    for (kind, channels) in KINDS {
        let folder = Folder::with_micro();
        let sets = pictures(&folder, kind, channels);
        let short = ["--set", "steps=2", "--set", "checkpoint.every=1", "--set", "checkpoint.keep_every=1"];
        let train = |out| with(&[&["train", "micro.toml", "--out", out][..], &short].concat(), &sets);
        folder.succeed(&train("run"));
        folder.succeed(&train("again"));
        fs::remove_dir_all(folder.path("again/checkpoints/step-00000002")).unwrap();
        fs::remove_file(folder.path("again/result.json")).unwrap();
        folder.succeed(&[train("again"), vec!["--resume"]].concat());
        assert_same_weights(&folder, "run", "again", 2);

        let scored = ["eval", "run", "--data", "run", "--probes", "knn", "--sizes", "32", "--out", "seen"];
        let ended = folder.succeed(&scored);
        assert!(ended.out.contains("knn/top1"), "{kind}: {}{}", ended.out, ended.err);
        folder.succeed(&["features", "pictures/a", "--weights", "run", "--out", "features"]);

        let n = channels * 32 * 32;
        let pixels: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let pixels = Tensor::from_slice(&pixels, &[1, channels, 32, 32]).unwrap();
        let features = |path: &Path| Trained::open(path).unwrap().features(&pixels).unwrap().patches.to_f64_vec();
        let expected = features(&folder.path("run"));
        for (format, said) in [("hf", "num_channels"), ("timm", "in_chans")] {
            if format == "timm" && folder.run(&["export", "run", "--format", format, "--out", format]).code != 0 {
                continue;
            } else if format == "hf" {
                folder.succeed(&["export", "run", "--format", format, "--out", format]);
            }
            assert!(folder.read(&format!("{format}/config.json")).contains(&format!("\"{said}\": {channels}")));
            let back = format!("{format}_back");
            folder.succeed(&["import", format, "--out", &back]);
            let error =
                features(&folder.path(&back)).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error < 1e-5, "{kind} {format}: {error}");
        }
        assert_eq!(json(&folder, "hf/preprocessor_config.json")["image_mean"].as_array().unwrap().len(), channels);
        folder.succeed(&["export", "run", "--format", "onnx", "--out", "onnx"]);
    }
}

#[test]
fn files_of_every_kind_keep_their_values() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, bytes: Vec<u8>, channels: usize, bits: Option<u8>| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        read_as(&path, &Wanted::new(channels, bits, [255; 3])).map(|sample| sample.pixels).map_err(|e| e.to_string())
    };
    for channels in [1, 2, 4, 5, 13] {
        let of = values(1, 2, channels);
        for (planar, meaning) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
            let file = tiff(&of, channels, planar, meaning);
            assert_eq!(read("a.tif", file, channels, None), Ok(of.clone().into()), "{channels} {planar} {meaning}");
        }
        let array = npy(&[HEIGHT as u64, WIDTH as u64, channels as u64], &of);
        assert_eq!(read("a.npy", array, channels, None), Ok(of.clone().into()));
    }
    let grey = values(0, 3, 1);
    assert_eq!(read("a.png", png(grey_16(grey.clone())), 1, None), Ok(grey.clone().into()));
    assert_eq!(read("a.npy", npy(&[HEIGHT as u64, WIDTH as u64], &grey), 1, None), Ok(grey.clone().into()));
    let upper: Vec<u8> = grey.iter().map(|&x| (f64::from(x) / 257.0).round() as u8).collect();
    assert_eq!(read("b.png", png(grey_16(grey)), 1, Some(8)), Ok(upper.clone().into()));
    assert_eq!(read("b.npy", npy(&[HEIGHT as u64, WIDTH as u64], &upper), 1, None), Ok(upper.into()));
    let smooth: ImageBuffer<Luma<u8>, _> = ImageBuffer::from_fn(32, 32, |x, y| Luma([(3 * x + 4 * y) as u8]));
    let mut jpeg = std::io::Cursor::new(Vec::new());
    smooth.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let Ok(Pixels::U8(read_back)) = read("a.jpg", jpeg.into_inner(), 1, None) else {
        panic!("a grey JPEG has one channel")
    };
    assert!(read_back.len() == 1024 && read_back.iter().zip(smooth.as_raw()).all(|(a, b)| a.abs_diff(*b) < 8));
    let rgba = values(1, 1, 4);
    let image: ImageBuffer<Rgba<u16>, _> = ImageBuffer::from_raw(WIDTH as u32, HEIGHT as u32, rgba.clone()).unwrap();
    assert_eq!(read("c.png", png(image), 4, None), Ok(rgba.into()));
    // Three channels are RGB: rounded to 8 bits unless 16 are asked for.
    let rgb = values(0, 0, 3);
    let image: ImageBuffer<Rgb<u16>, _> = ImageBuffer::from_raw(WIDTH as u32, HEIGHT as u32, rgb.clone()).unwrap();
    assert_eq!(read("d.png", png(image.clone()), 3, Some(16)), Ok(rgb.into()));
    assert!(matches!(read("d.png", png(image), 3, None), Ok(Pixels::U8(_))));
}

#[test]
fn what_has_other_channels_is_refused_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, bytes: Vec<u8>, channels: usize| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = read_as(&path, &Wanted::new(channels, None, [255; 3])).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    let colour: ImageBuffer<Rgb<u8>, Vec<u8>> = ImageBuffer::new(20, 20);
    let error = refused("a.png", png(colour), 1);
    assert!(error.contains("it has 3 channels (red, green and blue), and data.channels is 1"), "{error}");
    assert!(error.contains("-colorspace Gray"), "{error}");
    let transparent: ImageBuffer<LumaA<u16>, Vec<u16>> = ImageBuffer::new(20, 20);
    assert!(refused("b.png", png(transparent.clone()), 1).contains("grey and opacity"));
    assert!(refused("b.png", png(transparent), 2).contains("-alpha off"));
    let error = refused("c.tif", tiff(&values(0, 0, 4), 4, false, 2), 3 + 2);
    assert!(error.contains("it has 4 channels, and data.channels is 5"), "{error}");
    assert!(refused("d.npy", npy(&[4, 20, 20], &[0u16; 1600]), 4).contains("numpy.moveaxis"));
    assert!(refused("e.npy", npy(&[20, 20], &[0f32; 400]), 1).contains("numpy.uint16"));
    let clear = image::RgbaImage::from_fn(20, 20, |x, _| image::Rgba([x as u8, 0, 0, if x == 3 { 0 } else { 255 }]));
    let mut gif = std::io::Cursor::new(Vec::new());
    DynamicImage::from(clear).write_to(&mut gif, image::ImageFormat::Gif).unwrap();
    assert!(refused("p.gif", gif.into_inner(), 4).contains("palette"));
    let palette = tiff(&values(0, 0, 1), 1, false, 3);
    assert!(refused("f.tif", palette, 1).contains("palette"));
    let one_bit = tiff(&values(0, 0, 1), 1, false, 1);
    let bits = one_bit.windows(8).position(|w| w == [2, 1, 3, 0, 1, 0, 0, 0]).unwrap() + 8;
    let one_bit = [&one_bit[..bits], &[1], &one_bit[bits + 1..]].concat();
    assert!(refused("h.tif", one_bit, 1).contains("fewer than 8 bits"));
    // Where everything becomes RGB an array is no image.
    assert!(refused("g.npy", npy(&[20, 20, 3], &[0u8; 1200]), 3).contains("NumPy"));
}

/// The crop of a whole image as it is, in its own size.
fn whole(pixels: Pixels, channels: usize, color: ColorPlan, blur: Option<f32>) -> Vec<f32> {
    let side = 16;
    let (mean, std) = ((1..=channels).map(|c| 0.1 * c as f32).collect(), vec![0.2; channels]);
    let config = CropConfig { global_size: side, local_count: 0, mean, std, ..CropConfig::default() };
    let cut = Cut::Image { area: Rect { x: 0, y: 0, width: side, height: side }, flip: false };
    let crop = CropPlan { cut, color, blur, solarize: None };
    let plan = ImagePlan { shared_color: None, globals: [crop; 2], locals: Vec::new() };
    let mut crops = [vec![0.0; channels * side * side], vec![0.0; channels * side * side]];
    let image = Sample { width: side, height: side, pixels, ..Sample::default() };
    let globals = crops.iter_mut().map(Vec::as_mut_slice).collect();
    CropMaker::new(&config, None).apply(&image, &plan, &mut Views::of_globals(globals));
    crops[0].clone()
}

#[test]
fn a_value_of_16_bits_is_a_share_of_65535_less_the_mean_in_deviations() {
    let channels = 4;
    let values: Vec<u16> = (0..channels * 256).map(|i| (i * 64 % 65536) as u16).collect();
    let crop = whole(values.clone().into(), channels, ColorPlan::default(), None);
    for (i, v) in values.iter().enumerate() {
        let (channel, at) = (i % channels, i / channels);
        let expected = (f64::from(*v) / 65535.0 - 0.1 * (channel + 1) as f64) / 0.2;
        assert!((f64::from(crop[channel * 256 + at]) - expected).abs() < 1e-6, "{v} of channel {channel}");
    }
}

#[test]
fn sixteen_bits_of_8_bit_values_give_the_same_crops_to_within_rounding() {
    let jitter = Jitter {
        order: [JitterOp::Contrast, JitterOp::Brightness, JitterOp::Saturation, JitterOp::Hue],
        brightness: 0.8,
        contrast: 1.3,
        saturation: 1.0,
        hue: 0.0,
    };
    let color = ColorPlan { jitter: Some(jitter), grey: false };
    for channels in [1, 2, 3, 5] {
        let narrow: Vec<u8> = (0..channels * 256).map(|i| (i * 37 % 251) as u8).collect();
        let wide: Vec<u16> = narrow.iter().map(|&v| 257 * u16::from(v)).collect();
        for (color, blur, most) in [(ColorPlan::default(), None, 1e-6), (color, None, 3.0), (color, Some(1.0), 4.0)] {
            let (a, b) = (
                whole(narrow.clone().into(), channels, color, blur),
                whole(wide.clone().into(), channels, color, blur),
            );
            let level = 1.0 / (255.0 * 0.2);
            let error = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            assert!(error <= f32::max(1e-5, most * level), "{channels} channels: {error}");
        }
    }
}

/// What a recipe starts from, by name.
fn start(folder: &Folder, recipe: &str, sets: &[String]) -> Vec<(String, Tensor)> {
    let sets = sets.iter().filter(|text| *text != "--set").cloned().collect();
    let resolved =
        Resolved::load(folder.path(recipe), &Overrides { sets, env: false }).unwrap_or_else(|e| panic!("{e}"));
    let learner = Learner::new(&resolved.recipe).unwrap();
    learner.content(0).unwrap().model
}

/// The ConvNeXt of the tests.
const CONVNEXT: &str = r#"
extends = "micro.toml"
[backbone]
plugin = "convnext"
dims = [8, 16, 16, 32]
depths = [1, 1, 1, 1]
[crops]
global_size = 64
local_size = 32
[teachers.gram]
crop_size = 64
"#;

#[test]
fn weights_of_rgb_are_adapted_by_the_sum_or_by_repetition() {
    let folder = Folder::with_micro();
    folder.write("convnext.toml", CONVNEXT);
    for (recipe, embed) in [("micro.toml", "patch_embed.proj"), ("convnext.toml", "downsample_layers.0.0")] {
        let name = format!("student.backbone.{embed}.weight");
        let run = format!("{embed}_run");
        folder.succeed(&["train", recipe, "--out", &run, "--set", "steps=1"]);
        let path = folder.path(&run).join("checkpoints/step-00000001/model.safetensors");
        let theirs = dinolab_core::files::read_tensors(&path).unwrap();
        let theirs = theirs.get(&name).unwrap();
        let &[to, 3, side, _] = theirs.shape() else { panic!("{:?}", theirs.shape()) };
        let (old, plane) = (theirs.to_f64_vec(), side * side);
        let init = format!("init_from={}", folder.path(&run).display());
        for channels in [1, 2, 4, 7] {
            let keys = [sets(channels), vec!["--set".into(), init.clone()]].concat();
            let ours = start(&folder, recipe, &keys);
            let new = &ours.iter().find(|(n, _)| *n == name).unwrap().1;
            assert_eq!(new.shape(), [to, channels, side, side]);
            let new = new.to_f64_vec();
            for (row, at) in (0..to).flat_map(|row| (0..plane).map(move |at| (row, at))) {
                let rgb = |c: usize| old[(row * 3 + c) * plane + at];
                for c in 0..channels {
                    let expected = match channels {
                        1 => rgb(0) + rgb(1) + rgb(2),
                        n => rgb(c % 3) * 3.0 / n as f64,
                    };
                    let got = new[(row * channels + c) * plane + at];
                    assert!((got - expected).abs() < 1e-7, "channel {c} of {channels}: {got}, {expected}");
                }
            }
            let ended = folder.succeed(&with(&["recipe", "check", recipe], &keys));
            let said = if channels == 1 { "the sum over red, green and blue" } else { "red, green and blue repeated" };
            assert!(ended.err.contains("init_from") && ended.err.contains(said), "{}", ended.err);
        }
        if recipe == "micro.toml" {
            let keys = [pictures(&folder, "npy", 2), vec!["--set".into(), init]].concat();
            folder.succeed(&with(&["train", recipe, "--out", "two", "--set", "steps=1"], &keys));
            let messages = folder.read("two/messages.jsonl");
            assert!(messages.contains("red, green and blue repeated up to 2 channels, times 3/2"), "{messages}");
            let ended = folder.run(&["eval", "two", "--data", "micro.toml", "--probes", "cls_patch_cosine"]);
            assert!(ended.code != 0 && ended.err.contains("see 2 channels, and the images have 3"), "{}", ended.err);
        }
    }
}

#[test]
fn a_recipe_without_numbers_for_every_channel_is_refused() {
    let folder = Folder::with_micro();
    let check = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|key| ["--set", *key]).collect();
        let ended = folder.run(&[&["recipe", "check", "micro.toml"][..], &sets].concat());
        assert_eq!(ended.code, 2, "{}{}", ended.out, ended.err);
        ended.err
    };
    let data = ["data.plugin=image_folder", "data.path=pictures", "data.channels=4"];
    let off = ["crops.saturation=0", "crops.hue=0", "crops.grey_probability=0"];
    let err = check(&[&data[..], &off].concat());
    assert!(err.contains("crops.mean") && err.contains("4 channels") && err.contains("4 numbers each"), "{err}");
    let err = check(&[&data[..], &off, &["crops.mean=[0.1, 0.1, 0.1, 0.1]"]].concat());
    assert!(err.contains("crops.std") && err.contains("4 numbers"), "{err}");
    let both = ["crops.mean=[0.1, 0.1, 0.1, 0.1]", "crops.std=[0.1, 0.1, 0.1, 0.1]"];
    let err = check(&[&data[..], &both].concat());
    assert!(err.contains("saturation = 0, hue = 0, grey_probability = 0"), "{err}");
    let err = check(&[&both[..], &off].concat());
    assert!(err.contains("scenes") || err.contains("3 channels") || err.contains("crops.mean"), "{err}");
}

#[test]
fn probes_of_rgb_are_refused_before_the_run() {
    let folder = Folder::with_micro();
    let sets = pictures(&folder, "npy", 2);
    for (probe, said) in [
        ("robustness", "the corruption `jpeg` is of RGB images, and these have 2 channels"),
        ("tracking", "films are RGB, and the model sees 2 channels"),
    ] {
        let table = format!("probes.{probe}.plugin={probe}");
        let ended = folder.run(&with(&["recipe", "check", "micro.toml", "--set", &table], &sets));
        assert!(ended.code == 2 && ended.err.contains(&format!("probes.{probe}")), "{}", ended.err);
        assert!(ended.err.contains(said), "{}", ended.err);
    }
    folder.succeed(&with(&["train", "micro.toml", "--out", "run", "--set", "steps=1"], &sets));
    let ended = folder.run(&["eval", "run", "--data", "run", "--probes", "robustness"]);
    assert!(ended.code == 2 && ended.err.contains("without `jpeg`"), "{}", ended.err);
}

#[test]
fn a_run_on_files_of_other_channels_names_them() {
    let folder = Folder::with_micro();
    let sets = pictures(&folder, "png", 4);
    let ended = folder.run(&with(&["train", "micro.toml", "--out", "run"], &sets));
    assert_ne!(ended.code, 0);
    for said in ["pictures/", ".png", "it has 1 channels (grey), and data.channels is 4", "set data.channels"] {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
}

#[test]
fn a_folder_says_how_many_channels_it_has() {
    let folder = Folder::new();
    pictures(&folder, "tif", 4);
    let config = ImageFolderConfig { channels: 4, ..ImageFolderConfig::of(folder.path("pictures")) };
    let data = ImageFolder::open(&config).unwrap();
    assert_eq!((data.channels(), data.get(0).unwrap().channels()), (4, 4));
    dinolab_core::testing::contracts::dataset(&data).unwrap();
    let shown = data.get(0).unwrap();
    let Pixels::U16(values) = &shown.pixels else { panic!("it keeps 16 bits") };
    assert_eq!(shown.rgb()[..6], [0, 1, 2, 4, 5, 6].map(|i| (values[i] >> 8) as u8));
}

#[test]
fn features_see_the_bits_that_the_run_kept() {
    let folder = Folder::with_micro();
    for class in ["a", "b"] {
        fs::create_dir_all(folder.path(&format!("pictures/{class}"))).unwrap();
        for i in 0..6u16 {
            let pixel = |x: u32, y: u32| Rgb([40_000 + 131 * x as u16, 999 * y as u16, 5_003 * i]);
            let image: ImageBuffer<Rgb<u16>, Vec<u16>> = ImageBuffer::from_fn(40, 40, pixel);
            fs::write(folder.path(&format!("pictures/{class}/{i}.png")), png(image)).unwrap();
        }
    }
    let kept = ["--set", "data.plugin=image_folder", "--set", "data.path=pictures"].map(String::from);
    let narrow = ["--set".into(), "data.bits=12".into()];
    let refused = folder.run(&with(&["recipe", "check", "micro.toml"], &[&kept[..], &narrow].concat()));
    assert!(refused.code == 2 && refused.err.contains("data.bits: has to be 8 or 16, not 12"), "{}", refused.err);
    let wide = [&kept[..], &["--set".into(), "data.bits=16".into()]].concat();
    folder.succeed(&with(&["train", "micro.toml", "--out", "run", "--set", "steps=1"], &wide));
    let cls = |out: &str, bits: &[&str]| {
        let args = ["features", "pictures/a", "--weights", "run", "--out", out, "--no-pictures", "--format", "npy"];
        folder.succeed(&[&args[..], bits].concat());
        let image = fs::read_dir(folder.path(out)).unwrap().map(|e| e.unwrap().path()).find(|p| p.is_dir()).unwrap();
        fs::read(image.join("cls.npy")).unwrap()
    };
    assert_eq!(cls("own", &[]), cls("wide", &["--bits", "16"]));
    assert_ne!(cls("own", &[]), cls("narrow", &["--bits", "8"]));
    // What is written says how values are scaled, and is read back the same.
    folder.succeed(&["export", "run", "--format", "hf", "--out", "hf"]);
    let factor = json(&folder, "hf/preprocessor_config.json")["rescale_factor"].as_f64().unwrap();
    assert!((factor * 65535.0 - 1.0).abs() < 1e-12, "{factor}");
    folder.succeed(&["import", "hf", "--out", "back"]);
    let mean = |run: &str| Trained::open(&folder.path(run)).unwrap().normalization;
    assert_eq!(mean("back"), mean("run"));
}
