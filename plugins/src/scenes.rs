//! `scenes`: drawn pictures of several textured objects, with an image label and a class for every pixel.

mod shape;
mod texture;

use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset, ImageSize, Sample};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::parallel::dispatch;
use dinolab_core::{plugin, Result};

use shape::{Outline, Shape};
use texture::{hsv, Pattern, Texture};

/// Drawn scenes: textured shapes of up to eight classes over textured backgrounds, with occlusion, shadows and smooth
/// edges. Needs no download.
///
/// The label of a scene is the class of the object of which most is visible; its mask is the class of every pixel
/// (0: background). Colours are random and textures only lean towards a class (see `texture_cue`), so neither tells it
/// by itself. A scene is a pure function of the run's seed and its index; at another size it is the same scene, drawn anew with
/// more pixels or fewer. Its depth is the order of its layers: background at 10 metres, objects evenly between it and the eye.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScenesConfig {
    /// Side in pixels, or [width, height].
    pub size: Size,
    /// Scenes to train on.
    #[schemars(range(min = 1, max = 1_000_000_000_000u64))]
    pub count: usize,
    /// Scenes set aside for probes.
    #[schemars(range(max = 1_000_000_000_000u64))]
    pub held_out: usize,
    /// Objects in a scene: [least, most].
    #[schemars(inner(range(min = 1, max = 64)), extend("x-ascending" = true))]
    pub objects: [usize; 2],
    /// Classes of objects: disc, square, triangle, star, ring, cross, crescent, arrow; at most 8.
    #[schemars(range(min = 1, max = 8))]
    pub classes: usize,
    /// How much texture tells about the class: the probability that an object has the pattern of its class instead of a
    /// random one.
    #[schemars(range(min = 0, max = 1))]
    pub texture_cue: f64,
    /// Whether scenes have an up direction, as photographs do: objects are rotated by at most 20 degrees, and light
    /// comes from above within the same range. Otherwise both directions are random.
    pub upright: bool,
}

/// The size of a scene in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum Size {
    /// As wide as high.
    Square(#[schemars(range(min = 8, max = 16384))] usize),
    /// [width, height].
    Rectangle(#[schemars(inner(range(min = 8, max = 16384)))] [usize; 2]),
}

impl Default for ScenesConfig {
    fn default() -> Self {
        Self {
            size: Size::Square(96),
            count: 8192,
            held_out: 1024,
            objects: [2, 5],
            classes: 8,
            texture_cue: 0.5,
            upright: false,
        }
    }
}

plugin!(Dataset, "scenes", ScenesConfig, |config: ScenesConfig, context: &mut DataContext| {
    Ok(Box::new(Scenes::new(&config, context.seed)) as Box<dyn Dataset>)
});

/// The scenes of one seed that are trained on, or those that are held out.
#[derive(Debug)]
pub struct Scenes {
    seed: u64,
    width: usize,
    height: usize,
    objects: [usize; 2],
    classes: usize,
    texture_cue: f64,
    upright: bool,
    /// 0: trained on; 1: held out.
    part: u64,
    len: usize,
    held_out: Option<Arc<Scenes>>,
}

impl Scenes {
    /// From a config whose numbers are in their ranges.
    pub fn new(config: &ScenesConfig, seed: u64) -> Self {
        let [width, height] = match config.size {
            Size::Square(side) => [side, side],
            Size::Rectangle(size) => size,
        };
        let ScenesConfig { count, held_out, objects, classes, texture_cue, upright, .. } = *config;
        let part = |part, len, held_out| Self {
            seed,
            width,
            height,
            objects,
            classes,
            texture_cue,
            upright,
            part,
            len,
            held_out,
        };
        let held_out = (held_out > 0).then(|| Arc::new(part(1, held_out, None)));
        part(0, count, held_out)
    }
}

impl Dataset for Scenes {
    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize) -> Result<Sample> {
        Ok(self.draw(index, true))
    }

    fn get_image(&self, index: usize) -> Result<Sample> {
        Ok(self.draw(index, false))
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn mask_classes(&self) -> usize {
        self.classes + 1
    }

    fn has_depth(&self) -> bool {
        true
    }

    fn describe(&self, index: usize) -> String {
        let part = if self.part == 0 { "" } else { "held-out " };
        format!("{part}scene {index} of seed {}", self.seed)
    }

    fn at_size(&self, size: ImageSize) -> Option<Arc<dyn Dataset>> {
        Some(Arc::new(self.of_size(size)))
    }

    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        self.held_out.clone().map(|part| part as Arc<dyn Dataset>)
    }
}

