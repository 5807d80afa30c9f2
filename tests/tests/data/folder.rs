//! The `image_folder` dataset on files of all kinds, good and bad.

use std::fs;
use std::path::Path;

use dinolab_core::contract::Dataset;
use dinolab_plugins::image_folder::{ImageFolder, ImageFolderConfig, BACKGROUND};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};

fn open(path: &Path, held_out: f64) -> dinolab_core::Result<ImageFolder> {
    ImageFolder::open(&ImageFolderConfig { held_out, ..ImageFolderConfig::of(path) })
}

/// A folder with a good JPEG at every path; each is another picture.
fn folder_of(paths: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (i, path) in paths.iter().enumerate() {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let picture = RgbImage::from_fn(32, 16, |x, y| Rgb([8 * x as u8, 16 * y as u8, 20 * i as u8]));
        fs::write(path, encode(&picture.into(), ImageFormat::Jpeg)).unwrap();
    }
    folder
}

/// What a dataset says of itself: its content and all notes.
fn said(dataset: &ImageFolder) -> String {
    let summary = dataset.summary();
    format!("{}\n{}", summary.content, summary.notes.join("\n"))
}

/// Left half red, right half blue.
fn picture() -> DynamicImage {
    RgbImage::from_fn(32, 16, |x, _| if x < 16 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) }).into()
}

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A JPEG with a note that the camera was turned: EXIF orientation 6, to be shown turned clockwise.
fn turned_jpeg() -> Vec<u8> {
    let jpeg = encode(&picture(), ImageFormat::Jpeg);
    let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0".to_vec();
    exif.extend([0x12, 0x01, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    let length = (exif.len() as u16 + 2).to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &length, &exif, &jpeg[2..]].concat()
}

/// An 8x8 CMYK JPEG (Adobe, stored inverted) of one colour, written by hand: each component is a constant block.
fn cmyk_jpeg(stored: [u8; 4]) -> Vec<u8> {
    let mut jpeg = vec![0xff, 0xd8];
    let mut segment = |marker: u8, body: &[u8]| {
        jpeg.extend([0xff, marker]);
        jpeg.extend((body.len() as u16 + 2).to_be_bytes());
        jpeg.extend(body);
    };
    segment(0xee, b"Adobe\0\x64\0\0\0\0\0");
    // Quantisation by 8 makes a block's DC coefficient its mean less 128.
    segment(0xdb, &[&[0u8][..], &[8; 64]].concat());
    segment(0xc0, &[8, 0, 8, 0, 8, 4, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0, 4, 0x11, 0]);
    // DC codes: the nine size classes 0..=8 as 4-bit codes 0..=8. AC codes: end of block as the bit 0.
    segment(0xc4, &[&[0u8, 0, 0, 0, 9][..], &[0; 12], &[0, 1, 2, 3, 4, 5, 6, 7, 8]].concat());
    segment(0xc4, &[&[0x10u8, 1][..], &[0; 15], &[0]].concat());
    segment(0xda, &[4, 1, 0, 2, 0, 3, 0, 4, 0, 0, 63, 0]);
    let mut bits = String::new();
    for value in stored {
        let dc = i32::from(value) - 128;
        let size = 32 - dc.unsigned_abs().leading_zeros() as usize;
        let code = if dc < 0 { dc + (1 << size) - 1 } else { dc };
        bits += &format!("{size:04b}");
        if size > 0 {
            bits += &format!("{code:0size$b}");
        }
        bits += "0";
    }
    while !bits.len().is_multiple_of(8) {
        bits += "1";
    }
    for byte in bits.as_bytes().chunks(8) {
        let byte = byte.iter().fold(0u8, |b, &bit| b << 1 | (bit - b'0'));
        jpeg.push(byte);
        if byte == 0xff {
            jpeg.push(0);
        }
    }
    jpeg.extend([0xff, 0xd9]);
    jpeg
}

#[test]
fn every_kind_of_image_becomes_rgb() {
    let folder = tempfile::tempdir().unwrap();
    let picture = picture();
    let files: [(&str, Vec<u8>); 9] = [
        ("a.jpg", encode(&picture, ImageFormat::Jpeg)),
        ("b.PNG", encode(&picture, ImageFormat::Png)),
        ("c.webp", encode(&picture, ImageFormat::WebP)),
        ("d_alpha.png", encode(&picture.to_rgba8().into(), ImageFormat::Png)),
        ("e_16_bit.png", encode(&picture.to_rgb16().into(), ImageFormat::Png)),
        ("f_grey.jpg", encode(&picture.to_luma8().into(), ImageFormat::Jpeg)),
        ("g_grey_alpha.png", encode(&picture.to_luma_alpha8().into(), ImageFormat::Png)),
        ("h_png_named.jpeg", encode(&picture, ImageFormat::Png)),
        ("i_note.txt", b"not an image, and not listed".to_vec()),
    ];
    for (name, bytes) in &files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!((dataset.len(), dataset.classes(), dataset.held_out().is_none()), (8, 0, true));
    for index in 0..8 {
        let sample = dataset.get(index).unwrap();
        let name = dataset.describe(index);
        assert_eq!((sample.width, sample.height, sample.rgb().len()), (32, 16, 3 * 32 * 16), "{name}");
        // A pixel on the left and one on the right.
        let (left, right) = (&sample.rgb()[3 * 35..3 * 36], &sample.rgb()[3 * 60..3 * 61]);
        let expected = if name.contains("grey") { [[54; 3], [18; 3]] } else { [[255, 0, 0], [0, 0, 255]] };
        for (pixel, expected) in [left, right].into_iter().zip(expected) {
            let close = pixel.iter().zip(expected).all(|(&a, b)| a.abs_diff(b) < 6);
            assert!(close, "{name}: {pixel:?}, expected {expected:?}");
        }
    }
}

#[test]
fn a_photograph_is_turned_upright() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("turned.jpg"), turned_jpeg()).unwrap();
    let sample = open(folder.path(), 0.0).unwrap().get(0).unwrap();
    assert_eq!((sample.width, sample.height), (16, 32));
    let rgb = sample.rgb();
    let pixel = |x: usize, y: usize| &rgb[3 * (y * 16 + x)..][..3];
    assert!(pixel(8, 4)[0] > 240 && pixel(8, 28)[2] > 240, "what was left is above");
}

