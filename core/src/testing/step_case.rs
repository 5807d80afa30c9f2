//! A step's outputs, small and random: what a loss is checked on.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{json, Map, Value as Json};

use super::case::{cases, fixed, tracked, Bound, Case};
use super::gradient::tensors;
use crate::comm::Shards;
use crate::contract::{
    At, BatchImage, CropBox, Features, Grid, ImageContext, Loss, LossContext, ModelOutputs, NamedTeacher, Needs,
    Outputs, StepContext, Targets, View,
};
use crate::params::{Layout, ParamBuilder, Params};
use crate::registry::{self, Chosen};
use crate::rng::{Rng, Stream};
use crate::step::GLOBALS;
use crate::{Error, Result, Tensor};

/// Random steps for a registered loss, small enough to read: two to six patches, few images, a few channels. Options
/// of the loss that are a choice or true or false are drawn, and those whose schema says `x-width` are small; the others
/// have their defaults, unless `options` says something else. Parameters of the loss are inputs like features:
/// `params.<name>` the student's, `teacher_params.<name>` the teacher's.
///
/// # Errors
/// If there is no loss of that name.
pub fn loss_cases(name: &str, options: BoxedStrategy<Json>) -> Result<BoxedStrategy<Case>> {
    let schema = schema_of(name)?;
    let sizes = (0usize..3, 0usize..3, 1usize..3, 1usize..4, 2usize..6);
    let masked = proptest::collection::vec(any::<bool>(), 16);
    let drawn = (drawn_config(&schema), options, sizes, masked);
    let owned = name.to_string();
    let step = drawn.prop_map(move |(mut config, options, (more, locals, height, width, dim), masked)| {
        if let (Some(config), Some(options)) = (config.as_object_mut(), options.as_object()) {
            config.extend(options.clone());
        }
        let mut step = json!({
            "config": config, "images": 1, "locals": locals, "height": height, "width": width, "dim": dim,
        });
        let needs = build(&owned, &Case::new(step.clone())).map(|built| built.loss.needs()).unwrap_or_default();
        let images = needs.min_batch.max(1) + more;
        step["images"] = images.into();
        // At least one is masked and one is not.
        let last = GLOBALS * images * height * width - 1;
        let masked: Vec<usize> = (0..last).filter(|i| *i == 0 || masked[i % masked.len()]).collect();
        step["masked"] = masked.into();
        step
    });
    let name = name.to_string();
    let slots = move |case: &Case| {
        // A config that is refused is reported when the case is held; it needs no inputs.
        let Ok(built) = build(&name, case) else { return Vec::new() };
        let Needs { targets, teachers, layers, pixels, tokens, .. } = built.loss.needs();
        let size = Sizes::of(case);
        let (cls, patches) = ([GLOBALS * size.images, size.dim], [GLOBALS * size.images, size.patches, size.dim]);
        let mut slots = vec![
            tracked("student_cls", &cls),
            tracked("student_patches", &patches),
            fixed("teacher_cls", &cls),
            fixed("teacher_patches", &patches),
        ];
        slots.extend((size.locals > 0).then(|| tracked("student_local_cls", &[size.locals * size.images, size.dim])));
        for name in teachers {
            slots.extend([fixed(format!("{name}_cls"), &cls), fixed(format!("{name}_patches"), &patches)]);
        }
        let all = [GLOBALS * size.images, 1 + REGISTERS + size.patches, size.dim];
        for i in 0..layers.len() {
            slots.extend([tracked(format!("student_layer_{i}"), &all), fixed(format!("teacher_layer_{i}"), &all)]);
        }
        let (height, width) = (PATCH * case.size("height"), PATCH * case.size("width"));
        slots.extend(pixels.then(|| fixed("pixels", &[GLOBALS * size.images, 3, height, width])));
        if tokens {
            slots.push(tracked("student_registers", &[GLOBALS * size.images, REGISTERS, size.dim]));
            slots.push(tracked("student_prenorm", &all));
            let local = [size.locals * size.images, LOCAL_PATCHES, size.dim];
            slots.extend((size.locals > 0).then(|| tracked("student_local_patches", &local)));
        }
        let shapes = |view: &View| {
            let (rows, patches) = (view.crops * size.images, (view.size() / PATCH).pow(2));
            (vec![rows, size.dim], vec![rows, patches, size.dim])
        };
        for (i, (cls, patches)) in built.views(View::for_student).iter().map(shapes).enumerate() {
            slots.extend([tracked(format!("view_{i}_cls"), &cls), tracked(format!("view_{i}_patches"), &patches)]);
        }
        for (i, (cls, patches)) in built.views(View::for_teacher).iter().map(shapes).enumerate() {
            let name = format!("teacher_view_{i}");
            slots.extend([fixed(format!("{name}_cls"), &cls), fixed(format!("{name}_patches"), &patches)]);
        }
        for spec in built.layout.specs() {
            slots.push(tracked(format!("{PARAMS}{}", spec.name), &spec.shape).small());
            slots.extend(targets.map(|_| fixed(format!("{TEACHER_PARAMS}{}", spec.name), &spec.shape).small()));
        }
        slots
    };
    Ok(cases(step, slots).random())
}

