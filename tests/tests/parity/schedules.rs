//! Schedulers against the reference's numbers, built by the registry from tables as in a recipe.
//!
//! The translation from the reference's configuration (epochs, scaling rules) to a recipe (steps, final numbers) is here:
//! a recipe states the learning rate it uses, so that a change of the batch size changes nothing behind one's back.

use crate::golden::{Comparison, Golden};
use dinolab_core::contract::{At, Schedule};
use dinolab_core::DType;
use dinolab_plugins as _;
use serde_json::{json, Value};

/// Values of a recipe's schedule in a run of `total` steps.
fn values(recipe: &Value, total: u64) -> Vec<f64> {
    let schedule: Schedule = serde_json::from_value(recipe.clone()).unwrap_or_else(|e| panic!("{recipe}: {e}"));
    (0..total).map(|step| schedule.at(At { step, total })).collect()
}

fn number(table: &Value, key: &str) -> f64 {
    table[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {table}"))
}

/// A whole number, 0 where the table has none.
fn count(table: &Value, key: &str) -> u64 {
    table[key].as_u64().unwrap_or(0)
}

/// What the reference multiplies the learning rate by.
fn lr_scale(rule: &Value, batch: f64) -> f64 {
    match rule.as_str() {
        Some("sqrt_wrt_1024") => 4.0 * (batch / 1024.0).sqrt(),
        Some("linear_wrt_256") => batch / 256.0,
        _ => 1.0,
    }
}

/// The recipe of a table with `start`, `peak`, `end`, `warmup_epochs` and maybe `cosine_epochs`.
fn warmup_cosine(table: &Value, epoch: u64, scale: f64) -> Value {
    let mut recipe = json!({
        "plugin": "linear_warmup_cosine",
        "start": number(table, "start"),
        "peak": number(table, "peak") * scale,
        "end": number(table, "end") * scale,
        "warmup_steps": count(table, "warmup_epochs") * epoch,
    });
    if let Some(epochs) = table["cosine_epochs"].as_u64() {
        recipe["cosine_steps"] = (epochs * epoch).into();
    }
    recipe
}

/// The learning rate of the last layers: zero while they are frozen (`freeze_last_layer_steps` of a recipe).
fn frozen(lr: &[f64], steps: u64) -> Vec<f64> {
    lr.iter().enumerate().map(|(step, &lr)| if (step as u64) < steps { 0.0 } else { lr }).collect()
}

fn check_training_config(name: &str, config: &Value, world: f64, c: &mut Comparison<'_>) {
    let epoch = count(config, "OFFICIAL_EPOCH_LENGTH");
    let total = count(config, "epochs") * epoch;
    let batch = number(config, "batch_size_per_gpu") * world;
    for (key, table) in config["schedules"].as_object().expect("a table a schedule") {
        let scale = if key == "lr" { lr_scale(&config["scaling_rule"], batch) } else { 1.0 };
        let got = values(&warmup_cosine(table, epoch, scale), total);
        c.check_values(&format!("v2.{name}.{key}"), &got);
        if key == "lr" {
            let steps = count(table, "freeze_last_layer_epochs") * epoch;
            c.check_values(&format!("v2.{name}.last_layer_lr"), &frozen(&got, steps));
        }
    }
    for weight in ["gram_loss_weight", "dino_local_loss_weight"] {
        if config[weight].is_object() {
            c.check_values(
                &format!("loss.{name}.{weight}"),
                &values(&warmup_cosine(&config[weight], epoch, 1.0), total),
            );
        }
    }
}

/// The old-style configuration: `CosineScheduler` for everything.
fn check_old_config(name: &str, config: &Value, world: f64, c: &mut Comparison<'_>) {
    let (optim, teacher) = (&config["optim"], &config["teacher"]);
    let epoch = count(config, "OFFICIAL_EPOCH_LENGTH");
    let total = count(optim, "epochs") * epoch;
    let scale = lr_scale(&optim["scaling_rule"], number(config, "batch_size_per_gpu") * world);
    let cosine = |peak: f64, end: f64| {
        let trunc_extra = optim["schedule_trunc_extra"].as_f64().unwrap_or(0.0);
        json!({ "plugin": "cosine", "peak": peak, "end": end, "trunc_extra": trunc_extra })
    };
    let mut lr = cosine(number(config, "base_lr") * scale, number(optim, "min_lr"));
    lr["warmup_steps"] = (count(optim, "warmup_epochs") * epoch).into();
    let lr = values(&lr, total);
    c.check_values(&format!("{name}.last_layer_lr"), &frozen(&lr, count(optim, "freeze_last_layer_epochs") * epoch));
    c.check_values(&format!("{name}.lr"), &lr);
    let decay = cosine(number(optim, "weight_decay"), number(optim, "weight_decay_end"));
    c.check_values(&format!("{name}.weight_decay"), &values(&decay, total));
    let momentum = cosine(number(teacher, "momentum_teacher"), number(teacher, "final_momentum_teacher"));
    c.check_values(&format!("{name}.momentum"), &values(&momentum, total));
    // The temperature only warms up: its cosine has no step of its own.
    let steps = count(teacher, "warmup_teacher_temp_epochs") * epoch;
    let (start, peak) = (number(teacher, "warmup_teacher_temp"), number(teacher, "teacher_temp"));
    let temperature =
        json!({ "plugin": "cosine", "start": start, "peak": peak, "end": peak, "warmup_steps": steps, "total": steps });
    let got = values(&temperature, steps + 6);
    c.check_values(&format!("{name}.teacher_temp"), &got[..steps as usize]);
    let past_end = [steps - 1, steps, steps + 5].map(|i| got[i as usize]);
    c.check_values(&format!("{name}.teacher_temp_past_end"), &past_end);
}

pub fn schedules(golden: &Golden, _: DType, c: &mut Comparison<'_>) {
    let options = &golden.options;
    let cases = |key: &str| options[key].as_object().cloned().unwrap_or_default();
    for (case, table) in cases("linear_warmup_cosine_decay") {
        let mut recipe = json!({
            "plugin": "linear_warmup_cosine",
            "start": number(&table, "start"),
            "peak": number(&table, "peak"),
            "end": number(&table, "end"),
            "warmup_steps": count(&table, "warmup_iterations"),
        });
        if let Some(steps) = table["cosine_iterations"].as_u64() {
            recipe["cosine_steps"] = steps.into();
        }
        c.check_values(&format!("lwcd.{case}"), &values(&recipe, count(&table, "total_iterations")));
    }
    for (case, table) in cases("CosineScheduler") {
        let recipe = json!({
            "plugin": "cosine",
            "start": table["start_warmup_value"].as_f64().unwrap_or(0.0),
            "peak": number(&table, "base_value"),
            "end": number(&table, "final_value"),
            "warmup_steps": count(&table, "warmup_iters"),
            "freeze_steps": count(&table, "freeze_iters"),
            "trunc_extra": table["trunc_extra"].as_f64().unwrap_or(0.0),
        });
        c.check_values(&format!("cosine.{case}"), &values(&recipe, count(&table, "total_iters")));
    }
    let world = golden.number("/world_size", Some(1.0));
    for (name, config) in cases("configs") {
        check_training_config(&name, &config, world, c);
    }
    for (name, config) in options.as_object().expect("options are a table").iter().filter(|o| o.0.starts_with("v1.")) {
        check_old_config(name, config, world, c);
    }
}

/// DINOv3's own choice is a warm-up and then nothing: `linear_warmup` says so, and is the same curve.
#[test]
fn a_cosine_between_equal_values_is_the_linear_warmup() {
    let long =
        json!({ "plugin": "linear_warmup_cosine", "start": 0.04, "peak": 0.07, "end": 0.07, "warmup_steps": 20 });
    let short = json!({ "plugin": "linear_warmup", "start": 0.04, "peak": 0.07, "warmup_steps": 20 });
    assert_eq!(values(&long, 50), values(&short, 50));
    assert_eq!(values(&json!(0.07), 50), values(&json!({ "plugin": "constant", "value": 0.07 }), 50));
}