#[test]
fn cmyk_becomes_rgb() {
    let folder = tempfile::tempdir().unwrap();
    // Adobe stores 255 - ink: no cyan, full magenta and yellow, no black is red.
    fs::write(folder.path().join("print.jpg"), cmyk_jpeg([255, 0, 0, 255])).unwrap();
    let sample = open(folder.path(), 0.0).unwrap().get(0).unwrap();
    assert_eq!((sample.width, sample.height), (8, 8));
    let [r, g, b] = sample.rgb()[..3].try_into().unwrap();
    assert!(r > 250 && g < 5 && b < 5, "{r} {g} {b}");
}

#[test]
fn broken_files_are_named_with_their_problem() {
    let folder = tempfile::tempdir().unwrap();
    let png = encode(&picture(), ImageFormat::Png);
    let mut huge = png.clone();
    // Width and height in the header, 60000 each, and the header's checksum.
    huge[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let crc = crc32(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let files = [
        ("0_empty.jpg", Vec::new(), "empty"),
        ("1_text.png", b"hello, I am text".to_vec(), "neither JPEG, PNG, WebP"),
        ("2_cut.png", png[..png.len() / 2].to_vec(), ""),
        ("3_huge.png", huge, "60000x60000"),
        ("4_header.jpg", encode(&picture(), ImageFormat::Jpeg)[..100].to_vec(), ""),
    ];
    for (name, bytes, _) in &files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let dataset = open(folder.path(), 0.0).unwrap();
    for (index, (name, _, problem)) in files.iter().enumerate() {
        let error = dataset.get(index).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(problem), "{error}");
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &b| (0..8).fold(crc ^ u32::from(b), step))
}

#[test]
fn sub_folders_are_classes_only_if_every_image_is_in_one() {
    let folder = tempfile::tempdir().unwrap();
    let jpeg = encode(&picture(), ImageFormat::Jpeg);
    for name in ["dog/deep/1.jpg", "cat/1.jpg", "cat/2.jpg", "dog/2.jpg"] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &jpeg).unwrap();
    }
    let dataset = open(folder.path(), 0.0).unwrap();
    let labels: Vec<_> = (0..4).map(|i| dataset.get(i).unwrap().label).collect();
    assert_eq!((dataset.classes(), labels), (2, vec![Some(0), Some(0), Some(1), Some(1)]));
    fs::write(folder.path().join("loose.jpg"), &jpeg).unwrap();
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!((dataset.len(), dataset.classes(), dataset.get(0).unwrap().label), (5, 0, None));
}