/// The loss of a case, without a gradient.
///
/// # Errors
/// If the loss refuses the case.
pub fn loss_value(name: &str, case: &Case) -> Result<f64> {
    let built = build(name, case)?;
    let bound = Bound { case, tensors: tensors(case, None) };
    Ok(built.value(&bound)?.item())
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
    grid: Grid,
}

impl Sizes {
    fn of(case: &Case) -> Self {
        let grid = Grid { height: case.size("height"), width: case.size("width") };
        Self {
            images: case.size("images"),
            locals: case.size("locals"),
            dim: case.size("dim"),
            patches: grid.patches(),
            grid,
        }
    }
}

/// Side of a patch of a case's pixels.
const PATCH: usize = 2;
/// Register tokens of a crop, and patches of a local one.
const REGISTERS: usize = 2;
const LOCAL_PATCHES: usize = 1;
/// Side in pixels of the global crops that views are cut from: a whole number of thirds of patches, so that all grids fit.
const VIEWED: usize = 12 * PATCH;

/// Before the name of a parameter of the student's, and of the teacher's, among the inputs of a case.
pub(super) const PARAMS: &str = "params.";
const TEACHER_PARAMS: &str = "teacher_params.";

/// A loss with the parameters that it declares.
pub(super) struct Built {
    pub(super) loss: Box<dyn Loss>,
    pub(super) layout: Arc<Layout>,
}

impl Built {
    /// The loss of a case.
    pub(super) fn value(&self, bound: &Bound<'_>) -> Result<Tensor> {
        with_outputs(bound, self, |params, out, context| {
            let loss = self.loss.compute(params, out, context)?.loss;
            match loss.rank() {
                0 => Ok(loss),
                _ => Err(Error::shape("loss", format!("the loss has shape {:?}: expected a scalar", loss.shape()))),
            }
        })
    }

    /// Those of the loss's views of a case that a model sees.
    fn views(&self, sees: fn(&View) -> bool) -> Vec<View> {
        self.loss.views(VIEWED).unwrap_or_default().into_iter().filter(sees).collect()
    }

