//! Combinations that make no sense, found before anything is allocated or read.

use std::collections::BTreeSet;

use super::sizes;
use crate::contract::{At, Backbone, CropContext, Grid, ImageSize, Loss, Masking, Probe, Schedule, TeacherPolicy};
use crate::problem::{Problem, Severity};
use crate::recipe::{MomentStorage, Precision, ProbeEntry, Recipe};
use crate::registry::Chosen;
use crate::step::{build_backbone, build_loss, check_views, declare, from_the_start, Declared, Groups, Share, GLOBALS};
use crate::{params::ParamBuilder, Error, Result};

/// Everything that is wrong with, or odd about, a recipe whose types and ranges are right.
pub(super) fn check(recipe: &Recipe) -> Vec<Problem> {
    let mut problems = Vec::new();
    names(recipe, &mut problems);
    together(recipe, &mut problems);
    let (teacher, named) = teachers(recipe, &mut problems);
    let probes = probes(recipe);
    let masking = recipe.masking.build(&mut ()).map_err(|e| problems.push(refused("masking", e))).ok();
    match build_backbone(recipe, &mut ParamBuilder::new()) {
        Ok(backbone) => {
            let fits = crops(recipe, backbone.as_ref(), &named, &mut problems);
            problems.extend(probe_sizes(recipe, &probes, backbone.as_ref()));
            if fits {
                losses(recipe, backbone.as_ref(), masking.as_deref(), teacher.as_deref(), &mut problems);
            }
        }
        Err(error) => problems.push(refused("backbone", error)),
    }
    problems.extend(recipe.optimizer.plugin.build(&mut ()).err().map(|e| refused("optimizer", e)));
    if problems.iter().all(|p| p.severity == Severity::Warning) {
        views(recipe, &mut problems);
    }
    for (name, _, probe) in probes {
        let key = format!("probes.{name}");
        problems.extend(match probe {
            Ok(probe) => {
                let unfit = probe.unfit_channels(recipe.crops.channels());
                unfit.map(|(message, help)| Problem::error(key, message).help(help))
            }
            Err(error) => Some(refused(key, error)),
        });
    }
    if problems.iter().all(|p| p.severity == Severity::Warning) {
        problems.extend(sizes::overflow(recipe));
    }
    problems
}

/// The probes that are on: name, table and what was built of it.
pub(super) type Probes<'a> = Vec<(&'a str, &'a ProbeEntry, Result<Box<dyn Probe>>)>;

pub(super) fn probes(recipe: &Recipe) -> Probes<'_> {
    let on = recipe.probes.0.iter().filter(|(_, entry)| entry.enabled);
    on.map(|(name, entry)| (name.as_str(), entry, entry.probe.build(&mut ()))).collect()
}

/// Sizes of probes that the model cannot be shown, or that stand there twice.
fn probe_sizes(recipe: &Recipe, probes: &Probes<'_>, backbone: &dyn Backbone) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, entry, probe) in probes {
        let mut problem = |message: String, help: String| {
            problems.push(Problem::error(format!("probes.{name}.sizes"), message).help(help));
        };
        for (i, size) in entry.sizes.iter().enumerate() {
            if let Some((message, near)) = size.unfit(backbone.patch_size(), backbone.smallest_crop()) {
                problem(message, format!("use {near}"));
            } else if entry.sizes[..i].contains(size) {
                problem(format!("{size} stands there twice"), "list it once".into());
            }
        }
        let Ok(probe) = probe else { continue };
        let usual = [ImageSize::square(recipe.crops.global_size)];
        let sizes = if entry.sizes.is_empty() { &usual[..] } else { &entry.sizes };
        let unfit = |size: &ImageSize| probe.unfit_window(*size, backbone.patch_size(), backbone.smallest_crop());
        problems.extend(sizes.iter().find_map(unfit).map(|(message, near)| {
            Problem::error(format!("probes.{name}.window"), message).help(format!("use {near}"))
        }));
        let patches = |size: &ImageSize| size.pixels() / backbone.patch_size().pow(2).max(1);
        let unfit = sizes.iter().find_map(|size| probe.unfit_patches(patches(size)));
        problems.extend(unfit.map(|(message, help)| Problem::error(format!("probes.{name}"), message).help(help)));
    }
    problems
}

