use super::*;
use crate::contract::At;
use crate::recipe::describe::Guide;
use crate::recipe::test_plugins::{with, RECIPE};

fn refused(text: &str) -> String {
    Resolved::from_text(text).unwrap_err().to_string()
}

/// `RECIPE` has 9 lines, so `more` begins at line 10, inside `[losses.test_cls]`.
fn refused_with(more: &str) -> String {
    refused(&with(more))
}

fn set(text: &str) -> Result<Resolved> {
    let overrides = Overrides { sets: vec![text.into()], env: false };
    Resolved::of(RawRecipe::from_text(RECIPE).unwrap().with(&overrides).unwrap())
}

#[test]
fn every_default_is_filled_in() {
    let resolved = Resolved::from_text(RECIPE).unwrap();
    assert_eq!(resolved.value["backbone"]["pos_encoding"]["rescale"], 2.0);
    assert_eq!(resolved.value["losses"]["test_cls"]["weight"], 1.0);
    assert_eq!(resolved.value["crops"]["mean"], serde_json::json!([0.485, 0.456, 0.406]));
    assert_eq!(resolved.recipe.optimizer.lr.at(At { step: 0, total: 100 }), 1e-3);
}

#[test]
fn saved_toml_loads_to_the_same_recipe() {
    let text = with(
        "weight = { plugin = \"test_ramp\", to = 2 }\nhead = { prototypes = 16 }\n\
         [losses.compared_a]\nplugin = \"test_compared\"\nenabled = false\n\
         [on_non_finite]\nskip = 3\n[optimizer]\neps = 1e-12\n[probes.test_knn]\nevery = 10\n",
    );
    let first = Resolved::from_text(&format!("init_from = \"runs/a \\\"b\\\"\"\n{text}")).unwrap();
    let saved = first.to_toml();
    let second = Resolved::from_text(&saved).unwrap();
    assert_eq!(first.recipe, second.recipe);
    assert_eq!(first.hash, second.hash);
    assert!(saved.contains("\nsteps = 100                              # recipe.toml:3\n"), "{saved}");
    assert!(saved.contains("\neps = 1e-12"), "{saved}");
    assert!(saved.contains("\n[losses.test_cls.weight]\n"), "{saved}");
}

#[test]
fn the_hash_is_that_of_everything_but_the_name() {
    let hash = |set_: &str| set(set_).unwrap().hash;
    assert_eq!(hash("name=other"), hash("steps=100"));
    assert_ne!(hash("seed=1"), hash("seed=2"));
}

