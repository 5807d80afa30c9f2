use serde_json::json;

use super::*;
use crate::recipe::test_plugins::{with, RECIPE};
use crate::recipe::{Overrides, RawRecipe};
use crate::resolved::Resolved;

fn set(sets: &[&str]) -> crate::Result<Resolved> {
    let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
    Resolved::of(RawRecipe::from_text(RECIPE)?.with(&overrides)?)
}

fn refused(text: &str) -> String {
    set(&[text]).unwrap_err().to_string()
}

#[test]
fn a_range_is_told_in_words() {
    let cases = [
        (json!({ "minimum": 1 }), "1 or more"),
        (json!({ "minimum": 1, "maximum": 16384 }), "1 to 16384"),
        (json!({ "exclusiveMinimum": 0, "maximum": 0.5 }), "above 0, at most 0.5"),
        (json!({ "minimum": 0.0, "exclusiveMaximum": 1 }), "0 or more, below 1"),
        (json!({ "minimum": 1e-20, "maximum": 1e9 }), "1e-20 to 1000000000"),
        (json!({ "maximum": -3 }), "at most -3"),
    ];
    for (schema, expected) in cases {
        assert_eq!(words(&schema).as_deref(), Some(expected));
    }
    assert_eq!(words(&json!({ "type": "number" })), None);
}

#[test]
fn numbers_are_held_to_their_ranges_as_they_were_written() {
    let cases = [
        ("steps=0", "steps: has to be 1 to 1000000000000000, not 0"),
        ("batch.size=0", "batch.size: has to be 1 to 1000000000, not 0"),
        ("optimizer.eps=1e-46", "optimizer.eps: has to be 1e-20 to 1000, not 1e-46"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: number 2 has to be 0 or more, below 1, not 1"),
        (
            "optimizer.betas=[0.9, 0.999999999]",
            "optimizer.betas: number 2 has to be 0 or more, below 1, not 0.999999999",
        ),
        ("crops.std=[0.2, 0.2, 1e-50]", "crops.std: number 3 has to be 0.001 to 1, not 1e-50"),
        ("crops.mean=[1e39, 0.2, 0.2]", "crops.mean: number 1 has to be 0 to 1, not 1e39"),
        ("losses.test_cls.head.layers=9223372036854775807", "losses.test_cls.head.layers: has to be 1 to 100, not"),
        ("losses.test_cls.weight=1e300", "losses.test_cls.weight: has to be -1000000 to 1000000, not 1e300"),
    ];
    for (text, expected) in cases {
        let message = refused(text);
        assert!(message.starts_with(&format!("--set {text}: {expected}")), "{message}");
    }
}

#[test]
fn pixels_on_0_to_255_are_to_be_divided() {
    let message = refused("crops.mean=[123.675, 116.28, 103.53]");
    assert!(message.contains("help: pixels are in [0, 1] here: divide"), "{message}");
}

#[test]
fn numbers_without_a_range_have_to_be_ones_in_single_precision() {
    let wide = |x: &str| set(&["backbone.pos_encoding.plugin=test_box", &format!("backbone.pos_encoding.rescale={x}")]);
    assert!(wide("1e-46").unwrap_err().to_string().contains("1e-46 is zero in single precision"));
    assert!(wide("1e39").unwrap_err().to_string().contains("1e39 is infinite in single precision"));
    assert!(wide("-1e30").is_ok() && wide("0").is_ok() && wide("1.2e-38").is_ok());
    let sets =
        ["precision=f64", "device=cpu", "backbone.pos_encoding.plugin=test_box", "backbone.pos_encoding.rescale=1e-46"];
    set(&sets).unwrap();
}

#[test]
fn lists_have_as_many_values_as_are_read() {
    let three = refused("optimizer.betas=[0.9, 0.99, 0.5]");
    assert!(three
        .starts_with("--set optimizer.betas=[0.9, 0.99, 0.5]: optimizer.betas: expected a list of 2 values, found 3"));
    let four = refused("crops.mean=[0.1, 0.1, 0.1, 0.1]");
    assert!(four.contains("crops.std: has 3 numbers, and crops.mean 4"), "{four}");
    assert!(refused("crops.blur=[]").contains("a list of 3 values"));
}

#[test]
fn ranges_rise() {
    let message = refused("masking.ratio=[0.5, 0.1]");
    assert!(message.contains("masking.ratio: has to be [least, most] with least <= most, not [0.5, 0.1]"), "{message}");
    assert!(set(&["masking.ratio=[0.5, 0.5]"]).is_ok());
}

#[test]
fn tables_in_lists_are_looked_into() {
    let text =
        "[crops]\nresolutions = [{ share = 1, global_size = 64, local_size = 32 }, { share = 0, global_size = 64, \
        local_size = 99999 }]";
    let message = Resolved::from_text(&with(text)).unwrap_err().to_string();
    assert!(
        message.contains("crops.resolutions: entry 2 `share` has to be above 0, at most 1000000, not 0"),
        "{message}"
    );
    assert!(message.contains("crops.resolutions: entry 2 `local_size` has to be 1 to 16384, not 99999"), "{message}");
}

#[test]
fn a_schedule_is_held_to_its_range_at_every_step() {
    let weight = |table: &str| Resolved::from_text(&with(&format!("weight = {{ plugin = \"test_ramp\", {table} }}")));
    assert!(weight("to = 1e6").is_ok());
    let message = weight("from = 1, to = 2e6").unwrap_err().to_string();
    assert!(message.contains("losses.test_cls.weight: is "), "{message}");
    assert!(message.contains(", and has to be -1000000 to 1000000"), "{message}");
    let lr = refused("optimizer.lr={ plugin = \"test_ramp\", to = -1 }");
    assert!(lr.contains("optimizer.lr: is -0.01 at step 1, and has to be 0 to 100"), "{lr}");
    let nested = refused("optimizer.lr={ plugin = \"test_ramp\", to = 1e60 }");
    assert!(nested.contains("optimizer.lr.to: 1e60 is infinite in single precision"), "{nested}");
}

#[test]
fn a_run_of_a_million_million_steps_is_checked_at_once() {
    let begin = std::time::Instant::now();
    let sets = ["steps=1000000000000", "optimizer.lr={ plugin = \"test_ramp\", to = 1e-3 }"];
    set(&sets).unwrap();
    assert!(begin.elapsed().as_secs() < 5);
}

#[test]
fn a_negative_weight_is_a_warning() {
    let resolved = set(&["losses.test_cls.weight=-1"]).unwrap();
    let warning = resolved.warnings[0].to_string();
    assert!(warning.contains("losses.test_cls.weight: is -1 at step 0"), "{warning}");
}

#[test]
fn defaults_are_in_their_ranges() {
    let resolved = Resolved::from_text(RECIPE).unwrap();
    assert_eq!((resolved.warnings, resolved.notes), (vec![], vec![]));
}