/// A plugin's own refusal, as a problem of its table.
fn refused(key: impl Into<String>, error: Error) -> Problem {
    match error {
        Error::User { problem, help } => Problem::error(key, problem).help(help),
        other => Problem::error(key, other.to_string()),
    }
}

/// Bytes of the longest name that a file may have.
const LONGEST_NAME: usize = 255;

/// Names become those of folders and files, of modules and of curves.
fn names(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let mut look = |key: String, name: &str, what: &str| {
        let wrong = if name.is_empty() {
            Some("is empty".to_string())
        } else if name.len() > LONGEST_NAME {
            Some(format!("has {} bytes, more than the {LONGEST_NAME} that a file's name may have", name.len()))
        } else if name.contains(char::is_control) {
            Some(format!("{name:?} has a character that cannot be seen"))
        } else if name.contains(['/', '\\']) || name.starts_with('.') {
            Some(format!("`{name}` cannot be the name of a folder"))
        } else {
            None
        };
        let help = format!("letters, digits, `-` and `_` are safe in the name of a {what}");
        problems.extend(wrong.map(|message| Problem::error(key, message).help(help)));
    };
    look("name".into(), &recipe.name, "run");
    recipe.losses.0.keys().for_each(|name| look(format!("losses.{name}"), name, "loss"));
    recipe.probes.0.keys().for_each(|name| look(format!("probes.{name}"), name, "probe"));
    recipe.augmentations.0.keys().for_each(|name| look(format!("augmentations.{name}"), name, "augmentation"));
    recipe.teachers.0.keys().for_each(|name| look(format!("teachers.{name}"), name, "teacher"));
}

