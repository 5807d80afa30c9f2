//! What teacher and student compute in a step, and how a loss gets to see it.

use crate::contract::{
    At, Crops, Draws, Features, Grid, Mode, ModelOutputs, NamedTeacher, Needs, Outputs, State, Targets, View,
};
use crate::data::Batch;
use crate::params::Params;
use crate::scope;
use crate::{DType, Error, Result, Tensor};

use super::{views, Declared, DeclaredLoss, Learner, Teacher};

/// The teacher over all micro-batches, and every loss's targets.
pub(super) struct TeacherPass {
    /// None if nothing asks for them.
    features: Vec<Features>,
    /// `[loss][micro-batch]`: tokens after the blocks that the loss asks for.
    layers: Vec<Vec<Vec<Tensor>>>,
    /// `[loss][micro-batch]`: features of the views that the teacher sees.
    views: Vec<Vec<Vec<Features>>>,
    /// `[loss][micro-batch]`.
    targets: Vec<Vec<Option<Tensor>>>,
    /// The losses' state after their targets.
    pub(super) state: Vec<State>,
    /// For losses that do without.
    nothing: Features,
}

/// The teacher on one micro-batch.
pub(super) struct TeacherOf<'a> {
    pub(super) features: Option<&'a Features>,
    /// By loss.
    pub(super) targets: Vec<Option<&'a Tensor>>,
}

/// A model's tokens as a loss sees them; `layers` are those of the loss.
fn tokens<'a>(
    global: &'a Features,
    local: Option<&'a Features>,
    layers: &'a [Tensor],
    needs: &Needs,
    batch: &'a Batch,
) -> ModelOutputs<'a> {
    ModelOutputs {
        cls: &global.cls,
        patches: &global.patches,
        local_cls: local.map(|l| &l.cls),
        local_patches: local.filter(|_| needs.tokens).map(|l| &l.patches),
        registers: needs.tokens.then_some(&global.registers),
        prenorm: needs.tokens.then_some(&global.prenorm),
        layers,
        mask_indices: &batch.masks.indices,
    }
}

/// The features of crops that a model was not shown: no rows.
fn nothing(dim: usize, grid: Grid, dtype: DType) -> Features {
    let [cls, tokens] = [&[0, dim][..], &[0, 0, dim]].map(|shape| Tensor::zeros(shape, dtype));
    Features { cls, registers: tokens.clone(), patches: tokens.clone(), prenorm: tokens, layers: Vec::new(), grid }
}

/// The layers that a loss asks for, of features with all those that are asked for.
fn layers_of(all: &[usize], needs: &Needs, features: &Features) -> Vec<Tensor> {
    let place = |layer: &usize| all.iter().position(|l| l == layer);
    needs.layers.iter().filter_map(place).filter_map(|place| features.layers.get(place).cloned()).collect()
}

/// The state of a loss after a call that gave `new`; what it did not give stays as it was.
///
/// # Errors
/// If the loss does not declare one, or declares another shape.
pub(super) fn next_state(declared: &DeclaredLoss, old: &State, new: State) -> Result<State> {
    let mut next = old.clone();
    for (name, new) in new {
        let Some((_, own)) = next.iter_mut().find(|(known, _)| *known == name) else {
            let problem = format!("`{}` gave the state `{name}`, which it does not declare", declared.name);
            return Err(Error::shape("loss", problem));
        };
        if own.shape() != new.shape() {
            let (loss, has, gives) = (&declared.name, own.shape(), new.shape());
            let problem = format!("the state `{name}` of `{loss}` has shape {has:?}, but {gives:?} was given");
            return Err(Error::shape("loss", problem));
        }
        *own = new.detach().cast(own.dtype())?;
    }
    Ok(next)
}

