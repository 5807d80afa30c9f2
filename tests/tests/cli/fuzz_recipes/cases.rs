//! Random recipes from the schema: which keys there are, and values that are right, just not right, or absurd.

use dinolab_core::recipe::{describe, Overrides, RawRecipe};
use dinolab_core::registry;
use dinolab_core::resolved::Resolved;
use dinolab_core::rng::{Rng, Stream};
use serde_json::Value as Json;

/// A run of a fraction of a second, with every part that a recipe may have.
pub const BASE: &str = r#"
name = "fuzz"
steps = 3
device = "cpu"
[backbone]
plugin = "vit"
preset = "vit_tiny_test"
dim = 32
depth = 2
heads = 2
[data]
plugin = "scenes"
size = 48
count = 24
held_out = 8
objects = [1, 3]
[batch]
size = 4
loader_threads = 1
[crops]
global_size = 32
local_size = 16
local_count = 2
[losses.dino]
head = { hidden = 32, bottleneck = 16, prototypes = 32 }
[losses.ibot]
head = { hidden = 32, bottleneck = 16, prototypes = 32 }
[losses.koleo]
weight = 0.1
[losses.gram]
weight = 2.0
[teacher]
plugin = "ema"
[teachers.gram]
plugin = "gram_anchor"
refresh = { every = 2 }
crop_size = 48
[optimizer]
lr = 1e-3
[log]
every = 1
tensorboard = false
[probes.knn]
k = 3
train_samples = 8
test_samples = 4
[probes.linear_segmentation]
train_samples = 8
test_samples = 4
iterations = 5
[probes.patch_similarity]
samples = 4
[probes.cls_patch_cosine]
samples = 4
"#;

/// How wild values are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    /// Anything at all.
    Wild,
    /// In range, though often at its edge.
    Sound,
}

/// One random recipe: what is set on top of [`BASE`].
#[derive(Clone, Debug)]
pub struct Case {
    pub sets: Vec<String>,
}

impl Case {
    /// As one would type it to see the same.
    pub fn command(&self) -> String {
        let quoted = self.sets.iter().map(|set| format!(" --set '{set}'"));
        quoted.collect()
    }

    pub fn resolve(&self) -> dinolab_core::Result<Resolved> {
        let overrides = Overrides { sets: self.sets.clone(), env: false };
        Resolved::of(RawRecipe::from_text(BASE)?.with(&overrides)?)
    }
}

/// A key and what the schema says of it.
#[derive(Clone, Debug)]
struct Key {
    name: String,
    schema: Json,
}

/// All keys of [`BASE`] with some plugins chosen in place of its own.
#[derive(Debug)]
struct Choice {
    /// `backbone.plugin=..`, and the keys without which that is none.
    sets: Vec<String>,
    keys: Vec<Key>,
}

/// Makes cases.
#[derive(Debug)]
pub struct Cases {
    seed: u64,
    choices: Vec<Choice>,
}

impl Cases {
    pub fn new(seed: u64) -> Self {
        let schema = describe::schema();
        let mut choices = vec![Vec::new()];
        let kinds = [
            ("backbone", "backbone"),
            ("pos_encoding", "backbone.pos_encoding"),
            ("augmentation", "crops"),
            ("masking", "masking"),
            ("optimizer", "optimizer"),
        ];
        for (kind, key) in kinds {
            let plugins = registry::all().into_iter().filter(|p| p.kind == kind);
            choices.extend(plugins.map(|p| vec![format!("{key}.plugin={}", p.name)]));
        }
        for (set, more) in [
            ("teacher.plugin=frozen", vec!["teacher.checkpoint=nowhere"]),
            ("data.plugin=image_folder", vec!["data.path=nowhere"]),
            ("losses.dino.centering=softmax", vec!["losses.ibot.centering=softmax"]),
            ("losses.gram.tokens=masked", vec!["losses.gram.log_parts=true"]),
            ("backbone.ffn=swiglu", vec!["backbone.norm=rms_norm"]),
            ("batch.micro_batches=2", vec![]),
            ("crops.local_from_global=true", vec![]),
        ] {
            choices.push([set].into_iter().chain(more).map(String::from).collect());
        }
        choices.extend(other_losses());
        let choice = |sets: Vec<String>| {
            let case = Case { sets: sets.clone() };
            // A backbone may need other sizes than the base's; its keys are its keys all the same.
            let mut value = serde_json::to_value(RawRecipe::from_text(BASE).unwrap().value()).unwrap();
            if let Ok(resolved) = case.resolve() {
                value = resolved.value;
            } else if let Some(plugin) = sets[0].strip_prefix("backbone.plugin=") {
                value["backbone"] = serde_json::json!({ "plugin": plugin });
            }
            let mut keys = Vec::new();
            list(&schema, &value, "", &mut keys);
            Choice { sets, keys }
        };
        Self { seed, choices: choices.into_iter().map(choice).collect() }
    }

