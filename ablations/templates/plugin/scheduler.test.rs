use dinolab_core::contract::{At, Scheduler};
use dinolab_core::testing::contracts;
use my_plugin::MyPlugin;

#[test]
fn it_is_finite_and_halves() {
    contracts::registered("scheduler", "my_plugin").unwrap();
    let schedule = MyPlugin { start: 1.0, end: 0.0, half_life: 10.0 };
    contracts::scheduler(&schedule).unwrap();
    assert_eq!(schedule.value(At { step: 20, total: 100 }), 0.25);
}