#[test]
fn held_out_images_are_never_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..40 {
        fs::write(folder.path().join(format!("{i:02}.jpg")), b"").unwrap();
    }
    let dataset = open(folder.path(), 0.25).unwrap();
    let held_out = dataset.held_out().unwrap();
    let names = |d: &dyn Dataset| (0..d.len()).map(|i| d.describe(i)).collect::<Vec<_>>();
    let (train, probe) = (names(&dataset), names(&*held_out));
    assert_eq!((train.len(), probe.len()), (30, 10));
    assert!(probe.iter().all(|name| !train.contains(name)));
    assert_eq!(probe, names(&*open(folder.path(), 0.25).unwrap().held_out().unwrap()), "the split is fixed");
}

#[test]
fn a_folder_that_cannot_be_used_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |path: &Path, held_out| open(path, held_out).map(|_| ()).unwrap_err().to_string();
    let missing = fails(&folder.path().join("nowhere"), 0.1);
    assert!(
        missing.contains("nowhere") && missing.contains("no such folder") && missing.contains("data.path"),
        "{missing}"
    );
    let empty = fails(folder.path(), 0.1);
    assert!(empty.contains("holds no image") && empty.contains("webp"), "{empty}");
    fs::write(folder.path().join("one.jpg"), b"").unwrap();
    assert!(fails(&folder.path().join("one.jpg"), 0.1).contains("not a folder"));
    let few = fails(folder.path(), 0.1);
    assert!(few.contains("too few") && few.contains("held_out = 0"), "{few}");
}

#[test]
fn hidden_folders_and_those_of_systems_are_passed_over_and_said() {
    let good = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"];
    let rubbish = [
        ".Trash/1.jpg",
        "cat/.thumbnails/1.jpg",
        "@eaDir/1.jpg",
        "__MACOSX/cat/1.jpg",
        "dog/._1.jpg",
        "dog/.hidden.jpg",
        "$RECYCLE.BIN/1.jpg",
        "lost+found/1.jpg",
    ];
    let folder = folder_of(&[&good[..], &rubbish].concat());
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!((dataset.len(), dataset.classes()), (4, 2));
    let said = said(&dataset);
    assert!(said.contains("4 images in 2 classes (cat 2, dog 2)"), "{said}");
    assert!(said.contains("8 hidden or system entries passed over ($RECYCLE.BIN, .Trash, @eaDir, ...)"), "{said}");
    // A folder that is named is taken, whatever its name is.
    assert_eq!(open(&folder.path().join(".Trash"), 0.0).unwrap().len(), 1);
}

#[test]
fn files_of_other_types_are_counted_by_type() {
    let folder = folder_of(&["a.jpg", "b.JFIF", "c.Jpeg", "d.jpe", "e.mp4", "f.mp4", "g.psd", "h", "i.jpg.txt"]);
    let dataset = open(folder.path(), 0.25).unwrap();
    assert_eq!((dataset.len(), dataset.held_out().unwrap().len()), (3, 1));
    let said = said(&dataset);
    assert!(said.contains("3 images, 1 more held out for probes"), "{said}");
    assert!(
        said.contains("5 files of other types passed over (2 .mp4, 1 without an ending, 1 .psd, 1 .txt)"),
        "{said}"
    );
}

