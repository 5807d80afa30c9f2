//! Masks: as many patches as promised, in the shapes that the plugins say, and refused where there would be none.

use std::sync::Arc;

use dinolab_core::contract::{Dataset, Grid, Masking, Sample};
use dinolab_core::data::{LoaderSpec, Masks, Pipeline};
use dinolab_core::recipe::{BatchConfig, Overrides, RawRecipe};
use dinolab_core::registry::{self, Chosen};
use dinolab_core::resolved::Resolved;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Device, Result};
use dinolab_plugins::block::{circular_shift, Block};
use proptest::prelude::*;

const PLUGINS: [&str; 3] = ["block", "random", "multi_block"];

fn built(table: &str) -> Box<dyn Masking> {
    contracts::plugin::<dyn Masking>(table, &mut ()).unwrap()
}

fn count(mask: &[bool]) -> usize {
    mask.iter().filter(|&&hidden| hidden).count()
}

/// The share of pairs of neighbours in a row of which both are masked, among those of which the first is.
fn clumping(mask: &[bool], grid: Grid) -> f64 {
    let pairs = (0..mask.len()).filter(|i| i % grid.width + 1 < grid.width && mask[*i]);
    let both: Vec<bool> = pairs.map(|i| mask[i + 1]).collect();
    count(&both) as f64 / both.len().max(1) as f64
}

#[test]
fn every_plugin_keeps_the_contract() {
    for name in PLUGINS {
        for keys in ["", "\nprobability = 1.0", "\nprobability = 0.1", "\nprobability = 0"] {
            contracts::masking(built(&format!("plugin = \"{name}\"{keys}")).as_ref()).unwrap();
        }
    }
    for table in [
        "plugin = \"block\"\nrandom_circular_shift = true\nratio = [0.9, 1.0]\nmin_area = 30\ntries = 1",
        "plugin = \"block\"\naspect = [0.01, 0.01]",
        "plugin = \"random\"\nratio = [0.75, 0.75]\nprobability = 1.0",
        "plugin = \"multi_block\"\nblocks = 1\naspect = [10, 20]\nprobability = 1.0",
        "plugin = \"multi_block\"\nblocks = 9\nscale = [0, 0.9]\ntries = 1",
        "plugin = \"multi_block\"\nscale = [1.0, 1.0]",
    ] {
        contracts::masking(built(table).as_ref()).unwrap_or_else(|e| panic!("{table}: {e}"));
    }
}

#[test]
fn a_recipe_that_names_no_masking_has_blocks() {
    assert_eq!(registry::default_of::<dyn Masking>(), Some("block"));
    let plain = Chosen::<dyn Masking>::default();
    assert_eq!(plain, contracts::chosen("plugin = \"block\"").unwrap());
    assert_eq!(plain, contracts::chosen("probability = 0.5\naspect = [0.3, 3.3333333333333335]").unwrap());
}

proptest! {
    #[test]
    fn masks_have_exactly_the_asked_number_of_cells(height in 1usize..24, width in 1usize..24, share in 0.0..=1.0, seed: u64) {
        let grid = Grid { height, width };
        let asked = (grid.patches() as f64 * share) as usize;
        let mut rng = Rng::new(seed, Stream::Mask, 0, 0);
        let mask = Block::default().draw_one(&mut rng, grid, asked);
        prop_assert_eq!(count(&mask), asked);
        prop_assert_eq!(count(&circular_shift(&mut rng, grid, &mask)), asked);
    }

    #[test]
    fn mask_tensors_describe_one_another(images in 1usize..8, side in 1usize..12, seed: u64, plugin in 0..PLUGINS.len()) {
        let masking = built(&format!("plugin = \"{}\"", PLUGINS[plugin]));
        let (crops, grid) = (2 * images, Grid { height: side, width: side });
        let rows = masking.draw(&mut Rng::new(seed, Stream::Mask, 0, 0), crops, grid);
        let masks = Masks::from_rows(&rows, DType::F64).unwrap();
        let flat: Vec<u32> = masks.masks.as_slice().to_vec();
        let ones: Vec<u32> = (0..flat.len() as u32).filter(|&i| flat[i as usize] == 1).collect();
        prop_assert_eq!(masks.indices.as_slice::<u32>(), &ones);
        prop_assert_eq!(ones.len(), masking.masked(crops, grid));
        let masked_crops = flat.chunks(grid.patches()).filter(|row| row.contains(&1)).count();
        // Weights of a crop sum to 1.
        prop_assert!((masks.weights.to_f64_vec().iter().sum::<f64>() - masked_crops as f64).abs() < 1e-9);
    }

    #[test]
    fn check_knows_whether_a_patch_is_masked(
        crops in 1..60usize, side in 1..18usize, probability in 0.0..=1.0f64, least in 0.0..=1.0f64, most in 0.0..=1.0f64,
    ) {
        let grid = Grid { height: side, width: side };
        // Small shares are where it matters.
        for scale in [1.0, 0.1, 0.01] {
            let (low, high) = (least.min(most) * scale, least.max(most) * scale);
            for (name, range) in [("block", "ratio"), ("random", "ratio"), ("multi_block", "scale")] {
                let table =
                    format!("plugin = \"{name}\"\nprobability = {}\n{range} = [{low}, {high}]", probability * scale);
                let masking = built(&table);
                let masked = masking.masked(crops, grid);
                prop_assert_eq!(masking.unmasked(crops, grid).is_none(), masked > 0, "{}: {}", table, masked);
            }
        }
    }
}

