//! Losses of other methods against their statements in PyTorch (`tests/methods.py`), which follow the authors' code: value
//! and gradients on random cases.
//!
//! Needs a Python with `torch`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, the test says so and
//! passes.

use dinolab_tests::program;
use std::collections::BTreeMap;

use dinolab_core::proptest::sample;
use dinolab_core::proptest::strategy::{Strategy, ValueTree};
use dinolab_core::proptest::test_runner::TestRunner;
use dinolab_core::testing::loss_oracle::{loss_cases, loss_record, no_options};
use serde_json::{json, Value as Json};

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

const LOSSES: [&str; 12] = [
    "byol",
    "vicreg",
    "barlow_twins",
    "info_nce",
    "sigreg",
    "online_linear",
    "inpainting",
    "rotation",
    "jigsaw",
    "relative_location",
    "cka",
    "feature_distillation",
];
/// Cases of every loss.
const CASES: usize = 40;
/// How far a value or gradient may be, relative to the gradients' length.
const TOLERANCE: f64 = 1e-6;

fn numbers(value: &Json) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

#[test]
fn values_and_gradients_are_those_of_the_authors_statements() {
    let Some(python) = program::python("torch") else { return };
    let mut runner = TestRunner::deterministic();
    let mut records: BTreeMap<&str, Vec<Json>> = BTreeMap::new();
    for name in LOSSES {
        let options = match name {
            "cka" => sample::select(vec![json!({}), json!({ "layer": 1 })]).boxed(),
            _ => no_options(),
        };
        let cases = loss_cases(name, options).expect("the loss is registered");
        let mut draw = || cases.new_tree(&mut runner).expect("a case can be drawn").current();
        records.insert(name, (0..CASES).map(|_| loss_record(name, &draw()).expect("it is accepted")).collect());
    }
    let folder = program::Folder::new();
    folder.write("cases.json", &serde_json::to_string(&records).expect("plain data"));
    let text = program::script(&python, "methods.py", &[&folder.path("cases.json")]);
    let theirs: BTreeMap<String, Vec<Json>> = serde_json::from_str(&text).expect("JSON");
    for (name, ours) in &records {
        for (i, (ours, theirs)) in ours.iter().zip(&theirs[*name]).enumerate() {
            let (a, b) = (ours["loss"].as_f64().expect("a number"), theirs["loss"].as_f64().expect("a number"));
            assert!(
                (a - b).abs() < TOLERANCE * b.abs().max(1.0),
                "{name}, case {i}: {a}, but PyTorch gives {b}\n{ours}"
            );
            let gradients = ours["gradients"].as_object().expect("a table");
            let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let longest = theirs["gradients"].as_object().expect("a table").values().map(|g| length(&numbers(g)));
            let longest = longest.fold(1e-3, f64::max);
            for (input, gradient) in gradients {
                let (a, b) = (numbers(gradient), numbers(&theirs["gradients"][input]));
                let difference: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
                assert!(
                    a.len() == b.len() && length(&difference) < TOLERANCE * longest,
                    "{name}, case {i}: the gradient of {input} is {a:?}, but PyTorch gives {b:?}\n{ours}"
                );
            }
        }
    }
}