impl TeacherPass {
    /// `features`: whether they are needed although no loss asks for them.
    pub(super) fn run(learner: &Learner, batches: &[Batch], draws: &[Draws], at: At, features: bool) -> Result<Self> {
        let _scope = scope::enter("teacher");
        let run = |model: &Declared, params: &Params<'_>| {
            Self::of_model(learner, (model, params), (batches, draws), at, features)
        };
        // A frozen model of its own, or the student's EMA.
        match &learner.distilled {
            Some(teacher) => run(&teacher.model, &Params::frozen(&teacher.model.layout, teacher.flat())),
            None => {
                let (model, weights) = (&learner.model, &learner.weights);
                weights.with_frozen(&model.layout, weights.evaluated(), &learner.ranks, |params| run(model, params))
            }
        }
    }

    fn of_model(
        learner: &Learner,
        (model, params): (&Declared, &Params<'_>),
        (batches, draws): (&[Batch], &[Draws]),
        at: At,
        features: bool,
    ) -> Result<Self> {
        let needed = features || learner.model.losses.iter().any(|l| l.needs.runs_teacher());
        let losses = &learner.model.losses;
        let (mut features, mut layers, mut views) =
            (Vec::new(), vec![Vec::new(); losses.len()], vec![Vec::new(); losses.len()]);
        let shared = learner.shared.as_ref().map(|shared| shared.given());
        let asked = shared.as_ref().map_or_else(|| learner.model.layers(), |(asked, _)| asked.clone());
        for (micro, (batch, draws)) in batches.iter().zip(draws).enumerate().filter(|_| needed) {
            let of_views = views::crops(&learner.model, batch, draws, View::for_teacher)?;
            let given = match &shared {
                Some((_, seen)) => vec![seen[micro].clone()],
                None => {
                    let global = Crops::global(batch.global.clone()).with_layers(asked.clone());
                    let crops: Vec<Crops> = [global].into_iter().chain(of_views.iter().flatten().cloned()).collect();
                    model.backbone.forward(params, &crops, Mode::Eval)?
                }
            };
            let mut given = given.into_iter();
            let global = given.next().ok_or_else(|| Error::shape("backbone", "no features of the global crops"))?;
            for (i, (declared, of_views)) in losses.iter().zip(&of_views).enumerate() {
                layers[i].push(layers_of(&asked, &declared.needs, &global));
                views[i].push(given.by_ref().take(of_views.len()).collect());
            }
            features.push(global);
        }
        let (mut targets, mut state) = (Vec::new(), Vec::new());
        for (declared, old) in learner.model.losses.iter().zip(&learner.weights.loss_state) {
            let spec = declared.needs.targets;
            let taught =
                if spec.is_some_and(|spec| spec.features) { Some(declared) } else { model.loss(&declared.name) };
            let (Some(spec), Some(taught)) = (spec, taught) else {
                targets.push(vec![None; batches.len()]);
                state.push(old.clone());
                continue;
            };
            let _scope = scope::enter(format!("losses.{}", declared.name));
            if declared.needs.masks && batches.iter().all(|batch| batch.masks.share == 0.0) {
                let problem =
                    format!("no patch of this step's crops is masked, and the loss `{}` is of those", declared.name);
                let help =
                    "raise masking.probability or masking.ratio: of some crop at least one patch has to be masked";
                return Err(Error::user(problem, help));
            }
            let project = |((features, layers), batch): ((&Features, &Vec<Tensor>), &Batch)| {
                taught.loss.project(params, &tokens(features, None, layers, &taught.needs, batch))
            };
            let parts = features.iter().zip(&layers[targets.len()]).zip(batches).map(project);
            let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
            let all = Tensor::cat(&parts.iter().collect::<Vec<_>>())?;
            let rows: Vec<usize> = parts.iter().map(|part| part.dim(0)).collect();
            let (shards, rows) = (learner.ranks.shards_of(&rows), rows.iter().sum::<usize>());
            let Targets { rows: all, state: new } = declared.loss.targets(&all, &learner.context(at, old, &shards))?;
            if all.shape() != [rows, spec.width] {
                let (name, gives, asks) = (&declared.name, all.shape(), [rows, spec.width]);
                let problem = format!("the targets of `{name}` have shape {gives:?}, and `needs` says {asks:?}");
                return Err(Error::shape("loss", problem));
            }
            let mut start = 0;
            let part = |part: &Tensor| {
                let own = all.narrow(start, part.dim(0));
                start += part.dim(0);
                own.map(Some)
            };
            targets.push(parts.iter().map(part).collect::<Result<_>>()?);
            state.push(next_state(declared, old, new)?);
        }
        let nothing = nothing(learner.model.backbone.dim(), Grid { height: 0, width: 0 }, params.dtype());
        Ok(Self { features, layers, views, targets, state, nothing })
    }

    pub(super) fn of(&self, micro: usize) -> TeacherOf<'_> {
        let targets = self.targets.iter().map(|t| t[micro].as_ref()).collect();
        TeacherOf { features: self.features.get(micro), targets }
    }

    /// The teacher on one micro-batch as loss `i` sees it.
    fn seen_by<'a>(&'a self, needs: &Needs, (i, micro): (usize, usize), batch: &'a Batch) -> ModelOutputs<'a> {
        let features = self.features.get(micro).filter(|_| needs.teacher);
        let layers = self.layers[i].get(micro).filter(|_| needs.teacher).map_or(&[][..], Vec::as_slice);
        tokens(features.unwrap_or(&self.nothing), None, layers, needs, batch)
    }
}

/// The student on one micro-batch.
pub(super) struct StudentPass {
    global: Features,
    local: Option<Features>,
    /// By loss: tokens after the blocks that it asks for.
    layers: Vec<Vec<Tensor>>,
    /// By loss: of the views that the student sees.
    views: Vec<Vec<Features>>,
    /// By loss: what it drew, for the step and for each image.
    draws: Vec<[Option<Tensor>; 2]>,
}

