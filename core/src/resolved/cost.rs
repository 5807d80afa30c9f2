//! What a recipe costs, by formula: parameters, operations and memory, without allocating any of it.
//!
//! The rule for operations: a student is counted three times its forward (forward, and twice that backward), a teacher
//! once; a vector through a head costs twice the head's parameters forward. Softmax, norms and the optimizer are not
//! counted.

use crate::comm::Ranks;
use crate::contract::{Cost, Grid, ImageSize, LossCost, LossRows, View};
use crate::recipe::{DeviceChoice, Recipe, Resolution};
use crate::step::{declare, distilled_model, named_teachers, Declared, Layers, Storage, Teacher, GLOBALS};
use crate::{cuda, DType, Device, Error, Result};

/// What a recipe costs.
#[derive(Clone, Debug, PartialEq)]
pub struct RunCost {
    /// Trainable numbers of each sub-model: `backbone`, `<loss>_head`.
    pub modules: Vec<(String, usize)>,
    /// Operations for one image of a step in which everything is active.
    pub flops_per_image: f64,
    /// Parts of the memory at the point of a step where it is most, in bytes: on a GPU unless the recipe says otherwise.
    pub memory: Vec<(&'static str, f64)>,
    /// Bytes of host memory that a GPU's updates read in place.
    pub pinned: f64,
    /// Patches of all crops of one kind in a micro-batch, at most.
    pub most_patches: f64,
}

impl RunCost {
    /// Trainable numbers.
    pub fn parameters(&self) -> usize {
        self.modules.iter().fold(0, |all, (_, n)| all.saturating_add(*n))
    }

