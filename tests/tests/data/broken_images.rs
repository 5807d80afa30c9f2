//! Runs on folders in which some images are broken.

use dinolab_tests::program;
use dinolab_tests::program::Folder;

/// A folder `pictures` of two classes with 20 good images each, and a micro recipe that trains on it.
fn lab() -> Folder {
    let folder = Folder::with_micro();
    for class in ["cat", "dog"] {
        std::fs::create_dir_all(folder.path("pictures").join(class)).expect("a folder");
        for i in 0..20u8 {
            let pixel = |x, y| image::Rgb([x as u8 * 3, y as u8 * 4, i * 10 + class.len() as u8]);
            let picture = image::RgbImage::from_fn(50 + u32::from(i), 48, pixel);
            picture.save(folder.path(&format!("pictures/{class}/{i:02}.png"))).expect("it can be written");
        }
    }
    folder
}

fn train(folder: &Folder, more: &[&str]) -> program::Ended {
    let data =
        ["train", "micro.toml", "--out", "run", "--set", "data.plugin=image_folder", "--set", "data.path=pictures"];
    folder.run(&[&data[..], more].concat())
}

#[test]
fn one_broken_file_never_stops_a_run_and_is_named_once_with_the_total_at_the_end() {
    let folder = lab();
    folder.write("pictures/cat/broken.jpg", "version https://git-lfs.github.com/spec/v1");
    // Enough steps to meet it in several epochs.
    let ended = train(&folder, &["--set", "steps=60", "--set", "data.held_out=0"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let messages = folder.read("run/messages.jsonl");
    let named = messages.lines().filter(|line| line.contains("broken.jpg cannot be used")).count();
    assert!(named == 1 && messages.contains("pointer of Git LFS"), "{messages}");
    assert!(messages.contains("1 broken samples were replaced") && messages.contains("times by others"), "{messages}");
}

#[test]
fn more_broken_files_than_the_share_stop_a_run() {
    let folder = lab();
    for i in 0..3 {
        folder.write(&format!("pictures/cat/broken{i}.jpg"), "not an image");
    }
    let ended = train(&folder, &["--set", "steps=60", "--set", "data.held_out=0"]);
    assert!(ended.code == 2 && ended.err.contains("batch.max_broken_share"), "{}", ended.err);
}

#[test]
fn broken_images_that_are_held_out_are_left_out_of_the_score_and_said() {
    let folder = lab();
    for part in ["train", "val"] {
        std::fs::create_dir_all(folder.path("parts").join(part)).expect("a folder");
        for class in ["cat", "dog"] {
            let (from, to) = (folder.path("pictures").join(class), folder.path("parts").join(part));
            let copied = std::process::Command::new("cp").arg("-r").args([from, to]).status();
            assert!(copied.expect("cp starts").success());
        }
    }
    folder.write("parts/val/dog/05.png", "");
    let probe = ["--set", "data.path=parts", "--set", "probes.knn.enabled=true", "--set", "probes.knn.every=4"];
    let ended = train(&folder, &probe);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let messages = folder.read("run/messages.jsonl");
    assert!(messages.contains("probe `knn`: 1 of 40 samples were left out, such as "), "{messages}");
    assert_eq!(messages.matches("were left out").count(), 1, "said once, not at every probe: {messages}");
    assert!(folder.read("run/result.json").contains("probe/knn/top1"));
    // When none is left the probe is not taken, and the run ends well all the same.
    for class in ["cat", "dog"] {
        for i in 0..20 {
            folder.write(&format!("parts/val/{class}/{i:02}.png"), "");
        }
    }
    std::fs::remove_dir_all(folder.path("run")).expect("it was there");
    let ended = train(&folder, &probe);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let messages = folder.read("run/messages.jsonl");
    assert!(
        messages.contains("probe `knn` could not be taken") && messages.contains("the file is empty"),
        "{messages}"
    );
}
