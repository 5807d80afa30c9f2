//! The training step against the reference's numbers: a recipe is made of the reference's configuration, a learner of the
//! recipe, and its steps are compared in everything that the reference tells of its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use crate::golden::{Comparison, Golden};
use dinolab_core::checkpoint::{self, Content, Keep};
use dinolab_core::contract::{
    At, BatchImage, Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, Needs, Outputs, Schedule,
    Scheduler, StateSpec, StepContext, Targets,
};
use dinolab_core::data::{Batch, Masks};
use dinolab_core::files::write_tensors;
use dinolab_core::params::Params;
use dinolab_core::registry::Chosen;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Flat, Learner, Report};
use dinolab_core::{plugin, DType, Result, Tensor};
use dinolab_plugins as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

/// Scheduler `given`: one value a step, the last of them for all later steps.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Given {
    /// The values.
    values: Vec<f64>,
}

impl Scheduler for Given {
    fn value(&self, at: At) -> f64 {
        self.values[(at.step as usize).min(self.values.len() - 1)]
    }
}

plugin!(Scheduler, "given", Given);

/// Loss `spy`: another loss, and a record of what it saw.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SpyConfig {
    /// The loss that is watched.
    loss: Chosen<dyn Loss>,
}

#[derive(Debug)]
struct Spy {
    name: String,
    loss: Box<dyn Loss>,
}

thread_local! {
    /// What the losses of this thread's last step saw, `<loss>.<what>`.
    static SEEN: RefCell<BTreeMap<String, Tensor>> = const { RefCell::new(BTreeMap::new()) };
}

impl Spy {
    fn build(config: SpyConfig, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        Ok(Box::new(Self { name: config.loss.name().to_string(), loss: config.loss.build(context)? }))
    }

    fn record(&self, what: &str, tensor: &Tensor) {
        SEEN.with_borrow_mut(|seen| seen.insert(format!("{}.{what}", self.name), tensor.detach()));
    }
}

impl Loss for Spy {
    fn needs(&self) -> Needs {
        self.loss.needs()
    }

    fn state(&self) -> Vec<StateSpec> {
        self.loss.state()
    }

    fn project(&self, params: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        self.loss.project(params, outputs)
    }

    fn targets(&self, projected: &Tensor, context: &StepContext<'_>) -> Result<Targets> {
        let targets = self.loss.targets(projected, context)?;
        self.record("teacher_logits", projected);
        self.record("targets", &targets.rows);
        Ok(targets)
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.needs().targets.map(|_| self.project(params, &out.student)).transpose()?;
        let seen = [
            ("student_logits", logits.as_ref()),
            ("student_cls", Some(out.student.cls)),
            ("student_local_cls", out.student.local_cls),
            ("student_patches", Some(out.student.patches)),
            ("gram_patches", out.teachers.first().map(|(_, given)| &given.patches)),
        ];
        seen.into_iter().filter_map(|(what, tensor)| Some((what, tensor?))).for_each(|(what, t)| self.record(what, t));
        self.loss.compute(params, out, context)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        self.loss.cost(rows)
    }
}

plugin!(Loss, "spy", SpyConfig, Spy::build);

fn spy(plugin: &str, weight: Value, mut loss: Value) -> Value {
    loss["plugin"] = plugin.into();
    json!({ "plugin": "spy", "weight": weight, "loss": loss })
}

/// A schedule of the reference in a recipe's steps: a line, half a cosine, then constant.
fn schedule(table: &Value, epoch: u64) -> Value {
    let mut recipe = json!({
        "plugin": "linear_warmup_cosine",
        "start": table["start"],
        "peak": table["peak"],
        "end": table["end"],
        "warmup_steps": table["warmup_epochs"].as_u64().unwrap_or(0) * epoch,
    });
    if let Some(epochs) = table["cosine_epochs"].as_u64() {
        recipe["cosine_steps"] = (epochs * epoch).into();
    }
    recipe
}

/// What the optimizer and the teacher go by: one number, or one a step.
struct Rates {
    lr: Value,
    last_layer_lr: Value,
    weight_decay: Value,
    momentum: Value,
    teacher_temp: Value,
    freeze_last_layer_steps: u64,
    /// The steps that are run.
    steps: std::ops::Range<u64>,
}