    /// Bytes of everything together.
    pub fn total_memory(&self) -> f64 {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of what lasts from step to step.
    pub(super) fn lasting_memory(&self) -> f64 {
        self.memory.iter().take_while(|(part, _)| *part != CROPS).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of the weights of a model to distil from.
    pub(super) fn frozen_teacher(&self) -> f64 {
        self.memory.iter().find(|(part, _)| *part == DISTILLED).map_or(0.0, |(_, bytes)| *bytes)
    }
}

/// The first part of the memory that is a step's.
const CROPS: &str = "crops";
/// The part of the memory that a model to distil from is.
const DISTILLED: &str = "teacher to distil from";

/// What `recipe` costs on a GPU, unless it says that it runs on the CPU.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn cost(recipe: &Recipe) -> Result<RunCost> {
    cost_on(recipe, device_of(recipe))
}

/// A GPU, unless the recipe says that it runs on the CPU.
fn device_of(recipe: &Recipe) -> Device {
    let on_cpu = DeviceChoice::try_from("cpu".to_string()).is_ok_and(|cpu| recipe.device == cpu);
    if on_cpu {
        Device::Cpu
    } else {
        Device::Cuda(0)
    }
}

/// What `recipe` costs on a device.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn cost_on(recipe: &Recipe, device: Device) -> Result<RunCost> {
    Ok(cost_of(recipe, &declare(recipe)?, (device, 1)))
}

/// What `recipe` costs on a device, its model declared already and its optimizer shared by so many processes: operations on
/// average over its crop sizes, memory for the sizes that take most.
fn cost_of(recipe: &Recipe, model: &Declared, on: (Device, usize)) -> RunCost {
    let named = named_teachers(recipe, model).unwrap_or_default();
    let own_side = named.iter().find_map(|teacher| teacher.policy.crop_size());
    let variants = recipe.crops.variants(own_side);
    let shares: f64 = variants.iter().map(|sizes| sizes.share).sum();
    let costs = variants.iter().map(|sizes| (sizes.share / shares, cost_at(recipe, sizes, (model, &named), on)));
    let costs: Vec<(f64, RunCost)> = costs.collect();
    let flops_per_image = costs.iter().map(|(share, cost)| share * cost.flops_per_image).sum();
    let most_patches = costs.iter().map(|(_, cost)| cost.most_patches).fold(0.0, f64::max);
    let most = costs.into_iter().map(|(_, cost)| cost).max_by(|a, b| a.total_memory().total_cmp(&b.total_memory()));
    RunCost { flops_per_image, most_patches, ..most.expect("there is at least one set of crop sizes") }
}

/// What a step of these crop sizes costs.
fn cost_at(
    recipe: &Recipe,
    sizes: &Resolution,
    (model, named): (&Declared, &[Teacher]),
    (device, ranks): (Device, usize),
) -> RunCost {
    let backbone = model.backbone.as_ref();
    let grid = |side: usize| Grid { height: side / backbone.patch_size(), width: side / backbone.patch_size() };
    let globals = (GLOBALS, grid(sizes.global_size));
    let locals = (recipe.crops.local_count, grid(sizes.local_size));
    let [sees_globals, sees_locals] = model.student_sees();
    let seen = |sees: bool, (count, grid)| if sees { (count, grid) } else { (0, grid) };
    let views = model.losses.iter().flat_map(|l| l.loss.views(sizes.global_size).unwrap_or_default());
    let (for_student, for_teacher): (Vec<View>, Vec<View>) = {
        let all: Vec<View> = views.collect();
        let of = |sees: fn(&View) -> bool| all.iter().filter(|view| sees(view)).cloned().collect();
        (of(View::for_student), of(View::for_teacher))
    };
    let locals = seen(sees_locals, locals);
    let own =
        [seen(sees_globals, globals), locals].into_iter().chain(for_student.iter().map(|v| (v.crops, grid(v.size()))));
    let own: Vec<(usize, Grid)> = own.filter(|(count, _)| *count > 0).collect();
    let student = backbone.cost(&own);
    // A model to distil from whose run is not there yet is counted like the student.
    let distilled = distilled_model(recipe);
    let teacher_model = distilled.as_ref().unwrap_or(model);
    // It runs only if something is learned from it.
    let taught = model.losses.iter().any(|l| l.needs.runs_teacher());
    let shown: Vec<(usize, Grid)> =
        [globals].into_iter().chain(for_teacher.iter().map(|v| (v.crops, grid(v.size())))).collect();
    let teacher = if taught { teacher_model.backbone.cost(&shown) } else { Cost::default() };
    let mut flops = 3.0 * student.forward_flops + teacher.forward_flops;
    for teacher in named {
        let side = teacher.policy.crop_size().and(sizes.teacher_size).unwrap_or(sizes.global_size);
        flops += backbone.cost(&[(GLOBALS, grid(side))]).forward_flops;
    }
    let count = |prefix: &str| count_in(model, prefix);
    let rows = LossRows {
        globals: GLOBALS as f64,
        locals: recipe.crops.local_count as f64,
        patches: (GLOBALS * globals.1.patches()) as f64,
        masked: masked_patches(recipe, globals.1),
    };
    let (mut heads, mut most) = (LossCost::default(), LossCost::default());
    for declared in &model.losses {
        let cost = declared.loss.cost(&rows);
        let taught = teacher_model.loss(&declared.name).map(|loss| loss.loss.cost(&rows)).unwrap_or_default();
        flops += 3.0 * cost.forward_flops + taught.project_flops;
        heads.activations += cost.activations;
        heads.outputs += cost.outputs;
        heads.targets += cost.targets;
        heads.of_batch += cost.of_batch;
        most.of_batch = most.of_batch.max(cost.of_batch);
        most.outputs = most.outputs.max(cost.outputs);
        most.targets = most.targets.max(cost.targets);
    }
    let modules: Vec<(String, usize)> =
        model.layout.modules().into_iter().map(|m| (m.clone(), count(&format!("{m}.")))).collect();
    let named_len = named.len() * model.layout.range_of("backbone.").len();
    let has_teacher = recipe.teacher.build(&mut ()).is_ok_and(|t| t.exists());
    let distilled_len = distilled.as_ref().map(|m| m.layout.len());
    let part = 0..model.layout.len().div_ceil(ranks);
    let storage = Storage::new(&model.layout, recipe.optimizer.moments.unwrap_or_default(), &part);
    let layers = Layers::of(&model.layout);
    // A fused update has gradients of the layers that the backward pass is in. With one micro-batch each, processes have those as
    // well, the gradients of their part and a share of the sums.
    let (gradients, longest) = match Layers::are_summed(recipe.batch.micro_batches * ranks, ranks) {
        _ if recipe.optimizer.is_fused() && device != Device::Cpu => (layers.largest(2), 0),
        true => (2 * part.len() + layers.largest(2), layers.largest(1).max(part.len())),
        false => (model.layout.len(), model.layout.len()),
    };
    let of_models = (model.layout.len(), has_teacher, named_len, distilled_len);
    let (mut memory, pinned) = weights(recipe, (device, ranks), of_models, (gradients, &storage));
    // While a pass of a sharded teacher is in a layer, it has that and the last one.
    let gathered = if shards_teachers(recipe, ranks) && (has_teacher || named_len > 0) { layers.largest(2) } else { 0 };
    memory.extend((gathered > 0).then(|| ("gathered layers", (gathered * recipe.dtype(device).size()) as f64)));
    let moved = 2 * Ranks::at_once_on(device).min(longest) * recipe.dtype(device).wide().size();
    memory.extend((ranks > 1).then_some(("moved between processes", moved as f64)));

    let number = recipe.dtype(device).size() as f64;
    let all = recipe.batch.size as f64;
    let part = recipe.batch.images() as f64;
    let pixels = |count: usize, side: usize| (count * recipe.crops.channels()) as f64 * (side as f64).powi(2);
    let teacher_pixels = sizes.teacher_size.map_or(0.0, |side| pixels(GLOBALS, side));
    let further = model.augmentations(recipe).len() as f64 * pixels(GLOBALS, sizes.global_size);
    let crops = pixels(GLOBALS, sizes.global_size) + pixels(locals.0, sizes.local_size) + further;
    let view_pixels: f64 = for_student.iter().map(|v| pixels(v.crops, v.size())).sum();
    // The teacher goes over the whole batch before the student begins. While it turns logits into targets there are the
    // logits by part and together, and the targets; while the student's losses go backward, the logits and a gradient.
    let named_kept = named.len() as f64 * 2.0 * (GLOBALS * globals.1.patches()) as f64 * backbone.dim() as f64;
    let kept = part * (student.activations + student.features + heads.activations + named_kept + view_pixels);
    let backward = part * student.working.max(heads.outputs + most.outputs);
    let teaching = all * 2.0 * most.targets;
    memory.extend([
        (CROPS, number * all * (crops + teacher_pixels)),
        ("teacher's features and targets", number * all * (teacher.features + heads.targets)),
    ]);
    let wide = recipe.dtype(device).wide().size() as f64;
    memory.extend(match kept + backward >= teaching {
        true => vec![
            ("activations", number * kept + wide * heads.of_batch),
            ("logits and gradients", number * backward + wide * most.of_batch),
        ],
        false => vec![("teacher's logits", number * teaching)],
    });
    let patches = |(count, grid): (usize, Grid)| part * count as f64 * grid.patches() as f64;
    let most_patches = own.into_iter().map(patches).fold(patches(globals), f64::max);
    RunCost { modules, flops_per_image: flops, memory, pinned, most_patches }
}

/// What the probes of a run cost that begins after `start` steps: how often one is taken, images that they see in all, and
/// operations for these. What a probe does with features is not counted.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn probes(recipe: &Recipe, start: u64) -> Result<(u64, f64, f64)> {
    let backbone = declare(recipe)?.backbone;
    let each = |size: ImageSize| {
        let patches = |side: usize| side / backbone.patch_size();
        backbone.cost(&[(1, Grid { height: patches(size.height), width: patches(size.width) })]).forward_flops
    };
    let (mut taken, mut images, mut flops) = (0, 0.0, 0.0);
    for entry in recipe.probes.0.values().filter(|entry| entry.enabled) {
        // After the last step every probe is taken, whatever its `every`.
        let before = |step: u64| step.checked_div(entry.every).unwrap_or(0);
        let between = before(recipe.steps.saturating_sub(1)).saturating_sub(before(start));
        let usual = [ImageSize::square(recipe.crops.global_size)];
        let sizes = if entry.sizes.is_empty() { &usual[..] } else { &entry.sizes };
        let seen = (between + 1) as f64 * entry.probe.build(&mut ())?.images() as f64;
        taken += (between + 1) * sizes.len() as u64;
        images += seen * sizes.len() as f64;
        flops += seen * sizes.iter().map(|&size| each(size)).sum::<f64>();
    }
    Ok((taken, images, flops))
}

