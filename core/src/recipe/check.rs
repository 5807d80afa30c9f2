//! Combinations that make no sense, found before anything is allocated or read.

use super::problem::Problem;
use super::Recipe;
use crate::contract::{At, Backbone, Dataset, Schedule, TeacherPolicy};
use crate::registry::{BackboneContext, Chosen};
use crate::step::{loss_context, CHANNELS};
use crate::{params::ParamBuilder, Error};

/// Everything that is wrong with, or odd about, a recipe whose types are right.
pub(super) fn check(recipe: &Recipe) -> Vec<Problem> {
    let mut problems = Vec::new();
    numbers(recipe, &mut problems);
    schedules(recipe, &mut problems);
    let (teacher, gram) = teachers(recipe, &mut problems);
    let distils = teacher.is_some_and(|t| t.distils().is_some());
    let mut params = ParamBuilder::new();
    let mut context =
        BackboneContext { params: &mut params, global_size: recipe.crops.global_size, channels: CHANNELS };
    // A patch has at least one pixel, and a micro-batch one image, or there is nothing to build for.
    if recipe.batch.micro_batches > 0 {
        match recipe.backbone.build(&mut context) {
            Ok(backbone) => {
                let fits = crops(recipe, backbone.as_ref(), gram.as_deref(), &mut problems);
                if fits {
                    losses(recipe, backbone.as_ref(), distils, &mut problems);
                }
            }
            Err(error) => problems.push(refused("backbone", error)),
        }
    }
    for (name, entry) in recipe.probes.0.iter().filter(|(_, e)| e.enabled) {
        problems.extend(entry.probe.build(&mut ()).err().map(|e| refused(format!("probes.{name}"), e)));
    }
    problems
}

/// What the recipe asks of its data and this dataset does not have.
pub(super) fn check_data(recipe: &Recipe, data: &dyn Dataset) -> Vec<Problem> {
    let enabled = recipe.probes.0.iter().filter(|(_, e)| e.enabled);
    let needs = enabled.filter_map(|(name, e)| Some((name, e.probe.build(&mut ()).ok()?.needs())));
    let dataset = recipe.data.name();
    needs
        .flat_map(|(name, (labels, masks))| {
            let lacks = |what: &str| {
                let message = format!("needs {what}, and the dataset `{dataset}` gives none");
                let help = format!("set probes.{name}.enabled = false, or choose data with {what}");
                Problem::error(format!("probes.{name}"), message).help(help)
            };
            let labels = (labels && data.classes() == 0).then(|| lacks("image labels"));
            let masks = (masks && data.mask_classes() == 0).then(|| lacks("pixel masks"));
            labels.into_iter().chain(masks)
        })
        .collect()
}

/// A plugin's own refusal, as a problem of its table.
fn refused(key: impl Into<String>, error: Error) -> Problem {
    match error {
        Error::User { problem, help } => Problem::error(key, problem).help(help),
        other => Problem::error(key, other.to_string()),
    }
}