/// Numbers that are each in range but do not go together.
fn together(recipe: &Recipe, problems: &mut Vec<Problem>) {
    if recipe.init_from.is_some() && recipe.backbone.weights.is_some() {
        let message = "the backbone starts from backbone.weights already: remove one of the two";
        problems.push(Problem::error("init_from", message));
    }
    if recipe.init_role.is_some() && recipe.init_from.is_none() {
        let message = "says which weights of init_from are taken, and there is no init_from";
        problems.push(Problem::error("init_role", message).help("name a run with init_from, or remove this key"));
    }
    let starts = [("init_from", recipe.init_from.is_some()), ("backbone.weights", recipe.backbone.weights.is_some())];
    for (key, _) in starts.into_iter().filter(|(_, given)| *given && recipe.continue_from.is_some()) {
        let message = "is not read: the run goes on from `continue_from`";
        problems.push(Problem::warning(key, message).help("remove one of the two"));
    }
    if let Some(problem) = recipe.wrong_precision() {
        problems.push(Problem::error("precision", problem).help("set precision = \"auto\", or choose another device"));
    }
    if recipe.optimizer.moments == Some(MomentStorage::EightBit) && recipe.precision == Precision::F64 {
        let message = "moments in eight bits go with weights in f32";
        let help = "set optimizer.moments = \"f32\", or another precision";
        problems.push(Problem::error("optimizer.moments", message).help(help));
    }
    let (size, parts) = (recipe.batch.size, recipe.batch.micro_batches);
    if recipe.optimizer.is_fused() && parts > 1 {
        let message = format!(
            "an update that goes with the backward pass is of one micro-batch, and batch.micro_batches = {parts}"
        );
        let help = "set batch.micro_batches = 1, or optimizer.update = \"whole\"";
        problems.push(Problem::error("optimizer.update", message).help(help));
    }
    if recipe.optimizer.is_fused() && recipe.log.histograms_every > 0 {
        let message = "histograms are of gradients, which optimizer.update = \"fused\" does not keep";
        problems
            .push(Problem::error("log.histograms_every", message).help("set it to 0, or optimizer.update = \"whole\""));
    }
    if size % parts != 0 {
        let near: Vec<String> = near_divisors(size, parts).iter().map(ToString::to_string).collect();
        let message = format!("{size} images cannot be split into {parts} equal parts");
        problems.push(Problem::error("batch.micro_batches", message).help(format!("use {}", near.join(" or "))));
    }
    let shards = recipe.batch.shards;
    if !shards.is_power_of_two() || parts % shards != 0 {
        let fit: Vec<String> =
            (0..17).map(|i| 1 << i).filter(|n| parts % n == 0).map(|n: usize| n.to_string()).collect();
        let message = format!("{shards} is no power of two that divides {parts} micro-batches");
        let help = format!("use {}, or another batch.micro_batches", fit.join(", "));
        problems.push(Problem::error("batch.shards", message).help(help));
    }
    if recipe.steps.checked_mul(size as u64).is_none() {
        let message = format!("{} steps of {size} images are more images than can be counted", recipe.steps);
        problems.push(Problem::error("steps", message).help("lower steps or batch.size"));
    }
    problems.extend(channels(recipe));
    problems.extend(decay_of_all(recipe));
    problems.extend(stop(recipe));
    if recipe.losses.0.contains_key("total") {
        let message = "is the name of the sum of all losses, which this loss would hide";
        problems.push(Problem::error("losses.total", message).help("give the loss another name"));
    }
    for (name, entry) in recipe.losses.0.iter().filter(|(_, e)| e.enabled) {
        let lowest = entry.weight.landmarks(recipe.steps).into_iter().find_map(|step| {
            let weight = entry.weight.at(At { step, total: recipe.steps });
            (weight < 0.0)
                .then(|| format!("is {weight} at step {step}: the student is driven away from what it teaches"))
        });
        let problem = lowest.map(|message| Problem::warning(format!("losses.{name}.weight"), message));
        problems.extend(problem.map(|p| p.help("this is right for a few ideas only; losses are minimised")));
    }
    if recipe.losses.0.contains_key("") {
        problems.push(Problem::error("losses", "a loss has an empty name").help("give it one"));
    }
    let is_idle = |schedule: &Schedule| {
        let at = |step| schedule.at(At { step, total: recipe.steps });
        schedule.landmarks(recipe.steps).into_iter().all(|step| at(step) == 0.0)
    };
    let mut weights = recipe.losses.0.values().filter(|entry| entry.enabled).map(|entry| &entry.weight).peekable();
    if recipe.steps > 0 && weights.peek().is_some() && weights.all(is_idle) {
        let message = "all losses have the weight 0 at every step, so nothing is learned";
        problems.push(Problem::warning("losses", message).help("set the weight of one"));
    }
}

/// Another number of channels in `crops.mean`, in `crops.std` and in the images.
fn channels(recipe: &Recipe) -> Option<Problem> {
    // A dataset whose images may have any number has a key for it.
    let stated = recipe.data.config().get("channels").and_then(serde_json::Value::as_u64).map(|n| n as usize);
    if let Some(problem) = stated.and_then(|there| channels_of(recipe, there)) {
        return Some(problem);
    }
    let (means, stds) = (recipe.crops.mean.len(), recipe.crops.std.len());
    let message = format!("has {stds} numbers, and crops.mean {means}: one for every channel");
    let help = format!("set crops.std to {means} numbers, or crops.mean to {stds}");
    (stds != means).then(|| Problem::error("crops.std", message).help(help))
}

/// `crops.mean` or `crops.std` of another length than images of `there` channels ask for.
pub(super) fn channels_of(recipe: &Recipe, there: usize) -> Option<Problem> {
    let (key, numbers) = [("crops.mean", recipe.crops.mean.len()), ("crops.std", recipe.crops.std.len())]
        .into_iter()
        .find(|(_, numbers)| *numbers != there)?;
    let message = format!("has {numbers} numbers, and the images have {there} channels");
    let help = match there {
        3 => "set it to 3 numbers, or leave it out for ImageNet's; or set data.channels".into(),
        n => format!("set crops.mean and crops.std to {n} numbers each, one for every channel, of pixels in [0, 1]"),
    };
    Some(Problem::error(key, message).help(help))
}

