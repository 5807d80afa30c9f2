use dinolab_core::contract::{Grid, Masking};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use my_plugin::MyPlugin;

#[test]
fn it_masks_as_many_patches_as_it_says_on_one_side() {
    contracts::registered("masking", "my_plugin").unwrap();
    contracts::masking(&MyPlugin::default()).unwrap();
    let grid = Grid { height: 4, width: 4 };
    let half = MyPlugin { share: 0.5 };
    let sides = half.draw(&mut Rng::new(0, Stream::Mask, 0, 0), 100, grid);
    // Opposite corners: both sides of one of the four halves.
    assert!(sides.iter().all(|mask| mask[0] != mask[15]));
}
