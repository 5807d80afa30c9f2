use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::testing::contracts;
use my_plugin::MyPlugin;

#[test]
fn it_copies_the_student_after_every_tenth_step() {
    contracts::registered("teacher", "my_plugin").unwrap();
    let policy = MyPlugin::default();
    contracts::teacher(&policy).unwrap();
    let copies = |step| policy.after_step(At { step, total: 100 }) == Follow::Copy(Role::Student);
    assert_eq!((0..30).filter(|&step| copies(step)).collect::<Vec<_>>(), [9, 19, 29]);
}