impl Rates {
    fn of(g: &Golden) -> Self {
        let one = &g.options["schedule"];
        if let Some(step) = one["iteration"].as_u64() {
            let rate = |key: &str| one[key].clone();
            let frozen = one["last_layer_lr"] == 0.0;
            return Self {
                lr: rate("lr"),
                last_layer_lr: rate("last_layer_lr"),
                weight_decay: rate("weight_decay"),
                momentum: rate("momentum"),
                teacher_temp: rate("teacher_temp"),
                freeze_last_layer_steps: if frozen { step + 1 } else { 0 },
                steps: step..step + 1,
            };
        }
        let rate = |key: &str| json!({ "plugin": "given", "values": g.values(&format!("schedule.{key}")) });
        let last_layer = g.values("schedule.last_layer_lr");
        let frozen = last_layer.iter().take_while(|&&lr| lr == 0.0).count();
        Self {
            lr: rate("lr"),
            last_layer_lr: rate("last_layer_lr"),
            weight_decay: rate("weight_decay"),
            momentum: rate("momentum"),
            teacher_temp: rate("teacher_temp"),
            freeze_last_layer_steps: frozen as u64,
            steps: 0..last_layer.len() as u64,
        }
    }
}

/// The recipe's table of the Gram teacher, if the reference has one.
fn gram_teacher(g: &Golden, weights: &Path) -> Option<Value> {
    let (gram, crops) = (&g.options["cfg"]["gram"], &g.options["cfg"]["crops"]);
    if gram["use_loss"] != true {
        return None;
    }
    let mut table = json!({ "plugin": "gram_anchor", "source": "ema" });
    if gram["ema_teacher"] == true {
        // The EMA teacher of every step, on the student's crops.
        table["refresh"] = json!({ "every": 1 });
        return Some(table);
    }
    if g.names().any(|n| n.starts_with("gt.")) {
        table["source"] = json!({ "checkpoint": weights });
    }
    if let Some(size) = crops["gram_teacher_crops_size"].as_u64() {
        table["crop_size"] = size.into();
    }
    assert_eq!(gram["global_teacher_resize_method"], "bicubic");
    table["antialias"] = (gram["global_teacher_resize_antialias"] == true).into();
    if gram["rep_update"] == true {
        // After step i, if i + 1 is a multiple of `update_frequency` and at least `it_first_update`.
        let count = |key: &str| gram[key].as_u64().unwrap_or(0);
        let every = count("update_frequency");
        let first = every * count("it_first_update").div_ceil(every).max(1);
        table["refresh"] = json!({ "every": every, "first": first });
        if let Some(most) = gram["max_updates"].as_u64() {
            table["refresh"]["at_most"] = most.into();
        }
    }
    Some(table)
}