#[test]
fn plugins_differ_in_how_masked_patches_lie_together() {
    let grid = Grid { height: 16, width: 16 };
    let [block, random, multi] = PLUGINS.map(|name| {
        let masking = built(&format!("plugin = \"{name}\"\nprobability = 1.0"));
        let rows = masking.draw(&mut Rng::new(3, Stream::Mask, 0, 0), 200, grid);
        rows.iter().map(|row| clumping(row, grid)).sum::<f64>() / 200.0
    });
    // Single patches have masked neighbours as often as there are masked patches: three in ten.
    assert!((random - 0.3).abs() < 0.02 && block > 0.6 && multi > 0.8, "{block} {random} {multi}");
}

#[test]
fn keys_of_blocks_do_what_they_say() {
    let grid = Grid { height: 20, width: 20 };
    let wide = |aspect: &str| {
        let masking = built(&format!("probability = 1.0\nratio = [0.2, 0.2]\nmin_area = 16\naspect = {aspect}"));
        let rows = masking.draw(&mut Rng::new(3, Stream::Mask, 0, 0), 100, grid);
        rows.iter().map(|row| clumping(row, grid)).sum::<f64>() / 100.0
    };
    // Columns have no neighbours in a row.
    let (tall, flat) = (wide("[8, 10]"), wide("[0.1, 0.125]"));
    assert!(tall < 0.5 && flat > 0.8, "{tall} {flat}");
    // Without blocks that fit there are single patches.
    assert!(wide("[100, 100]") < 0.3);
}

/// Grey images.
#[derive(Debug)]
struct Greys;

impl Dataset for Greys {
    fn len(&self) -> usize {
        64
    }

    fn get(&self, index: usize) -> Result<Sample> {
        Ok(Sample { width: 32, height: 32, pixels: vec![index as u8; 3 * 32 * 32].into(), ..Sample::default() })
    }
}

#[test]
fn parts_of_a_batch_have_the_masks_of_the_whole_in_every_step() {
    for name in PLUGINS {
        let pipeline = |micro_batches: usize| {
            let masking = contracts::chosen(&format!("plugin = \"{name}\"")).unwrap();
            let batch = BatchConfig { size: 32, micro_batches, loader_threads: 1, ..BatchConfig::default() };
            Pipeline::new(Arc::new(Greys), LoaderSpec { masking, batch, ..spec() }).unwrap()
        };
        let (whole, parts) = (pipeline(1), pipeline(4));
        let mut shapes = Vec::new();
        for step in 0..8 {
            let (all, dealt) = (whole.step(step).unwrap().batches, parts.step(step).unwrap().batches);
            let masks_of = |batch: &dinolab_core::data::Batch, place: usize| -> [Vec<u32>; 2] {
                let (flat, patches) = (batch.masks.masks.as_slice::<u32>(), 64);
                [place, batch.images() + place].map(|crop| flat[crop * patches..][..patches].to_vec())
            };
            for batch in &dealt {
                for (place, index) in batch.indices().enumerate() {
                    let there = all[0].indices().position(|i| i == index).unwrap();
                    assert_eq!(masks_of(batch, place), masks_of(&all[0], there), "{name}, step {step}");
                }
            }
            assert_eq!(all[0].masks.indices.len(), whole.masked_patches(step));
            shapes.push(dealt.iter().map(|batch| batch.masks.indices.len()).collect::<Vec<_>>());
        }
        assert!(shapes.windows(2).all(|pair| pair[0] == pair[1]), "{name}: {shapes:?}");
    }
}

fn spec() -> LoaderSpec {
    LoaderSpec {
        part: 0..usize::MAX,
        batch: BatchConfig::default(),
        crops: recipe(&[]).unwrap().recipe.crops,
        masking: Chosen::default(),
        patch_size: 4,
        augmentations: Vec::new(),
        teacher_crop_size: None,
        seed: 9,
        device: Device::Cpu,
        dtype: DType::F32,
        start_step: 0,
        total_steps: 8,
        left_out: Vec::new(),
    }
}