/// A rule that could never end the run.
fn stop(recipe: &Recipe) -> Option<Problem> {
    let metric = &recipe.stop.as_ref()?.metric;
    let name = metric.strip_prefix("probe/").and_then(|rest| rest.split_once('/')).map(|(name, _)| name);
    let on = || recipe.probes.0.iter().filter(|(_, e)| e.enabled).map(|(name, _)| name.as_str());
    let problem = |message: String| Problem::error("stop.metric", message);
    let Some(name) = name else {
        let example = on().next().unwrap_or("knn");
        return Some(problem(format!(
            "`{metric}` is no score of a probe: probe/<name>/<score>, as in probe/{example}/..."
        )));
    };
    if !on().any(|probe| probe == name) {
        let known = on().collect::<Vec<_>>().join(", ");
        let help = match known.is_empty() {
            true => "no probe is on: turn one on, or remove `stop`".to_string(),
            false => format!("the probes that are: {known}"),
        };
        return Some(problem(format!("there is no probe `{name}` that is on")).help(help));
    }
    let never = recipe.probes.0[name].every == 0;
    let message = format!("the probe `{name}` is run at the end only");
    never.then(|| problem(message).help(format!("set probes.{name}.every")))
}

/// A decay that takes away more than the whole weight in a step, so that weights grow with changing signs.
fn decay_of_all(recipe: &Recipe) -> Option<Problem> {
    let (lr, decay) = (&recipe.optimizer.lr, &recipe.optimizer.weight_decay);
    let fastest = recipe.optimizer.patch_embed_lr_mult.max(1.0);
    let total = recipe.steps;
    let steps = lr.landmarks(total).into_iter().chain(decay.landmarks(total));
    let (step, share) = steps
        .map(|step| (step, fastest * lr.at(At { step, total }) * decay.at(At { step, total })))
        .find(|(_, share)| *share > 1.0)?;
    let message =
        format!("times the learning rate is {share:.3} at step {step}: more than the whole weight is taken away");
    Some(Problem::error("optimizer.weight_decay", message).help("0.04 is usual; lower it, or optimizer.lr"))
}

/// The divisors of `n` next to `near`: one below and one above, where there are any.
fn near_divisors(n: usize, near: usize) -> Vec<usize> {
    let small = (1..).take_while(|d| d * d <= n).filter(|d| n.is_multiple_of(*d));
    let all: Vec<usize> = small.flat_map(|d| [d, n / d]).collect();
    let below = all.iter().copied().filter(|d| *d < near).max();
    let above = all.iter().copied().filter(|d| *d > near).min();
    below.into_iter().chain(above).collect()
}

/// A teacher's policy, if it could be built.
type Policy = Option<Box<dyn TeacherPolicy>>;

/// The policies of `[teachers]` by their keys.
type Named = Vec<(String, Box<dyn TeacherPolicy>)>;

