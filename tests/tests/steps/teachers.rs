//! Teachers by name, tokens of inner layers, and views that the teacher sees.

use dinolab_core::checkpoint;
use dinolab_core::contract::{
    At, ImageContext, ImageDraws, Loss, LossContext, LossValue, Needs, Outputs, SeenBy, StepContext, Tile, View,
};
use dinolab_core::nn::Linear;
use dinolab_core::params::Params;
use dinolab_core::recipe::{Overrides, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Report};
use dinolab_core::{plugin, train, Result, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;
use serde::{Deserialize, Serialize};

/// The mean square of tokens after some blocks. Those after the last are what the backbone norms.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Inner {
    /// After how many blocks.
    layers: Vec<usize>,
}

impl Loss for Inner {
    fn needs(&self) -> Needs {
        Needs { layers: self.layers.clone(), tokens: true, min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        for (model, sees) in [(&out.student, "student"), (&out.teacher, "teacher")] {
            assert_eq!(model.layers.len(), self.layers.len(), "{sees}");
            let prenorm = model.prenorm.expect("`needs` asks for tokens");
            for (layer, tokens) in self.layers.iter().zip(model.layers) {
                assert_eq!(tokens.shape(), prenorm.shape());
                let equal = tokens.to_f64_vec() == prenorm.to_f64_vec();
                assert_eq!(equal, *layer == DEPTH, "the {sees}'s after {layer} blocks");
            }
        }
        out.student.layers[0].square()?.mean().map(LossValue::of)
    }
}

plugin!(Loss, "inner", Inner);

/// The distance of what student and teacher make of the image turned over; nothing is hidden from either.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Turned {}

impl Loss for Turned {
    fn needs(&self) -> Needs {
        Needs { locals: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        let whole = || View::new(1, 1, global_size);
        Ok(vec![whole().seen_by(SeenBy::Teacher), whole().seen_by(SeenBy::Both), whole()])
    }

    /// The first view is the first crop as it is, the others are turned over.
    fn draw_image(&self, _: &mut ImageContext<'_>) -> ImageDraws {
        let turned = |turns| vec![Tile { turns, ..Tile::default() }];
        ImageDraws { numbers: Vec::new(), tiles: vec![turned(0), turned(2), turned(2)] }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        assert_eq!((out.views.len(), out.teacher_views.len()), (2, 2));
        let far = |a: &Tensor, b: &Tensor| a.sub(b)?.square()?.mean()?.cast(context.dtype);
        let plain = out.teacher.cls.narrow(0, out.images)?;
        let parts = vec![
            ("as_it_is", far(&out.teacher_views[0].cls, &plain)?),
            ("turned", far(&out.teacher_views[1].cls, &plain)?),
            ("same", far(&out.views[0].cls, &out.views[1].cls)?.detach()),
        ];
        Ok(LossValue::of(far(&out.views[0].cls, &out.teacher_views[1].cls)?).with_parts(parts))
    }
}

plugin!(Loss, "turned_over", Turned);

/// The student sees the crops, the teacher the image without distortion, as another augmentation gives it.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Weakly {}

impl Loss for Weakly {
    fn needs(&self) -> Needs {
        Needs { locals: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        Ok(vec![View::new(2, 1, global_size).of("weak").seen_by(SeenBy::Both)])
    }

    fn draw_image(&self, _: &mut ImageContext<'_>) -> ImageDraws {
        let of_crop = |crop| Tile { crop, ..Tile::default() };
        ImageDraws { numbers: Vec::new(), tiles: vec![vec![of_crop(0), of_crop(1)]] }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        let (b, weak) = (out.images, &out.teacher_views[0].cls);
        // The second crop is cut as the first.
        let apart = weak.narrow(0, b)?.sub(&weak.narrow(b, b)?)?.square()?.mean()?;
        let loss = out.student.cls.sub(weak)?.square()?.mean()?;
        Ok(LossValue::of(loss).with_parts(vec![("apart", apart)]))
    }
}

plugin!(Loss, "weakly", Weakly);

/// Declares a layer twice.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Twice {}

impl Twice {
    fn build(self, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        for to in [4, 8] {
            Linear::declare(context.params, context.dim, to, true);
        }
        Ok(Box::new(Inner { layers: Vec::new() }))
    }
}

plugin!(Loss, "twice", Twice, Twice::build);

const DEPTH: usize = 3;
const BASE: &str = r#"
name = "teachers"
steps = 6
device = "cpu"
precision = "f64"
[backbone]
plugin = "vit"
dim = 16
depth = 3
heads = 2
registers = 1
layer_scale = 1.0
pos_encoding = { plugin = "none" }
patch_size = 4
[data]
plugin = "scenes"
size = 32
count = 16
[batch]
size = 4
[crops]
global_size = 16
local_size = 8
local_count = 2
[masking]
probability = 0.0
[teacher]
plugin = "ema"
momentum = 0.9
[optimizer]
lr = 1e-2
"#;
/// Two Gram losses, each with a teacher of its own: one that is refreshed, one with larger crops that stays.
const TWO: &str = "[losses.gram]\n[losses.early]\nplugin = \"gram\"\nteacher = \"early\"\n\
    [teachers.gram]\nplugin = \"gram_anchor\"\nfirst_step = 2\nrefresh = { every = 2 }\n\
    [teachers.early]\nplugin = \"gram_anchor\"\nfirst_step = 1\ncrop_size = 24\n\
    [losses.koleo]\n";

fn resolve(tables: &str, sets: &[&str]) -> Result<Resolved> {
    let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
    Resolved::of(RawRecipe::from_text(&format!("{BASE}\n{tables}"))?.with(&overrides)?)
}

/// The learner after some steps, and their reports.
fn trained(resolved: &Resolved, steps: u64) -> (Learner, Vec<Report>) {
    let mut learner = Learner::new(&resolved.recipe).unwrap_or_else(|e| panic!("{e}"));
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let pipeline = dinolab_core::data::Pipeline::new(data, train::loader_spec(&resolved.recipe, &learner, 0)).unwrap();
    let step =
        |step| learner.step(step, &pipeline.step(step).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"));
    let reports = (0..steps).map(step).collect();
    (learner, reports)
}

#[test]
fn every_loss_has_the_teacher_that_it_names() {
    let resolved = resolve(TWO, &[]).unwrap();
    let (learner, reports) = trained(&resolved, 6);
    let seen = |name: &str| reports.iter().map(|r| r.losses.contains_key(name)).collect::<Vec<_>>();
    assert_eq!(seen("loss/early"), [false, true, true, true, true, true]);
    assert_eq!(seen("loss/gram"), [false, false, true, true, true, true]);
    let named = &learner.weights().named;
    assert_eq!(named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["early", "gram"]);
    assert!(named[0].1.to_f64_vec() != named[1].1.to_f64_vec());
    // The one that stays is what the EMA teacher was after a step.
    let (after_one, _) = trained(&resolved, 1);
    let teacher = after_one.weights().teacher.as_ref().expect("there is one").to_f64_vec();
    assert!(named[0].1.to_f64_vec() == teacher[..named[0].1.len()]);
}

#[test]
fn a_teacher_beside_another_changes_nothing_of_it() {
    let both = trained(&resolve(TWO, &["losses.early.weight=0"]).unwrap(), 6).1;
    let alone = trained(&resolve(TWO, &["losses.early.enabled=false"]).unwrap(), 6).1;
    for (a, b) in both.iter().zip(&alone) {
        assert_eq!(a.losses.get("loss/gram").map(|x| x.to_bits()), b.losses.get("loss/gram").map(|x| x.to_bits()));
    }
}

#[test]
fn named_teachers_are_saved_and_resumed_to_the_bit() {
    let resolved = resolve(TWO, &[]).unwrap();
    let folder = std::env::temp_dir().join(format!("dinolab-teachers-{}", std::process::id()));
    let (half, _) = trained(&resolved, 3);
    let saved = checkpoint::save(&folder, &half.content(3).unwrap(), checkpoint::Keep::newest(1)).unwrap();
    let read = checkpoint::load(&saved.folder).unwrap();
    assert!(read.model.has("early_teacher.backbone.") && read.model.has("gram_teacher.backbone."));
    let mut resumed = Learner::from_checkpoint(&resolved.recipe, &read).unwrap();
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, &resumed, 0);
    let pipeline = dinolab_core::data::Pipeline::new(data, spec).unwrap();
    (3..6).for_each(|step| drop(resumed.step(step, &pipeline.step(step).unwrap().batches, false).unwrap()));
    let (whole, _) = trained(&resolved, 6);
    let all =
        |learner: &Learner| learner.content(6).unwrap().model.iter().map(|(_, t)| t.to_f64_vec()).collect::<Vec<_>>();
    assert!(all(&resumed) == all(&whole));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn tokens_of_inner_layers_are_those_of_both_models_and_have_a_gradient() {
    // After one block: neither the later blocks nor the norms learn.
    let (learner, _) = trained(&resolve("[losses.inner]\nlayers = [1, 3]", &["optimizer.weight_decay=0"]).unwrap(), 1);
    let layout = &learner.model().layout;
    let grads = learner.weights().grads();
    let moved = |name: &str| {
        let spec = layout.specs().iter().find(|s| s.name == name).expect("it is declared");
        grads.view(spec.offset, &spec.shape).to_f64_vec().iter().any(|g| *g != 0.0)
    };
    assert!(moved("backbone.blocks.0.mlp.fc1.weight") && moved("backbone.patch_embed.proj.weight"));
    assert!(!moved("backbone.blocks.1.mlp.fc1.weight") && !moved("backbone.norm.weight"));
    // The start of the first block, too; and inner layers of a batch in parts.
    trained(&resolve("[losses.inner]\nlayers = [0]", &["batch.micro_batches=2"]).unwrap(), 1);
}

#[test]
fn the_teacher_sees_the_views_that_are_for_it() {
    for sets in [&[][..], &["batch.micro_batches=2"]] {
        let (_, reports) = trained(&resolve("[losses.turned_over]", sets).unwrap(), 2);
        for losses in reports.iter().map(|r| &r.losses) {
            assert!(losses["loss/turned_over/as_it_is"] < 1e-12, "{losses:?}");
            assert!(losses["loss/turned_over/same"] < 1e-12 && losses["loss/turned_over/turned"] > 1e-6, "{losses:?}");
        }
        // Student and teacher begin alike.
        assert!(reports[0].losses["loss/turned_over"] < 1e-12 && reports[1].losses["loss/turned_over"] > 1e-9);
    }
}

#[test]
fn a_view_of_another_augmentation_is_of_the_same_images() {
    let weak = "[losses.weakly]\n[augmentations.weak]\nplugin = \"resized\"\n[losses.koleo]\n";
    let whole = trained(&resolve(weak, &[]).unwrap(), 3).1;
    assert!(whole[0].losses["loss/weakly/apart"] == 0.0 && whole[0].losses["loss/weakly"] > 1e-6);
    let parts = trained(&resolve(weak, &["batch.micro_batches=2", "losses.koleo.enabled=false"]).unwrap(), 1).1;
    assert!((parts[0].losses["loss/weakly"] - whole[0].losses["loss/weakly"]).abs() < 1e-9);
    // What others see stays as it is, and crops that no view is of are not made.
    let alone = trained(&resolve(weak, &["losses.weakly.enabled=false"]).unwrap(), 1).1;
    assert!((alone[0].losses["loss/koleo"] - whole[0].losses["loss/koleo"]).abs() < 1e-12);
    let distorted = resolve(weak, &["augmentations.weak={ plugin = \"multi_crop\" }"]).unwrap();
    assert!(trained(&distorted, 1).1[0].losses["loss/weakly/apart"] > 1e-8);
    let model = dinolab_core::step::declare(&distorted.recipe).unwrap();
    assert_eq!(model.augmentations(&distorted.recipe).len(), 1);
    let unread = resolve(weak, &["losses.weakly.enabled=false"]).unwrap();
    assert!(dinolab_core::step::declare(&unread.recipe).unwrap().augmentations(&unread.recipe).is_empty());
}

gpu_test!(named_teachers_inner_layers_and_views_are_recorded_and_give_the_numbers_of_the_cpu, {
    let tables = format!(
        "{TWO}\n[losses.cka]\nlayer = 2\n[losses.turned_over]\n[losses.weakly]\n[augmentations.weak]\nplugin = \"resized\"\n"
    );
    let of = |device: &str| {
        let device = format!("device=\"{device}\"");
        trained(&resolve(&tables, &[&device, "precision=\"f32\"", "optimizer.lr=1e-4"]).unwrap(), 6)
    };
    let ((cpu, on_cpu), (gpu, on_gpu)) = (of("cpu"), of("cuda"));
    assert_eq!((gpu.eager_reason(), gpu.recorded_nodes().len()), (None, 1));
    for (step, (a, b)) in on_cpu.iter().zip(&on_gpu).enumerate() {
        assert_eq!(a.losses.keys().collect::<Vec<_>>(), b.losses.keys().collect::<Vec<_>>());
        for (name, a) in &a.losses {
            let b = b.losses[name];
            assert!((a - b).abs() < 2e-3 * a.abs().max(1e-3), "step {step}: {name} is {a} on the CPU, {b} on the GPU");
        }
    }
    drop(cpu);
});

#[test]
fn what_no_teacher_or_backbone_gives_is_refused_with_a_remedy() {
    let refused = |tables: &str, sets: &[&str], message: &str, help: &str| {
        let error = resolve(tables, sets).err().unwrap_or_else(|| panic!("{tables} is accepted")).to_string();
        assert!(error.contains(message) && error.contains(help), "{error}");
    };
    refused(
        "[losses.gram]",
        &[],
        "losses.gram: this loss learns from the teacher `gram`",
        "add a table [teachers.gram]",
    );
    refused(TWO, &["losses.gram.teacher=\"erly\""], "the teacher `erly`", "(there is `early`, `gram`)");
    refused(TWO, &["teachers.gram.crop_size=32"], "there is one size for all", "set teachers.gram.crop_size = 24");
    refused(
        TWO,
        &["teachers.gram.plugin=\"none\""],
        "teachers.gram: this policy means that there is no teacher",
        "remove",
    );
    refused("[losses.twice]", &[], "losses.twice: the parameter `weight` is declared twice", "fault of the plugin");
    let weakly = "losses.weakly: a view of this loss is of the augmentation `weak`";
    refused("[losses.weakly]", &[], weakly, "add a table [augmentations.weak]");
    refused(
        "[losses.inner]\nlayers = [4]",
        &[],
        "reads tokens after 4 blocks, and the backbone `vit` has 3",
        "earlier",
    );
    let convnext =
        ["backbone={ plugin = \"convnext\", dims = [8, 8, 8, 16], depths = [1, 1, 1, 1] }", "crops.global_size=32"];
    let sets = [&convnext[..], &["crops.local_size=32", "losses.inner.layers=[1]"]].concat();
    refused("[losses.inner]", &sets, "the backbone `convnext` gives none", "losses.inner.enabled = false");
}

#[test]
fn a_timeline_has_the_events_of_every_teacher() {
    let resolved = resolve(TWO, &[]).unwrap();
    let keys: Vec<String> = resolved.recipe.all_teachers().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["teacher", "teachers.early", "teachers.gram"]);
    let policy = resolved.recipe.all_teachers()[1].1.build(&mut ()).unwrap();
    assert!(!policy.active(At { step: 0, total: 6 }) && policy.active(At { step: 1, total: 6 }));
}
