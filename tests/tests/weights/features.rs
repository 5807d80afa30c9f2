//! `dinolab features`: the numbers are the model's, the files open elsewhere, and bad input is named.

use dinolab_tests::program;
use std::path::Path;

use dinolab_core::files::read_tensors;
use dinolab_core::train::Trained;
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::program::Folder;
use image::{Rgb, RgbImage};

/// A picture of two halves with some texture, `size` pixels.
fn picture(size: (u32, u32)) -> RgbImage {
    RgbImage::from_fn(size.0, size.1, |x, y| {
        let wave = ((x * 7 + y * 3) % 23) as u8;
        if x < size.0 / 2 {
            Rgb([200, 40 + wave, 30])
        } else {
            Rgb([20 + wave, 60, 180])
        }
    })
}

/// A folder with a run `run`, and `images/` of three pictures and a broken one.
fn lab() -> Folder {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "run"]);
    std::fs::create_dir_all(folder.path("images/more")).expect("a folder");
    for (name, size) in [("a.png", (61, 40)), ("b.png", (40, 72)), ("more/a.png", (48, 48))] {
        picture(size).save(folder.path("images").join(name)).expect("a picture");
    }
    folder.write("images/broken.jpg", "this is no image");
    folder
}

/// The patch features `[H, W, D]` and CLS that the model gives for an image when it is called directly.
fn direct(run: &Path, image: &RgbImage) -> (Tensor, Tensor) {
    let trained = Trained::open(run).expect("a run");
    let (mean, std) = &trained.normalization;
    let pixels: Vec<f32> =
        (0..3).flat_map(|c| image.pixels().map(move |p| (f32::from(p.0[c]) / 255.0 - mean[c]) / std[c])).collect();
    let shape = [1, 3, image.height() as usize, image.width() as usize];
    let features = trained.features(&Tensor::from_slice(&pixels, &shape).unwrap()).expect("it runs");
    let (height, width, dim) = (features.grid.height, features.grid.width, trained.backbone.dim());
    (features.patches.reshape(&[height, width, dim]).unwrap(), features.cls.reshape(&[dim]).unwrap())
}

#[test]
fn features_of_files_are_those_of_the_model_in_both_formats() {
    let folder = lab();
    let ended = folder.succeed(&[
        "features",
        "images",
        "--weights",
        "run",
        "--out",
        "seen",
        "--format",
        "safetensors,npy",
        "--window",
        "512",
    ]);
    assert!(ended.out.contains("3 images") && ended.out.contains("1 skipped"), "{}", ended.out);
    assert!(ended.err.contains("broken.jpg") && ended.err.contains("neither JPEG"), "{}", ended.err);
    for (name, size, cut) in
        [("a", (61, 40), (56, 40, 2)), ("b", (40, 72), (40, 72, 0)), ("more/a", (48, 48), (48, 48, 0))]
    {
        // What does not fill a patch of 8 pixels is cut off on both sides.
        let image = image::imageops::crop_imm(&picture(size), cut.2, 0, cut.0, cut.1).to_image();
        let (patches, cls) = direct(&folder.path("run"), &image);
        let seen = folder.path("seen").join(name);
        let file = read_tensors(&seen.join("features.safetensors")).expect("it was written");
        assert_eq!(file.metadata["pixels"], format!("{}x{}", cut.0, cut.1));
        for (part, expected) in [("patches", &patches), ("cls", &cls)] {
            let tensor = file.get(part).expect("it is there");
            assert_eq!(
                (tensor.shape(), tensor.to_f64_vec()),
                (expected.shape(), expected.to_f64_vec()),
                "{name} {part}"
            );
            let bytes = std::fs::read(seen.join(format!("{part}.npy"))).expect("it was written");
            let array = npyz::NpyFile::new(&bytes[..]).expect("an array");
            let shape: Vec<usize> = array.shape().iter().map(|&n| n as usize).collect();
            assert_eq!(
                (&shape[..], array.into_vec::<f32>().unwrap()),
                (expected.shape(), expected.as_slice::<f32>().to_vec())
            );
        }
        for picture in ["image", "pca", "cls", "foreground"] {
            let shown = image::open(seen.join(format!("{picture}.png"))).expect("it was drawn");
            assert_eq!((shown.width(), shown.height()), (cut.0, cut.1), "{name} {picture}");
        }
    }
}