#[test]
#[cfg(unix)]
fn links_are_followed_once_and_dead_ones_are_broken_files() {
    use std::os::unix::fs::symlink;
    let folder = folder_of(&["real/a/1.jpg", "real/b/1.jpg", "elsewhere/2.jpg"]);
    let root = folder.path().join("real");
    symlink("a", root.join("a_again")).unwrap();
    symlink("..", root.join("a/loop")).unwrap();
    symlink("itself.jpg", root.join("itself.jpg")).unwrap();
    symlink("nowhere.jpg", root.join("b/dead.jpg")).unwrap();
    symlink("nowhere", root.join("dead")).unwrap();
    symlink(folder.path().join("elsewhere"), root.join("c")).unwrap();
    let dataset = open(&root, 0.0).unwrap();
    let names: Vec<String> = (0..dataset.len()).map(|i| dataset.describe(i)).collect();
    let ends = ["a/1.jpg", "b/1.jpg", "b/dead.jpg", "c/2.jpg", "itself.jpg"];
    assert!(names.len() == 5 && names.iter().zip(ends).all(|(name, end)| name.ends_with(end)), "{names:?}");
    for (i, good) in [true, true, false, true, false].into_iter().enumerate() {
        assert_eq!(dataset.get(i).is_ok(), good, "{}", names[i]);
    }
    let said = said(&dataset);
    assert!(said.contains("2 links to folders that are taken already passed over (a/loop, a_again)"), "{said}");
    assert!(said.contains("1 entries cannot be read (dead: "), "{said}");
}

#[test]
#[cfg(unix)]
fn only_regular_files_are_opened() {
    let folder = folder_of(&["good.jpg", "folder.jpg/inside.jpg"]);
    let pipe = folder.path().join("pipe.jpg");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket.png")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.path().join("endless.webp")).unwrap();
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!(dataset.len(), 2);
    let said = said(&dataset);
    assert!(said.contains("3 pipes, sockets or devices passed over"), "{said}");
    // To open it would wait for ever.
    let error = dinolab_plugins::image_folder::read(&pipe, BACKGROUND).unwrap_err().to_string();
    assert!(error.contains("no regular file"), "{error}");
}

#[test]
#[cfg(unix)]
fn a_folder_that_may_not_be_read_is_said_and_the_others_are_used() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder_of(&["good/1.jpg", "secret/1.jpg"]);
    let secret = folder.path().join("secret");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let all = fs::read_dir(&secret).is_ok();
    let dataset = open(folder.path(), 0.0).unwrap();
    // The administrator reads everything.
    assert_eq!(dataset.len(), if all { 2 } else { 1 });
    assert_eq!(said(&dataset).contains("secret: Permission denied"), !all);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn train_and_val_are_parts_of_the_data_and_no_classes() {
    let train = ["train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg"];
    let folder = folder_of(&[&train[..], &["Val/cat/3.jpg", "Val/dog/4.jpg", "test/cat/5.jpg"]].concat());
    let dataset = open(folder.path(), 0.1).unwrap();
    let held_out = dataset.held_out().unwrap();
    assert_eq!((dataset.len(), held_out.len(), dataset.classes(), held_out.classes()), (3, 2, 2, 2));
    assert_eq!(held_out.get(1).unwrap().label, Some(1));
    let said = said(&dataset);
    for part in [
        "3 images in 2 classes (cat 2, dog 1), 2 more held out for probes",
        "folder train is trained on, folder val is held out",
        "1 file in other folders beside them are not used",
    ] {
        assert!(said.contains(part), "{said}");
    }
    // Beside something else they are taken for classes, which is said.
    let folder = folder_of(&["train/1.jpg", "val/1.jpg", "more/1.jpg"]);
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!(dataset.classes(), 3);
    assert!(said_of(&dataset, "folder train looks like a part of the data and is taken for a class"));
    // Alone it holds the classes.
    let dataset = folder_of(&["train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg"]);
    assert_eq!(open(dataset.path(), 0.1).unwrap().classes(), 2);
}

fn said_of(dataset: &ImageFolder, part: &str) -> bool {
    said(dataset).contains(part)
}

#[test]
fn the_file_that_takes_the_labels_away_is_named() {
    let folder = folder_of(&["cat/1.jpg", "dog/1.jpg", "loose.jpg"]);
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!(dataset.classes(), 0);
    let said = said(&dataset);
    assert!(said.contains("the 2 folders are no classes, because an image lies beside them (loose.jpg)"), "{said}");
}

