//! Optimizers against their statements in PyTorch (`tests/optimizers.py`: `torch.optim.AdamW`, `torch.optim.SGD`, and Muon,
//! which is held to `torch.optim.Muon` there), over several updates; and what holds for each of them.
//!
//! The statements need a Python with `torch`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, that test
//! says so and passes.

#[allow(dead_code)]
mod runs;

use dinolab_core::contract::{At, Optimizer};
use dinolab_core::params::Layout;
use dinolab_core::recipe::OptimizerEntry;
use dinolab_core::registry;
use dinolab_core::resolved::{cost, Resolved};
use dinolab_core::step::{Learner, Updates};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Device, Tensor};
use dinolab_tests::program;
use runs::{
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped, distance, entry, gradients, held, large,
    moments_that_begin_in_a_fork_count_updates_from_there, recipe, run, run_large, start, steps, updates, COMMON,
    DEPTH, ECHO, EIGHT_BIT, RECIPE, STEPS, TABLES,
};
use serde_json::json;

#[test]
fn weights_after_several_updates_are_those_of_pytorch() {
    let Some(python) = program::python("torch") else { return };
    let layout = contracts::parameters();
    let steps: Vec<Vec<f64>> = (0..STEPS).map(|step| gradients(&layout, step)).collect();
    let clips: Vec<Vec<f64>> = steps
        .iter()
        .map(|all| {
            let of = |module: &String| {
                let range = layout.range_of(&format!("{module}."));
                let norm = all[range].iter().map(|g| g * g).sum::<f64>().sqrt();
                (2.5 / (norm + 1e-6)).min(1.0)
            };
            layout.modules().iter().map(of).collect()
        })
        .collect();
    let mut cases = Vec::new();
    for table in TABLES {
        let (own, fresh) = (entry(table), updates(table, &layout, Device::Cpu, DType::F64));
        let plugin: Box<dyn Optimizer> = own.plugin.build(&mut ()).unwrap();
        let start = fresh.weights().student.to_f64_vec();
        let params: Vec<_> = layout
            .specs()
            .iter()
            .zip(fresh.rules())
            .map(|(spec, rule)| {
                let module = layout.modules().iter().position(|m| m == spec.module()).unwrap();
                let clipped = steps
                    .iter()
                    .zip(&clips)
                    .map(|(all, clip)| all[spec.range()].iter().map(|g| g * clip[module]).collect::<Vec<f64>>());
                let split = if plugin.adamw(spec).is_none() && own.plugin.name() == "muon" { spec.stacked } else { 1 };
                json!({
                    "name": spec.name, "shape": spec.shape, "start": start[spec.range()], "stacked": split,
                    "lr": 0.05 * rule.lr_multiplier, "weight_decay": if rule.decays { 0.3 } else { 0.0 },
                    "hidden": plugin.adamw(spec).is_none(), "gradients": clipped.collect::<Vec<_>>(),
                })
            })
            .collect();
        cases.push(json!({ "plugin": own.plugin.name(), "config": own.plugin.config(), "params": params }));
    }
    let folder = program::Folder::new();
    folder.write("cases.json", &serde_json::to_string(&cases).unwrap());
    let text = program::script(&python, "optimizers.py", &[&folder.path("cases.json")]);
    let theirs: Vec<std::collections::BTreeMap<String, Vec<f64>>> = serde_json::from_str(&text).expect("JSON");
    for (table, theirs) in TABLES.iter().zip(theirs) {
        let ours = &run(table, Device::Cpu, DType::F64)[0];
        for spec in layout.specs() {
            let off = distance(&ours[spec.range()], &theirs[&spec.name]);
            assert!(off < 1e-9, "{table}: {} is {off:e} from PyTorch's", spec.name);
        }
    }
}

#[test]
fn muon_takes_hidden_matrices_and_nothing_else() {
    let plugin: Box<dyn Optimizer> = entry("plugin = \"muon\"").plugin.build(&mut ()).unwrap();
    let taken = |layout: &Layout| {
        let own = layout.specs().iter().filter(|spec| plugin.adamw(spec).is_none());
        own.map(|spec| spec.name.clone()).collect::<Vec<_>>()
    };
    let hidden = ["backbone.qkv", "backbone.wide", "backbone.tall", "head.mlp"];
    assert_eq!(taken(&contracts::parameters()), hidden);
    // Of real models, by their names.
    let model = Learner::new(&recipe("cpu", "f32", "plugin = \"muon\"").recipe).unwrap();
    let found = taken(&model.model().layout);
    let parts = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"];
    let blocks = (0..2).flat_map(|i| parts.map(|part| format!("backbone.blocks.{i}.{part}")));
    let heads = ["dino_head", "ibot_head"].into_iter();
    let heads = heads.flat_map(|head| [0, 2, 4].map(|layer| format!("{head}.mlp.{layer}.weight")));
    assert_eq!(found, blocks.chain(heads).collect::<Vec<_>>());
    let qkv = model.model().layout.find("backbone.blocks.0.attn.qkv.weight").unwrap();
    assert_eq!(qkv.stacked, 3);
}

