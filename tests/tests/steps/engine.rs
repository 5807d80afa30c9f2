//! Nothing is computed that nobody asked for, and the optimizer treats parameters as the reference does.

use std::sync::atomic::Ordering;

use dinolab_core::resolved::Resolved;
use dinolab_core::step::Learner;
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::gpu_test;

use super::lab::*;

#[test]
fn the_teacher_runs_only_when_something_asks_for_it() {
    let start_of = BASE.find("[backbone]").unwrap();
    let end_of = BASE.find("[data]").unwrap();
    let base = format!("{}[backbone]\nplugin = \"watched\"\n{}", &BASE[..start_of], &BASE[end_of..]);
    let looks = |losses: &str, health: bool| {
        let resolved = resolve(&format!("{base}\n{losses}"), "device = \"cpu\"").unwrap_or_else(|e| panic!("{e}"));
        let (mut learner, pipeline) = start(&resolved);
        let before = LOOKED.load(Ordering::Relaxed);
        learner.step(0, &pipeline.step(0).unwrap().batches, health).unwrap();
        LOOKED.load(Ordering::Relaxed) - before
    };
    assert_eq!(looks("[losses.koleo]", false), 0, "KoLeo looks at the student alone");
    assert_eq!(looks("[losses.koleo]", true), 1, "health is measured on the teacher");
    assert_eq!(looks("[losses.koleo]\n[losses.dino]\nhead = { hidden = 4, bottleneck = 4, prototypes = 8 }", false), 1);
    let gram = "[losses.gram]\n[teachers.gram]\nplugin = \"gram_anchor\"";
    assert_eq!(looks(gram, false), 1, "the Gram teacher, and no other");
}

#[test]
fn names_do_not_decide_how_the_optimizer_treats_a_parameter() {
    let rules = |name: &str| {
        let resolved = recipe(
            "device = \"cpu\"",
            &format!("[losses.{name}]\nplugin = \"dino\"\nhead = {{ hidden = 8, bottleneck = 8, prototypes = 8 }}"),
        );
        let learner = Learner::new(&resolved.recipe).unwrap();
        let heads = learner.param_rules().iter().filter(|rule| rule.name.starts_with(&format!("{name}_head.")));
        heads.map(|r| (r.lr_multiplier, r.decays, r.last_layer)).collect::<Vec<_>>()
    };
    let plain = rules("dino");
    assert!(plain.iter().any(|(_, decays, _)| *decays) && plain.iter().filter(|(.., last)| *last).count() == 1);
    for name in ["norm_matching", "gamma_bias", "patch_embed_loss", "last_layer"] {
        assert_eq!(rules(name), plain, "{name}");
    }
}

/// The reference's rule, which goes by names: right for its own.
#[test]
fn shipped_models_are_treated_as_the_reference_treats_them() {
    let backbones = [
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nlayer_scale = 1.0\nuntie_cls_and_patch_norms = true",
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nffn = \"swiglu\"\npos_encoding = { plugin = \"learned_absolute\" }",
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nnorm = \"rms_norm\"\npos_encoding = { plugin = \"relative_bias_box\" }",
        "plugin = \"convnext\"\nlayer_scale = 1e-6",
    ];
    for backbone in backbones {
        let text = format!(
            "name = \"x\"\nsteps = 1\ndevice = \"cpu\"\n[backbone]\n{backbone}\n[data]\nplugin = \"scenes\"\n[crops]\n\
             global_size = 64\nlocal_size = 32\n[losses.dino]\nhead = {{ hidden = 8, bottleneck = 8, prototypes = 8 }}\n\
             [teacher]\nplugin = \"ema\"\n[optimizer]\nlayerwise_decay = 1.0"
        );
        let resolved = Resolved::from_text(&text).unwrap_or_else(|e| panic!("{backbone}: {e}"));
        let learner = Learner::new(&resolved.recipe).unwrap();
        for rule in learner.param_rules() {
            let name = &rule.name;
            let plain = name.ends_with("bias") || name.contains("norm") || name.contains("gamma");
            assert_eq!(rule.decays, !plain, "{name}");
            assert_eq!(rule.last_layer, name.contains("last_layer"), "{name}");
            assert_eq!(rule.lr_multiplier == 0.2, name.contains("patch_embed"), "{name}: {}", rule.lr_multiplier);
        }
    }
}