fn numbers(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let mut require = |holds: bool, key: &str, message: String| {
        if !holds {
            problems.push(Problem::error(key, message));
        }
    };
    let positive = [
        ("steps", recipe.steps),
        ("batch.size", recipe.batch.size as u64),
        ("batch.micro_batches", recipe.batch.micro_batches as u64),
        ("log.every", recipe.log.every),
        ("checkpoint.keep", recipe.checkpoint.keep as u64),
    ];
    for (key, value) in positive {
        require(value > 0, key, "has to be at least 1".into());
    }
    let name = &recipe.name;
    let is_file_name = !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.');
    require(is_file_name, "name", format!("`{name}` cannot be the name of a folder"));
    let shares = [
        ("batch.max_broken_share", recipe.batch.max_broken_share),
        ("masking.probability", recipe.masking.probability),
    ];
    for (key, share) in shares {
        require((0.0..=1.0).contains(&share), key, format!("a share is between 0 and 1, not {share}"));
    }
    let ranges = [
        ("crops.global_scale", recipe.crops.global_scale, f64::MIN_POSITIVE),
        ("crops.local_scale", recipe.crops.local_scale, f64::MIN_POSITIVE),
        ("masking.ratio", recipe.masking.ratio, 0.0),
    ];
    for (key, [least, most], lowest) in ranges {
        let ordered = lowest <= least && least <= most && most <= 1.0;
        let from = if lowest > 0.0 { "0 <" } else { "0 <=" };
        require(ordered, key, format!("has to be [least, most] with {from} least <= most <= 1, not [{least}, {most}]"));
    }
    require(recipe.crops.std.iter().all(|s| *s > 0.0), "crops.std", "has to be positive in every channel".into());
    let twice = recipe.init_from.is_some() && recipe.backbone.weights.is_some();
    require(!twice, "init_from", "the backbone starts from backbone.weights already: remove one of the two".into());
    let o = &recipe.optimizer;
    require(o.betas.iter().all(|b| (0.0..1.0).contains(b)), "optimizer.betas", "have to be in [0, 1)".into());
    require(o.eps > 0.0, "optimizer.eps", "has to be positive".into());
    require(o.clip_grad >= 0.0, "optimizer.clip_grad", "cannot be negative; 0 means no clipping".into());
    let decay = o.layerwise_decay;
    require(decay > 0.0 && decay <= 1.0, "optimizer.layerwise_decay", "has to be in (0, 1]; 1 means no decay".into());
    require(o.patch_embed_lr_mult >= 0.0, "optimizer.patch_embed_lr_mult", "cannot be negative".into());

    let (size, parts) = (recipe.batch.size, recipe.batch.micro_batches);
    if parts > 0 && size % parts != 0 {
        let divisors: Vec<String> = (1..=size).filter(|d| size.is_multiple_of(*d)).map(|d| d.to_string()).collect();
        let message = format!("{size} images cannot be split into {parts} equal parts");
        problems
            .push(Problem::error("batch.micro_batches", message).help(format!("use one of {}", divisors.join(", "))));
    }
}

/// Rates and weights have to be numbers at every step; a few are looked at.
fn schedules(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let total = recipe.steps;
    let mut look = |key: String, schedule: &Schedule, negative_allowed: bool| {
        let wrong = |x: f64| !x.is_finite() || (x < 0.0 && !negative_allowed);
        let steps = [0, total / 4, total / 2, total * 3 / 4, total.saturating_sub(1)];
        if let Some(step) = steps.into_iter().find(|&step| wrong(schedule.at(At { step, total }))) {
            let value = schedule.at(At { step, total });
            problems.push(Problem::error(key, format!("is {value} at step {step}")));
        }
    };
    look("optimizer.lr".into(), &recipe.optimizer.lr, false);
    look("optimizer.weight_decay".into(), &recipe.optimizer.weight_decay, false);
    for (name, entry) in recipe.losses.0.iter().filter(|(_, e)| e.enabled) {
        look(format!("losses.{name}.weight"), &entry.weight, true);
    }
}

/// A teacher's policy, if it could be built.
type Policy = Option<Box<dyn TeacherPolicy>>;

/// Builds both teacher policies: the teacher's, and the Gram teacher's.
fn teachers(recipe: &Recipe, problems: &mut Vec<Problem>) -> (Policy, Policy) {
    let mut build = |key: &str, chosen: &Chosen<dyn TeacherPolicy>| {
        chosen.build(&mut ()).map_err(|e| problems.push(refused(key, e))).ok()
    };
    let teacher = build("teacher", &recipe.teacher);
    let gram = recipe.gram_teacher.as_ref().and_then(|chosen| build("gram_teacher", chosen));
    if gram.as_ref().is_some_and(|g| g.distils().is_some()) {
        let help = "for fixed weights use `plugin = \"gram_anchor\"` with `source = { checkpoint = \"..\" }`";
        let message = "this policy distils from another model, which a Gram teacher cannot";
        problems.push(Problem::error("gram_teacher", message).help(help));
    }
    (teacher, gram)
}

