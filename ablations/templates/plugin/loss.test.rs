use dinolab_core::testing::{check, contracts};
use my_plugin as _;

#[test]
fn value_and_gradient_are_right() {
    contracts::registered("loss", "my_plugin").unwrap();
    let outcome = check(&["my_plugin".into()], 64, 0).unwrap().pop().unwrap();
    assert!(outcome.failure.is_none(), "{:#?}", outcome.failure);
}