#[test]
fn a_direction_of_muon_is_near_an_orthogonal_matrix_of_the_size_of_adamws() {
    let layout = contracts::parameters();
    let spec = layout.find("backbone.wide").unwrap();
    let table = "plugin = \"muon\"\nlayerwise_decay = 1.0\nlr = 1.0\nweight_decay = 0.0";
    let entry: OptimizerEntry = toml::from_str(table).unwrap();
    let mut run = Updates::new(&entry, &layout, DEPTH, 1, (Device::Cpu, DType::F64)).unwrap();
    let matrix = |run: &Updates| run.weights().student.view(spec.offset, &spec.shape).unwrap().to_owned();
    let before = matrix(&run);
    run.update(0, &gradients(&layout, 0), 0.0).unwrap();
    let step = matrix(&run).sub(&before).unwrap().scale(1.0 / (0.2 * 8f64.sqrt())).unwrap();
    let gram = step.matmul_t(&step).unwrap().to_f64_vec();
    for (i, x) in gram.into_iter().enumerate() {
        // Singular values come within a third of 1.
        assert!((x - f64::from(u8::from(i % 6 == 0))).abs() < 0.45, "{i}: {x}");
    }
}

#[test]
fn every_optimizer_keeps_its_contract() {
    for table in TABLES {
        contracts::optimizer(&format!("{COMMON}{table}")).unwrap_or_else(|e| panic!("{table}: {e}"));
    }
    let shipped = |p: &&registry::PluginInfo| p.kind == "optimizer" && p.file.starts_with("plugins/");
    for plugin in registry::all().iter().filter(shipped) {
        assert!(TABLES.iter().any(|t| t.contains(&format!("\"{}\"", plugin.name))), "{} is not tried", plugin.name);
        contracts::registered("optimizer", plugin.name).unwrap();
    }
}

#[test]
fn an_optimizer_that_breaks_its_contract_is_told_so() {
    for (fault, said) in [
        ("one_moment", "leaves parameters to AdamW and keeps the moments [\"one\"]"),
        ("shape", "backbone.mask_token [1, 6] it gives a direction []"),
        ("too_far", "farther than `reach` says"),
        ("restless", "gradients of zero move a weight"),
    ] {
        let broken = contracts::optimizer(&format!("plugin = \"faulty\"\nfault = \"{fault}\"")).unwrap_err();
        assert!(broken.contains(said), "{fault}: {broken}");
    }
    let (mut learner, pipeline) = start(&recipe("cpu", "f32", "plugin = \"faulty\"\nfault = \"no_reach\""));
    let report = learner.step(0, &pipeline.step(0).unwrap().batches, false).unwrap();
    assert!(report.non_finite.expect("nothing bounds it").contains("the update of the weights"));
}

#[test]
fn tensors_that_are_handed_back_are_not_mixed_up() {
    let layout = contracts::parameters();
    let [student, _, last, before] = &run(ECHO, Device::Cpu, DType::F64)[..] else { panic!("four buffers") };
    let start = updates(ECHO, &layout, Device::Cpu, DType::F64).weights().student.to_f64_vec();
    let shrinks = (1.0 - 0.1f64).powi(STEPS as i32);
    for spec in layout.specs() {
        let shrunk: Vec<f64> = start[spec.range()].iter().map(|x| x * shrinks).collect();
        assert!(distance(&student[spec.range()], &shrunk) < 1e-12, "{}", spec.name);
        for (moment, step) in [(last, STEPS - 1), (before, STEPS - 2)] {
            assert_eq!(moment[spec.range()], gradients(&layout, step)[spec.range()], "{}", spec.name);
        }
    }
}

#[test]
fn nesterov_without_a_momentum_is_refused() {
    let refused = "plugin = \"sgd\"\nmomentum = 0.0\nnesterov = true";
    let said = Resolved::from_text(&format!("{RECIPE}{refused}\n")).unwrap_err().to_string();
    assert!(said.contains("optimizer: nesterov") && said.contains("optimizer.momentum = 0.9"), "{said}");
}

#[test]
fn a_run_with_any_optimizer_resumes_to_the_bit() {
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped("cpu", &["", TABLES[2], TABLES[3], TABLES[4], EIGHT_BIT]);
}