/// The reference's configuration as a recipe that starts from the weights in `folder`.
fn recipe(g: &Golden, dtype: DType, folder: &Path) -> Value {
    let cfg = &g.options["cfg"];
    let (dino, ibot, gram, optim) = (&cfg["dino"], &cfg["ibot"], &cfg["gram"], &cfg["optim"]);
    let epoch = cfg["train"]["OFFICIAL_EPOCH_LENGTH"].as_u64().unwrap();
    let rates = Rates::of(g);

    let mut backbone = cfg["student"].clone();
    for (key, size) in g.options["arch"].as_object().unwrap() {
        backbone[key] = size.clone();
    }
    let centering = match cfg["train"]["centering"].as_str() {
        Some("sinkhorn_knopp") => "sinkhorn_knopp",
        _ => "softmax",
    };
    let bias = |loss: &str| g.names().any(|n| n.starts_with(&format!("s.{loss}_head.mlp.")) && n.ends_with("bias"));
    let head_loss = |loss: &str, table: &Value| {
        json!({
            "head": {
                "bias": bias(loss),
                "hidden": table["head_hidden_dim"],
                "bottleneck": table["head_bottleneck_dim"],
                "prototypes": table["head_n_prototypes"],
                "layers": table["head_nlayers"],
            },
            "student_temp": cfg["student_temp"],
            "teacher_temp": rates.teacher_temp,
            "centering": centering,
        })
    };
    let mut dino_loss = head_loss("dino", dino);
    dino_loss["ignore_diagonal"] = dino["global_ignore_diagonal"].clone();
    if dino["reweight_dino_local_loss"] == true {
        dino_loss["local_weight"] = schedule(&dino["local_loss_weight_schedule"], epoch);
    }
    // Only the distributed KoLeo has neighbours and groups to choose.
    let mut koleo = json!({ "weight": dino["koleo_loss_weight"] });
    if dino["koleo_loss_distributed"] == true {
        koleo["topk"] = dino["koleo_topk"].clone();
        koleo["group_size"] = dino["koleo_distributed_loss_group_size"].as_u64().unwrap_or(0).into();
    }
    let mut losses = json!({
        "dino": spy("dino", dino["loss_weight"].clone(), dino_loss),
        "ibot": spy("ibot", ibot["loss_weight"].clone(), head_loss("ibot", ibot)),
        "koleo": koleo,
    });
    let gram_teacher = gram_teacher(g, &folder.join("gram.safetensors"));
    if gram_teacher.is_some() {
        let weight = match &gram["loss_weight_schedule"] {
            Value::Null => gram["loss_weight"].clone(),
            table => schedule(table, epoch),
        };
        let remove = match (gram["remove_neg"] == true, gram["remove_only_teacher_neg"] == true) {
            (true, _) => "both",
            (false, true) => "teacher",
            (false, false) => "none",
        };
        let loss = json!({
            "normalize": gram["normalized"],
            "image_level": gram["img_level"],
            "remove_negative": remove,
            "tokens": gram["tokens_used"],
            "log_parts": gram["compute_stats"],
        });
        losses["gram"] = spy("gram", weight, loss);
    }
    let mut recipe = json!({
        "name": "parity",
        "steps": (optim["epochs"].as_u64().unwrap() * epoch).max(rates.steps.end),
        "precision": if dtype == DType::F64 { "f64" } else { "f32" },
        "init_from": folder.join("start.safetensors"),
        "backbone": crate::reference::backbone(&backbone),
        "data": { "plugin": "scenes" },
        "batch": { "size": g.options["batch"] },
        "crops": {
            "global_size": cfg["crops"]["global_crops_size"],
            "local_size": cfg["crops"]["local_crops_size"],
            "local_count": cfg["crops"]["local_crops_number"],
        },
        "losses": losses,
        "teacher": match distils(g) {
            true => json!({ "plugin": "frozen", "checkpoint": folder.join("large"), "momentum": rates.momentum }),
            false => json!({ "plugin": "ema", "momentum": rates.momentum }),
        },
        "optimizer": {
            "lr": rates.lr,
            "last_layer_lr": rates.last_layer_lr,
            "weight_decay": rates.weight_decay,
            "betas": [optim["adamw_beta1"], optim["adamw_beta2"]],
            "eps": g.number("/adamw/eps", Some(1e-8)),
            "clip_grad": optim["clip_grad"].as_f64().unwrap_or(0.0),
            "layerwise_decay": optim["layerwise_decay"],
            "patch_embed_lr_mult": optim["patch_embed_lr_mult"],
            "freeze_last_layer_steps": rates.freeze_last_layer_steps,
        },
    });
    if let Some(table) = gram_teacher {
        recipe["teachers"] = json!({ "gram": table });
    }
    recipe
}

/// Whether the teacher is a frozen model of another size.
fn distils(g: &Golden) -> bool {
    g.options["cfg"]["distillation"]["enabled"] == true
}

