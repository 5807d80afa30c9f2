use dinolab_core::testing::contracts;
use my_plugin as _;

#[test]
fn features_have_their_shapes_and_parameters_their_gradients() {
    contracts::registered("backbone", "my_plugin").unwrap();
    contracts::backbone(r#"plugin = "my_plugin""#).unwrap();
}