impl StudentPass {
    pub(super) fn run(learner: &Learner, params: &Params<'_>, batch: &Batch, draws: &Draws) -> Result<Self> {
        let _scope = scope::enter("student");
        let model = &learner.model;
        // A student that is distilled sees whole crops, as in the reference; losses on masked patches are of the same places.
        let hidden = learner.distilled.is_none() && model.losses.iter().any(|l| l.needs.masks);
        let masks = hidden.then(|| batch.masks.masks.clone());
        let [globals, locals] = model.student_sees();
        let local = batch.local.clone().filter(|_| locals);
        let mut crops = Vec::new();
        let layers = model.layers();
        crops.extend(globals.then(|| Crops { pixels: batch.global.clone(), masks, local: false, layers }));
        crops.extend(local.map(|pixels| Crops { local: true, ..Crops::global(pixels) }));
        let own = crops.len();
        let of_losses = views::crops(model, batch, draws, View::for_student)?;
        crops.extend(of_losses.iter().flatten().cloned());
        let mut features = match crops.is_empty() {
            true => Vec::new(),
            false => model.backbone.forward(params, &crops, Mode::Train(draws))?,
        };
        if features.len() != crops.len() {
            let problem = format!("{} kinds of features for {} kinds of crops", features.len(), crops.len());
            return Err(Error::shape("backbone", problem));
        }
        let mut of_views = features.split_off(own).into_iter();
        let mut features = features.into_iter();
        let (patch, dim) = (model.backbone.patch_size(), model.backbone.dim());
        let grid = Grid { height: batch.global.dim(2) / patch, width: batch.global.dim(3) / patch };
        let global = if globals { features.next() } else { None };
        let global = global.unwrap_or_else(|| nothing(dim, grid, params.dtype()));
        let local = features.next();
        let views = of_losses.iter().map(|of_loss| of_views.by_ref().take(of_loss.len()).collect()).collect();
        let layers = model.losses.iter().map(|l| layers_of(&model.layers(), &l.needs, &global)).collect();
        let drawn = |i| Ok([draws.of_loss(i)?, views::image_draws(draws, i, batch.images())?]);
        let draws = (0..model.losses.len()).map(drawn).collect::<Result<_>>()?;
        Ok(Self { global, local, layers, views, draws })
    }

    /// The step as loss `i` sees it on micro-batch `micro`.
    pub(super) fn outputs<'a>(
        &'a self,
        learner: &Learner,
        batch: &'a Batch,
        (i, micro): (usize, usize),
        teacher: &'a TeacherPass,
        teachers: &'a [(String, NamedTeacher)],
    ) -> Outputs<'a> {
        let needs = &learner.model.losses[i].needs;
        Outputs {
            images: batch.images(),
            globals: batch.global.dim(0) / batch.images(),
            locals: learner.locals,
            grid: self.global.grid,
            student: tokens(&self.global, self.local.as_ref(), &self.layers[i], needs, batch),
            teacher: teacher.seen_by(needs, (i, micro), batch),
            targets: teacher.targets[i][micro].as_ref(),
            unmasked_indices: &batch.masks.unmasked,
            mask_weights: &batch.masks.weights,
            mask_share: batch.masks.share,
            teachers: if needs.teachers.is_empty() { &[] } else { teachers },
            pixels: needs.pixels.then_some(&batch.global),
            labels: needs.classes.map(|_| &batch.labels),
            draws: self.draws[i][0].as_ref(),
            image_draws: self.draws[i][1].as_ref(),
            views: &self.views[i],
            teacher_views: teacher.views[i].get(micro).map_or(&[], Vec::as_slice),
            fields: if needs.fields.is_empty() { &[] } else { &batch.fields },
        }
    }
}

impl Learner {
    /// What the teachers of `[teachers]` that are active give of one micro-batch, on the student's grid.
    pub(super) fn named_teachers(&self, batch: &Batch, at: At) -> Result<Vec<(String, NamedTeacher)>> {
        let active = self.named.iter().enumerate().filter(|(_, teacher)| teacher.policy.active(at));
        active.map(|(i, teacher)| Ok((teacher.name.clone(), self.named_teacher(i, teacher, batch)?))).collect()
    }

    fn named_teacher(&self, i: usize, teacher: &Teacher, batch: &Batch) -> Result<NamedTeacher> {
        let _scope = scope::enter(format!("teachers.{}", teacher.name));
        let model = &self.model;
        let own = batch.teacher.as_ref().filter(|_| teacher.policy.crop_size().is_some());
        let crops = Crops::global(own.unwrap_or(&batch.global).clone());
        let forward = |params: &Params<'_>| model.backbone.forward(params, &[crops], Mode::Eval);
        let mut features = self.weights.with_frozen(&model.layout, self.weights.named(i), &self.ranks, forward)?;
        let Features { cls, patches, grid: from, .. } =
            features.pop().ok_or_else(|| Error::shape("backbone", "no features for a teacher's crops"))?;
        let patch = model.backbone.patch_size();
        let to = Grid { height: batch.global.dim(2) / patch, width: batch.global.dim(3) / patch };
        let patches = match from == to {
            true => patches,
            false => {
                let (from, to) = ((from.height, from.width), (to.height, to.width));
                patches.resize_bicubic(from, to, teacher.policy.antialias())?
            }
        };
        Ok(NamedTeacher { cls, patches })
    }
}
