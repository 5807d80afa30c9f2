//! `cut_outs`: scenes composed of cut-outs on photographs, with a class and a distance for every pixel.

mod paste;
mod source;

use std::path::PathBuf;
use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset, Sample, Summary};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result};

use crate::image_folder::count_classes;
use crate::scenes::Size;

use paste::{Canvas, Pose};
use source::Source;

/// The nearest and the farthest distance of an object, and that of the background, in metres.
const NEAR: f64 = 1.0;
const FAR: f64 = 3.0;
const BEHIND: f32 = 4.0;
/// The longer side of an object at distance 1, as a share of the scene's shorter side.
const LARGEST: f64 = 0.75;
/// The smallest part of a background that a scene shows, as a share of its sides.
const PART: f64 = 0.6;

/// Scenes of real content: cut-outs from a folder, pasted on photographs from another, with occlusion. The sibling of `scenes`
/// for anyone who has cut-outs.
///
/// A cut-out is a PNG, WebP or GIF that is transparent around the object; the sub-folder that it lies in is its class. Every object has a
/// distance, drawn uniformly from 1 to 3 metres: nearer objects cover farther ones and look larger. Objects are turned and mirrored, and
/// backgrounds cut anew, at random. The mask is exact: the class of the object that covers more than half of a pixel (0: background); the
/// depth is its distance (background: 4). The label is the class of the object of which most is visible.
///
/// Held-out scenes are composed of cut-outs and photographs that no scene to train on has, the same ones for every seed. A scene is a pure
/// function of the run's seed and its index.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CutOutsConfig {
    /// The folder of cut-outs, a sub-folder a class.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// The folder of photographs that they are pasted on.
    #[schemars(extend("format" = "path"))]
    pub backgrounds: PathBuf,
    /// Side in pixels, or [width, height].
    #[serde(default = "default_size")]
    pub size: Size,
    /// Scenes to train on.
    #[serde(default = "default_count")]
    #[schemars(range(min = 1, max = 1_000_000_000_000u64))]
    pub count: usize,
    /// Scenes set aside for probes.
    #[serde(default = "default_held_out")]
    #[schemars(range(max = 1_000_000_000_000u64))]
    pub held_out: usize,
    /// Share of the cut-outs of every class, and of the photographs, that held-out scenes alone have.
    #[serde(default = "default_aside")]
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub aside: f64,
    /// Objects in a scene: [least, most].
    #[serde(default = "default_objects")]
    #[schemars(inner(range(min = 1, max = 64)), extend("x-ascending" = true))]
    pub objects: [usize; 2],
    /// Objects are turned by at most so many degrees to either side.
    #[serde(default = "default_turn")]
    #[schemars(range(min = 0, max = 180))]
    pub turn: f64,
}

fn default_size() -> Size {
    Size::Square(96)
}

fn default_count() -> usize {
    8192
}

fn default_held_out() -> usize {
    1024
}

fn default_aside() -> f64 {
    0.2
}

fn default_objects() -> [usize; 2] {
    [2, 5]
}

fn default_turn() -> f64 {
    20.0
}

plugin!(Dataset, "cut_outs", CutOutsConfig, |config: CutOutsConfig, context: &mut DataContext| {
    CutOuts::open(&config, context.seed).map(|scenes| Box::new(scenes) as Box<dyn Dataset>)
});

/// The scenes of one seed that are trained on, or those that are held out.
#[derive(Debug)]
pub struct CutOuts {
    seed: u64,
    source: Arc<Source>,
    size: [usize; 2],
    objects: [usize; 2],
    turn: f64,
    /// 0: trained on; 1: held out.
    part: usize,
    len: usize,
    held_out: Option<Arc<CutOuts>>,
}

/// One object of a scene.
struct Object {
    class: usize,
    file: usize,
    distance: f64,
    pose: Pose,
}

impl CutOuts {
    /// Lists both folders; no image is read.
    ///
    /// # Errors
    /// If a folder cannot be read or holds nothing, a cut-out lies in no sub-folder, or there are more than 254 classes.
    pub fn open(config: &CutOutsConfig, seed: u64) -> Result<Self> {
        let size = match config.size {
            Size::Square(side) => [side, side],
            Size::Rectangle(size) => size,
        };
        let short = size[0].min(size[1]);
        let largest = (LARGEST / NEAR * short as f64).ceil() as u32;
        let aside = if config.held_out > 0 { config.aside } else { 0.0 };
        let background = size.map(|side| (side as f64 / PART).ceil() as u32);
        let source = Arc::new(Source::open(&config.path, &config.backgrounds, aside, largest, background)?);
        let part = |part, len, held_out| Self {
            seed,
            source: source.clone(),
            size,
            objects: config.objects,
            turn: config.turn.to_radians(),
            part,
            len,
            held_out,
        };
        let held_out = (config.held_out > 0).then(|| Arc::new(part(1, config.held_out, None)));
        Ok(part(0, config.count, held_out))
    }