/// The teacher to distil from, as a run of the student's recipe with its own sizes.
fn write_large(g: &Golden, student: &Value, weights: Vec<(String, Tensor)>, folder: &Path) {
    let mut recipe = student.clone();
    let arch = &g.options["teacher_arch"];
    for (key, ours) in [("depth", "depth"), ("embed_dim", "dim"), ("ffn_ratio", "ffn_ratio"), ("num_heads", "heads")] {
        recipe["backbone"][ours] = arch[key].clone();
    }
    for (loss, sizes) in g.options["teacher_heads"].as_object().unwrap() {
        for (key, size) in sizes.as_object().unwrap() {
            recipe["losses"][loss]["loss"]["head"][key] = size.clone();
        }
    }
    recipe["teacher"] = json!({ "plugin": "ema" });
    recipe.as_object_mut().unwrap().remove("init_from");
    let resolved = Resolved::from_text(&toml::to_string(&recipe).unwrap()).unwrap();
    let content = Content { step: 1, skipped: 0, model: weights, optimizer: Vec::new() };
    checkpoint::save(folder, &content, Keep::newest(1)).unwrap();
    std::fs::write(folder.join("recipe.toml"), resolved.to_toml()).unwrap();
}

/// The file's weights as files to start from: student and teacher, the Gram teacher if there is one, and the teacher to
/// distil from.
fn write_start(g: &Golden, recipe: &Value, folder: &Path) {
    let renamed = |from: &str, to: &str| -> Vec<(String, Tensor)> {
        let names = g.names().filter_map(|n| Some((n, n.strip_prefix(from)?)));
        names.map(|(n, inner)| (format!("{to}{inner}"), g.tensor(n, DType::F32))).collect()
    };
    let mut start = renamed("s.", "student.");
    if distils(g) {
        let large = ["student.", "teacher."].map(|role| renamed("t.", role)).concat();
        write_large(g, recipe, large, &folder.join("large"));
    } else {
        start.extend(renamed("t.", "teacher."));
    }
    write_tensors(&folder.join("start.safetensors"), &start, &[]).unwrap();
    let gram = renamed("gt.", "gram_teacher.");
    if !gram.is_empty() {
        write_tensors(&folder.join("gram.safetensors"), &gram, &[]).unwrap();
    }
}

/// The file's batch; its mask indices and weights have to be what the product makes of its masks.
fn batch(g: &Golden, prefix: &str, learner: &Learner) -> Batch {
    let tensor = |name: &str| {
        let name = format!("{prefix}{name}");
        (g.has(&name) && !g.values(&name).is_empty()).then(|| g.tensor(&name, DType::F32))
    };
    let patches = g.shape(&format!("{prefix}collated_masks"))[1];
    let masks = g.values(&format!("{prefix}collated_masks")).iter().map(|&m| m != 0.0).collect::<Vec<_>>();
    let masks: Vec<Vec<bool>> = masks.chunks(patches).map(<[bool]>::to_vec).collect();
    let masks = Masks::from_rows(&masks, DType::F32).unwrap();
    assert_eq!(masks.indices.to_f64_vec(), g.values(&format!("{prefix}mask_indices_list")));
    assert_eq!(masks.weights.to_f64_vec(), g.values(&format!("{prefix}masks_weight")));
    Batch {
        global: tensor("collated_global_crops").expect("global crops"),
        local: tensor("collated_local_crops"),
        teacher: learner.teacher_crop_size().and_then(|_| tensor("collated_gram_teacher_crops")),
        masks,
        labels: Tensor::from_slice(
            &vec![0u32; g.number("/batch", None) as usize],
            &[g.number("/batch", None) as usize],
        )
        .unwrap(),
        fields: Vec::new(),
        further: Vec::new(),
        sources: (0..g.number("/batch", None) as usize)
            .map(|i| BatchImage { index: i, place: i, ..BatchImage::default() })
            .collect(),
    }
}

/// The weight that a loss's part or the loss itself has at a step.
fn weight_at(learner: &Learner, recipe: &Value, name: &str, at: At) -> f64 {
    let losses = &learner.model().losses;
    match name {
        "gram_loss_weight" => losses.iter().find(|l| l.name == "gram").expect("a Gram loss").weight.at(at),
        "dino_local_loss_weight" => {
            let schedule = recipe["losses"]["dino"]["loss"]["local_weight"].clone();
            serde_json::from_value::<Schedule>(schedule).unwrap().at(at)
        }
        other => panic!("no weight {other}"),
    }
}