/// Builds the policies of all teachers.
fn teachers(recipe: &Recipe, problems: &mut Vec<Problem>) -> (Policy, Named) {
    let mut build = |key: &str, chosen: &Chosen<dyn TeacherPolicy>| {
        chosen.build(&mut ()).map_err(|e| problems.push(refused(key, e))).ok()
    };
    let teacher = build("teacher", &recipe.teacher);
    let named = recipe.teachers.0.iter().map(|(name, entry)| (format!("teachers.{name}"), entry));
    let named: Named = named.filter_map(|(key, chosen)| Some((key.clone(), build(&key, chosen)?))).collect();
    for (key, policy) in &named {
        if policy.distils().is_some() {
            let message = "this policy distils from another model, which only [teacher] can";
            let help = "choose a policy that copies weights";
            problems.push(Problem::error(key, message).help(help));
        }
        if !policy.exists() {
            let message = "this policy means that there is no teacher";
            problems.push(Problem::error(key, message).help("remove the table, or name another plugin"));
        }
    }
    let sizes = named.iter().filter_map(|(key, policy)| Some((key, policy.crop_size()?)));
    let sizes: Vec<(&String, usize)> = sizes.collect();
    if let Some((first, other)) = sizes.first().zip(sizes.iter().find(|(_, size)| *size != sizes[0].1)) {
        let message =
            format!("crops of {} pixels, and {} has crops of {}: there is one size for all", other.1, first.0, first.1);
        let help = format!("set {}.crop_size = {}, or leave one out", other.0, first.1);
        problems.push(Problem::error(format!("{}.crop_size", other.0), message).help(help));
    }
    (teacher, named)
}

/// Whether all crops are whole numbers of patches.
fn crops(recipe: &Recipe, backbone: &dyn Backbone, named: &Named, problems: &mut Vec<Problem>) -> bool {
    let patch = backbone.patch_size();
    let crops = &recipe.crops;
    let mut sides = vec![("crops.global_size".to_string(), crops.global_size)];
    if crops.local_count > 0 {
        sides.push(("crops.local_size".into(), crops.local_size));
    }
    sides.extend(named.iter().filter_map(|(key, policy)| Some((format!("{key}.crop_size"), policy.crop_size()?))));
    for sizes in &crops.resolutions {
        let all = [Some(sizes.global_size), (crops.local_count > 0).then_some(sizes.local_size), sizes.teacher_size];
        sides.extend(all.into_iter().flatten().map(|side| ("crops.resolutions".to_string(), side)));
    }
    let before = problems.len();
    let key = if crops.resolutions.is_empty() { "crops" } else { "crops.resolutions" };
    let built = crops.variants(None).into_iter().map(|sizes| crops.build(&sizes, patch));
    problems.extend(built.filter_map(|built| Some(refused(key, built.err()?))));
    for (key, side) in sides {
        let (below, above) = (side / patch * patch, side.div_ceil(patch) * patch);
        let least = backbone.smallest_crop().next_multiple_of(patch);
        if side < patch {
            let message = format!("a crop of {side} pixels is smaller than a patch of {patch}");
            problems.push(Problem::error(key, message).help(format!("use at least {least}")));
        } else if side < least {
            let name = recipe.backbone.plugin.name();
            let message = format!("a crop of {side} pixels is too small for the backbone `{name}`");
            problems.push(Problem::error(key, message).help(format!("use at least {least}")));
        } else if side != below {
            let message = format!("{side} pixels are not a whole number of patches of {patch}");
            problems.push(Problem::error(key, message).help(format!("use {below} or {above}")));
        }
    }
    problems.len() == before
}