#[test]
fn the_page_is_one_file_that_asks_for_nothing_and_names_are_text() {
    let folder = lab();
    picture((32, 32)).save(folder.path("images/<b>&.png")).expect("a picture");
    folder.succeed(&["features", "images", "--weights", "run", "--out", "seen"]);
    let page = folder.read("seen/index.html");
    for outside in ["src=\"http", "href=", "@import", "url(", "fetch(", "XMLHttpRequest"] {
        assert!(!page.contains(outside), "the page has {outside}");
    }
    assert!(!page.contains("<b>&") && page.contains("\\u003cb>&"));
    assert_eq!(page.matches("</script>").count(), 2, "no name or number ends the data early");
    assert!(folder.path("seen/contact_sheet_1.png").exists());
}

#[test]
fn two_weights_are_compared_on_the_same_images() {
    let folder = lab();
    let before = "run/checkpoints/step-00000008";
    let args =
        ["features", "images/a.png", "--compare", before, "run", "--out", "seen", "--patch", "1,2", "--patch", "4,6"];
    folder.succeed(&args);
    let image = image::imageops::crop_imm(&picture((61, 40)), 2, 0, 56, 40).to_image();
    for (side, weights) in [("a", before), ("b", "run")] {
        let (patches, _) = direct(&folder.path(weights), &image);
        let file =
            read_tensors(&folder.path("seen/a").join(side).join("features.safetensors")).expect("it was written");
        assert_eq!(file.get("patches").unwrap().to_f64_vec(), patches.to_f64_vec(), "{side}");
        for patch in ["1_2", "4_6"] {
            assert!(folder.path("seen/a").join(side).join(format!("similarity_{patch}.png")).exists());
        }
    }
    let page = folder.read("seen/index.html");
    assert!(page.contains("step-00000008") && page.contains("\"run\""));
}

#[test]
fn a_large_image_is_seen_in_windows_and_a_small_one_can_be_enlarged() {
    let folder = lab();
    let see = |out: &str, args: &[&str]| {
        folder.succeed(
            &[&["features", "images/b.png", "--weights", "run", "--out", out, "--no-pictures"], args].concat(),
        );
        let file = read_tensors(&folder.path(out).join("b/features.safetensors")).expect("it was written");
        file.get("patches").expect("it is there").clone()
    };
    let (whole, windows) = (see("whole", &["--window", "72"]), see("windows", &["--window", "32"]));
    assert_eq!((whole.shape(), windows.shape()), (&[9, 5, 32][..], &[9, 5, 32][..]));
    let (a, b) = (whole.to_f64_vec(), windows.to_f64_vec());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
    assert!(cosine > 0.9 && cosine < 1.0 - 1e-9, "windows see nearly, not exactly, the same: {cosine}");
    assert_eq!(see("large", &["--size", "144"]).shape(), [18, 10, 32]);
    assert!(!folder.path("large/index.html").exists() && !folder.path("large/b/pca.png").exists());
}

#[test]
fn bad_input_is_named_with_the_remedy() {
    let folder = lab();
    picture((6, 30)).save(folder.path("images/thin.png")).expect("a picture");
    let cases: [(&[&str], &str); 7] = [
        (&["images", "--weights", "nowhere"], "does not exist"),
        (&["images", "--weights", "images"], "there are no weights here"),
        (&["nowhere", "--weights", "run"], "nowhere: does not exist"),
        (&["images/broken.jpg", "--weights", "run"], "none of the images could be used"),
        (&["images/thin.png", "--weights", "run"], "6x30 pixels are too few"),
        (&["images/a.png", "--weights", "run", "--patch", "9,0"], "there is no patch 9,0: it has 5 rows and 7 columns"),
        (&["images", "--weights", "run", "--window", "4"], "at least 8 a side"),
    ];
    for (i, (args, said)) in cases.into_iter().enumerate() {
        let out = format!("out-{i}");
        let ended = folder.run(&[&["features"], args, &["--out", &out]].concat());
        assert_eq!(ended.code, 2, "{args:?}: {}", ended.err);
        assert!(ended.err.contains(said), "{args:?}: {}", ended.err);
    }
    std::fs::create_dir(folder.path("full")).expect("a folder");
    folder.write("full/something.txt", "not ours");
    let full = folder.run(&["features", "images/a.png", "--weights", "run", "--out", "full"]);
    assert!(full.code == 2 && full.err.contains("not empty"), "{}", full.err);
}