/// Whether all crops are whole numbers of patches.
fn crops(
    recipe: &Recipe,
    backbone: &dyn Backbone,
    gram: Option<&dyn TeacherPolicy>,
    problems: &mut Vec<Problem>,
) -> bool {
    let patch = backbone.patch_size();
    let crops = &recipe.crops;
    let mut sides = vec![("crops.global_size", crops.global_size)];
    if crops.local_count > 0 {
        sides.push(("crops.local_size", crops.local_size));
    }
    if let Some(side) = gram.and_then(|g| g.crop_size()) {
        sides.push(("gram_teacher.crop_size", side));
    }
    for sizes in &crops.resolutions {
        let all = [Some(sizes.global_size), (crops.local_count > 0).then_some(sizes.local_size), sizes.gram_size];
        sides.extend(all.into_iter().flatten().map(|side| ("crops.resolutions", side)));
    }
    let before = problems.len();
    if crops.resolutions.iter().any(|r| r.share.is_nan() || r.share <= 0.0) {
        let problem = Problem::error("crops.resolutions", "every share must be positive");
        problems.push(problem.help("remove sizes that are never drawn"));
    }
    for (key, side) in sides {
        let (below, above) = (side / patch * patch, side.div_ceil(patch) * patch);
        let least = backbone.smallest_crop().next_multiple_of(patch);
        if side < patch {
            let message = format!("a crop of {side} pixels is smaller than a patch of {patch}");
            problems.push(Problem::error(key, message).help(format!("use at least {least}")));
        } else if side < least {
            let name = recipe.backbone.name();
            let message = format!("a crop of {side} pixels is too small for the backbone `{name}`");
            problems.push(Problem::error(key, message).help(format!("use at least {least}")));
        } else if side != below {
            let message = format!("{side} pixels are not a whole number of patches of {patch}");
            problems.push(Problem::error(key, message).help(format!("use {below} or {above}")));
        }
    }
    problems.len() == before
}

fn losses(recipe: &Recipe, backbone: &dyn Backbone, distils: bool, problems: &mut Vec<Problem>) {
    let context = loss_context(recipe, backbone);
    let mut gram_is_used = false;
    let mut enabled = 0;
    for (name, entry) in &recipe.losses.0 {
        if !entry.enabled {
            // A recipe may keep a Gram teacher ready for a loss that an arm of a suite turns on.
            gram_is_used |= entry.loss.build(&mut context.clone()).is_ok_and(|loss| loss.needs().gram_teacher);
            continue;
        }
        enabled += 1;
        let key = format!("losses.{name}");
        let off = format!("set {key}.enabled = false");
        let needs = match entry.loss.build(&mut context.clone()) {
            Ok(loss) => loss.needs(),
            Err(error) => {
                problems.push(refused(key, error));
                continue;
            }
        };
        gram_is_used |= needs.gram_teacher;
        if needs.gram_teacher && recipe.gram_teacher.is_none() {
            let message = "this loss compares with a Gram teacher, and the recipe has none";
            let help = format!("add a table [gram_teacher] with `plugin = \"gram_anchor\"`, or {off}");
            problems.push(Problem::error(&key, message).help(help));
        }
        if needs.min_batch > context.images {
            let (least, images) = (needs.min_batch, context.images);
            let message = format!("needs at least {least} images of a micro-batch; there is {images}");
            let help = format!("raise batch.size, lower batch.micro_batches, or {off}");
            problems.push(Problem::error(&key, message).help(help));
        }
        let none_masked = if recipe.masking.probability == 0.0 { Some("masking.probability") } else { None };
        let none_masked = none_masked.or((recipe.masking.ratio[1] == 0.0).then_some("masking.ratio"));
        if let (true, Some(key)) = (needs.masks, none_masked) {
            let message = format!("no patch is ever masked, but the loss `{name}` is computed on masked patches");
            problems.push(Problem::error(key, message).help(format!("raise it, or {off}")));
        }
        // With a teacher of its own to learn from, patches in plain sight teach something.
        if needs.masks && !backbone.hides_masked_patches() && !distils {
            let message = format!(
                "the backbone `{}` has no mask token, so it sees the patches that this loss \
                hides from others: student and teacher get the same image",
                recipe.backbone.name()
            );
            problems.push(Problem::warning(&key, message).help(off.clone()));
        }
        if let Some((_, head)) = &needs.head {
            if head.hidden == 0 || head.bottleneck == 0 || head.prototypes < 2 || head.layers == 0 {
                let message = "a head needs at least 1 layer, 1 hidden and bottleneck unit and 2 prototypes";
                problems.push(Problem::error(&key, message));
            }
        }
    }
    if enabled == 0 {
        let names: Vec<_> = recipe.losses.0.keys().map(|n| format!("losses.{n}.enabled = true")).collect();
        let help = if names.is_empty() { "add a table, for example [losses.dino]".into() } else { names.join(" or ") };
        problems.push(Problem::error("losses", "no loss is enabled, so nothing would be learned").help(help));
    }
    if recipe.gram_teacher.is_some() && !gram_is_used {
        let message = "no loss uses a Gram teacher, so this table does nothing";
        problems.push(Problem::warning("gram_teacher", message).help("add a loss that does, or remove the table"));
    }
}
