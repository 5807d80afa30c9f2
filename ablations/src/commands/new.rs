//! `dinolab new plugin NAME --kind KIND`: a crate with a plugin that works, to be changed into one's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::registry;
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use crate::style;

/// What can be made.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// A crate that registers a plugin, with a test, a recipe, a suite, and a `main` that is the whole program with it.
    Plugin(Args),
}

/// Arguments of `dinolab new plugin`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The plugin's name in recipes, and the crate's: `patch_contrast`.
    name: String,
    /// What it is.
    #[arg(long, value_enum)]
    kind: Kind,
    /// The folder to make [default: NAME].
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The kinds of plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Kind {
    Loss,
    Backbone,
    PosEncoding,
    Scheduler,
    Teacher,
    Dataset,
    Augmentation,
    Masking,
    Probe,
    Optimizer,
}

macro_rules! template {
    ($file:literal) => {
        include_str!(concat!("../../templates/plugin/", $file))
    };
}

/// What differs from kind to kind.
struct Template {
    source: &'static str,
    test: &'static str,
    /// Parts of the recipe in place of the usual ones: (placeholder, text).
    recipe: &'static [(&'static str, &'static str)],
    question: &'static str,
    metric: &'static str,
    /// Name and changes of the arm that is compared with, and of the other.
    arms: [(&'static str, &'static str); 2],
}

/// The recipe without a plugin of one's own.
const USUAL: &[(&str, &str)] = &[
    (
        "BACKBONE",
        "[backbone]\nplugin = \"vit\"\npreset = \"vit_tiny_test\"\nlayer_scale = 1.0\npos_encoding = { plugin = \"rope_box\" }",
    ),
    ("DATA", "[data]\nplugin = \"scenes\"\nsize = 96\ncount = 1024\nclasses = 4\ntexture_cue = 1.0"),
    ("AUGMENTATION", ""),
    ("MASKING", ""),
    ("LOSSES", ""),
    ("TEACHER", "plugin = \"ema\"\nmomentum = 0.99"),
    ("LR", "1e-3"),
    ("OPTIMIZER", ""),
    ("PROBES", ""),
];

impl Kind {
    fn template(self) -> Template {
        let knn = "probe/knn/top1";
        match self {
            Self::Loss => Template {
                source: template!("loss.rs"),
                test: template!("loss.test.rs"),
                recipe: &[("LOSSES", "\n[losses.my_plugin]\nweight = 1.0\n")],
                question: "Does the loss my_plugin help?",
                metric: knn,
                arms: [("without", "\"losses.my_plugin.enabled\" = false"), ("my_plugin", "")],
            },
            Self::Backbone => Template {
                source: template!("backbone.rs"),
                test: template!("backbone.test.rs"),
                recipe: &[("BACKBONE", "[backbone]\nplugin = \"my_plugin\"")],
                question: "How does the backbone my_plugin compare with a small ViT?",
                metric: knn,
                arms: [
                    ("vit", "backbone = { plugin = \"vit\", preset = \"vit_tiny_test\", layer_scale = 1.0 }"),
                    ("my_plugin", ""),
                ],
            },
            Self::PosEncoding => Template {
                source: template!("pos_encoding.rs"),
                test: template!("pos_encoding.test.rs"),
                recipe: &[(
                    "BACKBONE",
                    "[backbone]\nplugin = \"vit\"\npreset = \"vit_tiny_test\"\nlayer_scale = 1.0\npos_encoding = { plugin = \"my_plugin\" }",
                )],
                question: "How does the position encoding my_plugin compare with RoPE?",
                metric: knn,
                arms: [("rope", "\"backbone.pos_encoding\" = { plugin = \"rope_box\" }"), ("my_plugin", "")],
            },
            Self::Scheduler => Template {
                source: template!("scheduler.rs"),
                test: template!("scheduler.test.rs"),
                recipe: &[("LR", "{ plugin = \"my_plugin\", start = 2e-3, half_life = 50 }")],
                question: "How does my_plugin compare with a constant learning rate?",
                metric: knn,
                arms: [("constant", "\"optimizer.lr\" = 1e-3"), ("my_plugin", "")],
            },
            Self::Teacher => Template {
                source: template!("teacher.rs"),
                test: template!("teacher.test.rs"),
                recipe: &[("TEACHER", "plugin = \"my_plugin\"")],
                question: "How does the teacher policy my_plugin compare with a moving average?",
                metric: knn,
                arms: [("ema", "teacher = { plugin = \"ema\", momentum = 0.99 }"), ("my_plugin", "")],
            },
            Self::Dataset => Template {
                source: template!("dataset.rs"),
                test: template!("dataset.test.rs"),
                recipe: &[("DATA", "[data]\nplugin = \"my_plugin\"")],
                question: "What does KoLeo change on my_plugin?",
                metric: knn,
                arms: [("without_koleo", "\"losses.koleo.enabled\" = false"), ("my_plugin", "")],
            },
            Self::Augmentation => Template {
                source: template!("augmentation.rs"),
                test: template!("augmentation.test.rs"),
                recipe: &[("AUGMENTATION", "plugin = \"my_plugin\"\n")],
                question: "How does the augmentation my_plugin compare with multi-crop?",
                metric: knn,
                arms: [("multi_crop", "\"crops.plugin\" = \"multi_crop\""), ("my_plugin", "")],
            },
            Self::Masking => Template {
                source: template!("masking.rs"),
                test: template!("masking.test.rs"),
                recipe: &[
                    ("MASKING", "\n[masking]\nplugin = \"my_plugin\"\n"),
                    ("LOSSES", "\n[losses.ibot]\nhead = { hidden = 128, bottleneck = 64, prototypes = 128 }\n"),
                ],
                question: "How does the masking my_plugin compare with blocks?",
                metric: knn,
                arms: [("block", "masking = { plugin = \"block\" }"), ("my_plugin", "")],
            },
            Self::Probe => Template {
                source: template!("probe.rs"),
                test: template!("probe.test.rs"),
                recipe: &[("PROBES", "\n[probes.my_plugin]\n")],
                question: "What does KoLeo change as my_plugin measures it?",
                metric: "probe/my_plugin/cosine",
                arms: [("without_koleo", "\"losses.koleo.enabled\" = false"), ("with_koleo_my_plugin", "")],
            },
            Self::Optimizer => Template {
                source: template!("optimizer.rs"),
                test: template!("optimizer.test.rs"),
                recipe: &[("LR", "1e-3"), ("OPTIMIZER", "plugin = \"my_plugin\"\n")],
                question: "How does the optimizer my_plugin compare with AdamW?",
                metric: knn,
                arms: [("adamw", "\"optimizer.plugin\" = \"adamw\""), ("my_plugin", "")],
            },
        }
    }