#[test]
fn exact_copies_are_named() {
    let folder = folder_of(&["a/1.jpg", "b/1.jpg", "b/2.jpg"]);
    let dataset = open(folder.path(), 0.0).unwrap();
    assert!(!said_of(&dataset, "cop"), "no file is another's copy");
    fs::copy(folder.path().join("a/1.jpg"), folder.path().join("b/copy.jpg")).unwrap();
    // As long as the original, and another picture.
    let mut other = fs::read(folder.path().join("a/1.jpg")).unwrap();
    *other.last_mut().unwrap() ^= 1;
    fs::write(folder.path().join("b/as_long.jpg"), other).unwrap();
    let said = said(&open(folder.path(), 0.0).unwrap());
    assert!(said.contains("an image is an exact copy of another: ") && said.contains("b/copy.jpg of "), "{said}");
}

#[test]
fn what_lies_in_a_folder_that_is_not_used_says_nothing_of_classes() {
    let parts = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg"];
    let folder = folder_of(&[&parts[..], &["test/5.jpg", "test/bird/6.jpg"]].concat());
    let dataset = open(folder.path(), 0.0).unwrap();
    assert_eq!((dataset.len(), dataset.classes(), dataset.get(1).unwrap().label), (2, 2, Some(1)));
    assert!(said(&dataset).contains("2 files in other folders beside them are not used"), "{}", said(&dataset));
}

#[test]
fn images_that_are_held_out_and_trained_on_are_told() {
    let folder = folder_of(&["a/1.jpg", "b/1.jpg", "b/2.jpg"]);
    let with_val = |val: &str| {
        let val = Some(folder.path().join(val));
        said(&ImageFolder::open(&ImageFolderConfig { val, ..ImageFolderConfig::of(folder.path()) }).unwrap())
    };
    let told = with_val("b");
    assert!(told.contains("b/1.jpg and 1 more held out for probes and trained on"), "{told}");
}

#[test]
fn what_is_transparent_lies_on_the_background() {
    let folder = tempfile::tempdir().unwrap();
    // Noise under full transparency, which no viewer shows.
    let hidden = image::RgbaImage::from_fn(16, 16, |x, y| image::Rgba([x as u8 * 15, y as u8 * 15, 99, 0]));
    for (name, format) in [("a.png", ImageFormat::Png), ("b.webp", ImageFormat::WebP)] {
        fs::write(folder.path().join(name), encode(&hidden.clone().into(), format)).unwrap();
    }
    for background in [[255, 255, 255], [10, 20, 30]] {
        let config = ImageFolderConfig { held_out: 0.0, background, ..ImageFolderConfig::of(folder.path()) };
        let dataset = ImageFolder::open(&config).unwrap();
        for i in 0..2 {
            let sample = dataset.get(i).unwrap();
            assert!(sample.rgb().chunks(3).all(|pixel| pixel == background), "{}", dataset.describe(i));
        }
    }
}

#[test]
#[cfg(unix)]
fn names_of_any_bytes_are_told_apart_and_shown_on_one_line() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder_of(&[]);
    let jpeg = encode(&picture(), ImageFormat::Jpeg);
    for name in [&b"latin1_\xe8.jpg"[..], b"latin1_\xe9.jpg", b"two\nlines.jpg", b"esc_\x1b[31mred.jpg"] {
        fs::write(folder.path().join(std::ffi::OsStr::from_bytes(name)), &jpeg).unwrap();
    }
    let dataset = open(folder.path(), 0.0).unwrap();
    let names: std::collections::BTreeSet<String> = (0..4).map(|i| dataset.describe(i)).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names.iter().all(|name| !name.chars().any(char::is_control)), "{names:?}");
    assert!((0..4).all(|i| dataset.get(i).is_ok()));
}

/// A grey PNG that says that it has so many pixels, and has none.
fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    header.extend([8, 0, 0, 0, 0]);
    let chunk = |content: &[u8]| {
        [&(content.len() as u32 - 4).to_be_bytes()[..], content, &crc32(content).to_be_bytes()].concat()
    };
    [&b"\x89PNG\r\n\x1a\n"[..], &chunk(&header), &chunk(b"IDAT\0"), &chunk(b"IEND")].concat()
}

/// Two pictures in `i`, with what lies beside them in `m`.
fn with_beside(pictures: [Vec<u8>; 2], beside: [Vec<u8>; 2]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (place, ending, files) in [("i", "jpg", pictures), ("m", "png", beside)] {
        fs::create_dir(folder.path().join(place)).unwrap();
        for (name, bytes) in ["a", "b"].iter().zip(files) {
            fs::write(folder.path().join(place).join(format!("{name}.{ending}")), bytes).unwrap();
        }
    }
    folder
}