/// Metres to the background.
const FAR: f32 = 10.0;

impl Scenes {
    fn of_size(&self, size: ImageSize) -> Self {
        let held_out = self.held_out.as_ref().map(|part| Arc::new(part.of_size(size)));
        Self { width: size.width, height: size.height, held_out, ..*self }
    }

    /// A scene, with mask and depth or without.
    fn draw(&self, index: usize, dense: bool) -> Sample {
        let parts = self.parts(index);
        let (canvas, objects) = (self.paint(&parts), &parts.objects);
        let mut classes = [0; 256];
        for (class, object) in classes[1..].iter_mut().zip(objects) {
            *class = object.class as u8 + 1;
        }
        let mut visible = vec![0usize; objects.len() + 1];
        canvas.ids.iter().for_each(|&id| visible[id as usize] += 1);
        let largest = (1..visible.len()).max_by_key(|&id| visible[id]).expect("a scene has at least one object");
        let mask = || canvas.ids.iter().map(|&id| classes[usize::from(id)]).collect();
        let layers = visible.len() as f32;
        let depth = || canvas.ids.iter().map(|&id| FAR * (1.0 - f32::from(id) / layers)).collect();
        Sample {
            width: self.width,
            height: self.height,
            pixels: canvas.rgb().into(),
            label: Some(objects[largest - 1].class as u32),
            mask: dense.then(mask),
            depth: dense.then(depth),
            ..Sample::default()
        }
    }
}

/// What a scene is painted from.
struct Parts {
    background: Texture,
    /// Back to front.
    objects: Vec<Object>,
    light: [f32; 2],
}

impl Scenes {
    fn parts(&self, index: usize) -> Parts {
        let mut rng = Rng::new(self.seed, Stream::Scene, self.part, index as u64);
        let scale = self.width.min(self.height) as f32;
        let ground = rng.unit();
        let background = background(&mut rng, ground, scale);
        let objects = self.objects(&mut rng, ground, scale);
        let light = self.direction(&mut rng, -std::f64::consts::FRAC_PI_2);
        Parts { background, objects, light: [light.cos() as f32, light.sin() as f32] }
    }

    fn paint(&self, Parts { background, objects, light }: &Parts) -> Canvas {
        let mut canvas = Canvas::new(self.width, self.height, background);
        for (id, object) in objects.iter().enumerate() {
            canvas.shade(object, *light);
            canvas.paint(object, *light, id as u8 + 1);
        }
        canvas
    }

    /// Scene `index` as a film: its objects move over the ground, each its own way and evenly, by at most [`REACH`] of the shorter
    /// side. The mask of a frame has the object at every pixel, 0 for the background.
    pub(crate) fn film(&self, index: usize, frames: usize) -> Vec<Sample> {
        let mut parts = self.parts(index);
        let mut rng = Rng::new(self.seed, Stream::Scene, 2 + self.part, index as u64);
        let reach = REACH * self.width.min(self.height) as f64;
        let ways: Vec<[f64; 2]> =
            parts.objects.iter().map(|_| [rng.uniform(-reach, reach), rng.uniform(-reach, reach)]).collect();
        let starts: Vec<[f32; 2]> = parts.objects.iter().map(|object| object.centre).collect();
        // Far enough that no texture is asked for left of its beginning.
        let start = 2 * self.width.max(self.height);
        let frame = |t: usize| {
            for ((object, way), start_at) in parts.objects.iter_mut().zip(&ways).zip(&starts) {
                let moved = way.map(|way| (way * t as f64 / (frames.max(2) - 1) as f64).round());
                object.centre = [start_at[0] + moved[0] as f32, start_at[1] + moved[1] as f32];
                object.texture_start = moved.map(|moved| (start as f64 - moved) as usize);
            }
            let canvas = self.paint(&parts);
            let (width, height, pixels) = (self.width, self.height, canvas.rgb().into());
            Sample { width, height, pixels, mask: Some(canvas.ids), ..Sample::default() }
        };
        (0..frames).map(frame).collect()
    }
}