/// Two global crops of 8 x 8 patches of 4 images, in two parts.
fn recipe(sets: &[&str]) -> Result<Resolved> {
    let text =
        "name = \"masks\"\nsteps = 10\n[backbone]\nplugin = \"vit\"\npreset = \"vit_tiny_test\"\npatch_size = 4\n\
        [data]\nplugin = \"scenes\"\n[batch]\nsize = 4\nmicro_batches = 2\n\
        [crops]\nglobal_size = 32\nlocal_size = 16\nlocal_count = 2\n[losses.ibot]\n[teacher]\nplugin = \"ema\"\n";
    let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
    Resolved::of(RawRecipe::from_text(text)?.with(&overrides)?)
}

#[test]
fn masks_that_hide_nothing_name_the_key_and_the_least_number() {
    let refused = |sets: &[&str]| recipe(sets).unwrap_err().to_string();
    for name in PLUGINS {
        let plugin = format!("masking.plugin={name}");
        let share = refused(&[&plugin, "masking.probability=0.12"]);
        assert!(
            share.contains("masking.probability: no patch is masked") && share.contains("use at least 0.125, or set"),
            "{share}"
        );
        recipe(&[&plugin, "masking.probability=0.125"]).unwrap();
    }
    let ratio = refused(&["masking.ratio=[0, 0.0156]"]);
    assert!(ratio.contains("masking.ratio: no patch is masked") && ratio.contains("use at least 0.0157"), "{ratio}");
    recipe(&["masking.ratio=[0, 0.0157]"]).unwrap();
    let small = refused(&["crops.resolutions=[{ share = 1, global_size = 4, local_size = 4 }]"]);
    assert!(small.contains("0.5 of the 1 patches"), "{small}");
    let scale = refused(&["masking.plugin=multi_block", "masking.scale=[0, 0.003]"]);
    assert!(scale.contains("masking.scale: no patch is masked") && scale.contains("use at least 1.6e-2"), "{scale}");
    recipe(&["masking.plugin=multi_block", "masking.scale=[0, 1.6e-2]"]).unwrap();
}

#[test]
fn keys_are_held_to_their_ranges_and_to_their_plugin() {
    let refused = |sets: &[&str]| recipe(sets).unwrap_err().to_string();
    for (sets, said) in [
        (&["masking.probability=1.5"][..], "masking.probability: has to be 0 to 1, not 1.5"),
        (&["masking.ratio=[0.5, 0.1]"], "masking.ratio: has to be [least, most]"),
        (&["masking.aspect=[0, 1]"], "masking.aspect: number 1 has to be 0.01 to 100, not 0"),
        (&["masking.tries=0"], "masking.tries: has to be 1 to 1000, not 0"),
        (&["masking.min_area=0.5"], "masking.min_area: has to be 1 to 10000, not 0.5"),
        (&["masking.plugin=multi_block", "masking.blocks=0"], "masking.blocks: has to be 1 to 100, not 0"),
        (&["masking.plugin=random", "masking.min_area=4"], "masking.min_area: unknown key"),
        (&["masking.plugin=blokc"], "there is no masking plugin `blokc`"),
    ] {
        let message = refused(sets);
        assert!(message.contains(said), "{message}");
    }
}

/// Masks one patch more than it says.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct OneMore {}

impl Masking for OneMore {
    fn masked(&self, crops: usize, _: Grid) -> usize {
        crops
    }
    fn share(&self, grid: Grid) -> f64 {
        1.0 / grid.patches() as f64
    }
    fn unmasked(&self, _: usize, _: Grid) -> Option<dinolab_core::contract::Unmasked> {
        None
    }
    fn draw(&self, _: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        vec![(0..grid.patches()).map(|patch| patch < 2).collect(); crops]
    }
}

dinolab_core::plugin!(Masking, "test_one_more", OneMore);

#[test]
fn a_plugin_that_breaks_its_promise_is_named() {
    let masking = contracts::chosen("plugin = \"test_one_more\"").unwrap();
    let pipeline = Pipeline::new(Arc::new(Greys), LoaderSpec { masking, ..spec() }).unwrap();
    let error = pipeline.step(0).unwrap_err().to_string();
    assert!(
        error.contains("the masking plugin `test_one_more` masks 256 patches of a batch and promises 128"),
        "{error}"
    );
    assert!(contracts::masking(&OneMore {}).unwrap_err().contains("and says"));
}
