use super::*;
use crate::recipe::test_plugins::{with, RECIPE};
use crate::resolved::Resolved;

fn files(named: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in named {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let last = folder.path().join(named.last().unwrap().0);
    (folder, last)
}

fn sets(sets: &[&str]) -> Overrides {
    Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false }
}

fn number(raw: &RawRecipe, key: &str) -> f64 {
    let value = raw.get(key).unwrap().to_num().unwrap();
    value.to_f64().unwrap_or_else(|| value.to_i128().unwrap() as f64)
}

#[test]
fn later_layers_win_and_the_origin_is_remembered() {
    let (_folder, file) = files(&[
        ("base/root.toml", &with("weight = 1\n[optimizer]\nlr = 1\neps = 1\nclip_grad = 1\nlayerwise_decay = 0.1")),
        ("base/mid.toml", "extends = \"root.toml\"\n[optimizer]\neps = 2\nclip_grad = 2\nlayerwise_decay = 0.2"),
        ("top.toml", "extends = \"base/mid.toml\"\n[optimizer]\nclip_grad = 3\nlayerwise_decay = 0.3"),
    ]);
    let vars = vec![("optimizer.layerwise_decay".to_string(), "0.4".to_string())];
    let raw = RawRecipe::load(file).unwrap().with_env(vars).unwrap();
    let raw = raw.with_sets(&["losses.test_cls.weight=5".into()]).unwrap();
    let values = ["lr", "eps", "clip_grad", "layerwise_decay"].map(|k| number(&raw, &format!("optimizer.{k}")));
    assert_eq!(values, [1.0, 2.0, 3.0, 0.4]);
    assert_eq!(number(&raw, "losses.test_cls.weight"), 5.0);
    assert!(raw.origin("optimizer.eps").to_string().ends_with("mid.toml:3"));
    assert_eq!(raw.origin("optimizer.layerwise_decay").to_string(), "environment DINOLAB_OPTIMIZER__LAYERWISE_DECAY");
    assert_eq!(raw.origin("losses.test_cls.weight").to_string(), "--set losses.test_cls.weight=5");
    assert_eq!(raw.set_by("optimizer.betas"), Origin::Default);
}

#[test]
fn the_base_is_kept_for_a_comparison() {
    let (_folder, file) = files(&[("root.toml", "steps = 1"), ("top.toml", "extends = \"root.toml\"\nsteps = 2")]);
    let raw = RawRecipe::load(file).unwrap();
    assert_eq!((number(&raw, "steps"), number(raw.base().unwrap(), "steps")), (2.0, 1.0));
}

#[test]
fn another_plugin_drops_the_keys_of_the_one_below() {
    let text = with("weight = 2\ntemperature = 0.5");
    let raw = RawRecipe::from_text(&text).unwrap();
    let other = raw.clone().with(&sets(&["losses.test_cls.plugin=test_spread"])).unwrap();
    assert!(other.get("losses.test_cls.temperature").is_none());
    assert_eq!(other.set_by("losses.test_cls.temperature"), Origin::Default);
    assert_eq!(number(&other, "losses.test_cls.weight"), 2.0, "the weight is the recipe's, not the plugin's");
    Resolved::of(other).unwrap();
    let same = raw.with(&sets(&["losses.test_cls.plugin=test_cls"])).unwrap();
    assert_eq!(number(&same, "losses.test_cls.temperature"), 0.5);
}