#[test]
fn a_misspelt_key_at_the_top_names_its_neighbour() {
    let expected = "recipe.toml:1:1: stpes: unknown key\n  |\n1 | stpes = 1\n  | ^^^^^\n  help: did you mean `steps`?";
    let message = refused(&format!("stpes = 1\n{RECIPE}"));
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn a_misspelt_key_of_a_plugin_names_all_keys() {
    assert_eq!(
        refused_with("temprature = 1"),
        "recipe.toml:10:1: losses.test_cls.temprature: unknown key\n   |\n10 | temprature = 1\n   | ^^^^^^^^^^\n  \
         help: did you mean `temperature`? known: enabled, head, plugin, temperature, weight"
    );
    assert!(refused_with("enabeld = false").contains("did you mean `enabled`?"));
}

#[test]
fn a_misspelt_key_of_a_nested_scheduler_has_its_whole_path() {
    assert_eq!(
        refused_with("temperature = { plugin = \"test_ramp\", form = 1 }"),
        "recipe.toml:10:39: losses.test_cls.temperature.form: unknown key\n   |\n\
         10 | temperature = { plugin = \"test_ramp\", form = 1 }\n   |                                       ^^^^\n  \
         help: did you mean `from`? known: from, plugin, to"
    );
    let weight = refused_with("weight = { plugin = \"test_rmap\" }");
    assert!(weight.starts_with("recipe.toml:10:21: losses.test_cls.weight.plugin: there is no scheduler"), "{weight}");
    assert!(weight.contains("did you mean `test_ramp`?"), "{weight}");
}

#[test]
fn a_misspelt_key_of_a_nested_plugin_has_its_whole_path() {
    let message = refused_with("[backbone.pos_encoding]\nplugin = \"test_box\"\nrescle = 1");
    assert!(message.starts_with("recipe.toml:12:1: backbone.pos_encoding.rescle: unknown key"), "{message}");
    assert!(message.ends_with("did you mean `rescale`? known: plugin, rescale"), "{message}");
}

#[test]
fn misspelt_overrides_name_the_override() {
    let message = set("losses.test_cls.wieght=2").unwrap_err().to_string();
    let expected =
        "--set losses.test_cls.wieght=2: losses.test_cls.wieght: unknown key\n  help: did you mean `weight`?";
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn wrong_types_are_told_in_words() {
    let cases = [
        (
            "weight = \"abc\"",
            "losses.test_cls.weight: expected a number or scheduler, -1000000 to 1000000, found the text \"abc\"",
        ),
        ("enabled = 1", "losses.test_cls.enabled: expected `true` or `false`, found `1`"),
        ("[crops]\nlocal_count = -1", "crops.local_count: expected a whole number, 0 to 1000, found `-1`"),
        ("[crops]\nlocal_count = 1.5", "crops.local_count: expected a whole number, 0 to 1000, found `1.5`"),
        ("[crops]\nlocal_scale = [0.5]", "crops.local_scale: expected a list of 2 values, found 1 of them"),
        ("[crops]\nlocal_scale = [0.5, \"x\"]", "crops.local_scale.1: expected a number, found the text \"x\""),
        ("weight = {}", "losses.test_cls.weight.plugin: missing key"),
        ("[optimizer]\nclip_grad = inf", "optimizer.clip_grad: expected a finite number"),
        ("[batch]\nsize = []", "batch.size: expected a whole number, 1 to 1000000000, found a list"),
    ];
    for (more, expected) in cases {
        let message = refused_with(more);
        let (place, rest) = message.split_once(": ").unwrap();
        assert!(place.starts_with("recipe.toml:1"), "{message}");
        assert!(rest.starts_with(expected), "{message}");
    }
}

#[test]
fn choices_are_listed_and_cannot_be_numbers() {
    let message = refused(&format!("precision = \"half\"\n{RECIPE}"));
    assert!(message.starts_with("recipe.toml:1:13: precision: `half` is not one of the choices"), "{message}");
    assert!(message.ends_with("known: auto, bf16, f32, f64, tf32"), "{message}");
    let message = refused(&format!("precision = 1\n{RECIPE}"));
    assert!(
        message.contains("precision: expected \"auto\" or \"bf16\" or \"tf32\" or \"f32\" or \"f64\", found `1`"),
        "{message}"
    );
    let message = refused(&format!("device = \"gpu\"\n{RECIPE}"));
    assert!(message.contains("`gpu` is not a device: choose auto, cpu, cuda or cuda:N"), "{message}");
}

#[test]
fn a_key_that_nothing_read_is_an_error() {
    let message = refused_with("[losses.test_careless]\nnumber = 1\nnmuber = 2");
    assert!(message.starts_with("recipe.toml:12:1: losses.test_careless.nmuber: nothing reads this key"), "{message}");
}

#[test]
fn several_problems_come_together_in_the_order_of_the_file() {
    let message = refused(
        "steps = \"many\"\nbatchsize = 3\n[backbone]\nplugin = \"test_matrx\"\n[data]\nplugin = \"test_greys\"\ncuont = 1\n\
         [losses.a]\n",
    );
    let starts: Vec<&str> = message.lines().filter(|l| l.contains(": ") && !l.starts_with(' ')).collect();
    assert_eq!(
        starts,
        [
            "name: missing in recipe.toml",
            "recipe.toml:1:9: steps: expected a whole number, 1 to 1000000000000000, found the text \"many\"",
            "recipe.toml:2:1: batchsize: unknown key",
            "recipe.toml:4:10: backbone.plugin: there is no backbone plugin `test_matrx`",
            "recipe.toml:7:1: data.cuont: unknown key",
            "recipe.toml:8:9: losses.a.plugin: there is no loss plugin `a`",
        ],
        "{message}"
    );
}

#[test]
fn a_misspelt_key_is_not_missing_as_well() {
    let message = refused(&RECIPE.replace("steps = 100", "stpes = 100"));
    assert!(message.starts_with("recipe.toml:2:1: stpes: unknown key"), "{message}");
    assert_eq!(message.matches("did you mean").count(), 1, "{message}");
    assert!(!message.contains("missing"), "{message}");
}

#[test]
fn impossible_combinations_name_key_and_remedy() {
    let cases = [
        ("[crops]\nglobal_size = 100", "recipe.toml:11:15: crops.global_size: 100 pixels are not a whole number of patches of 16", "use 96 or 112"),
        ("[crops]\nlocal_size = 8", "recipe.toml:11:14: crops.local_size: a crop of 8 pixels is smaller than a patch of 16", "use at least 16"),
        ("[batch]\nsize = 6\nmicro_batches = 4", "recipe.toml:12:17: batch.micro_batches: 6 images cannot be split into 4 equal parts", "use 3 or 6"),
        ("[losses.test_compared]", "recipe.toml:10:9: losses.test_compared: this loss learns from the teacher `slow`, and the recipe has none of that name", "[teachers.slow]"),
        ("[batch]\nsize = 2\nmicro_batches = 2\n[losses.test_spread]", "recipe.toml:13:9: losses.test_spread: needs at least 2 images of a micro-batch; there is 1", "raise batch.size"),
        ("[losses.test_masked]\n[masking]\nshare = 0", "recipe.toml:12:9: masking.share: no patch is masked", "use at least 0.1, or set losses.test_masked.enabled = false"),
        ("[masking]\nshare = 1.5", "recipe.toml:11:9: masking.share: has to be 0 to 1, not 1.5", ""),
        ("[masking]\nshrae = 1.5", "recipe.toml:11:1: masking.shrae: unknown key", "did you mean `share`"),
        ("[masking]\nratio = [0.5, 0.1]", "recipe.toml:11:9: masking.ratio: has to be [least, most]", ""),
        ("[crops]\nlocal_scale = [0.0, 0.1]", "recipe.toml:11:15: crops.local_scale: number 1 has to be above 0, at most 1, not 0", ""),
        ("enabled = false", "recipe.toml:9:2: losses: no loss is enabled", "losses.test_cls.enabled = true"),
        ("[backbone.pos_encoding]\nplugin = \"test_box\"\n[teachers.slow]\nplugin = \"test_slow\"\ncrop_size = 40\n[losses.test_compared]", "recipe.toml:14:13: teachers.slow.crop_size: 40 pixels", "use 32 or 48"),
        ("weight = { plugin = \"test_ramp\", to = nan }", "recipe.toml:10:39: losses.test_cls.weight.to: expected a finite number", ""),
        ("head = { prototypes = 1 }", "recipe.toml:10:23: losses.test_cls.head.prototypes: has to be 2 to 2147483647, not 1", ""),
        ("[optimizer]\nlr = { plugin = \"test_ramp\", to = -1 }", "recipe.toml:11:1: optimizer.lr: is -0.01 at step 1, and has to be 0 to 100", ""),
    ];
    for (more, expected, help) in cases {
        let message = refused_with(more);
        assert!(message.starts_with(expected) && message.contains(help), "{message}");
    }
    let heads = set("backbone.heads=3").unwrap_err().to_string();
    assert_eq!(heads.lines().next(), Some("--set backbone.heads=3: backbone: width 8 is not 3 equal heads"));
    let steps = set("steps=0").unwrap_err().to_string();
    assert_eq!(steps, "--set steps=0: steps: has to be 1 to 1000000000000000, not 0");
}

#[test]
fn an_unused_teacher_is_a_warning() {
    let resolved = Resolved::from_text(&with("[teachers.slow]\nplugin = \"test_slow\"")).unwrap();
    let warning = resolved.warnings[0].to_string();
    assert!(warning.starts_with("recipe.toml:10:11: teachers.slow: no loss learns from this teacher"), "{warning}");
    let kept =
        Resolved::from_text(&with("[teachers.slow]\nplugin = \"test_slow\"\n[losses.test_compared]\nenabled = false"));
    assert_eq!(kept.unwrap().warnings, [], "ready for an arm that enables the loss");
}

#[test]
fn a_probe_that_needs_labels_refuses_data_without() {
    let resolved = Resolved::from_text(&with("[probes.test_knn]")).unwrap();
    let data = resolved.recipe.data.build(&mut crate::contract::DataContext { seed: 0 }).unwrap();
    let message = resolved.check_data(data.as_ref()).unwrap_err().to_string();
    assert!(message.starts_with("recipe.toml:10:9: probes.test_knn: needs image labels"), "{message}");
    assert!(message.contains("set probes.test_knn.enabled = false"), "{message}");
}

#[test]
fn names_that_no_folder_can_have_are_refused() {
    let names = ["", ".hidden", "a/b", "a\\b", "line\nbreak", "nul\0", "\u{7f}"].map(String::from);
    for name in names.into_iter().chain(["x".repeat(256), "ü".repeat(128)]) {
        let text = RECIPE.replace("\"small\"", &toml::Value::from(name.clone()).to_string());
        let message = refused(&text);
        assert!(message.contains("name: "), "{name:?}: {message}");
        assert!(!message.contains('\0') && !message.contains('\u{7f}'), "it is shown as it can be read: {message:?}");
    }
    for name in ["x".repeat(255), "ü".repeat(127), "with space".into(), "Größe-1_a.b".into()] {
        Resolved::from_text(&RECIPE.replace("small", &name)).unwrap();
    }
    let loss = refused_with("[losses.\"a/b\"]\nplugin = \"test_cls\"");
    assert!(loss.contains("losses.a/b: `a/b` cannot be the name of a folder"), "{loss}");
}

#[test]
fn a_precision_that_the_named_device_does_not_have_is_refused() {
    for (device, precision, fits) in [
        ("cpu", "bf16", false),
        ("cpu", "tf32", false),
        ("cpu", "f64", true),
        ("cuda:1", "f64", false),
        ("cuda", "bf16", true),
        ("auto", "bf16", true),
    ] {
        let text = format!("device = \"{device}\"\nprecision = \"{precision}\"\n{RECIPE}");
        let found = Resolved::from_text(&text);
        assert_eq!(found.is_ok(), fits, "{device} {precision}: {found:?}");
    }
}

#[test]
fn a_masking_table_that_names_no_plugin_means_the_default_of_its_kind() {
    let value = |more: &str| Resolved::from_text(&with(more)).unwrap().value["masking"].clone();
    assert_eq!(value("")["plugin"], "test_first");
    assert_eq!(value("[masking]\nshare = 0.25")["share"], 0.25);
    // Another plugin drops the keys of the one that was not named.
    let other = set("masking.plugin=test_a_nothing").unwrap();
    assert_eq!(other.value["masking"], serde_json::json!({ "plugin": "test_a_nothing" }));
    let base = RawRecipe::from_text(&with("[masking]\nshare = 0.25")).unwrap();
    let overrides = Overrides { sets: vec!["masking.plugin=test_a_nothing".into()], env: false };
    assert_eq!(Resolved::of(base.with(&overrides).unwrap()).unwrap().value["masking"], other.value["masking"]);
    let raw = RawRecipe::from_text(&with("[masking]\nshare = 0.25")).unwrap();
    let key = Guide::default().key(raw.value(), "masking.share").expect("a key of the default");
    assert_eq!((key.reader.as_str(), key.kind.as_str()), ("masking plugin `test_first`", "number, 0 to 1"));
}

#[test]
fn crops_have_keys_of_their_own_beside_those_of_the_augmentation() {
    let crops = |more: &str| Resolved::from_text(&with(&format!("[crops]\n{more}")));
    let value = crops("nested = true\nlocal_count = 3\nmean = [0.5, 0.5, 0.5]").unwrap().value["crops"].clone();
    assert_eq!((&value["plugin"], &value["nested"]), (&"test_whole".into(), &true.into()));
    assert_eq!((&value["local_count"], &value["global_size"]), (&3.into(), &256.into()));
    let resolved = Resolved::from_text(&with("")).unwrap();
    assert_eq!(Resolved::from_text(&resolved.to_toml()).unwrap().value, resolved.value);
    let misspelt = refused_with("[crops]\nloacl_count = 3");
    assert!(misspelt.contains("crops.loacl_count: unknown key") && misspelt.contains("`local_count`"), "{misspelt}");
    let misspelt = refused_with("[crops]\nnestde = true");
    assert!(misspelt.contains("crops.nestde: unknown key") && misspelt.contains("`nested`"), "{misspelt}");
    let text = refused_with("[crops]\nglobal_size = \"large\"");
    assert!(text.contains("recipe.toml:11:15: crops.global_size: expected a whole number, 1 to 16384"), "{text}");
    let raw = RawRecipe::from_text(&with("[crops]\nnested = true")).unwrap();
    let reader = |key: &str| Guide::default().key(raw.value(), key).expect("a key").reader;
    assert_eq!(reader("crops.local_count"), "augmentation");
    assert_eq!(reader("crops.nested"), "augmentation plugin `test_whole`");
}

#[test]
fn an_augmentation_refuses_sizes_that_it_cannot_cut() {
    let crops = |more: &str| with(&format!("[crops]\nnested = true\n{more}"));
    let whole = refused(&crops("local_size = 512"));
    assert!(whole.contains("crops: 512 is more than 256") && whole.contains("set crops.nested = false"), "{whole}");
    let sizes = |a: usize, b: usize| {
        format!(
            "resolutions = [{{ share = 1, global_size = 64, local_size = 64 }}, \
            {{ share = 1, global_size = {a}, local_size = {b} }}]"
        )
    };
    let message = refused(&crops(&sizes(64, 80)));
    assert!(message.contains("crops.resolutions: 80 is more than 64"), "{message}");
    Resolved::from_text(&crops(&sizes(80, 64))).unwrap();
    Resolved::from_text(&crops(&format!("{}\nlocal_count = 0", sizes(64, 80)))).unwrap();
}

#[test]
fn sizes_that_no_machine_has_name_the_key() {
    let message = set("backbone.dim=2000000000000000").unwrap_err().to_string();
    assert!(message.contains("backbone.dim: with 2000000000000000 the run needs about"), "{message}");
    let message = set("backbone.dim=9223372036854775806").unwrap_err().to_string();
    assert!(message.contains("backbone.dim: with 9223372036854775806"), "{message}");
    let images = "steps=1000000000000000";
    let counted = RawRecipe::from_text(RECIPE).unwrap();
    let overrides = Overrides { sets: vec![images.into(), "batch.size=1000000".into()], env: false };
    let message = Resolved::of(counted.with(&overrides).unwrap()).unwrap_err().to_string();
    assert!(message.contains("more images than can be counted"), "{message}");
}

#[test]
fn what_this_machine_cannot_hold_is_known_before_a_run() {
    let small = Resolved::from_text(RECIPE).unwrap();
    assert!(fit(&small.recipe, crate::Device::Cpu, 1).unwrap().is_none());
    let large = set("losses.test_cls.head.prototypes=2000000000").unwrap();
    let large = large.raw.with(&Overrides { sets: vec!["losses.test_cls.head.bottleneck=2000".into()], env: false });
    let large = Resolved::of(large.unwrap()).unwrap();
    let fit = fit(&large.recipe, crate::Device::Cpu, 1).unwrap().unwrap();
    assert_eq!(fit.key, "losses.test_cls.head.prototypes");
    assert!(fit.message.starts_with("with 2000000000 the run needs about"), "{fit:?}");
}

#[test]
fn keys_of_what_is_off_are_told() {
    let off = with("[losses.test_spread]\nenabled = false");
    let typed = |text: &str, sets: &[&str]| {
        let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
        Resolved::of(RawRecipe::from_text(text).unwrap().with(&overrides).unwrap()).unwrap()
    };
    let warned = typed(&off, &["losses.test_spread.top_k=3"]).warnings;
    let expected =
        "--set losses.test_spread.top_k=3: losses.test_spread.top_k: is off, so nothing reads losses.test_spread.top_k";
    assert!(warned[0].to_string().starts_with(expected), "{warned:?}");
    // A file may keep it for a suite.
    let kept = typed(&format!("{off}top_k = 3\n"), &[]);
    assert_eq!(kept.warnings, []);
    assert!(kept.notes[0]
        .to_string()
        .contains("losses.test_spread: is off, so nothing reads losses.test_spread.top_k"));
    let slow = with("[losses.test_compared]\nenabled = false\n[teachers.slow]\nplugin = \"test_slow\"\ncrop_size = 64");
    let notes = typed(&slow, &[]).notes;
    assert!(notes[0].to_string().contains("so nothing reads teachers.slow.crop_size"), "{notes:?}");
    assert_eq!(typed(&slow, &["losses.test_compared.enabled=true"]).notes, []);
    assert_eq!(typed(RECIPE, &[]).notes, []);
}
