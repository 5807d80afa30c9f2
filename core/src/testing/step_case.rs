//! A step's outputs, small and random: what a loss is checked on.

use proptest::prelude::*;
use serde_json::{json, Map, Value as Json};

use super::case::{cases, fixed, tracked, Bound, Case};
use super::gradient::tensors;
use crate::comm::Single;
use crate::contract::{At, GramTarget, Grid, HeadInput, Loss, Needs, Outputs, StepContext, TeacherBatch};
use crate::registry::{self, Chosen, LossContext};
use crate::step::GLOBALS;
use crate::{Error, Result, Tensor};

/// Random steps for a registered loss, small enough to read: two to six patches, few images, a few channels. Options
/// of the loss that are a choice or true or false are drawn; the others have their defaults, unless `options` says
/// something else.
///
/// # Errors
/// If there is no loss of that name.
pub fn loss_cases(name: &str, options: BoxedStrategy<Json>) -> Result<BoxedStrategy<Case>> {
    let schema = schema_of(name)?;
    let sizes = (0usize..3, 0usize..3, 1usize..3, 1usize..4, 2usize..6, 2usize..6);
    let masked = proptest::collection::vec(any::<bool>(), 16);
    let drawn = (drawn_config(&schema), options, sizes, masked);
    let owned = name.to_string();
    let step = drawn.prop_map(move |(mut config, options, (more, locals, height, width, dim, prototypes), masked)| {
        if let (Some(config), Some(options)) = (config.as_object_mut(), options.as_object()) {
            config.extend(options.clone());
        }
        if schema.pointer("/properties/head/properties/prototypes").is_some() {
            config["head"] = json!({ "prototypes": prototypes });
        }
        let mut step = json!({
            "config": config, "images": 1, "locals": locals, "height": height, "width": width, "dim": dim,
        });
        let needs = build(&owned, &Case::new(step.clone())).map(|loss| loss.needs()).unwrap_or_default();
        let images = needs.min_batch.max(1) + more;
        step["images"] = images.into();
        // At least one is masked and one is not.
        let last = GLOBALS * images * height * width - 1;
        let masked: Vec<usize> = (0..last).filter(|i| *i == 0 || masked[i % masked.len()]).collect();
        step["masked"] = masked.into();
        step
    });
    let name = name.to_string();
    Ok(cases(step, move |case| {
        // A config that is refused is reported when the case is held; it needs no inputs.
        let Ok(loss) = build(&name, case) else { return Vec::new() };
        let Needs { head, gram_teacher, .. } = loss.needs();
        let size = Sizes::of(case);
        let (cls, patches) = ([GLOBALS * size.images, size.dim], [GLOBALS * size.images, size.patches, size.dim]);
        let mut slots = vec![
            tracked("student_cls", &cls),
            tracked("student_patches", &patches),
            fixed("teacher_cls", &cls),
            fixed("teacher_patches", &patches),
        ];
        slots.extend((size.locals > 0).then(|| tracked("student_local_cls", &[size.locals * size.images, size.dim])));
        slots.extend(gram_teacher.then(|| fixed("gram_patches", &patches)));
        if let Some((input, head)) = head {
            let (student, teacher) = match input {
                HeadInput::Cls => ((GLOBALS + size.locals) * size.images, GLOBALS * size.images),
                HeadInput::MaskedPatches => [case.indices("masked").len(); 2].into(),
            };
            slots.push(tracked("student_logits", &[student, head.prototypes]));
            slots.push(fixed("teacher_logits", &[teacher, head.prototypes]));
        }
        slots
    }))
}

/// The loss of a case, without a gradient.
///
/// # Errors
/// If the loss refuses the case.
pub fn loss_value(name: &str, case: &Case) -> Result<f64> {
    let loss = build(name, case)?;
    let bound = Bound { case, tensors: tensors(case, None) };
    with_outputs(&bound, loss.as_ref(), |out, context| Ok(loss.compute(out, context)?.loss.item()))
}

fn schema_of(name: &str) -> Result<Json> {
    let all = registry::all();
    let found = all.into_iter().find(|p| p.kind == "loss" && p.name == name);
    let found = found.ok_or_else(|| Error::user(format!("there is no loss `{name}`"), "see `dinolab plugins loss`"))?;
    Ok(found.schema.to_value())
}

struct Sizes {
    images: usize,
    locals: usize,
    dim: usize,
    patches: usize,
}

impl Sizes {
    fn of(case: &Case) -> Self {
        let patches = case.size("height") * case.size("width");
        Self { images: case.size("images"), locals: case.size("locals"), dim: case.size("dim"), patches }
    }
}