/// The reference's numbers of a step, and the product's names for them.
const LOSSES: [(&str, &str); 8] = [
    ("total_loss", "loss/total"),
    ("dino_global_crops_loss", "loss/dino/global"),
    ("dino_local_crops_loss", "loss/dino/local"),
    ("koleo_loss", "loss/koleo/per_crop"),
    ("ibot_loss", "loss/ibot"),
    ("gram_loss", "loss/gram"),
    ("stats_masked_gram_loss", "loss/gram/masked"),
    ("stats_unmasked_gram_loss", "loss/gram/unmasked"),
];

/// All numbers of a step by the reference's names.
fn numbers(g: &Golden, prefix: &str, learner: &Learner, recipe: &Value, at: At, report: &Report) -> Vec<(String, f64)> {
    let losses = LOSSES.iter().filter_map(|(name, ours)| Some((name.to_string(), *report.losses.get(*ours)?)));
    let norms = report.grad_norms.iter().map(|(module, norm)| (format!("grad_norm.{module}"), *norm));
    let weights = ["gram_loss_weight", "dino_local_loss_weight"].into_iter();
    let weights = weights.filter(|name| g.has(&format!("{prefix}{name}")));
    let weights = weights.map(|name| (name.to_string(), weight_at(learner, recipe, name, at)));
    let all = losses.chain(norms).chain(weights).map(|(name, x)| (format!("{prefix}{name}"), x));
    all.filter(|(name, _)| g.has(name)).collect()
}

/// Compares all parameters `<prefix><name>`, and how far they moved from `<start><name>`.
fn check_weights(g: &Golden, c: &mut Comparison<'_>, learner: &Learner, (prefix, start): (&str, &str), flat: &Flat) {
    let flat = flat.to_f64_vec();
    for spec in learner.model().layout.specs() {
        let (got, name) = (&flat[spec.range()], format!("{prefix}{}", spec.name));
        c.check_values(&name, got);
        let (want, start) = (g.values(&name), g.values(&format!("{start}{}", spec.name)));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let moved = norm(&mut want.iter().zip(start).map(|(w, s)| w - s));
        let error = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
        assert!(error <= 1e-3 * moved, "{name} moved by {moved:e} in the reference, {error:e} away from there");
    }
}

fn check_rules(g: &Golden, learner: &Learner) {
    let groups = g.metadata("param_groups");
    assert_eq!(groups.as_object().unwrap().len(), learner.param_rules().len());
    for rule in learner.param_rules() {
        let group = &groups[&rule.name];
        let lr = group["lr_multiplier"].as_f64().unwrap();
        assert!((rule.lr_multiplier - lr).abs() <= 1e-12 * lr, "{rule:?} is not {group}");
        assert_eq!(group["wd_multiplier"], if rule.decays { 1.0 } else { 0.0 }, "{rule:?}");
        assert_eq!(group["is_last_layer"], rule.last_layer, "{rule:?}");
    }
}

/// A learner with the file's weights, and its resolved recipe.
fn learner(g: &Golden, dtype: DType) -> (Learner, Value) {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(g, dtype, folder.path());
    write_start(g, &recipe, folder.path());
    let text = toml::to_string(&recipe).unwrap();
    let resolved = Resolved::from_text(&text).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let learner = Learner::new(&resolved.recipe).unwrap();
    check_rules(g, &learner);
    (learner, resolved.value)
}

/// The patches of `[C, P, D]` that the Gram loss compares: all, masked or unmasked.
fn compared_patches(patches: &Tensor, batch: &Batch, tokens: &Value) -> Tensor {
    let rows = patches.reshape(&[patches.dim(0) * patches.dim(1), patches.dim(2)]).unwrap();
    match tokens.as_str() {
        Some("masked") => rows.gather_rows(&batch.masks.indices).unwrap(),
        Some("unmasked") => rows.gather_rows(&batch.masks.unmasked).unwrap(),
        _ => rows,
    }
}