fn grey(width: u32, height: u32) -> Vec<u8> {
    encode(&image::GrayImage::from_pixel(width, height, image::Luma([1])).into(), ImageFormat::Png)
}

fn config(folder: &Path, masks: bool) -> ImageFolderConfig {
    let [images, beside] = ["i", "m"].map(|place| folder.join(place));
    let [masks, depth] = [masks, !masks].map(|is| is.then(|| beside.clone()));
    ImageFolderConfig { held_out: 0.0, masks, depth, ..ImageFolderConfig::of(images) }
}

#[test]
fn a_mask_or_depth_of_too_many_pixels_is_refused_before_memory_is_taken() {
    let jpeg = encode(&picture(), ImageFormat::Jpeg);
    let folder = with_beside([jpeg.clone(), jpeg], [grey(32, 16), png_of_size(200_000, 200_000)]);
    let error = ImageFolder::open(&config(folder.path(), true)).map(drop).unwrap_err().to_string();
    assert!(error.contains("b.png") && error.contains("more than the limit"), "{error}");
    let depth = ImageFolder::open(&config(folder.path(), false)).unwrap();
    assert!(depth.get(0).unwrap().depth.is_some());
    let error = depth.get(1).unwrap_err().to_string();
    assert!(error.contains("b.png") && error.contains("more than the limit"), "{error}");
}

#[test]
fn a_mask_of_a_turned_image_is_taken_only_if_its_size_shows_that_it_is_turned_too() {
    // Of 32x16 pixels, shown as 16x32: a mask of that size is as one sees the image, one of the other is not.
    let folder = with_beside([turned_jpeg(), turned_jpeg()], [grey(16, 32), grey(32, 16)]);
    for masks in [true, false] {
        let data = ImageFolder::open(&config(folder.path(), masks)).unwrap();
        let seen = data.get(0).unwrap();
        assert_eq!((seen.width, seen.mask.is_some(), seen.depth.is_some()), (16, masks, !masks));
        let error = data.get(1).unwrap_err().to_string();
        assert!(error.contains("m/b.png") && error.contains("EXIF") && error.contains("-auto-orient"), "{error}");
    }
    // Of a square nothing shows it.
    let square = RgbImage::from_pixel(16, 16, Rgb([9; 3]));
    let jpeg = encode(&square.into(), ImageFormat::Jpeg);
    let turned = turned_jpeg();
    let exif = turned[2..turned.len() - encode(&picture(), ImageFormat::Jpeg).len() + 2].to_vec();
    let square = [&jpeg[..2], &exif, &jpeg[2..]].concat();
    let folder = with_beside([square, jpeg], [grey(16, 16), grey(16, 16)]);
    let data = ImageFolder::open(&config(folder.path(), true)).unwrap();
    assert!(data.get(0).unwrap_err().to_string().contains("EXIF") && data.get(1).unwrap().mask.is_some());
}

#[test]
fn data_are_the_same_wherever_their_folders_lie_and_others_when_files_change() {
    let jpeg = encode(&picture(), ImageFormat::Jpeg);
    let folder = with_beside([jpeg.clone(), jpeg], [grey(32, 16), grey(32, 16)]);
    let open = |at: &Path| ImageFolder::open(&config(at, true)).unwrap();
    let before = open(folder.path());
    let moved = folder.path().join("moved");
    fs::create_dir(&moved).unwrap();
    for place in ["i", "m"] {
        fs::rename(folder.path().join(place), moved.join(place)).unwrap();
    }
    let after = open(&moved);
    assert_eq!((before.fingerprint(), before.stamp()), (after.fingerprint(), after.stamp()));
    // The same length, written at another time.
    let mask = moved.join("m/a.png");
    let bytes = fs::read(&mask).unwrap();
    fs::write(&mask, bytes).unwrap();
    let file = fs::File::options().append(true).open(&mask).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
    let after = open(&moved);
    assert_eq!(before.fingerprint(), after.fingerprint());
    assert_ne!(before.stamp(), after.stamp());
}