#[test]
fn a_head_may_have_no_bias_and_the_last_layers_a_rate_of_their_own() {
    let heads = "[losses.dino]\nhead = { hidden = 24, bottleneck = 16, prototypes = 40, bias = false }";
    let moved = |rate: &str| {
        let resolved = recipe(&format!("device = \"cpu\"\noptimizer.weight_decay = 0.0\n{rate}"), heads);
        let (mut learner, pipeline) = start(&resolved);
        let layout = learner.model().layout.clone();
        assert!(layout.specs().iter().all(|s| !s.name.starts_with("dino_head.mlp") || s.name.ends_with("weight")));
        let of = |learner: &Learner| {
            ["dino_head.last_layer.weight", "dino_head.mlp.0.weight"].map(|name| {
                let spec = layout.find(name).expect("a head's parameter");
                let values = learner.weights().student.view(spec.offset, &spec.shape).unwrap().to_f64_vec();
                Tensor::from_slice(&values, &spec.shape).unwrap()
            })
        };
        let before = of(&learner);
        step(&mut learner, &pipeline, 0);
        let after = of(&learner);
        [0, 1].map(|i| distance(&after[i], &before[i]))
    };
    let [last, first] = moved("");
    let [slow, same] = moved("optimizer.last_layer_lr = 1e-4");
    assert_eq!(first, same);
    assert!((last / slow - 10.0).abs() < 1e-2, "{last} and {slow}");
    let scheduled = "optimizer.last_layer_lr = { plugin = \"linear_warmup\", peak = 1e-3, warmup_steps = 10 }";
    assert!(moved(scheduled)[0] < last);
    assert_eq!(moved("optimizer.last_layer_lr = 1e-4\noptimizer.freeze_last_layer_steps = 1")[0], 0.0);
}

#[test]
fn turning_gram_on_changes_nothing_that_the_student_sees_or_learns_first() {
    let gram = "[losses.gram]\nenabled = ENABLED\n[teachers.gram]\nplugin = \"gram_anchor\"\ncrop_size = 24";
    for first in ["", "crops.teacher_without_distortion = true\n", "crops.local_from_global = true\n"] {
        let of = |enabled: &str| {
            let resolved = recipe(
                &format!("device = \"cpu\"\n{first}"),
                &format!("{HEADS}\n{}", gram.replace("ENABLED", enabled)),
            );
            let (mut learner, pipeline) = start(&resolved);
            let batch = pipeline.step(0).unwrap().batches.remove(0);
            assert_eq!(batch.teacher.is_some(), enabled == "true");
            let report = learner.step(0, std::slice::from_ref(&batch), false).unwrap();
            let pixels = [Some(&batch.global), batch.local.as_ref()].map(|t| t.expect("crops").as_bytes().to_vec());
            (pixels, report.losses["loss/dino"].to_bits(), report.losses["loss/ibot"].to_bits())
        };
        assert!(of("true") == of("false"), "{first}");
    }
}

fn without_a_teacher_none_is_kept(device: &str, precisions: [&str; 2]) {
    let bare = BASE.replace("[teacher]\nplugin = \"ema\"\nmomentum = 0.9\n", "");
    let alone = "[losses.koleo]\n[losses.vicreg]\nprojector = { hidden = 8, output = 4, layers = 1 }\n";
    for precision in precisions {
        let sets = &format!("device = \"{device}\"\nprecision = \"{precision}\"");
        let resolved = resolve(&format!("{bare}\n{alone}"), sets).unwrap_or_else(|e| panic!("{e}"));
        let (mut learner, pipeline) = start(&resolved);
        (0..3).for_each(|i| drop(step(&mut learner, &pipeline, i)));
        assert!(learner.weights().teacher.is_none());
        assert!(learner.content(3).unwrap().model.iter().all(|(name, _)| name.starts_with("student.")));
        // With a teacher that keeps nothing of itself it would be the same.
        let with = resolve(&format!("{bare}\n[teacher]\nplugin = \"ema\"\nmomentum = 0.0\n{alone}"), sets).unwrap();
        let (mut follows, pipeline) = start(&with);
        (0..3).for_each(|i| drop(step(&mut follows, &pipeline, i)));
        let pixels = pipeline.step(3).unwrap().batches[0].global.cast(learner.features_dtype()).unwrap();
        let [own, taught] = [&learner, &follows].map(|l| l.teacher_features(&pixels).unwrap().cls.to_f64_vec());
        assert_eq!(own, taught);
        let resumed = resumed(&resolved, &learner, 3);
        assert_eq!(held(&resumed), held(&learner));
    }
}

#[test]
fn without_a_teacher_the_student_is_evaluated() {
    without_a_teacher_none_is_kept("cpu", ["f32", "f64"]);
    let bare = BASE.replace("[teacher]\nplugin = \"ema\"\nmomentum = 0.9\n", "");
    let error = resolve(&format!("{bare}\n{HEADS}"), "device = \"cpu\"").expect_err("refused").to_string();
    for part in ["losses.dino", "losses.ibot", "learns from a teacher", "plugin = \"ema\""] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

gpu_test!(without_a_teacher_the_student_is_evaluated_on_the_gpu, {
    without_a_teacher_none_is_kept("cuda", ["f32", "bf16"]);
});