    /// What the loss draws for the images of a case: `[B, numbers]`, f64. Crops were cut anywhere in images of 100 x 100
    /// pixels.
    fn image_draws(&self, sizes: &Sizes) -> Result<Option<Tensor>> {
        let of_image = |place: usize| {
            let mut rng = Rng::new(0, Stream::Loss, 4, place as u64);
            let cut = |rng: &mut Rng| {
                let (width, height) = (rng.uniform(20.0, 100.0), rng.uniform(20.0, 100.0));
                let (x, y) = (rng.uniform(0.0, 100.0 - width), rng.uniform(0.0, 100.0 - height));
                CropBox { x, y, width, height, flip: rng.chance(0.5) }
            };
            let globals = (0..GLOBALS).map(|_| cut(&mut rng)).collect();
            let locals = (0..sizes.locals).map(|_| cut(&mut rng)).collect();
            let image = BatchImage { index: place, place, globals, locals };
            self.loss
                .draw_image(&mut ImageContext { image: &image, global_size: VIEWED, grid: sizes.grid, rng: &mut rng })
                .numbers
        };
        let drawn: Vec<f64> = (0..sizes.images).flat_map(of_image).collect();
        let shape = [sizes.images, drawn.len() / sizes.images];
        (!drawn.is_empty()).then(|| Tensor::from_slice(&drawn, &shape)).transpose()
    }

    /// The parameters of a case, by the loss's own names.
    pub(super) fn params(&self, bound: &Bound<'_>, prefix: &str) -> Vec<(String, Tensor)> {
        let of = |name: &str| bound.tensor(&format!("{prefix}{name}")).clone();
        self.layout.specs().iter().map(|spec| (spec.name.clone(), of(&spec.name))).collect()
    }
}

/// The loss that a case is about.
pub(super) fn build(name: &str, case: &Case) -> Result<Built> {
    let mut table = Map::from_iter([("plugin".to_string(), Json::from(name))]);
    table.extend(case.options["config"].as_object().cloned().unwrap_or_default());
    let table = figment::value::Value::serialize(table).expect("a table is plain data");
    let refused = |e: crate::problem::Nested| {
        Error::user(format!("loss `{name}` refuses {}: {}", case.options["config"], e.encode()), "mend its defaults")
    };
    let chosen = Chosen::<dyn Loss>::from_value(&table, None).map_err(refused)?;
    let Sizes { images, locals, dim, patches, .. } = Sizes::of(case);
    let mut params = ParamBuilder::new();
    let loss = chosen.build(&mut LossContext {
        params: &mut params,
        dim,
        images,
        globals: GLOBALS,
        locals,
        patches,
        patch_size: PATCH,
        channels: 3,
    })?;
    params.check()?;
    Ok(Built { loss, layout: params.finish() })
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
    if field.get("x-width").is_some() {
        return Some((2usize..5).prop_map(Json::from).boxed());
    }
    match field.get("type").and_then(Json::as_str) {
        Some("object") if field.get("properties").is_some() => Some(drawn_config(field)),
        Some("boolean") => Some(any::<bool>().prop_map(Json::from).boxed()),
        Some("number") if required => Some((100..2000u32).prop_map(|k| json!(f64::from(k) / 1000.0)).boxed()),
        Some("integer") if required => Some((1..4u32).prop_map(Json::from).boxed()),
        _ if required && field.get("x-schedule").is_some() => Some(Just(json!(0.5)).boxed()),
        _ => None,
    }
}