/// What a step costs one of several processes that share it.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// Images of this process.
    pub images: usize,
    /// What it costs it: memory is its own.
    pub own: RunCost,
    /// Bytes that it receives: its part of the gradients of all others, and the weights of student and teachers that they
    /// updated. What losses exchange is little beside it: a number a prototype, a few times.
    pub received: f64,
}

/// What a step of `recipe` costs each of `ranks` processes, on a GPU each unless it says that it runs on the CPU.
///
/// # Errors
/// If they cannot share it, or a plugin refuses its configuration.
pub fn shared(recipe: &Recipe, ranks: usize) -> Result<Shared> {
    shared_on(recipe, device_of(recipe), ranks)
}

/// What a step of `recipe` costs each of `ranks` processes on such devices.
///
/// # Errors
/// As [`shared`].
pub fn shared_on(recipe: &Recipe, device: Device, ranks: usize) -> Result<Shared> {
    let shards = recipe.batch.shards;
    if ranks == 0 || !shards.is_multiple_of(ranks) {
        let problem = format!("{ranks} processes cannot share batch.shards = {shards} evenly");
        return Err(Error::user(problem, "name a power of two up to batch.shards, or set more batch.shards"));
    }
    let mut own = recipe.clone();
    own.batch.size /= ranks;
    own.batch.micro_batches /= ranks;
    own.batch.shards /= ranks;
    let model = declare(&own)?;
    let features = own.dtype(device);
    let teacher = if own.teacher.build(&mut ())?.exists() { 1.0 } else { 0.0 };
    // A sharded teacher is gathered for each micro-batch that it sees, another is spread after its update.
    let further = named_teachers(&own, &model)?.len() as f64 * model.layout.range_of("backbone.").len() as f64;
    let teachers = match shards_teachers(recipe, ranks) {
        true => own.batch.micro_batches as f64 * (teacher + further / model.layout.len() as f64),
        false => teacher,
    };
    // Sums of gradients that are taken layer by layer go to those whose they are afterwards.
    let sums = if Layers::are_summed(recipe.batch.micro_batches, ranks) { 1.0 / ranks as f64 } else { 0.0 };
    let of_number = (1.0 + sums) * features.wide().size() as f64 + (1.0 + teachers) * features.size() as f64;
    let of_others = model.layout.len() as f64 * (ranks - 1) as f64 / ranks as f64;
    let cost = cost_of(&own, &model, (device, ranks));
    Ok(Shared { images: own.batch.size, own: cost, received: of_others * of_number })
}

