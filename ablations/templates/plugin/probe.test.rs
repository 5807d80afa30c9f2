use dinolab_core::contract::{Dataset, Features, Grid, ImageSize, Probe, ProbeContext, Sample};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Result, Tensor};
use my_plugin::MyPlugin;

/// Black on the left, white on the right.
#[derive(Debug)]
struct Halves;

impl Dataset for Halves {
    fn len(&self) -> usize {
        4
    }
    fn get(&self, _: usize) -> Result<Sample> {
        let pixels = (0..3 * 8 * 8).map(|i| if i / 3 % 8 < 4 { 0u8 } else { 255 }).collect();
        Ok(Sample { width: 8, height: 8, pixels, ..Sample::default() })
    }
}

/// Features whose CLS is the row of pixels `columns`.
fn features(pixels: &Tensor, columns: std::ops::Range<usize>) -> Features {
    let (b, side) = (pixels.dim(0), pixels.dim(3));
    let row = pixels.reshape(&[b, pixels.len() / b]).and_then(|x| x.narrow_axis(1, columns.start, columns.len()));
    let empty = |n: usize| Tensor::zeros(&[b, n, columns.len()], DType::F32);
    let grid = Grid { height: side, width: side };
    Features { cls: row.unwrap(), registers: empty(0), patches: empty(1), prenorm: empty(1), layers: Vec::new(), grid }
}

fn score(see: std::ops::Range<usize>) -> f64 {
    let context = ProbeContext {
        features: &|pixels: &Tensor| Ok(features(pixels, see.clone())),
        train: &Halves,
        test: &Halves,
        image_size: ImageSize::square(8),
        patch_size: 1,
        normalization: (&[0.5; 3], &[0.5; 3]),
        seed: 0,
        warn: &|_| (),
        show: None,
    };
    MyPlugin::default().run(&context).unwrap()[0].value
}

#[test]
fn what_sees_the_left_half_only_sees_the_opposite_in_the_mirror() {
    contracts::registered("probe", "my_plugin").unwrap();
    assert!((score(0..4) + 1.0).abs() < 1e-6);
}