/// How far an object of a film moves along each axis at most, in shorter sides.
const REACH: f64 = 0.3;

/// One object of a scene.
struct Object {
    class: usize,
    outline: Outline,
    centre: [f32; 2],
    /// In pixels.
    radius: f32,
    /// Cosine and sine of its rotation.
    turn: [f32; 2],
    texture: Texture,
    /// The column and row of its texture at the scene's first pixel: it moves with the object in a film.
    texture_start: [usize; 2],
}

fn background(rng: &mut Rng, hue: f64, scale: f32) -> Texture {
    let pattern = Pattern::ALL[rng.below(Pattern::ALL.len())];
    let value = rng.uniform(0.3, 0.85);
    let other = (value + rng.uniform(0.12, 0.3) * if rng.chance(0.5) { 1.0 } else { -1.0 }).clamp(0.15, 0.95);
    let near = hsv(hue, rng.uniform(0.1, 0.45), value);
    let far = hsv(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.1, 0.45), other);
    Texture::draw(rng, pattern, scale, [near, far])
}

/// How far objects and light of upright scenes lean from their direction.
const LEAN: f64 = 20.0 * std::f64::consts::PI / 180.0;

impl Scenes {
    /// An angle: about `up` in upright scenes, otherwise any.
    fn direction(&self, rng: &mut Rng, up: f64) -> f64 {
        match self.upright {
            true => up + rng.uniform(-LEAN, LEAN),
            false => rng.uniform(0.0, std::f64::consts::TAU),
        }
    }

    /// Draws the objects, back to front: one large, the others smaller.
    fn objects(&self, rng: &mut Rng, ground: f64, scale: f32) -> Vec<Object> {
        let [least, most] = self.objects;
        let count = least + rng.below(most - least + 1);
        let large = rng.below(count);
        let object = |i: usize| {
            let class = rng.below(self.classes);
            let (radius, margin) =
                if i == large { (rng.uniform(0.22, 0.34), 0.28) } else { (rng.uniform(0.09, 0.19), 0.08) };
            let centre = [self.width, self.height].map(|side| (side as f64 * rng.uniform(margin, 1.0 - margin)) as f32);
            let angle = self.direction(rng, 0.0);
            let typical = class % Pattern::ALL.len();
            let pattern = if rng.chance(self.texture_cue) { typical } else { rng.below(Pattern::ALL.len()) };
            // Any hue that stands out from the background.
            let hue = ground + rng.uniform(0.12, 0.88);
            let main = hsv(hue, rng.uniform(0.5, 0.95), rng.uniform(0.65, 1.0));
            let second = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.75));
            Object {
                class,
                outline: Shape::ALL[class].outline(),
                centre,
                radius: radius as f32 * scale,
                turn: [angle.cos() as f32, angle.sin() as f32],
                texture: Texture::draw(rng, Pattern::ALL[pattern], scale, [main, second]),
                texture_start: [0; 2],
            }
        };
        (0..count).map(object).collect()
    }
}

/// A picture being painted.
struct Canvas {
    width: usize,
    height: usize,
    /// Red, green and blue planes in 0..=255.
    planes: [Vec<f32>; 3],
    /// The object seen at every pixel; 0: background.
    ids: Vec<u8>,
}

/// A row of pixels of an object's box: coordinates in units of its radius, distances to its outline in pixels.
struct Row {
    x: Vec<f32>,
    y: Vec<f32>,
    distance: Vec<f32>,
    pattern: Vec<f32>,
}