/// What teacher, student and Gram teacher gave on the way to the losses.
fn check_outputs(g: &Golden, c: &mut Comparison<'_>, batch: &Batch) {
    let seen = SEEN.with_borrow_mut(std::mem::take);
    let globals = batch.global.dim(0);
    let mut outputs: Vec<(&str, Tensor)> = [
        ("teacher.cls_after_head", "dino.teacher_logits"),
        ("teacher.cls_centered", "dino.targets"),
        ("teacher.masked_patch_after_head", "ibot.teacher_logits"),
        ("teacher.masked_patch_centered", "ibot.targets"),
        ("student.global.cls_pre_head", "dino.student_cls"),
        ("student.global.patch_pre_head", "dino.student_patches"),
        ("student.global.masked_patch_after_head", "ibot.student_logits"),
        ("student.local.cls_pre_head", "dino.student_local_cls"),
    ]
    .into_iter()
    .filter_map(|(name, ours)| Some((name, seen.get(ours)?.clone())))
    .collect();
    let logits = &seen["dino.student_logits"];
    outputs.push(("student.global.cls_after_head", logits.narrow(0, globals).unwrap()));
    outputs.push(("student.local.cls_after_head", logits.narrow(globals, logits.dim(0) - globals).unwrap()));
    if let Some(patches) = seen.get("gram.gram_patches") {
        let whole = g.has("gram.teacher_patches") && g.values("gram.teacher_patches").len() == patches.len();
        let tokens = &g.options["cfg"]["gram"]["tokens_used"];
        let patches = if whole { patches.clone() } else { compared_patches(patches, batch, tokens) };
        outputs.push(("gram.teacher_patches", patches));
    }
    outputs.iter().filter(|(name, _)| g.has(name)).for_each(|(name, got)| c.check(name, got));
}

pub fn one_step(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let (mut learner, recipe) = learner(g, dtype);
    let Rates { steps, .. } = Rates::of(g);
    // As if nothing had been learned before: AdamW's moments begin here.
    learner.weights_mut().skipped = steps.start;
    let batch = batch(g, "", &learner);
    let report = learner.step(steps.start, std::slice::from_ref(&batch), false).unwrap();
    assert_eq!(report.non_finite, None);
    check_outputs(g, c, &batch);
    let at = At { step: steps.start, total: recipe["steps"].as_u64().unwrap() };
    for (name, number) in numbers(g, "", &learner, &recipe, at, &report) {
        c.check_values(&name, &[number]);
    }
    let grads = learner.weights().grads().to_f64_vec();
    for spec in learner.model().layout.specs() {
        let (name, grad) = (format!("g.{}", spec.name), &grads[spec.range()]);
        match g.has(&name) {
            true => c.check_values(&name, grad),
            false => assert!(grad.iter().all(|&x| x == 0.0), "the reference has no {name}"),
        }
    }
    check_weights(g, c, &learner, ("u.", "s."), &learner.weights().student);
    let average = if distils(g) { "s." } else { "t." };
    check_weights(g, c, &learner, ("e.", average), learner.weights().teacher.as_ref().unwrap());
}

pub fn trajectory(g: &Golden, dtype: DType, c: &mut Comparison<'_>) {
    let (mut learner, recipe) = learner(g, dtype);
    let Rates { steps, .. } = Rates::of(g);
    let batches = g.number("/n_batches", None) as usize;
    let batches: Vec<Batch> = (0..batches).map(|i| batch(g, &format!("b{i}."), &learner)).collect();
    let mut series: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut refreshed = Vec::new();
    for step in steps {
        let gram = learner.weights().named.first().map(|(_, flat)| flat.to_f64_vec());
        let batch = &batches[step as usize % batches.len()];
        let report = learner.step(step, std::slice::from_ref(batch), false).unwrap();
        assert_eq!(report.non_finite, None);
        let at = At { step, total: recipe["steps"].as_u64().unwrap() };
        for (name, number) in numbers(g, "step.", &learner, &recipe, at, &report) {
            series.entry(name).or_default().push(number);
        }
        if gram != learner.weights().named.first().map(|(_, flat)| flat.to_f64_vec()) {
            refreshed.push(step);
        }
    }
    series.iter().for_each(|(name, values)| c.check_values(name, values));
    if let Some(expected) = g.options.get("gram_updates_after_steps") {
        assert_eq!(json!(refreshed), *expected);
    }
    check_weights(g, c, &learner, ("sN.", "s."), &learner.weights().student);
    check_weights(g, c, &learner, ("tN.", "t."), learner.weights().teacher.as_ref().unwrap());
}