    /// Draws the objects, the farthest first.
    fn draw(&self, rng: &mut Rng) -> Vec<Object> {
        let [least, most] = self.objects;
        let count = least + rng.below(most - least + 1);
        let short = self.size[0].min(self.size[1]) as f64;
        let object = |_| {
            let class = rng.below(self.source.classes().len());
            let files = self.source.cut_outs(class, self.part);
            let file = files[rng.below(files.len())];
            let distance = rng.uniform(NEAR, FAR);
            let centre = self.size.map(|side| (side as f64 * rng.uniform(0.1, 0.9)) as f32);
            let angle = rng.uniform(-self.turn, self.turn) as f32;
            let pose = Pose { centre, side: (LARGEST * short / distance) as f32, angle, mirrored: rng.chance(0.5) };
            Object { class, file, distance, pose }
        };
        let mut objects: Vec<Object> = (0..count).map(object).collect();
        objects.sort_by(|a, b| b.distance.total_cmp(&a.distance));
        objects
    }
}

impl Dataset for CutOuts {
    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let mut rng = Rng::new(self.seed, Stream::Scene, self.part as u64, index as u64);
        let [width, height] = self.size;
        let files = self.source.backgrounds(self.part);
        let background = self.source.background(files[rng.below(files.len())])?;
        let (part, mirrored) = (rng.uniform(PART, 1.0), rng.chance(0.5));
        let corner = [rng.unit(), rng.unit()];
        let mut canvas = Canvas::new([width, height], &background, part, corner, mirrored);
        let objects = self.draw(&mut rng);
        for (id, object) in objects.iter().enumerate() {
            canvas.paste(self.source.cut_out(object.file)?.as_ref(), &object.pose, id as u8 + 1);
        }
        let mut visible = vec![0usize; objects.len() + 1];
        canvas.ids.iter().for_each(|&id| visible[usize::from(id)] += 1);
        let of = |id: u8| usize::from(id).checked_sub(1).map(|id| &objects[id]);
        let largest = (1..visible.len()).max_by_key(|&id| visible[id]).filter(|&id| visible[id] > 0);
        Ok(Sample {
            width,
            height,
            label: largest.map(|id| objects[id - 1].class as u32),
            mask: Some(canvas.ids.iter().map(|&id| of(id).map_or(0, |object| object.class as u8 + 1)).collect()),
            depth: Some(canvas.ids.iter().map(|&id| of(id).map_or(BEHIND, |object| object.distance as f32)).collect()),
            pixels: canvas.rgb.into(),
            ..Sample::default()
        })
    }

    fn classes(&self) -> usize {
        self.source.classes().len()
    }

    fn mask_classes(&self) -> usize {
        self.classes() + 1
    }

    fn has_depth(&self) -> bool {
        true
    }

    fn class_names(&self) -> Vec<String> {
        self.source.classes().to_vec()
    }

    fn mask_class_names(&self) -> Vec<String> {
        [vec!["background".into()], self.class_names()].concat()
    }

    fn describe(&self, index: usize) -> String {
        let part = if self.part == 0 { "" } else { "held-out " };
        format!("{part}scene {index} of seed {}", self.seed)
    }

    fn summary(&self) -> Summary {
        let files =
            |part| (0..self.classes()).flat_map(move |class| vec![class; self.source.cut_outs(class, part).len()]);
        let (cut_outs, photographs) = (files(self.part).count(), self.source.backgrounds(self.part).len());
        let classes = count_classes(self.source.classes(), files(self.part).map(|class| Some(class as u32)));
        let mut content = format!("{} scenes of {cut_outs} cut-outs{classes} on {photographs} photographs", self.len);
        if let Some(held_out) = &self.held_out {
            content += &format!(", {} more of others held out for probes", held_out.len);
        }
        Summary { content, notes: self.source.notes().to_vec() }
    }

    fn fingerprint(&self) -> Option<String> {
        Some(self.source.hashes().content.clone())
    }

    fn stamp(&self) -> Option<String> {
        Some(self.source.hashes().written.clone())
    }

    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        self.held_out.clone().map(|part| part as Arc<dyn Dataset>)
    }
}
