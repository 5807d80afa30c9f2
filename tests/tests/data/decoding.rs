//! Images as Pillow (libjpeg-turbo, libpng, libwebp) sees them, or refused: never another picture.
//!
//! `IMAGE_FLIPS=200` turns so many bits in every file and cuts it at every twentieth: an hour's run.
//! `IMAGE_SEED` draws others.

use dinolab_tests::program;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use dinolab_plugins::image_folder::{read, BACKGROUND};
use image::RgbImage;

/// Mean distance of two pictures that are the same, in levels of 255: decoders round differently.
const SAME: f64 = 3.0;

/// A file, and what Pillow makes of it.
#[derive(serde::Deserialize)]
struct Case {
    name: String,
    kind: Kind,
    bytes: usize,
    /// Why Pillow refuses it; it may have a picture all the same, when it is told to be lenient.
    problem: Option<String>,
    width: u32,
    height: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Good,
    Rare,
    Cut,
    Flip,
}

/// What became of the files of a kind.
#[derive(Debug, Default)]
struct Tally {
    same: usize,
    refused: usize,
}

/// Mean distance of the values of two pictures of one size.
fn distance(a: &RgbImage, b: &[u8]) -> f64 {
    let sum: u64 = a.as_raw().iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / b.len() as f64
}

/// Compares a file with what Pillow sees; says what is wrong, if anything is.
fn judge(case: &Case, path: &Path, expected: &[u8], tally: &mut Tally) -> Option<String> {
    let size = (case.width, case.height);
    match read(path, BACKGROUND) {
        Err(_) if case.kind != Kind::Good || case.problem.is_some() => {
            tally.refused += 1;
            None
        }
        Err(error) => Some(format!("{}: a good file is refused: {error}", case.name)),
        // A stream of a lossy WebP has no check sum, and may end within its last byte for one decoder and not for another.
        Ok(_) if expected.is_empty() && case.kind == Kind::Flip && case.name.contains(".webp") => {
            tally.same += 1;
            None
        }
        Ok(_) if expected.is_empty() => {
            Some(format!("{}: Pillow sees nothing: {}", case.name, case.problem.as_deref().unwrap_or_default()))
        }
        Ok(image) if image.dimensions() != size => {
            Some(format!("{}: {:?} pixels instead of {size:?}", case.name, image.dimensions()))
        }
        Ok(image) => {
            tally.same += 1;
            let distance = distance(&image, expected);
            // A strip has little but borders, where the decoder extends colours otherwise.
            let most = if size.0.min(size.1) < 8 { 2.0 * SAME } else { SAME };
            (distance > most).then(|| format!("{}: another picture, {distance:.1} levels off", case.name))
        }
    }
}

#[test]
fn every_image_is_what_pillow_sees_or_refused() {
    let Some(python) = program::python("PIL, numpy") else { return };
    let number = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    let script = program::root().join("tests/image_corpus.py");
    let mut made = Command::new(python)
        .arg(script)
        .args([number("IMAGE_FLIPS", "2"), number("IMAGE_SEED", "1")])
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut cases = BufReader::new(made.stdout.take().expect("it is piped"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case");
    let mut tallies: BTreeMap<Kind, Tally> = BTreeMap::new();
    let mut wrong = Vec::new();
    loop {
        let mut line = String::new();
        if cases.read_line(&mut line).unwrap() == 0 {
            break;
        }
        let case: Case = serde_json::from_str(&line).unwrap();
        let mut bytes = vec![0; case.bytes];
        cases.read_exact(&mut bytes).unwrap();
        let mut expected = vec![0; 3 * (case.width * case.height) as usize];
        cases.read_exact(&mut expected).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        wrong.extend(judge(&case, &path, &expected, tallies.entry(case.kind).or_default()));
    }
    assert!(made.wait().unwrap().success(), "the script ends well");
    println!("{tallies:?}");
    assert!(wrong.is_empty(), "{} files:\n{}", wrong.len(), wrong.join("\n"));
    // The script made files of every kind, and what is valid is mostly read.
    assert!(tallies[&Kind::Good].same > 240 && tallies[&Kind::Rare].same > 50, "{tallies:?}");
    assert!(tallies[&Kind::Cut].refused > 500 && tallies[&Kind::Flip].refused > 200, "{tallies:?}");
}
