use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::testing::contracts;
use my_plugin as _;

#[test]
fn samples_are_whole_and_the_same_every_time() {
    contracts::registered("dataset", "my_plugin").unwrap();
    let data = contracts::plugin::<dyn Dataset>(r#"plugin = "my_plugin""#, &mut DataContext { seed: 7 }).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
}