    fn name(self) -> String {
        use clap::ValueEnum as _;
        self.to_possible_value().expect("no kind is hidden").get_name().to_string()
    }

    /// All files of the crate, with the places where names go.
    fn files(self) -> Vec<(&'static str, String)> {
        let template = self.template();
        let mut recipe = template!("recipe.toml").to_string();
        for (place, text) in template.recipe.iter().chain(USUAL) {
            recipe = recipe.replace(place, text);
        }
        let [(baseline, changes), (other, other_changes)] = template.arms;
        let suite = template!("suite.toml")
            .replace("QUESTION", template.question)
            .replace("METRIC", template.metric)
            .replace("BASELINE_SET", changes)
            .replace("OTHER_SET", other_changes)
            .replace("BASELINE", baseline)
            .replace("OTHER", other)
            .replace("{  }", "{}");
        vec![
            ("Cargo.toml", template!("Cargo.toml.in").to_string()),
            ("README.md", template!("README.md").into()),
            (".gitignore", "/target\n/runs\n".into()),
            ("src/lib.rs", template.source.into()),
            ("src/main.rs", template!("main.rs").into()),
            ("tests/my_plugin.rs", template!("test.rs").replace("CONTRACT", template.test)),
            ("recipe.toml", recipe.trim_end().to_string() + "\n"),
            ("suite.toml", suite),
        ]
    }
}

/// Makes the crate.
pub fn run(command: &Command) -> Result<ExitCode> {
    let Command::Plugin(Args { name, kind, out }) = command;
    check_name(name, *kind)?;
    let folder = out.clone().unwrap_or_else(|| name.into());
    if folder.exists() {
        let help = "choose another name, or another folder with --out";
        return Err(Error::content(&folder, "this is there already", help));
    }
    let camel: String = name.split('_').map(capitalised).collect();
    let (core, program) = (dependency("core")?, dependency("ablations")?);
    for (path, text) in kind.files() {
        let text = text.replace("my_plugin", name).replace("MyPlugin", &camel).replace("KIND", &kind.name());
        let text = text.replace("DINOLAB", &program).replace("CORE", &core);
        write(&folder.join(path.replace("my_plugin", name)), &text)?;
    }
    add_workspace(&folder)?;
    let shown = printable(&folder);
    style::say(&format!("made {shown}: a plugin of kind {} that works, to be changed\n", kind.name()));
    style::say(&format!("    cd {shown}\n    cargo test --release\n    cargo run --release -- train recipe.toml"));
    Ok(ExitCode::SUCCESS)
}