#[test]
fn keys_beside_a_plugin_are_kept_in_any_order() {
    let raw = || RawRecipe::from_text(&with("weight = 2\ntemperature = 0.5")).unwrap();
    let keys = ["losses.test_cls.temperature=3", "losses.test_cls.plugin=test_cls", "losses.test_cls.weight=4"];
    let below = || raw().with(&sets(&["losses.test_cls.plugin=test_spread"])).unwrap();
    for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]] {
        let pairs = order.map(|i| keys[i].split_once('=').unwrap());
        let variables = pairs.map(|(key, text)| (key.to_string(), text.to_string()));
        let values = pairs.map(|(key, text)| (key, parse_value(text).unwrap()));
        for layered in [
            below().with_sets(&order.map(|i| keys[i].to_string())).unwrap(),
            below().with_env(variables.to_vec()).unwrap(),
            below().with_overrides("arm", values.iter().map(|(key, value)| (*key, value))).unwrap(),
        ] {
            let [temperature, weight] =
                ["temperature", "weight"].map(|k| number(&layered, &format!("losses.test_cls.{k}")));
            assert_eq!((temperature, weight), (3.0, 4.0), "{order:?}");
        }
    }
    // A table that is given whole before a plugin is below it.
    let table = "losses.test_cls={ plugin = \"test_cls\", temperature = 3 }";
    let other = raw().with(&sets(&[table, "losses.test_cls.plugin=test_spread"])).unwrap();
    assert!(other.get("losses.test_cls.temperature").is_none());
}

#[test]
fn a_bare_number_replaces_a_scheduler_and_back() {
    let raw = RawRecipe::from_text(&with("weight = { plugin = \"test_ramp\", to = 3 }")).unwrap();
    let flat = raw.clone().with(&sets(&["losses.test_cls.weight=2"])).unwrap();
    assert_eq!(number(&flat, "losses.test_cls.weight"), 2.0);
    assert_eq!(flat.set_by("losses.test_cls.weight.to"), Origin::Default);
    let table = flat.with(&sets(&["losses.test_cls.weight={ plugin = \"test_ramp\" }"])).unwrap();
    Resolved::of(table).unwrap();
}

#[test]
fn set_takes_toml_and_bare_words() {
    let raw = RawRecipe::from_text("").unwrap();
    let raw = raw.with(&sets(&["name=my-run", "a=[1, 2]", "b=true", "c=1e-3", "d=\"q\"", "e = 3"])).unwrap();
    let text = |key| raw.get(key).unwrap().as_str().map(String::from);
    assert_eq!((text("name"), text("d")), (Some("my-run".into()), Some("q".into())));
    assert_eq!(raw.get("a").unwrap().as_array().unwrap().len(), 2);
    assert_eq!(raw.get("b").unwrap().to_bool(), Some(true));
    assert_eq!((number(&raw, "c"), number(&raw, "e")), (1e-3, 3.0));
}

#[test]
fn arms_override_with_a_name() {
    let value = toml::Value::from(4);
    let raw = RawRecipe::from_text(RECIPE).unwrap().with_overrides("arm `b`", [("losses.test_cls.weight", &value)]);
    assert_eq!(raw.unwrap().origin("losses.test_cls.weight").to_string(), "arm `b`");
}

