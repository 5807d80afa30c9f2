//! A loss that exists in dfdx only runs in a recipe like any other, and gives what a loss of operations gives.

use dinolab_tests::program::Folder;

const RECIPE: &str = r#"
extends = "micro.toml"
name = "slow"
[losses.LOSS]
weight = 0.5
"#;

#[test]
fn a_loss_in_dfdx_trains_as_one_of_operations_and_says_that_it_is_slow() {
    let folder = Folder::with_micro();
    let last = |loss: &str| {
        folder.write(&format!("{loss}.toml"), &RECIPE.replace("LOSS", loss));
        let out = format!("runs/{loss}");
        let ended = folder.succeed(&["train", &format!("{loss}.toml"), "--out", &out, "--set", "precision=f64"]);
        let metrics = folder.read(&format!("{out}/metrics.jsonl"));
        let line: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        let value = |name: &str| line.get(name).and_then(serde_json::Value::as_f64);
        let own = value(&format!("loss/{loss}")).expect("the loss is logged");
        (own, value("loss/dino").expect("DINO is logged"), ended.err)
    };
    let (slow, dino_slow, said) = last("toy_distance_dfdx");
    let (fast, dino_fast, said_fast) = last("toy_distance");
    // After twelve steps that both have shaped.
    assert!((slow - fast).abs() < 1e-9 * fast.abs(), "{slow} against {fast}");
    assert!((dino_slow - dino_fast).abs() < 1e-9, "{dino_slow} against {dino_fast}");
    let note = "loss `toy_distance_dfdx` takes the slow path";
    assert_eq!(said.matches(note).count(), 1, "{said}");
    assert!(!said_fast.contains("slow path"));
}