fn check_name(name: &str, kind: Kind) -> Result<()> {
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !plain || !name.starts_with(|c: char| c.is_ascii_lowercase()) || name.ends_with('_') {
        return Err(Error::user(
            format!("`{name}` cannot be the name of a plugin"),
            "use small letters, digits and `_`, beginning with a letter: patch_contrast",
        ));
    }
    // As many as a registry of crates takes; names of files have a limit too.
    if name.len() > 64 {
        let problem = format!("the name of the plugin has {} letters, and that of a crate has at most 64", name.len());
        return Err(Error::user(problem, "choose a shorter name"));
    }
    // Crates of the language, ours, and folders that cargo makes beside a program.
    let taken = [
        "test",
        "std",
        "core",
        "alloc",
        "proc_macro",
        "dinolab",
        "dinolab_core",
        "build",
        "deps",
        "examples",
        "incremental",
    ];
    if taken.contains(&name) || KEYWORDS.contains(&name) {
        return Err(Error::user(format!("a crate cannot be named `{name}`"), "choose another name"));
    }
    if registry::all().iter().any(|p| (p.kind, p.name) == (kind.name().as_str(), name)) {
        let help = "choose another name: recipes could not tell the two apart";
        return Err(Error::user(format!("there is a plugin `{name}` of kind {} already", kind.name()), help));
    }
    Ok(())
}

/// Words of Rust that no crate can be named.
const KEYWORDS: &[&str] = &[
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "override", "priv", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
    "try", "type", "typeof", "unsafe", "unsized", "use", "virtual", "where", "while", "yield",
];

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
}

/// How the crate depends on one of this program's: on its source where that lies, else on the repository.
///
/// # Errors
/// If neither is known.
fn dependency(folder: &str) -> Result<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the program's crate is in a workspace");
    if source.join(folder).join("Cargo.toml").exists() {
        return Ok(format!("{{ path = {:?} }}", source.join(folder)));
    }
    match env!("CARGO_PKG_REPOSITORY") {
        "" => {
            let problem = "the source of this program, which a plugin is compiled with, is not there any more";
            Err(Error::content(source, problem, "put it back, or build the program anew where it is now"))
        }
        url => {
            let revision = crate::REVISION.split('-').next().unwrap_or_default();
            Ok(format!("{{ git = {url:?}, rev = {revision:?} }}"))
        }
    }
}

/// Makes the crate a workspace of its own, unless it is a member of one.
fn add_workspace(folder: &Path) -> Result<()> {
    let here = fs::canonicalize(folder).map_err(Error::io("read", folder))?;
    let workspace = |folder: &Path| {
        let text = fs::read_to_string(folder.join("Cargo.toml")).ok()?;
        text.parse::<toml::Table>().ok()?.get("workspace").cloned()
    };
    let above = here.ancestors().skip(1).find_map(|above| Some((above, workspace(above)?)));
    if above.is_some_and(|(above, workspace)| is_member(&workspace, here.strip_prefix(above).expect("it is above"))) {
        return Ok(());
    }
    let path = folder.join("Cargo.toml");
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    write(&path, &format!("{text}\n[workspace]\n"))
}

/// Whether `[workspace]` names a folder as a member, by `*` in parts of its path too.
fn is_member(workspace: &toml::Value, folder: &Path) -> bool {
    let names = |key: &str| workspace.get(key).and_then(toml::Value::as_array).into_iter().flatten();
    let fits = |part: &str, name: &str| match part.split_once('*') {
        Some((begin, end)) => name.len() >= begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end),
        None => part == name,
    };
    let is_named = |pattern: &toml::Value| {
        let Some(pattern) = pattern.as_str() else { return false };
        let (pattern, path) = (Path::new(pattern).iter(), folder.iter());
        pattern.clone().count() == path.clone().count()
            && pattern.zip(path).all(|(part, name)| fits(&part.to_string_lossy(), &name.to_string_lossy()))
    };
    names("members").any(is_named) && !names("exclude").any(is_named)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().expect("every file lies in a folder");
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    fs::write(path, text).map_err(Error::io("write", path))
}
