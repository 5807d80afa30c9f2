use dinolab_core::contract::PosEncoding;
use dinolab_core::testing::contracts;
use my_plugin as _;

#[test]
fn tables_have_their_shapes_on_every_grid() {
    contracts::registered("pos_encoding", "my_plugin").unwrap();
    let encoding = contracts::plugin::<dyn PosEncoding>(r#"plugin = "my_plugin""#, &mut ()).unwrap();
    contracts::pos_encoding(encoding).unwrap();
}