/// Lets `f` see the step of a case, with the student's parameters.
pub(super) fn with_outputs<R>(
    bound: &Bound<'_>,
    built: &Built,
    f: impl FnOnce(&Params<'_>, &Outputs<'_>, &StepContext<'_>) -> Result<R>,
) -> Result<R> {
    let (case, loss) = (bound.case(), built.loss.as_ref());
    let sizes = Sizes::of(case);
    let Sizes { images, locals, patches, .. } = sizes;
    let cls = bound.tensor("student_cls");
    let dtype = cls.dtype().wide();
    let params = |prefix: &str| {
        let tensors = built.params(bound, prefix).into_iter().map(|(_, tensor)| tensor).collect();
        Params::given(&built.layout, cls, tensors)
    };
    let state: Vec<_> = loss.state().iter().map(|s| (s.name, Tensor::zeros(&s.shape, dtype))).collect();
    let at = At { step: 3, total: 10 };
    let context = StepContext { at, seed: 0, shards: &Shards::one(), dtype, state: &state };
    let masked = case.indices("masked");
    let mask_indices = &case.rows("masked");
    let needs = loss.needs();
    let layers = |model: &str| -> Vec<Tensor> {
        (0..needs.layers.len()).map(|i| bound.tensor(&format!("{model}_layer_{i}")).clone()).collect()
    };
    let teacher = ModelOutputs {
        cls: bound.tensor("teacher_cls"),
        patches: bound.tensor("teacher_patches"),
        local_cls: None,
        local_patches: None,
        registers: None,
        prenorm: None,
        layers: &layers("teacher"),
        mask_indices,
    };
    let targets = needs.targets.map(|_| {
        let Targets { rows, .. } = loss.targets(&loss.project(&params(TEACHER_PARAMS), &teacher)?, &context)?;
        Ok::<_, Error>(rows)
    });
    let targets = targets.transpose()?;
    let all = GLOBALS * images * patches;
    let unmasked: Vec<u32> = (0..all).filter(|i| !masked.contains(i)).map(|i| i as u32).collect();
    let of_crop = |crop: usize| masked.iter().filter(|&&i| i / patches == crop).count();
    let weights: Vec<f64> = masked.iter().map(|i| 1.0 / of_crop(i / patches) as f64).collect();
    let named = |name: &String| {
        let of = |what: &str| bound.tensor(&format!("{name}_{what}")).clone();
        (name.clone(), NamedTeacher { cls: of("cls"), patches: of("patches") })
    };
    let teachers: Vec<(String, NamedTeacher)> = needs.teachers.iter().map(named).collect();
    let drawn = loss.draw(&mut Rng::new(0, Stream::Loss, at.step, 0));
    let drawn = (!drawn.is_empty()).then(|| Tensor::from_slice(&drawn, &[drawn.len()])).transpose()?;
    let image_draws = built.image_draws(&sizes)?;
    let view = |name: String, view: View| {
        let (cls, patches) = (bound.tensor(&format!("{name}_cls")), bound.tensor(&format!("{name}_patches")));
        let side = view.size() / PATCH;
        let none = Tensor::zeros(&[cls.dim(0), 0, cls.dim(1)], cls.dtype());
        Features {
            cls: cls.clone(),
            registers: none.clone(),
            patches: patches.clone(),
            prenorm: none,
            layers: Vec::new(),
            grid: Grid { height: side, width: side },
        }
    };
    let views = |prefix: &str, sees: fn(&View) -> bool| -> Vec<Features> {
        let seen = built.views(sees).into_iter().enumerate();
        seen.map(|(i, of_loss)| view(format!("{prefix}view_{i}"), of_loss)).collect()
    };
    // One image, if there are several, has no label.
    let label = |classes: usize| (0..images).map(|i| (i * 7 % (classes + 1)) as u32).collect::<Vec<_>>();
    let labels = needs.classes.map(|n| Tensor::from_slice(&label(n), &[images])).transpose()?;
    let outputs = Outputs {
        images,
        globals: GLOBALS,
        locals,
        grid: sizes.grid,
        student: ModelOutputs {
            cls,
            patches: bound.tensor("student_patches"),
            local_cls: bound.get("student_local_cls"),
            local_patches: bound.get("student_local_patches"),
            registers: bound.get("student_registers"),
            prenorm: bound.get("student_prenorm"),
            layers: &layers("student"),
            mask_indices,
        },
        teacher,
        targets: targets.as_ref(),
        unmasked_indices: &Tensor::from_slice(&unmasked, &[unmasked.len()])?,
        mask_weights: &Tensor::from_f64(&weights, &[weights.len()], dtype)?,
        mask_share: weights.len() as f64,
        teachers: &teachers,
        pixels: bound.get("pixels"),
        labels: labels.as_ref(),
        draws: drawn.as_ref(),
        image_draws: image_draws.as_ref(),
        views: &views("", View::for_student),
        teacher_views: &views("teacher_", View::for_teacher),
        fields: &[],
    };
    f(&params(PARAMS), &outputs, &context)
}
