//! Students of one frozen teacher side by side on a GPU.

use std::path::Path;
use std::sync::Arc;

use dinolab_core::data::Loader;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Peers, SharedTeacher};
use dinolab_core::train::{self, Outcome, RunOptions, Silent, StudentRun};
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::gpu_test;

use super::step::RECIPE;

/// The small recipe, taught by the run in `folder/teacher`.
fn student(folder: &Path, name: &str, dim: usize) -> Resolved {
    let teacher = folder.join("teacher");
    let frozen = format!("plugin = \"frozen\"\ncheckpoint = {teacher:?}");
    let text = RECIPE.replace("plugin = \"ema\"", &frozen).replace("dim = 32", &format!("dim = {dim}"));
    let text = text.replace("name = \"small\"\nsteps = 40", &format!("name = \"{name}\"\nsteps = 6"));
    Resolved::from_text(&format!("device = \"cuda\"\nprecision = \"bf16\"\n{text}")).unwrap_or_else(|e| panic!("{e}"))
}

fn options(out: &Path) -> RunOptions {
    RunOptions {
        out: out.to_path_buf(),
        resume: false,
        stop: Arc::default(),
        revision: String::new(),
        save_within: None,
    }
}

fn teach(folder: &Path) {
    let text = format!("device = \"cpu\"\n{}", RECIPE.replace("steps = 40", "steps = 1"));
    let resolved = Resolved::from_text(&text).unwrap_or_else(|e| panic!("{e}"));
    train::run(&resolved, &options(&folder.join("teacher")), &mut Silent).unwrap();
}

gpu_test!(students_side_by_side_have_the_bits_that_they_have_alone, {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    teach(folder);
    let recipes = [("wide", 32), ("narrow", 16)].map(|(name, dim)| student(folder, name, dim));
    let outs = |place: &str| ["wide", "narrow"].map(|name| folder.join(place).join(name));
    for (resolved, out) in recipes.iter().zip(outs("alone")) {
        train::run(resolved, &options(&out), &mut Silent).unwrap();
    }
    let options = outs("together").map(|out| options(&out));
    let mut observers = [Silent, Silent];
    let students = recipes.iter().zip(&options).zip(&mut observers);
    let students = students.map(|((resolved, options), observer)| StudentRun { resolved, options, observer });
    for ended in train::run_students(students.collect()).unwrap() {
        assert!(matches!(ended.unwrap(), Outcome::Finished(_)));
    }
    for (alone, together) in outs("alone").iter().zip(outs("together")) {
        let weights = |run: &Path| std::fs::read(run.join("checkpoints/step-00000006/model.safetensors")).unwrap();
        assert!(weights(alone) == weights(&together), "{}", together.display());
    }
});

gpu_test!(a_shared_teacher_sees_a_step_once_and_students_steps_are_recorded_without_it, {
    let folder = tempfile::tempdir().unwrap();
    teach(folder.path());
    let resolved = student(folder.path(), "student", 32);
    let run = |shared: Option<&Arc<SharedTeacher>>, students: usize| {
        let peers = Peers { teacher: shared, ..Peers::default() };
        let mut learners: Vec<Learner> =
            (0..students).map(|_| Learner::new_with(&resolved.recipe, peers).unwrap()).collect();
        let (data, _) = train::datasets(&resolved.recipe).unwrap();
        let loader = Loader::new(data, train::loader_spec(&resolved.recipe, &learners[0], 0)).unwrap();
        for (step, made) in loader.enumerate() {
            let batches = made.unwrap().batches;
            for learner in &mut learners {
                learner.step(step as u64, &batches, step == 4).unwrap();
            }
        }
        let of = |learner: &Learner| -> (Tensor, Vec<usize>) {
            assert_eq!(learner.eager_reason(), None);
            (learner.weights().student.to_host().unwrap(), learner.recorded_nodes())
        };
        learners.iter().map(of).collect::<Vec<_>>()
    };
    let alone = run(None, 1);
    let shared = Arc::new(SharedTeacher::default());
    let together = run(Some(&shared), 2);
    assert_eq!(shared.passes(), 6, "one a step, for two students");
    for (weights, nodes) in &together {
        assert_eq!(weights.as_bytes(), alone[0].0.as_bytes());
        assert!(nodes[0] > 100 && nodes[0] < alone[0].1[0], "{nodes:?} of {:?}", alone[0].1);
    }
});
