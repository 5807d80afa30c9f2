//! The product's numbers against those of the public PyTorch reference: one test a family of golden files.
//!
//! `cargo test -p dinolab-tests --release parity -- --nocapture` compares every output and gradient of every file and
//! prints one table. `DINOLAB_GOLDEN=<folder>` in front compares another folder; `DINOLAB_WRITE_TABLE=1` writes the
//! summary into the book.

mod data;
mod draws;
mod golden;
mod hf;
mod layers;
mod model;
mod ops;
mod reference;
mod rope;
mod schedules;
mod step;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{LazyLock, OnceLock};

use dinolab_core::DType;
use golden::{folder, Comparison, Golden, Row};

/// Files that are compared in the same way: those whose case begins with the family's name.
struct Family {
    name: &'static str,
    /// The types of arithmetic in which it is compared.
    types: &'static [DType],
    compare: fn(&Golden, DType, &mut Comparison<'_>),
}

const BOTH: &[DType] = &[DType::F32, DType::F64];
/// Schedules are computed in f64, whatever the type of a model.
const WIDE: &[DType] = &[DType::F64];
/// Pixels and masks.
const NARROW: &[DType] = &[DType::F32];

macro_rules! families {
    ($($name:ident: $types:ident, $compare:path;)*) => {
        const FAMILIES: &[Family] =
            &[$(Family { name: stringify!($name), types: $types, compare: $compare }),*];

        /// `parity` is what the command filters by.
        mod parity {
            $(#[test] fn $name() { super::holds(stringify!($name)); })*

            #[test]
            fn every_file_is_compared() {
                super::no_file_is_left_over();
            }

            #[test]
            fn rotary_draws() {
                super::draws::the_rotary_box_is_moved_as_the_paper_says();
            }

            #[test]
            fn stochastic_depth() {
                super::draws::stochastic_depth_keeps_every_image_equally_often();
            }

            #[test]
            fn table() {
                super::table::print_and_check(super::all_rows());
            }
        }
    };
}

families! {
    adamw: BOTH, ops::adamw;
    bicubic: BOTH, ops::bicubic;
    block: BOTH, model::block;
    collate: NARROW, data::collate;
    dino_head: BOTH, model::head;
    dino_loss: BOTH, ops::dino_loss;
    dino_sinkhorn: BOTH, ops::sinkhorn_and_centring;
    distillation_step: BOTH, step::one_step;
    gram_loss: BOTH, ops::gram_loss;
    hf: BOTH, hf::published_layout;
    ibot_loss: BOTH, ops::ibot_loss;
    koleo: BOTH, ops::koleo;
    koleo_multirank: BOTH, ops::koleo_over_ranks;
    layer_attention: BOTH, layers::attention;
    layer_ffn: BOTH, layers::feed_forward;
    layer_norms: BOTH, layers::norms_and_layer_scale;
    layer_patch_embed: BOTH, layers::patch_embedding;
    masking: NARROW, data::mask_statistics;
    rope_apply: BOTH, rope::rotation;
    rope_bf16: BOTH, rope::bf16_tables;
    rope_eval: BOTH, rope::evaluation_tables;
    rope_train: BOTH, rope::training_tables;
    schedules: WIDE, schedules::schedules;
    ssl_step: BOTH, step::one_step;
    trajectory: BOTH, step::trajectory;
    vit: BOTH, model::vit;
}

/// The family with the longest name that the case begins with.
fn family_of(case: &str) -> Option<&'static Family> {
    FAMILIES.iter().filter(|f| case.starts_with(f.name)).max_by_key(|f| f.name.len())
}

/// The folder's files by family; those of no family under "".
static FILES: LazyLock<BTreeMap<&str, Vec<PathBuf>>> = LazyLock::new(|| {
    let mut files: BTreeMap<&str, Vec<PathBuf>> = BTreeMap::new();
    for path in Golden::all() {
        let family = family_of(&Golden::case_of(&path)).map_or("", |f| f.name);
        files.entry(family).or_default().push(path);
    }
    files
});

/// The comparisons of each family, made once for its own test and for the table.
static ROWS: LazyLock<BTreeMap<&str, OnceLock<Vec<Row>>>> =
    LazyLock::new(|| FAMILIES.iter().map(|f| (f.name, OnceLock::new())).collect());

fn rows(family: &Family) -> &'static [Row] {
    ROWS[family.name].get_or_init(|| {
        let mut rows = Vec::new();
        for path in FILES.get(family.name).into_iter().flatten() {
            let golden = Golden::open(path);
            for &dtype in family.types {
                let mut comparison = golden.compare(dtype);
                (family.compare)(&golden, dtype, &mut comparison);
                rows.extend(comparison.finish());
            }
        }
        rows
    })
}

fn all_rows() -> Vec<&'static Row> {
    FAMILIES.iter().flat_map(rows).collect()
}

fn holds(family: &str) {
    let family = FAMILIES.iter().find(|f| f.name == family).expect("tests are made from the families");
    if !FILES.contains_key(family.name) {
        let (folder, given) = folder();
        assert!(given, "{} has no file of the family {}", folder.display(), family.name);
        println!("{} has no file of the family {}: nothing to compare", folder.display(), family.name);
    }
    let off: Vec<String> = rows(family).iter().filter(|row| !row.holds()).map(table::line).collect();
    assert!(off.is_empty(), "not within tolerance, or (NaN) not compared:\n{}", off.join("\n"));
}

fn no_file_is_left_over() {
    let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
    let unknown = FILES.get("").map(|paths| paths.as_slice()).unwrap_or_default();
    assert!(unknown.is_empty(), "no test knows what to do with {unknown:?}; families: {}", known.join(", "));
}
