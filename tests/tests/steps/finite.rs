//! Nothing that is not finite gets into the weights, and a loss that jumps is not learned from.

use dinolab_core::checkpoint;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::Learner;
use dinolab_core::{DType, Device, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;

use super::lab::*;

/// Steps 0 to 2, of which the second is refused for `what`: nothing of it stays, and the third is taken.
fn the_second_step_is_refused(resolved: &Resolved, what: &str) {
    let (mut learner, pipeline) = start(resolved);
    assert_eq!(step(&mut learner, &pipeline, 0).non_finite, None);
    let before = held(&learner);
    let report = step(&mut learner, &pipeline, 1);
    let said = report.non_finite.unwrap_or_else(|| panic!("step 1 is taken: {:?}", report.grad_norms));
    assert!(said.contains(what), "{said}");
    assert!(held(&learner) == before, "a step that is refused changes nothing");
    assert_eq!(learner.skipped(), 1);
    for i in 2..5 {
        assert_eq!(step(&mut learner, &pipeline, i).non_finite, None, "step {i}");
    }
    assert!(held(&learner) != before);
    let finite = |(name, tensor): &(String, Tensor)| {
        let all = tensor.to_f64_vec().iter().all(|x| x.is_finite());
        assert!(all, "{name}");
    };
    let content = learner.content(5).unwrap();
    content.model.iter().chain(&content.optimizer).for_each(finite);
}

fn refusals(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"\noptimizer.clip_grad = 0.0");
    let once = |value: f64| format!("{{ plugin = \"once\", at_step = 1, value = {value:e} }}");
    let jump = |value: f64| format!("[losses.size]\nscale = {}", once(value));
    the_second_step_is_refused(&recipe(&first, &jump(1e20)), "loss/size");
    // The gradient is a number, and its square is none.
    the_second_step_is_refused(&recipe(&first, &jump(3e12)), "update of the weights by a gradient of length");
    let state = format!("[losses.growing_state]\ngrowth = {}", once(1e20));
    the_second_step_is_refused(&recipe(&first, &state), "the state memory of growing_state");
}

#[test]
fn a_step_that_would_leave_the_finite_numbers_changes_nothing_and_the_next_is_taken() {
    refusals("cpu");
}

gpu_test!(a_step_that_would_leave_the_finite_numbers_changes_nothing_on_a_gpu, {
    refusals("cuda");
});

