//! Which algorithm computes a matrix product is chosen once, by whoever comes first, and kept in a file. On the emulator
//! alone: a file of a real GPU is not spoiled.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::{DType, Device, Tensor};
use dinolab_plugins as _;
use dinolab_tests::emulator::{has_gpu, is_emulated, passed, run_emulated};

/// The side of the product that a process computes.
const SIDE: &str = "DINOLAB_TEST_SIDE";

/// Computes products of a side in a process of its own, whose choices are kept in `cache`; false where there is no emulator.
fn product(cache: &Path, side: &str) -> bool {
    let environment = [("DINOLAB_CACHE", cache.to_str().expect("a UTF-8 path")), (SIDE, side)];
    let ended = run_emulated("gpu_ops::products::a_product_of_the_side_that_is_asked_for", &environment);
    ended.inspect(|ended| assert!(passed(ended), "failed on the emulator")).is_some()
}

#[test]
fn a_product_of_the_side_that_is_asked_for() {
    let Some(side) = std::env::var(SIDE).ok().filter(|_| is_emulated()) else { return };
    let n: usize = side.parse().unwrap();
    let device: Device = "cuda".parse().unwrap();
    let x = device.with(|| Tensor::full(&[n, n], DType::F32, 0.5)).unwrap();
    let y = x.matmul(&x).unwrap().to_f64_vec();
    assert!(y.iter().all(|&y| y == 0.25 * n as f64), "{y:?}");
}

fn choices(cache: &Path) -> BTreeMap<String, Vec<u64>> {
    let file = |entry: std::io::Result<std::fs::DirEntry>| Some(entry.unwrap().path()).filter(|f| is_choices(f));
    let file = std::fs::read_dir(cache).unwrap().find_map(file).expect("choices are kept");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn is_choices(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "json")
}

#[test]
fn a_damaged_choice_is_made_anew() {
    let cache = tempfile::tempdir().unwrap();
    if has_gpu() || !product(cache.path(), "128") {
        return;
    }
    let good = choices(cache.path());
    let spoiled: BTreeMap<String, Vec<u64>> = good.keys().map(|shape| (shape.clone(), vec![7; 8])).collect();
    let file = std::fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().path()).find(|f| is_choices(f)).unwrap();
    std::fs::write(&file, serde_json::to_vec(&spoiled).unwrap()).unwrap();
    product(cache.path(), "128");
    let mended = choices(cache.path());
    assert_eq!(mended.keys().collect::<Vec<_>>(), good.keys().collect::<Vec<_>>());
    assert!(mended.values().all(|algorithm| algorithm[0] == good.values().next().unwrap()[0]), "{mended:?}");
}

#[test]
fn processes_that_choose_at_the_same_time_keep_the_choices_of_each_other() {
    let cache = tempfile::tempdir().unwrap();
    if has_gpu() {
        return;
    }
    // Where there is a choice at all.
    let sides = ["128", "256", "384", "512"];
    std::thread::scope(|scope| {
        for side in sides {
            scope.spawn(|| product(cache.path(), side));
        }
    });
    if dinolab_tests::emulator::library_path().is_some() {
        assert_eq!(choices(cache.path()).len(), sides.len());
    }
}

#[test]
fn an_algorithm_that_leaves_out_the_end_of_a_sum_is_not_taken() {
    let cache = tempfile::tempdir().unwrap();
    // The emulator has one that sums 64 numbers of 65; the product is looked at where it is made.
    if !has_gpu() {
        product(cache.path(), "65");
    }
}