/// The loss that a case is about.
pub(super) fn build(name: &str, case: &Case) -> Result<Box<dyn Loss>> {
    let mut table = Map::from_iter([("plugin".to_string(), Json::from(name))]);
    table.extend(case.options["config"].as_object().cloned().unwrap_or_default());
    let table = figment::value::Value::serialize(table).expect("a table is plain data");
    let refused = |e: crate::recipe::Nested| {
        Error::user(format!("loss `{name}` refuses {}: {}", case.options["config"], e.encode()), "mend its defaults")
    };
    let chosen = Chosen::<dyn Loss>::from_value(&table, None).map_err(refused)?;
    let Sizes { images, locals, dim, patches } = Sizes::of(case);
    chosen.build(&mut LossContext { dim, images, globals: GLOBALS, locals, patches })
}

/// The loss's own keys of a case, every default filled in.
pub(super) fn config(name: &str, case: &Case) -> Result<Json> {
    let entry = registry::find::<dyn Loss>(name).expect("its cases were drawn from its schema");
    let table = figment::value::Value::serialize(&case.options["config"]).expect("a table is plain data");
    (entry.resolve)(&table).map_err(|e| Error::user(format!("loss `{name}`: {e}"), "mend its defaults"))
}

/// A config: choices are drawn; of numbers only those that have no default.
fn drawn_config(schema: &Json) -> BoxedStrategy<Json> {
    let required: Vec<&str> =
        schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str).collect();
    let mut all: BoxedStrategy<Map<String, Json>> = Just(Map::new()).boxed();
    for (key, field) in schema.get("properties").and_then(Json::as_object).into_iter().flatten() {
        let Some(value) = drawn_value(field, required.contains(&key.as_str())) else { continue };
        let key = key.clone();
        let with = move |(mut map, value): (Map<String, Json>, Json)| {
            map.insert(key.clone(), value);
            map
        };
        all = (all, value).prop_map(with).boxed();
    }
    all.prop_map(Json::Object).boxed()
}

fn drawn_value(field: &Json, required: bool) -> Option<BoxedStrategy<Json>> {
    let alternatives = ["enum", "oneOf", "anyOf"].iter().find_map(|key| field.get(key)).and_then(Json::as_array);
    let choices: Vec<Json> = alternatives
        .into_iter()
        .flatten()
        .filter_map(|choice| choice.get("const").or_else(|| choice.is_string().then_some(choice)).cloned())
        .collect();
    if !choices.is_empty() {
        return Some(proptest::sample::select(choices).boxed());
    }
    match field.get("type").and_then(Json::as_str) {
        Some("boolean") => Some(any::<bool>().prop_map(Json::from).boxed()),
        Some("number") if required => Some((100..2000u32).prop_map(|k| json!(f64::from(k) / 1000.0)).boxed()),
        Some("integer") if required => Some((1..4u32).prop_map(Json::from).boxed()),
        _ if required && field.get("x-schedule").is_some() => Some(Just(json!(0.5)).boxed()),
        _ => None,
    }
}

/// Lets `f` see the step of a case.
pub(super) fn with_outputs<R>(
    bound: &Bound<'_>,
    loss: &dyn Loss,
    f: impl FnOnce(&Outputs<'_>, &StepContext<'_>) -> Result<R>,
) -> Result<R> {
    let case = bound.case();
    let Sizes { images, locals, patches, .. } = Sizes::of(case);
    let dtype = bound.tensor("student_cls").dtype().wide();
    let state: Vec<Tensor> = loss.state().iter().map(|s| Tensor::zeros(&s.shape, dtype)).collect();
    let at = At { step: 3, total: 10 };
    let context = StepContext { at, seed: 0, comm: &Single, dtype, state: &state };
    let targets = bound.get("teacher_logits").map(|logits| loss.targets(&TeacherBatch { logits }, &context));
    let targets = targets.transpose()?.map(|(targets, _)| targets);
    let masked = case.indices("masked");
    let all = GLOBALS * images * patches;
    let unmasked: Vec<u32> = (0..all).filter(|i| !masked.contains(i)).map(|i| i as u32).collect();
    let of_crop = |crop: usize| masked.iter().filter(|&&i| i / patches == crop).count();
    let weights: Vec<f64> = masked.iter().map(|i| 1.0 / of_crop(i / patches) as f64).collect();
    let gram = bound.get("gram_patches").map(|patches| GramTarget { patches: patches.clone() });
    let outputs = Outputs {
        images,
        globals: GLOBALS,
        locals,
        grid: Grid { height: case.size("height"), width: case.size("width") },
        student_cls: bound.tensor("student_cls"),
        student_local_cls: bound.get("student_local_cls"),
        student_patches: bound.tensor("student_patches"),
        student_logits: bound.get("student_logits"),
        teacher_cls: bound.tensor("teacher_cls"),
        teacher_patches: bound.tensor("teacher_patches"),
        targets: targets.as_ref(),
        mask_indices: &case.rows("masked"),
        unmasked_indices: &Tensor::from_slice(&unmasked, &[unmasked.len()])?,
        mask_weights: &Tensor::from_f64(&weights, &[weights.len()], dtype)?,
        gram: gram.as_ref(),
    };
    f(&outputs, &context)
}
