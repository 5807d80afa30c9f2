//! Models of timm both ways (`tests/timm_models.py`).
//!
//! Needs a Python with `timm`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, the test says so and passes.

use std::path::{Path, PathBuf};

use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::train::Trained;
use dinolab_plugins as _;
use dinolab_tests::program::{python, script, Folder};

#[test]
fn timm_and_dinolab_agree_both_ways() {
    let Some(python) = python("timm") else { return };
    let folder = Folder::new();
    script(&python, "timm_models.py", &[Path::new("make"), &folder.path(".")]);
    let read = |file: &str| read_tensors(&folder.path(file)).expect("a safetensors file");
    let names = ["mlp", "bias", "gated"];
    let ours = names.map(|name| {
        let (weights, back) = (format!("{name}_weights"), format!("{name}_back"));
        folder.succeed(&["import", name, "--out", &weights]);
        let pixels = read(&format!("{name}/pixels.safetensors"));
        let pixels = pixels.get("pixels").expect("it has pixels").clone();
        let trained = Trained::open(&folder.path(&weights)).expect("a weights folder");
        let features = trained.features(&pixels).expect("it runs");
        folder.succeed(&["export", &weights, "--format", "timm", "--out", &back]);
        let place = folder.path(&format!("{back}/pixels.safetensors"));
        write_tensors(&place, &[("pixels".into(), pixels)], &[]).expect("a temporary folder");
        let n = features.cls.dim(0);
        let all = |i: usize| {
            let of = |x: &dinolab_core::Tensor| x.to_f64_vec()[i * x.len() / n..(i + 1) * x.len() / n].to_vec();
            [of(&features.cls), of(&features.registers), of(&features.patches)].concat()
        };
        (0..n).flat_map(all).collect::<Vec<f64>>()
    });
    let backs = names.map(|name| folder.path(&format!("{name}_back")));
    let args: Vec<&Path> = [Path::new("run")].into_iter().chain(backs.iter().map(PathBuf::as_path)).collect();
    script(&python, "timm_models.py", &args);
    for (name, ours) in names.iter().zip(&ours) {
        let error = |file: &str| {
            let theirs = read(file).get("features").expect("it has features").to_f64_vec();
            assert_eq!(theirs.len(), ours.len());
            let most = theirs.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / most).fold(0.0, f64::max)
        };
        let there = error(&format!("{name}/expected.safetensors"));
        let again = error(&format!("{name}_back/expected.safetensors"));
        println!("{name}: {there:.1e} in, {again:.1e} back");
        assert!(there < 1e-5 && again < 1e-5, "{name}: {there:e} in, {again:e} back");
    }
}
