//! Losses keep their state from one part of a batch to the next, and parts train as the whole does.

use dinolab_core::data::{Batch, Masks};
use dinolab_core::step::Learner;
use dinolab_core::DType;
use dinolab_plugins as _;
use dinolab_tests::gpu_test;

use super::lab::*;

fn a_headless_loss_keeps_its_state(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"");
    // A second loss with a state, and a head: buffers of one must not become those of the other.
    let losses = "[losses.running_mean]\n[losses.dino]\nhead = { hidden = 24, bottleneck = 16, prototypes = 24 }\n\
        centering = \"softmax\"";
    let resolved = recipe(&first, losses);
    let (mut whole, pipeline) = start(&resolved);
    let (mut first, _) = start(&resolved);
    for i in 0..5 {
        step(&mut whole, &pipeline, i);
    }
    for i in 0..3 {
        step(&mut first, &pipeline, i);
    }
    let state = |learner: &Learner, name: &str| -> Vec<f64> {
        let found = learner.content(0).unwrap().optimizer.into_iter().find(|(n, _)| n == name);
        found.unwrap_or_else(|| panic!("no {name}")).1.to_f64_vec()
    };
    assert_eq!(state(&first, "state.running_mean.calls"), [3.0]);
    assert!(state(&first, "state.running_mean.mean").iter().any(|x| *x != 0.0));
    assert!(state(&first, "state.dino.center") != state(&first, "state.running_mean.mean"));
    let mut second = resumed(&resolved, &first, 3);
    for i in 3..5 {
        step(&mut second, &pipeline, i);
    }
    assert!(held(&second) == held(&whole), "a resumed run has the bits of an uninterrupted one");
    assert_eq!(state(&second, "state.running_mean.calls"), [5.0]);
}

#[test]
fn a_loss_without_a_head_keeps_its_state_and_resumes_with_it() {
    a_headless_loss_keeps_its_state("cpu");
}

gpu_test!(a_loss_without_a_head_keeps_its_state_on_a_gpu, {
    a_headless_loss_keeps_its_state("cuda");
});

#[test]
fn every_part_of_a_batch_sees_the_state_that_the_one_before_left() {
    let resolved = recipe("device = \"cpu\"\nbatch.micro_batches = 4", "[losses.running_mean]");
    let (mut learner, pipeline) = start(&resolved);
    step(&mut learner, &pipeline, 0);
    let calls = learner.content(0).unwrap().optimizer.into_iter().find(|(name, _)| name == "state.running_mean.calls");
    assert_eq!(calls.expect("a state").1.to_f64_vec(), [4.0]);
}

#[test]
fn a_step_without_a_masked_patch_says_which_key_to_raise() {
    let resolved = recipe("device = \"cpu\"", HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let batches = pipeline.step(0).unwrap().batches;
    let bare = |batch: &Batch| Batch {
        masks: Masks::from_rows(&vec![vec![false; 16]; 16], DType::F32).unwrap(),
        ..batch.clone()
    };
    let bare: Vec<Batch> = batches.iter().map(bare).collect();
    let error = learner.step(0, &bare, false).unwrap_err().to_string();
    assert!(error.contains("masking.probability") && error.contains("`ibot`"), "{error}");
}

#[test]
fn parts_of_a_batch_train_as_the_whole_batch_does() {
    for (precision, centering, tolerance) in
        [("f64", "sinkhorn_knopp", 1e-10), ("f64", "softmax", 1e-10), ("f32", "sinkhorn_knopp", 1e-4)]
    {
        let train = |parts: usize| {
            let first = format!("device = \"cpu\"\nprecision = \"{precision}\"\nbatch.micro_batches = {parts}");
            let heads = HEADS.replace("}\n", &format!("}}\ncentering = \"{centering}\"\n"));
            let resolved = recipe(&first, &heads);
            let (mut learner, pipeline) = start(&resolved);
            let mut losses = Vec::new();
            for i in 0..6 {
                let report = step(&mut learner, &pipeline, i);
                losses.push(["loss/dino", "loss/ibot"].map(|name| report.losses[name]));
            }
            (
                learner.weights().student.to_host().unwrap(),
                learner.weights().teacher.as_ref().unwrap().to_host().unwrap(),
                losses,
            )
        };
        let (student, teacher, losses) = train(1);
        for parts in [2, 4, 8] {
            let (s, t, l) = train(parts);
            let off = distance(&s, &student).max(distance(&t, &teacher));
            assert!(off < tolerance, "{precision}, {centering}: {parts} parts are {off:e} from the whole");
            for (own, whole) in l.iter().flatten().zip(losses.iter().flatten()) {
                assert!((own - whole).abs() < tolerance * 100.0 * whole.abs(), "{parts} parts: {own}, {whole}");
            }
        }
    }
}
