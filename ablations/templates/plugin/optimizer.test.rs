use dinolab_core::testing::contracts;
use my_plugin as _;

#[test]
fn it_keeps_still_without_a_gradient_and_moves_no_farther_than_it_says() {
    contracts::registered("optimizer", "my_plugin").unwrap();
    contracts::optimizer("plugin = \"my_plugin\"\nlr = 0.1").unwrap();
    contracts::optimizer("plugin = \"my_plugin\"\nmomentum = 0.0").unwrap();
}