/// Whether each of so many processes has a part of the teachers alone.
fn shards_teachers(recipe: &Recipe, ranks: usize) -> bool {
    recipe.optimizer.shard_teachers && ranks > 1
}

/// Numbers in the parameters whose names begin with `prefix`.
fn count_in(model: &Declared, prefix: &str) -> usize {
    let inside = model.layout.specs().iter().filter(|s| s.name.starts_with(prefix));
    inside.fold(0, |all: usize, s| all.saturating_add(s.range().len()))
}

/// What lasts from step to step, in bytes: for so many parameters, a teacher with as many if there is one, those of further
/// teachers and of a model to distil from; so many gradients, and moments at these places. And what of it is in pinned host memory.
fn weights(
    recipe: &Recipe,
    (device, ranks): (Device, usize),
    (own, teacher, further, distilled): (usize, bool, usize, Option<usize>),
    (gradients, storage): (usize, &Storage),
) -> (Vec<(&'static str, f64)>, f64) {
    let features = recipe.dtype(device);
    let wide = |n: usize| n as f64 * features.wide().size() as f64;
    // Lower halves are spread over the ranks, and may be in host memory.
    let (in_place, beside) = match features == DType::BF16 && recipe.optimizer.offload {
        true => (0.0, 1.0 / ranks as f64),
        false => (1.0 / ranks as f64, 0.0),
    };
    let rounded = |n: usize| n as f64 * features.size() as f64;
    let kept = |n: usize| rounded(n) + in_place * (wide(n) - rounded(n));
    let of_teacher = |n: usize| match shards_teachers(recipe, ranks) {
        true => kept(n) - rounded(n) * (1.0 - 1.0 / ranks as f64),
        false => kept(n),
    };
    let all = own + if teacher { own } else { 0 } + further;
    let mut pinned = beside * (wide(all) - rounded(all));
    let mut memory = vec![("student", kept(own)), ("gradients", wide(gradients))];
    // Shards wait for each other in a tree; their sum is made beside them.
    let waiting = recipe.batch.shards.ilog2();
    memory.extend((waiting > 0).then(|| ("gradients of shards", f64::from(waiting + 1) * wide(own))));
    memory.extend(teacher.then(|| ("EMA teacher", of_teacher(own))));
    let moments = recipe.optimizer.plugin.build(&mut ()).map_or(0, |optimizer| optimizer.moments().len());
    let offload = recipe.optimizer.offload_moments && device != Device::Cpu;
    let moment = |offload| storage.bytes(features.wide(), offload);
    let of_moments = moments as f64 * moment(offload);
    pinned += moments as f64 * (moment(false) - moment(offload));
    memory.extend(match moments {
        0 => None,
        1 => Some(("optimizer (1 moment)", of_moments)),
        2 => Some(("optimizer (2 moments)", of_moments)),
        _ => Some(("optimizer (moments)", of_moments)),
    });
    memory.extend(distilled.map(|n| (DISTILLED, n as f64 * features.size() as f64)));
    memory.extend((further > 0).then(|| ("further teachers", of_teacher(further))));
    if device != Device::Cpu {
        memory.push(("workspace of matrix products", cuda::WORKSPACE as f64));
    }
    (memory, pinned)
}

/// Masked patches an image, on average; 0 if the plugin refuses its configuration.
fn masked_patches(recipe: &Recipe, grid: Grid) -> f64 {
    let share = recipe.masking.build(&mut ()).map_or(0.0, |masking| masking.share(grid));
    (GLOBALS * grid.patches()) as f64 * share
}