#[test]
fn an_override_that_changes_nothing_is_a_warning() {
    let resolved = Resolved::of(RawRecipe::from_text(RECIPE).unwrap().with(&sets(&["steps=100"])).unwrap()).unwrap();
    let expected = "--set steps=100: steps: changes nothing: the recipe says the same already";
    assert_eq!(resolved.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
}

fn message(result: Result<RawRecipe>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn broken_files_and_overrides_say_where() {
    let broken = message(RawRecipe::from_text("name = \"a\"\nsteps = = 3\n"));
    assert!(broken.starts_with("recipe.toml:2:9: "), "{broken}");
    let raw = RawRecipe::from_text("").unwrap();
    assert_eq!(
        message(raw.clone().with(&sets(&["steps"]))),
        "--set steps: expected `key=value`\n  help: for example --set optimizer.lr=1e-3"
    );
    let list = message(raw.clone().with(&sets(&["a=[1, "])));
    assert!(list.starts_with("--set a=[1, : a: `[1,` is not TOML: "), "{list}");
    assert!(message(raw.with(&sets(&["a..b=1"]))).contains("`a..b` is not a dotted key"));
    let dotted = message(RawRecipe::from_text("[losses.\"a.b\"]\n"));
    assert!(dotted.starts_with("recipe.toml:1:9: losses.a.b: a name cannot be empty or contain a dot"), "{dotted}");
}

#[test]
fn missing_and_circular_files_are_named() {
    let (folder, file) = files(&[
        ("tiny.toml", RECIPE),
        ("lost.toml", "\nextends = \"tinny.toml\""),
        ("a.toml", "extends = \"b.toml\""),
        ("b.toml", "extends = \"a.toml\""),
    ]);
    let tinny = message(RawRecipe::load(folder.path().join("tinny.toml")));
    assert!(tinny.starts_with("cannot read ") && tinny.contains("tinny.toml: No such file"), "{tinny}");
    assert!(tinny.ends_with("/tiny.toml?"), "{tinny}");
    let lost = message(RawRecipe::load(folder.path().join("lost.toml")));
    assert!(lost.contains("lost.toml:2:11: extends: cannot read") && lost.contains("did you mean"), "{lost}");
    let circle = message(RawRecipe::load(file));
    assert!(circle.contains("a.toml:1:11: extends:") && circle.contains("b.toml extends itself"), "{circle}");
    let empty = message(RawRecipe::load(folder.path()));
    assert!(empty.contains("is a folder without a recipe.toml"), "{empty}");
}

#[test]
fn a_child_that_repeats_its_base_is_warned_of() {
    let base = with("weight = { plugin = \"test_ramp\", to = 3 }\n[optimizer]\nbetas = [0.9, 0.99]");
    let child = "extends = \"root.toml\"\nsteps = 100.0\n[losses.test_cls]\nplugin = \"test_cls\"\n\
        weight = { plugin = \"test_ramp\", to = 3 }\n[optimizer]\nbetas = [0.9, 0.99]\neps = 1e-6\n[backbone]\nplugin = \"test_matrix\"\ndim = 8";
    let (_folder, file) = files(&[("root.toml", &base), ("top.toml", &child.replace("100.0", "100"))]);
    let raw = RawRecipe::load(file).unwrap();
    let keys: Vec<&str> = raw.warnings().iter().map(|w| w.key.as_str()).collect();
    assert_eq!(keys, ["losses.test_cls.weight.to", "optimizer.betas", "steps"]);
    let said = raw.warnings()[2].to_string();
    assert!(said.contains("top.toml:2:") && said.contains("root.toml says the same already"), "{said}");
}

#[test]
fn keys_of_another_plugin_are_no_repetition() {
    let base = with("[losses.other]\nplugin = \"test_cls\"\nweight = 2");
    let child = "extends = \"root.toml\"\n[losses.other]\nplugin = \"test_spread\"\ntop_k = 1";
    let (_folder, file) = files(&[("root.toml", &base), ("top.toml", child)]);
    assert_eq!(RawRecipe::load(file).unwrap().warnings(), []);
}

#[test]
fn text_in_another_encoding_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (file, near) = (folder.path().join("utf16.toml"), folder.path().join("utf8.toml"));
    std::fs::write(near, RECIPE).unwrap();
    let wide = |bytes: fn(u16) -> [u8; 2], mark: bool| -> Vec<u8> {
        let mark = mark.then_some(0xfeff);
        mark.into_iter().chain(RECIPE.encode_utf16()).flat_map(bytes).collect()
    };
    for bytes in [wide(u16::to_le_bytes, true), wide(u16::to_be_bytes, true), wide(u16::to_le_bytes, false)] {
        std::fs::write(&file, bytes).unwrap();
        let said = message(RawRecipe::load(&file));
        assert!(
            said.contains("is text in UTF-16\n  help: save it as UTF-8") && !said.contains("did you mean"),
            "{said}"
        );
    }
    std::fs::write(&file, b"name = \"caf\xe9\"").unwrap();
    assert!(message(RawRecipe::load(&file)).contains("is not text in UTF-8"));
    std::fs::write(&file, format!("\u{feff}{RECIPE}")).unwrap();
    assert_eq!(RawRecipe::load(&file).unwrap().get("name").unwrap().as_str(), Some("small"));
}