    pub fn keys(&self) -> usize {
        let mut names: Vec<&str> = self.choices.iter().flat_map(|c| &c.keys).map(|k| k.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    /// Case `i`.
    pub fn case(&self, i: u64, mood: Mood) -> Case {
        let rng = &mut Rng::new(self.seed, Stream::Probe, i, 0);
        let choice = if rng.chance(0.4) { &self.choices[rng.below(self.choices.len())] } else { &self.choices[0] };
        let mut sets = choice.sets.clone();
        for _ in 0..1 + rng.below(3) {
            let key = &choice.keys[rng.below(choice.keys.len())];
            sets.push(format!("{}={}", key.name, value(rng, &key.schema, mood, 0)));
        }
        Case { sets }
    }
}

/// Every registered loss that [`BASE`] does not have, at a size that trains in no time.
fn other_losses() -> Vec<Vec<String>> {
    let small = [
        ("byol", "projector={ hidden = 32, output = 16, layers = 2 }"),
        ("byol", "predictor_hidden=32"),
        ("vicreg", "projector={ hidden = 32, output = 32, layers = 2 }"),
        ("barlow_twins", "projector={ hidden = 32, output = 32, layers = 2 }"),
        ("info_nce", "projector={ hidden = 32, output = 16, layers = 2 }"),
        ("sigreg", "projector={ hidden = 32, output = 16, layers = 2 }"),
        ("online_linear", "classes=4"),
    ];
    let losses = registry::all().into_iter().filter(|p| p.kind == "loss");
    let others = losses.filter(|p| !BASE.contains(&format!("[losses.{}]", p.name)));
    let sets = |name: &str| {
        let own = small.iter().filter(|(loss, _)| *loss == name).map(|(loss, set)| format!("losses.{loss}.{set}"));
        std::iter::once(format!("losses.{name}.weight=0.1")).chain(own).collect()
    };
    others.map(|p| sets(p.name)).collect()
}

/// All keys of the tables that `value` has, those too that it does not say.
fn list(schema: &Json, value: &Json, path: &str, keys: &mut Vec<Key>) {
    let schema = table(schema, value, path);
    for (key, inside) in schema["properties"].as_object().into_iter().flatten() {
        let name = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        // Other files than this one are another test's.
        if ["extends", "init_from", "backbone.weights"].contains(&name.as_str()) {
            continue;
        }
        match &value[key] {
            table @ Json::Object(_) if inside.get("x-schedule").is_none() => list(inside, table, &name, keys),
            Json::Null if ["losses", "probes"].contains(&path) => {}
            _ => keys.push(Key { name, schema: inside.clone() }),
        }
    }
}

/// Of several alternatives the one for this table.
fn table<'a>(schema: &'a Json, value: &Json, path: &str) -> &'a Json {
    let plugin = value["plugin"].as_str().unwrap_or(path.rsplit('.').next().unwrap_or_default());
    let all = describe::alternatives(schema);
    let named = all.iter().find(|s| s.get("x-kind").is_some() && s["title"] == plugin);
    let default = all.iter().find(|s| s.get("x-default").is_some());
    named.or(default).or(all.iter().find(|s| s.get("properties").is_some())).copied().unwrap_or(schema)
}

/// Types of TOML, and what is no number to most programs.
const ABSURD: [&str; 22] = [
    "nan",
    "inf",
    "-inf",
    "0",
    "-0.0",
    "-1",
    "1e308",
    "-1e308",
    "5e-324",
    "1e-46",
    "1e39",
    "1e30",
    "4294967296",
    "9223372036854775807",
    "-9223372036854775808",
    "2147483648",
    "1e12",
    "1000000000000",
    "\"text\"",
    "true",
    "[]",
    "{}",
];

