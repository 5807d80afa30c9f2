use dinolab_core::contract::{Augmentation, CropContext, Cut};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use my_plugin as _;

#[test]
fn its_plans_can_be_applied_and_its_boxes_are_squares() {
    contracts::registered("augmentation", "my_plugin").unwrap();
    contracts::augmentation(r#"plugin = "my_plugin""#).unwrap();
    let mut crops = CropContext { global_size: 64, local_size: 32, local_count: 2, patch_size: 8, channels: 3 };
    let plugin = contracts::plugin::<dyn Augmentation>(r#"plugin = "my_plugin""#, &mut crops).unwrap();
    let plan = plugin.plan((80, 60), &|crop| Rng::new(0, Stream::Augment, 0, crop));
    for crop in plan.globals.iter().chain(&plan.locals) {
        assert!(matches!(crop.cut, Cut::Image { area, .. } if area.width == area.height));
    }
}