fn losses(
    recipe: &Recipe,
    backbone: &dyn Backbone,
    masking: Option<&dyn Masking>,
    teacher: Option<&dyn TeacherPolicy>,
    problems: &mut Vec<Problem>,
) {
    let taught = teacher.is_none_or(|t| t.exists());
    let distils = teacher.is_some_and(|t| t.distils().is_some());
    let images = recipe.batch.images();
    let build = |loss: &Chosen<dyn Loss>| build_loss(recipe, backbone, &mut ParamBuilder::new(), loss);
    let mut used = BTreeSet::new();
    let mut enabled = 0;
    for (name, entry) in &recipe.losses.0 {
        if !entry.enabled {
            // A recipe may keep a teacher ready for a loss that an arm of a suite turns on.
            used.extend(build(&entry.loss).map(|loss| loss.needs().teachers).unwrap_or_default());
            continue;
        }
        enabled += 1;
        let key = format!("losses.{name}");
        let off = format!("set {key}.enabled = false");
        let needs = match build(&entry.loss) {
            Ok(loss) => loss.needs(),
            Err(error) => {
                problems.push(refused(key, error));
                continue;
            }
        };
        for teacher in needs.teachers.iter().filter(|name| !recipe.teachers.0.contains_key(*name)) {
            let message =
                format!("this loss learns from the teacher `{teacher}`, and the recipe has none of that name");
            let there = recipe.teachers.0.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let has = if there.is_empty() { String::new() } else { format!(" (there is {there})") };
            let help = format!("add a table [teachers.{teacher}]{has}, or {off}");
            problems.push(Problem::error(&key, message).help(help));
        }
        used.extend(needs.teachers.iter().cloned());
        let deepest = needs.layers.iter().max().copied();
        if let Some(layer) = deepest.filter(|layer| !backbone.gives_layers() || *layer > backbone.depth()) {
            let name = recipe.backbone.plugin.name();
            let message = match backbone.gives_layers() {
                true => {
                    format!("reads tokens after {layer} blocks, and the backbone `{name}` has {}", backbone.depth())
                }
                false => format!("reads tokens of inner layers, and the backbone `{name}` gives none"),
            };
            problems
                .push(Problem::error(&key, message).help(format!("name an earlier layer, another backbone, or {off}")));
        }
        if needs.runs_teacher() && !taught {
            let message = "this loss learns from a teacher, and the recipe has none";
            let help = format!("add a table [teacher] with `plugin = \"ema\"`, or {off}");
            problems.push(Problem::error(&key, message).help(help));
        }
        // What it is of another model is known when that model is read.
        let features = needs.targets.filter(|targets| targets.features && !distils);
        if let Some(targets) = features.filter(|targets| targets.width != backbone.dim()) {
            let (width, dim) = (targets.width, backbone.dim());
            let message =
                format!("expects features of {width} numbers, and the teacher is the student's average: {dim}");
            let help =
                format!("remove {key}.teacher_dim, or set teacher.plugin = \"frozen\" to learn from another model");
            problems.push(Problem::error(&key, message).help(help));
        }
        if needs.min_batch > images {
            let least = needs.min_batch;
            let message = format!("needs at least {least} images of a micro-batch; there is {images}");
            // Two are what any comparison takes; more were asked for.
            let asks = if least > 2 { format!(", lower what {key} asks for") } else { String::new() };
            let help = format!("raise batch.size, lower batch.micro_batches{asks}, or {off}");
            problems.push(Problem::error(&key, message).help(help));
        }
        let parts = recipe.batch.micro_batches;
        if needs.whole_batch && parts > 1 {
            let message =
                format!("its statistics run over the whole batch, which batch.micro_batches splits into {parts}");
            problems.push(Problem::error(&key, message).help(format!("set batch.micro_batches = 1, or {off}")));
        }
        if let (true, Some(masking)) = (needs.masks, masking) {
            problems.extend(masked(recipe, masking, backbone.patch_size(), name));
        }
        if needs.masks && !needs.runs_teacher() && distils {
            let message = "the student of a frozen teacher sees whole images, so also the pixels that this loss hides from others";
            problems.push(Problem::warning(&key, message).help(off.clone()));
        }
        // With a teacher of its own to learn from, patches in plain sight teach something.
        if needs.masks && !backbone.hides_masked_patches() && !distils {
            let message = format!(
                "the backbone `{}` has no mask token, so it sees the patches that this loss \
                hides from others: student and teacher get the same image",
                recipe.backbone.plugin.name()
            );
            problems.push(Problem::warning(&key, message).help(off.clone()));
        }
    }
    if enabled == 0 {
        let names: Vec<_> = recipe.losses.0.keys().map(|n| format!("losses.{n}.enabled = true")).collect();
        let help = if names.is_empty() {
            "add a table [losses.<name>]: `dinolab plugins loss` lists them".into()
        } else {
            names.join(" or ")
        };
        problems.push(Problem::error("losses", "no loss is enabled, so nothing would be learned").help(help));
    }
    for name in recipe.teachers.0.keys().filter(|name| !used.contains(*name)) {
        let message = "no loss learns from this teacher, so the table does nothing";
        let help = "add a loss that does, or remove the table";
        problems.push(Problem::warning(format!("teachers.{name}"), message).help(help));
    }
}