/// A value as TOML.
fn value(rng: &mut Rng, schema: &Json, mood: Mood, depth: usize) -> String {
    if mood == Mood::Wild && rng.chance(0.35) {
        return ABSURD[rng.below(ABSURD.len())].into();
    }
    let all = describe::alternatives(schema);
    let one = if schema.get("x-schedule").is_some() && rng.chance(0.6) { all[0] } else { all[rng.below(all.len())] };
    if let Some(only) = one.get("const") {
        return only.to_string();
    }
    if let Some(choices) = one["enum"].as_array() {
        return choices[rng.below(choices.len())].to_string();
    }
    let kind = match &one["type"] {
        Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).find(|k| *k != "null").unwrap_or("string"),
        kind => kind.as_str().unwrap_or("object"),
    };
    match kind {
        "integer" => integer(rng, &[schema, one], mood),
        "number" => number(rng, &[schema, one], mood),
        "boolean" => rng.chance(0.5).to_string(),
        "array" => {
            let bound = |key: &str, default: usize| one[key].as_u64().map_or(default, |n| n as usize);
            let (least, most) = (bound("minItems", 0), bound("maxItems", 3));
            let slack = usize::from(mood == Mood::Wild && rng.chance(0.3));
            let n = least.saturating_sub(slack) + rng.below(most + 2 * slack - least + 1);
            let mut items: Vec<String> = (0..n).map(|_| value(rng, &one["items"], mood, depth + 1)).collect();
            if one.get("x-ascending").is_some() && mood == Mood::Sound {
                items.sort_by(|a, b| a.parse::<f64>().unwrap_or(0.0).total_cmp(&b.parse::<f64>().unwrap_or(0.0)));
            }
            format!("[{}]", items.join(", "))
        }
        "object" if depth < 3 => {
            let required = one["required"].as_array().cloned().unwrap_or_default();
            let keys = one["properties"].as_object().into_iter().flatten();
            let pairs: Vec<String> = keys
                .filter(|(key, _)| required.iter().any(|r| r == *key) || rng.chance(0.5))
                .map(|(key, inside)| (key, inside.clone()))
                .collect::<Vec<_>>()
                .into_iter()
                .map(|(key, inside)| format!("{key} = {}", value(rng, &bounded(inside, schema), mood, depth + 1)))
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        _ => "\"text\"".into(),
    }
}

/// The numbers of a scheduler are mostly near the range of the key that takes it; they state none themselves.
fn bounded(mut inside: Json, outer: &Json) -> Json {
    if inside["type"] == "number" && inside.get("minimum").is_none() && inside.get("maximum").is_none() {
        for key in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
            if let (Some(bound), Some(table)) = (outer.get(key), inside.as_object_mut()) {
                table.insert(key.into(), bound.clone());
            }
        }
    }
    inside
}

fn bound(schemas: &[&Json], key: &str) -> Option<f64> {
    schemas.iter().find_map(|s| s.get(key)).and_then(Json::as_f64)
}

fn integer(rng: &mut Rng, schemas: &[&Json], mood: Mood) -> String {
    let least = bound(schemas, "minimum").unwrap_or(0.0) as i64;
    let most = bound(schemas, "maximum").map_or(i64::MAX, |x| x as i64);
    let usual = schemas.iter().find_map(|s| s["default"].as_i64()).unwrap_or(4).max(1);
    let near = [least, least + 1, least + 2, usual, usual + 1, usual / 2, 2 * usual, 8, 16, 24, 32, 1, 2, 3];
    let far = [most, most.saturating_add(1), least - 1, most / 2, 65_536, 1 << 31, 1 << 40];
    let pick = match mood {
        Mood::Wild if rng.chance(0.4) => far[rng.below(far.len())],
        _ if rng.chance(0.04) => most,
        _ => near[rng.below(near.len())].clamp(least, most),
    };
    pick.to_string()
}

fn number(rng: &mut Rng, schemas: &[&Json], mood: Mood) -> String {
    let least = bound(schemas, "minimum").or(bound(schemas, "exclusiveMinimum").map(|x| x.max(0.0) + 1.2e-38));
    let most = bound(schemas, "maximum").or(bound(schemas, "exclusiveMaximum").map(|x| x * (1.0 - 1e-7)));
    let usual = schemas.iter().find_map(|s| s["default"].as_f64()).unwrap_or(0.1);
    let (low, high) = (least.unwrap_or(-3.4e38), most.unwrap_or(3.4e38));
    let inside = match rng.below(5) {
        0 => low,
        1 => high,
        2 => usual * rng.uniform(0.5, 2.0),
        3 if low < high => rng.uniform(low.max(-1e6), high.min(1e6)),
        _ => rng.log_uniform(low.max(1e-9), high.clamp(1e-8, 1e9)),
    };
    let inside = inside.clamp(low, high);
    let pick = match mood {
        Mood::Wild if rng.chance(0.4) => {
            [low - 1.0, high + 1.0, low * 0.999, high * 1.001, low - 1e-9, high + 1e-9][rng.below(6)]
        }
        _ => inside,
    };
    format!("{pick:?}")
}