impl Canvas {
    fn new(width: usize, height: usize, background: &Texture) -> Self {
        let mut pattern = vec![0.0; width];
        let mut planes = [(); 3].map(|()| vec![0.0; width * height]);
        let [near, far] = background.colors;
        for y in 0..height {
            dispatch(
                #[inline(always)]
                || {
                    background.row(y, 0, &mut pattern);
                    for (c, plane) in planes.iter_mut().enumerate() {
                        for (p, t) in plane[y * width..(y + 1) * width].iter_mut().zip(&pattern) {
                            *p = near[c] + (far[c] - near[c]) * t;
                        }
                    }
                },
            );
        }
        Self { width, height, planes, ids: vec![0; width * height] }
    }

    /// Darkens what lies in the object's shadow.
    fn shade(&mut self, object: &Object, light: [f32; 2]) {
        let shift = 0.16 * object.radius;
        let centre = [object.centre[0] - shift * light[0], object.centre[1] - shift * light[1]];
        let softness = 1.0 / (0.3 * object.radius).max(1.0);
        self.rows(
            object,
            centre,
            #[inline(always)]
            |planes, _, _, row| {
                for plane in planes {
                    for (p, d) in plane.iter_mut().zip(&row.distance) {
                        *p *= 1.0 - 0.45 * (0.5 - d * softness).clamp(0.0, 1.0);
                    }
                }
            },
        );
    }

    /// Paints the object over what is there.
    fn paint(&mut self, object: &Object, light: [f32; 2], id: u8) {
        // The light in the object's own coordinates.
        let ([c, s], [lx, ly]) = (object.turn, light);
        let (lx, ly) = (lx * c + ly * s, ly * c - lx * s);
        let [near, far] = object.texture.colors;
        let rim = 1.0 / (0.14 * object.radius).max(1.0);
        self.rows(
            object,
            object.centre,
            #[inline(always)]
            |planes, ids, (y, first), row| {
                let [column, line] = object.texture_start;
                object.texture.row(y + line, first + column, &mut row.pattern);
                // Lit from one side, darker towards the rim; coverage of the pixel by the distance to the outline.
                for i in 0..row.x.len() {
                    let lit = 1.0 + 0.22 * (row.x[i] * lx + row.y[i] * ly);
                    let edge = 0.72 + 0.28 * (-row.distance[i] * rim).clamp(0.0, 1.0);
                    row.x[i] = lit * edge;
                    row.y[i] = (0.5 - row.distance[i]).clamp(0.0, 1.0);
                }
                for (c, plane) in planes.into_iter().enumerate() {
                    let pixels = plane.iter_mut().zip(&row.pattern).zip(row.x.iter().zip(&row.y));
                    for ((p, t), (shade, cover)) in pixels {
                        let color = ((near[c] + (far[c] - near[c]) * t) * shade).min(255.0);
                        *p += (color - *p) * cover;
                    }
                }
                for (seen, d) in ids.iter_mut().zip(&row.distance) {
                    *seen = if *d <= 0.0 { id } else { *seen };
                }
            },
        );
    }

    /// Calls `f(planes, ids, (y, first column), row)` for every row of the object's box around `centre`.
    #[inline(always)]
    fn rows(
        &mut self,
        object: &Object,
        centre: [f32; 2],
        f: impl Fn([&mut [f32]; 3], &mut [u8], (usize, usize), &mut Row),
    ) {
        let (reach, [cx, cy]) = (1.45 * object.radius + 1.0, centre);
        let range = |centre: f32, side: usize| {
            let clip = |v: f32| v.clamp(0.0, side as f32) as usize;
            clip((centre - reach).floor())..clip((centre + reach).ceil())
        };
        let (columns, lines) = (range(cx, self.width), range(cy, self.height));
        let n = columns.len();
        let mut row = Row { x: vec![0.0; n], y: vec![0.0; n], distance: vec![0.0; n], pattern: vec![0.0; n] };
        let ([c, s], inverse) = (object.turn, 1.0 / object.radius);
        let [red, green, blue] = &mut self.planes;
        for y in lines {
            let pixels = y * self.width + columns.start..y * self.width + columns.end;
            let planes = [&mut red[pixels.clone()], &mut green[pixels.clone()], &mut blue[pixels.clone()]];
            let ids = &mut self.ids[pixels];
            dispatch(
                #[inline(always)]
                || {
                    let dy = (y as f32 + 0.5 - cy) * inverse;
                    for (i, (x, y)) in row.x.iter_mut().zip(&mut row.y).enumerate() {
                        let dx = ((columns.start + i) as f32 + 0.5 - cx) * inverse;
                        (*x, *y) = (dx * c + dy * s, dy * c - dx * s);
                    }
                    object.outline.distances(&row.x, &row.y, &mut row.distance);
                    row.distance.iter_mut().for_each(|d| *d *= object.radius);
                    f(planes, ids, (y, columns.start), &mut row);
                },
            );
        }
    }