/// Views that cannot be made of global crops of any of the recipe's sizes.
fn views(recipe: &Recipe, problems: &mut Vec<Problem>) {
    let Ok(model) = declare(recipe) else { return };
    let (depth, alone) = (model.backbone.depth(), Share::default());
    let groups = Groups::new(&recipe.optimizer, &model.layout, depth, alone, from_the_start);
    problems.extend(groups.err().map(|e| refused("optimizer", e)));
    augmentations(recipe, &model, problems);
    let sides = recipe.crops.variants(None).into_iter().map(|r| r.global_size);
    for (side, declared) in sides.flat_map(|side| model.losses.iter().map(move |l| (side, l))) {
        let refused = check_views(declared, &model, side).err();
        problems.extend(refused.map(|e| self::refused(format!("losses.{}", declared.name), e)));
    }
}

/// Augmentations that views are of and that are not there, cannot be built, or are there for nothing.
fn augmentations(recipe: &Recipe, model: &Declared, problems: &mut Vec<Problem>) {
    let patch_size = model.backbone.patch_size();
    for sizes in recipe.crops.variants(None) {
        let context = CropContext { local_count: 0, ..recipe.crops.context(&sizes, patch_size) };
        for (name, entry) in &recipe.augmentations.0 {
            let built = entry.build(&mut context.clone());
            problems.extend(built.err().map(|e| refused(format!("augmentations.{name}"), e)));
        }
    }
    let mut used = BTreeSet::new();
    for (name, entry) in &recipe.losses.0 {
        let built = build_loss(recipe, model.backbone.as_ref(), &mut ParamBuilder::new(), &entry.loss);
        let Ok(loss) = built else { continue };
        let views = loss.views(recipe.crops.global_size).unwrap_or_default();
        let asked: BTreeSet<String> = views.into_iter().filter_map(|view| view.augmentation).collect();
        for missing in asked.iter().filter(|asked| entry.enabled && !recipe.augmentations.0.contains_key(*asked)) {
            let message =
                format!("a view of this loss is of the augmentation `{missing}`, and the recipe has none of that name");
            let help = format!("add a table [augmentations.{missing}], or set losses.{name}.enabled = false");
            problems.push(Problem::error(format!("losses.{name}"), message).help(help));
        }
        used.extend(asked);
    }
    for name in recipe.augmentations.0.keys().filter(|name| !used.contains(*name)) {
        let message = "no view of a loss is of this augmentation, so the table does nothing";
        let help = "add a loss that has one, or remove the table";
        problems.push(Problem::warning(format!("augmentations.{name}"), message).help(help));
    }
}

/// What keeps the loss `name` from ever seeing a masked patch: the masks of every crop size, as the loader makes them.
fn masked(recipe: &Recipe, masking: &dyn Masking, patch: usize, name: &str) -> Option<Problem> {
    // Masks are drawn for the whole batch, and dealt to its parts.
    let crops = GLOBALS * recipe.batch.size;
    let mut sides: Vec<usize> = recipe.crops.variants(None).into_iter().map(|r| r.global_size / patch).collect();
    sides.sort_unstable();
    let none = sides.into_iter().find_map(|side| masking.unmasked(crops, Grid { height: side, width: side }))?;
    let message = format!("no patch is masked, but the loss `{name}` is computed on masked patches: {}", none.reason);
    let help = format!("{}, or set losses.{name}.enabled = false", none.help);
    Some(Problem::error(format!("masking.{}", none.key), message).help(help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_near_a_number_are_found_without_listing_all() {
        assert_eq!(near_divisors(12, 5), [4, 6]);
        assert_eq!(near_divisors(7, 9), [7]);
        assert_eq!(near_divisors(1_000_000_000, 999), [800, 1000]);
    }
}
