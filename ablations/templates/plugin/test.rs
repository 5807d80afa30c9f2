//! The plugin keeps its contract, and the program knows it.

CONTRACT
/// The program with this plugin, run in the crate's folder.
fn dinolab(args: &[&str]) -> String {
    let program = std::process::Command::new(env!("CARGO_BIN_EXE_my_plugin"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(program.status.success(), "{args:?}: {}", String::from_utf8_lossy(&program.stderr));
    String::from_utf8_lossy(&program.stdout).into_owned()
}

#[test]
fn the_program_lists_the_plugin() {
    assert!(dinolab(&["plugins", "KIND", "my_plugin"]).contains("my_plugin"));
}

#[test]
fn the_recipe_and_the_suite_are_right() {
    dinolab(&["recipe", "check", "recipe.toml"]);
    assert!(dinolab(&["ablate", "suite.toml", "--dry-run"]).contains("my_plugin"));
}