gpu_test!(a_recorded_step_keeps_the_numbers_of_the_host_that_it_reads, {
    let after = |count: usize| {
        let first = "device = \"cuda\"\nprecision = \"f32\"";
        let (mut learner, pipeline) = start(&recipe(first, &format!("[losses.crowd]\nat_step = 2\ncount = {count}")));
        for i in 0..6 {
            // The third runs eagerly, as its health is measured.
            learner.step(i, &pipeline.step(i).unwrap().batches, i == 2).unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!((learner.eager_reason(), learner.recorded_nodes().len()), (None, 1));
        held(&learner)
    };
    // More than are kept on the device; then fewer, which the replays that come after must not write to.
    let (many, few) = (after(5000), after(3000));
    assert!(many == few, "numbers of another step came where those of the recorded one were");
    assert!(after(0) == few, "a replay wrote to numbers of the host");
});

fn moments_too_large_for_the_rates(device: &str) {
    let resolved = recipe(&format!("device = \"{device}\"\nprecision = \"f32\""), HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let moments = Device::Cpu.with(|| Tensor::full(learner.weights().moments[0].shape(), DType::F32, 1e35)).unwrap();
    learner.weights_mut().moments[0].copy_from(&moments).unwrap();
    let before = held(&learner);
    let said = step(&mut learner, &pipeline, 0).non_finite.expect("1e35 / 1e-8 is not finite");
    assert!(said.contains("the update of the weights"), "{said}");
    assert!(held(&learner) == before);
}

#[test]
fn moments_that_are_too_large_for_the_rates_do_not_reach_the_weights() {
    moments_too_large_for_the_rates("cpu");
}

gpu_test!(moments_that_are_too_large_for_the_rates_do_not_reach_the_weights_on_a_gpu, {
    moments_too_large_for_the_rates("cuda");
});

#[test]
fn weights_that_are_not_finite_are_named_before_they_are_used() {
    let resolved = recipe("device = \"cpu\"", HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let name = "backbone.blocks.1.norm1.weight";
    let at = learner.model().layout.find(name).expect("a parameter").offset;
    for (bad, role) in [(f32::NAN, "student"), (f32::INFINITY, "teacher")] {
        let put = |learner: &mut Learner, x: f32| {
            let weights = learner.weights_mut();
            let flat = if role == "student" { &mut weights.student } else { weights.teacher.as_mut().unwrap() };
            let mut numbers = flat.to_host().unwrap().to_owned();
            let before = std::mem::replace(&mut numbers.as_mut_slice::<f32>()[at + 3], x);
            flat.set(&numbers).unwrap();
            before
        };
        let good = put(&mut learner, bad);
        let folder = tempfile::tempdir().unwrap();
        checkpoint::save(folder.path(), &learner.content(1).unwrap(), checkpoint::Keep::newest(1)).unwrap();
        let error = learner.step(0, &pipeline.step(0).unwrap().batches, false).unwrap_err().to_string();
        assert!(error.contains(&format!("{role}.{name}")), "{error}");
        let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
        let error = Learner::from_checkpoint(&resolved.recipe, &checkpoint).err().expect("a NaN in it").to_string();
        assert!(error.contains(&format!("{role}.{name}")), "{error}");
        put(&mut learner, good);
    }
}

#[test]
fn an_eps_that_is_nothing_in_the_types_of_the_step_is_refused_by_name() {
    for eps in ["1e-46", "0.0", "1e-39", "-1.0"] {
        let sets = format!("device = \"cpu\"\noptimizer.eps = {eps}");
        let error = match resolve(&format!("{BASE}\n{HEADS}"), &sets) {
            Ok(resolved) => Learner::new(&resolved.recipe).err().expect("refused").to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("optimizer.eps"), "{error}");
    }
}

/// Learning goes on with the bits of a run that knows nothing of jumps, but for the step that jumps.
fn a_jump_is_not_taken(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"");
    let losses = "[losses.size]\nweight = { plugin = \"once\", at_step = 6, value = 50.0 }\n[on_spike]\nfactor = 2.0\nwindow = 4";
    let resolved = recipe(&first, losses);
    let (mut learner, pipeline) = start(&resolved);
    for i in 0..6 {
        let report = step(&mut learner, &pipeline, i);
        assert!(report.spike.is_none() && report.non_finite.is_none(), "step {i}");
    }
    let before: Vec<_> = held(&learner).into_iter().filter(|(name, _)| !name.starts_with("spike.")).collect();
    let mut again = resumed(&resolved, &learner, 6);
    let report = step(&mut learner, &pipeline, 6);
    let limit = report.spike.expect("fifty times the loss");
    assert!(report.losses["loss/total"] > limit, "{limit}");
    let after: Vec<_> = held(&learner).into_iter().filter(|(name, _)| !name.starts_with("spike.")).collect();
    assert!(after == before, "a step that is not taken changes nothing");
    assert_eq!((learner.skipped(), learner.spikes()), (1, 1));
    assert_eq!(step(&mut again, &pipeline, 6).spike, Some(limit), "a resumed run compares with the same losses");
    for i in 7..9 {
        assert_eq!(step(&mut learner, &pipeline, i).spike, None);
        step(&mut again, &pipeline, i);
    }
    assert!(held(&again) == held(&learner));
    let mut late = resumed(&resolved, &learner, 9);
    assert_eq!((late.skipped(), late.spikes()), (1, 1));
    step(&mut learner, &pipeline, 9);
    step(&mut late, &pipeline, 9);
    assert!(held(&late) == held(&learner));
}

#[test]
fn a_loss_that_jumps_is_not_learned_from_and_a_resumed_run_agrees() {
    a_jump_is_not_taken("cpu");
}

gpu_test!(a_loss_that_jumps_is_not_learned_from_on_a_gpu, {
    a_jump_is_not_taken("cuda");
});