    fn rgb(&self) -> Vec<u8> {
        let [red, green, blue] = &self.planes;
        let mut rgb = vec![0; 3 * red.len()];
        for (i, out) in rgb.chunks_exact_mut(3).enumerate() {
            (out[0], out[1], out[2]) = ((red[i] + 0.5) as u8, (green[i] + 0.5) as u8, (blue[i] + 0.5) as u8);
        }
        rgb
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenes(size: Size) -> Scenes {
        Scenes::new(&ScenesConfig { size, ..ScenesConfig::default() }, 3)
    }

    #[test]
    fn a_scene_depends_on_seed_index_and_part_alone() {
        let config = ScenesConfig { size: Size::Square(32), ..ScenesConfig::default() };
        let [a, same, other] = [3, 3, 4].map(|seed| Scenes::new(&config, seed));
        assert_eq!(a.get(7).unwrap(), same.get(7).unwrap());
        assert_ne!(a.get(7).unwrap(), a.get(8).unwrap());
        assert_ne!(a.get(7).unwrap(), other.get(7).unwrap());
        assert_ne!(a.get(7).unwrap(), a.held_out().unwrap().get(7).unwrap());
    }

    #[test]
    fn objects_of_a_film_move_with_their_texture_over_a_ground_that_stands() {
        let config = ScenesConfig { objects: [1, 1], ..ScenesConfig::default() };
        let scenes = Scenes::new(&config, 3);
        let mut moved = 0;
        for index in 0..8 {
            let film = scenes.film(index, 5);
            let (first, last) = (&film[0], &film[4]);
            let (a, b) = (first.mask.as_ref().unwrap(), last.mask.as_ref().unwrap());
            let places = |mask: &[u8]| (0..96 * 96).filter(|&i| mask[i] == 1).collect::<Vec<_>>();
            let (from, to) = (places(a), places(b));
            moved += usize::from(from != to);
            // Away from shadows the ground is the same.
            let ground = (0..96 * 96).filter(|&i| a[i] == 0 && b[i] == 0);
            let same = ground.clone().filter(|&i| first.rgb()[3 * i..][..3] == last.rgb()[3 * i..][..3]).count();
            assert!(same as f64 > 0.5 * ground.count() as f64, "film {index}");
            // Inside, the object looks the same where it went.
            if from.len() == to.len() {
                let alike = from
                    .iter()
                    .zip(&to)
                    .filter(|(i, k)| (0..3).all(|c| first.rgb()[3 * **i + c].abs_diff(last.rgb()[3 * **k + c]) < 8));
                assert!(alike.count() as f64 > 0.8 * from.len() as f64, "film {index}");
            }
        }
        assert!(moved >= 7, "{moved} of 8 objects moved");
    }

    #[test]
    fn label_and_mask_say_what_is_seen() {
        let scenes = scenes(Size::Rectangle([80, 48]));
        for index in 0..50 {
            let scene = scenes.get(index).unwrap();
            let (label, mask) = (scene.label.unwrap(), scene.mask.clone().unwrap());
            assert_eq!((scene.width, scene.height, scene.rgb().len(), mask.len()), (80, 48, 3 * 80 * 48, 80 * 48));
            assert!(mask.iter().all(|&class| usize::from(class) < scenes.mask_classes()));
            let seen = mask.iter().filter(|&&class| u32::from(class) == label + 1).count();
            assert!(seen > 80, "scene {index}: {seen} pixels of the labelled class");
        }
    }

    #[test]
    fn a_scene_is_the_same_at_every_size_and_nearer_layers_hide_farther_ones() {
        let (small, large) =
            (scenes(Size::Square(48)), scenes(Size::Square(24)).at_size(ImageSize::square(96)).unwrap());
        for index in 0..20 {
            let (small, large) = (small.get(index).unwrap(), large.get(index).unwrap());
            let (mask, depth) = (small.mask.unwrap(), small.depth.unwrap());
            let whole = large.mask.unwrap();
            let at = |i: usize| whole[(2 * (i / 48) + 1) * 96 + 2 * (i % 48) + 1];
            let same = (0..mask.len()).filter(|&i| mask[i] == at(i)).count();
            assert!(same as f64 > 0.97 * mask.len() as f64, "{same} pixels of scene {index} have their class");
            assert!(mask.iter().zip(&depth).all(|(&class, &depth)| (class == 0) == (depth == FAR) && depth > 0.0));
        }
        let wide = scenes(Size::Square(24)).at_size(ImageSize { width: 40, height: 24 }).unwrap();
        assert_eq!((wide.get(0).unwrap().width, wide.held_out().unwrap().get(0).unwrap().width), (40, 40));
        let image = wide.get_image(3).unwrap();
        assert_eq!(image, Sample { mask: None, depth: None, ..wide.get(3).unwrap() });
    }

    #[test]
    fn what_lies_below_an_object_is_dark_in_upright_scenes_alone() {
        // The mean brightness above and below the labelled object, over many scenes.
        let below_and_above = |upright: bool| {
            let config = ScenesConfig { objects: [1, 1], upright, ..ScenesConfig::default() };
            let scenes = Scenes::new(&config, 3);
            let mut sums = [0.0; 2];
            for index in 0..200 {
                let scene = scenes.get(index).unwrap();
                let mask = scene.mask.clone().unwrap();
                for x in 0..scene.width {
                    let column: Vec<usize> = (0..scene.height).filter(|y| mask[y * scene.width + x] > 0).collect();
                    let (Some(first), Some(last)) = (column.first(), column.last()) else { continue };
                    let at = |y: usize| f64::from(scene.rgb()[3 * (y * scene.width + x)]);
                    if *first >= 2 && last + 2 < scene.height {
                        sums = [sums[0] + at(last + 2), sums[1] + at(first - 2)];
                    }
                }
            }
            sums[0] / sums[1]
        };
        let (upright, any) = (below_and_above(true), below_and_above(false));
        assert!(upright < 0.8 && (0.9..1.1).contains(&any), "{upright} {any}");
    }

    #[test]
    fn mean_colour_does_not_tell_the_class() {
        let scenes = scenes(Size::Square(32));
        let features = |from: usize| -> Vec<([f64; 3], usize)> {
            let mean = |scene: &Sample| -> [f64; 3] {
                std::array::from_fn(|c| {
                    scene.rgb().iter().skip(c).step_by(3).map(|&x| f64::from(x)).sum::<f64>() / 1024.0
                })
            };
            let read = |i| scenes.get(i).map(|s| (mean(&s), s.label.unwrap() as usize)).unwrap();
            (from..from + 1000).map(read).collect()
        };
        let mut centres = [([0.0; 3], 0.0); 8];
        for (x, label) in features(0) {
            (0..3).for_each(|c| centres[label].0[c] += x[c]);
            centres[label].1 += 1.0;
        }
        let distance =
            |x: &[f64; 3], k: usize| (0..3).map(|c| (x[c] - centres[k].0[c] / centres[k].1).powi(2)).sum::<f64>();
        let nearest = |x: &[f64; 3]| (0..8).min_by(|&a, &b| distance(x, a).total_cmp(&distance(x, b))).unwrap();
        let right = features(1000).iter().filter(|(x, label)| nearest(x) == *label).count();
        assert!(right < 220, "{right} of 1000 classes are told by the mean colour; chance is 125");
    }
}