#[test]
fn features_go_on_with_what_is_missing() {
    let folder = lab();
    let args = ["features", "images", "--weights", "run", "--out", "seen"];
    folder.succeed(&[&args[..], &["--format", "safetensors,npy"]].concat());
    let kept = std::fs::metadata(folder.path("seen/a/features.safetensors")).unwrap().modified().unwrap();
    let page = folder.read("seen/index.html");
    // As after a kill: one image is not done, one line is half a line, the page is not there.
    let record = folder.read("seen/done.jsonl");
    let (first, rest) = record.split_once('\n').expect("a line an image");
    folder.write("seen/done.jsonl", &format!("{first}\n{}", &rest[..rest.len() / 2 - 9]));
    std::fs::remove_file(folder.path("seen/index.html")).unwrap();
    std::fs::remove_dir_all(folder.path("seen/b")).unwrap();
    let again = folder.succeed(&[&args[..], &["--format", "safetensors,npy"]].concat());
    assert!(again.out.contains("1 of 4 images are done already") && again.out.contains("2 images in"), "{}", again.out);
    assert_eq!(kept, std::fs::metadata(folder.path("seen/a/features.safetensors")).unwrap().modified().unwrap());
    assert_eq!(folder.read("seen/index.html"), page, "the page is that of an uninterrupted command");
    assert_eq!(folder.read("seen/done.jsonl").lines().filter(|line| line.ends_with('}')).count(), 3);
    // Other options or weights do not go into the same folder.
    for other in [&["--size", "64"][..], &["--no-pictures"], &["--background", "0,0,0"]] {
        let refused = folder.run(&[&args[..], &["--format", "safetensors,npy"], other].concat());
        assert!(refused.code == 2 && refused.err.contains("made otherwise"), "{other:?}: {}", refused.err);
    }
    let other = ["features", "images", "--weights", "run/checkpoints/step-00000008", "--out", "seen"];
    let refused = folder.run(&[&other[..], &["--format", "safetensors,npy"]].concat());
    assert!(refused.code == 2 && refused.err.contains("weights"), "{}", refused.err);
}

#[test]
fn asked_to_stop_it_says_how_to_go_on_and_does() {
    let folder = lab();
    for i in 0..300 {
        picture((200, 200 + i % 7)).save(folder.path(&format!("images/{i:03}.png"))).expect("a picture");
    }
    let args = ["features", "images", "--weights", "run", "--out", "seen", "--no-pictures"];
    let mut child = folder.start(&args);
    let begin = std::time::Instant::now();
    while std::fs::read(folder.path("seen/done.jsonl")).map_or(true, |text| text.is_empty()) {
        assert!(begin.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none(), "it did not begin");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let kill = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let ended: program::Ended = child.wait_with_output().unwrap().into();
    assert_eq!(ended.code, 75, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("of 304 images are done; go on with the same command"), "{}", ended.out);
    let done = folder.read("seen/done.jsonl").lines().count();
    let ended = folder.succeed(&args);
    assert!(ended.out.contains(&format!("{done} of 304 images are done already")), "{}", ended.out);
    assert_eq!(folder.read("seen/done.jsonl").lines().count(), 303, "all but the broken one");
}

#[test]
fn names_of_images_never_take_those_of_own_files() {
    let folder = lab();
    for name in ["index.html.png", "contact_sheet_1.png.png", "features.json.png", "a/pca.png.png", "a/x.png"] {
        let path = folder.path("images").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        picture((40, 40)).save_with_format(path, image::ImageFormat::Png).expect("a picture");
    }
    folder.succeed(&["features", "images", "--weights", "run", "--out", "seen"]);
    for file in
        ["index.html", "features.json", "contact_sheet_1.png", "index.html_/pca.png", "a/pca.png", "a/pca.png_/cls.png"]
    {
        assert!(folder.path("seen").join(file).is_file(), "{file}");
    }
}

#[test]
fn a_size_that_no_memory_holds_is_an_error_and_no_abort() {
    let folder = lab();
    for size in ["3000000", "99999999999"] {
        let ended = folder.run(&["features", "images", "--weights", "run", "--out", size, "--size", size]);
        assert_eq!(ended.code, 2, "{}", ended.err);
        assert!(ended.err.contains("more than there is") && ended.err.contains("lower --size"), "{}", ended.err);
    }
}