#[test]
fn eight_bits_change_large_matrices_by_little_and_nothing_else() {
    let ([student, teacher], run) = run_large(EIGHT_BIT, Device::Cpu, DType::F32);
    let ([exact, exact_teacher], _) = run_large("plugin = \"adamw\"\neps = 1e-3", Device::Cpu, DType::F32);
    let start = updates(EIGHT_BIT, &large(), Device::Cpu, DType::F32).weights().student.to_f64_vec();
    for (found, exact) in [(&student, &exact), (&teacher, &exact_teacher)] {
        for (rule, spec) in run.rules().iter().zip(large().specs()) {
            let (found, exact, start) = (&found[spec.range()], &exact[spec.range()], &start[spec.range()]);
            let moved: Vec<f64> = exact.iter().zip(start).map(|(x, y)| x - y).collect();
            let off = exact.iter().zip(found).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
                / moved.iter().map(|x| x * x).sum::<f64>().sqrt();
            match rule.name.ends_with("large") || rule.name.ends_with("larger") {
                true => assert!(off > 1e-4 && off < 0.03, "{}: {off}", rule.name),
                false => assert_eq!(found, exact, "{}", rule.name),
            }
        }
    }
}

#[test]
fn eight_bits_go_with_adamw_in_f32() {
    for (table, says) in [
        ("plugin = \"muon\"\nmoments = \"8bit\"", "moments in eight bits are AdamW's, and the optimizer is `muon`"),
        ("plugin = \"sgd\"\nmoments = \"8bit\"", "moments in eight bits are AdamW's, and the optimizer is `sgd`"),
        ("moments = \"4bit\"", "4bit"),
    ] {
        let said = Resolved::from_text(&format!("{RECIPE}{table}\n")).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
    let said =
        Resolved::from_text(&format!("precision = \"f64\"\n{RECIPE}moments = \"8bit\"\n")).unwrap_err().to_string();
    assert!(said.contains("moments in eight bits go with weights in f32"), "{said}");
}

#[test]
fn a_run_counts_the_moments_that_its_optimizer_keeps() {
    let memory = |table: &str| {
        let cost = cost::cost(&recipe("cpu", "f32", table).recipe).unwrap();
        let of = |name: &str| cost.memory.iter().find(|(part, _)| part.starts_with(name)).map_or(0.0, |(_, b)| *b);
        of("optimizer") / of("student")
    };
    assert_eq!([TABLES[0], TABLES[1], TABLES[3], TABLES[4]].map(memory), [2.0, 1.0, 0.0, 2.0]);
    let of_tiny = |moments: &str| {
        let text = format!("name = \"s\"\nsteps = 9\n[backbone]\nplugin = \"vit\"\npreset = \"vit_s16\"\n[data]\nplugin = \"scenes\"\n[losses.dino]\n[teacher]\nplugin = \"ema\"\n[optimizer]\nmoments = \"{moments}\"\n");
        let cost = cost::cost(&Resolved::from_text(&text).unwrap().recipe).unwrap();
        cost.memory.iter().find(|(part, _)| part.starts_with("optimizer")).map(|(_, bytes)| *bytes).unwrap()
    };
    let (f32, eight) = (of_tiny("f32"), of_tiny("8bit"));
    // All but vectors and the 65,536 prototypes of 256 numbers.
    let vectors = 4.0 * 2.0 * 65536.0 * 256.0;
    let expected = vectors + (f32 - vectors) * 260.0 / 1024.0;
    assert!((eight / expected - 1.0).abs() < 0.01, "{eight} of {f32}, expected {expected}");
}

#[test]
fn gradients_beyond_an_optimizers_reach_are_not_taken() {
    let resolved = recipe("cpu", "f32", "plugin = \"sgd\"\nclip_grad = 0.0");
    let (mut learner, pipeline) = start(&resolved);
    steps(&mut learner, &pipeline, 0..1);
    let moment = Device::Cpu.with(|| Tensor::full(&[learner.weights().student.len()], DType::F32, 3e38)).unwrap();
    learner.weights_mut().moments[0].copy_from(&moment).unwrap();
    let before = held(&learner);
    let report = learner.step(1, &pipeline.step(1).unwrap().batches, false).unwrap();
    assert!(report.non_finite.expect("3e38 is near the end").contains("the update of the weights"));
    assert!(held(&learner) == before);
}

#[test]
fn a_momentum_may_be_a_schedule() {
    let table = "plugin = \"sgd\"\nmomentum = { plugin = \"linear_warmup\", peak = 0.8, warmup_steps = 4 }";
    let plugin = entry(table).plugin.build(&mut ()).unwrap();
    let at = |step| plugin.numbers(At { step, total: 10 }, 1)[0];
    assert_eq!((at(0), at(2), at(9)), (0.0, 0.4, 0.8));
    assert_eq!(plugin.moments(), ["momentum_buffer"]);
}

#[test]
fn moments_of_what_is_new_in_a_fork_count_updates_from_there() {
    moments_that_begin_in_a_fork_count_updates_from_there("cpu");
}
