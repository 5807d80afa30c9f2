//! Optimizers on a GPU: the CPU's numbers, in steps that are recorded, and runs that resume to the bit.

#[allow(dead_code)]
#[path = "../ops/optimizers/runs.rs"]
mod runs;

use dinolab_core::{DType, Device};
use dinolab_tests::gpu_test;
use runs::{
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped, distance,
    moments_that_begin_in_a_fork_count_updates_from_there, recipe, run, run_large, start, steps, ECHO, EIGHT_BIT,
    TABLES,
};

gpu_test!(updates_on_a_gpu_are_those_of_the_cpu, {
    let device: Device = "cuda".parse().unwrap();
    for table in TABLES.into_iter().chain([ECHO]) {
        let exact = run(table, Device::Cpu, DType::F64);
        let [whole, halves] = [DType::F32, DType::BF16].map(|dtype| run(table, device, dtype));
        // For features in bf16 weights are kept in halves, which changes none of their bits.
        assert!(table.contains("muon") || whole == halves, "{table}: f32 in halves has other bits");
        // In bf16 the iteration of Muon rounds, and little else does.
        for (run, tolerance) in [(whole, 1e-5), (halves, if table.contains("muon") { 2e-2 } else { 1e-5 })] {
            for (i, (found, exact)) in run.iter().zip(&exact).enumerate() {
                let off = distance(found, exact);
                assert!(off < tolerance, "{table}: buffer {i} is {off:e} from the CPU's");
            }
        }
    }
});

gpu_test!(updates_in_eight_bits_on_a_gpu_are_those_of_the_cpu, {
    let ([student, teacher], _) = run_large(EIGHT_BIT, Device::Cpu, DType::F32);
    let [whole, halves] = [DType::F32, DType::BF16].map(|dtype| run_large(EIGHT_BIT, "cuda".parse().unwrap(), dtype).0);
    assert!(whole == halves, "f32 in halves has other bits");
    for (found, exact) in whole.iter().zip([&student, &teacher]) {
        // Where the last bit of a sum differs, a number may become the neighbouring value.
        assert!(distance(found, exact) < 1e-4, "{:e}", distance(found, exact));
    }
});

gpu_test!(a_run_with_any_optimizer_resumes_to_the_bit_on_a_gpu, {
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped("cuda", &[TABLES[2], TABLES[4], EIGHT_BIT]);
});

gpu_test!(steps_with_any_optimizer_are_recorded_and_equal_the_cpu, {
    for table in [TABLES[2], TABLES[3], TABLES[4], EIGHT_BIT] {
        let of = |device: &str| {
            let (mut learner, pipeline) = start(&recipe(device, "f32", table));
            let losses = steps(&mut learner, &pipeline, 0..5);
            let recorded = (learner.eager_reason().map(String::from), learner.recorded_nodes().len());
            (losses, learner.weights().student.to_f64_vec(), recorded)
        };
        let ((gpu, student, recorded), (cpu, exact, _)) = (of("cuda"), of("cpu"));
        assert_eq!(recorded, (None, 1), "{table}");
        for (a, b) in gpu.iter().zip(&cpu) {
            assert!((a - b).abs() < 1e-3 * b.abs(), "{table}: {gpu:?}, {cpu:?}");
        }
        assert!(distance(&student, &exact) < 1e-3, "{table}: {:e}", distance(&student, &exact));
    }
});

gpu_test!(moments_of_what_is_new_in_a_fork_count_updates_from_there_on_a_gpu, {
    moments_that_begin_in_a_fork_count_updates_from_there("cuda");
});
