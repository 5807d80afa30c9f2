//! What teacher and student compute in a step, and how a loss gets to see it.

use crate::contract::{At, Crops, Draws, Features, GramTarget, Grid, Mode, ModelOutputs, Needs, Outputs};
use crate::data::Batch;
use crate::params::Params;
use crate::tensor::scope;
use crate::{DType, Error, Result, Tensor};

use super::{views, DeclaredLoss, Learner};

/// The teacher over all micro-batches, and every loss's targets.
pub(super) struct TeacherPass {
    /// None if nothing asks for them.
    features: Vec<Features>,
    /// `[loss][micro-batch]`.
    targets: Vec<Vec<Option<Tensor>>>,
    /// The losses' state after their targets.
    pub(super) state: Vec<Vec<Tensor>>,
    /// For losses that do without.
    nothing: Features,
}

/// The teacher on one micro-batch.
pub(super) struct TeacherOf<'a> {
    pub(super) features: Option<&'a Features>,
    /// By loss.
    pub(super) targets: Vec<Option<&'a Tensor>>,
}

/// A model's tokens as a loss sees them.
fn tokens<'a>(global: &'a Features, local: Option<&'a Features>, needs: &Needs, batch: &'a Batch) -> ModelOutputs<'a> {
    ModelOutputs {
        cls: &global.cls,
        patches: &global.patches,
        local_cls: local.map(|l| &l.cls),
        local_patches: local.filter(|_| needs.tokens).map(|l| &l.patches),
        registers: needs.tokens.then_some(&global.registers),
        prenorm: needs.tokens.then_some(&global.prenorm),
        mask_indices: &batch.masks.indices,
    }
}

/// The features of crops that a model was not shown: no rows.
fn nothing(dim: usize, grid: Grid, dtype: DType) -> Features {
    let [cls, tokens] = [&[0, dim][..], &[0, 0, dim]].map(|shape| Tensor::zeros(shape, dtype));
    Features { cls, registers: tokens.clone(), patches: tokens.clone(), prenorm: tokens, grid }
}

/// The state of a loss after a call that gave `new`; none: it stays as it was.
///
/// # Errors
/// If the shapes are not those that the loss declares.
pub(super) fn next_state(declared: &DeclaredLoss, old: &[Tensor], new: Vec<Tensor>) -> Result<Vec<Tensor>> {
    if new.is_empty() {
        return Ok(old.to_vec());
    }
    let shapes = |state: &[Tensor]| state.iter().map(|t| t.shape().to_vec()).collect::<Vec<_>>();
    if shapes(old) != shapes(&new) {
        let (name, has, gives) = (&declared.name, shapes(old), shapes(&new));
        return Err(Error::shape(
            "loss",
            format!("the state of `{name}` has shapes {has:?}, but {gives:?} were given"),
        ));
    }
    new.iter().zip(old).map(|(new, old)| new.detach().cast(old.dtype())).collect()
}

impl TeacherPass {
    /// `features`: whether they are needed although no loss asks for them.
    pub(super) fn run(learner: &Learner, batches: &[Batch], at: At, features: bool) -> Result<Self> {
        let _scope = scope::enter("teacher");
        // A frozen model of its own, or the student's EMA.
        let (model, flat) = match &learner.distilled {
            Some(teacher) => (&teacher.model, &teacher.flat),
            None => (&learner.model, learner.weights.evaluated()),
        };
        let params = Params::frozen(&model.layout, flat);
        let needed = features || learner.model.losses.iter().any(|l| l.needs.runs_teacher());
        let mut features = Vec::new();
        for batch in batches.iter().filter(|_| needed) {
            let crops = Crops::global(batch.global.clone());
            features.extend(model.backbone.forward(&params, &[crops], Mode::Eval)?);
        }
        let (mut targets, mut state) = (Vec::new(), Vec::new());
        for (declared, old) in learner.model.losses.iter().zip(&learner.weights.loss_state) {
            let (Some(spec), Some(taught)) = (declared.needs.targets, model.loss(&declared.name)) else {
                targets.push(vec![None; batches.len()]);
                state.push(old.clone());
                continue;
            };
            let _scope = scope::enter(format!("losses.{}", declared.name));
            if declared.needs.masks && batches.iter().all(|b| b.masks.indices.is_empty()) {
                let problem =
                    format!("no patch of this step's crops is masked, and the loss `{}` is of those", declared.name);
                let help =
                    "raise masking.probability or masking.ratio: of some crop at least one patch has to be masked";
                return Err(Error::user(problem, help));
            }
            let parts = features
                .iter()
                .zip(batches)
                .map(|(f, b)| taught.loss.project(&params, &tokens(f, None, &taught.needs, b)));
            let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
            let all = Tensor::cat(&parts.iter().collect::<Vec<_>>())?;
            let (all, new) = declared.loss.targets(&all, &learner.context(at, old))?;
            let rows = parts.iter().map(|part| part.dim(0)).sum::<usize>();
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
        Ok(Self { features, targets, state, nothing })
    }

    pub(super) fn of(&self, micro: usize) -> TeacherOf<'_> {
        let targets = self.targets.iter().map(|t| t[micro].as_ref()).collect();
        TeacherOf { features: self.features.get(micro), targets }
    }

    /// The teacher on one micro-batch as a loss sees it.
    fn seen_by<'a>(&'a self, needs: &Needs, micro: usize, batch: &'a Batch) -> ModelOutputs<'a> {
        let features = self.features.get(micro).filter(|_| needs.teacher);
        tokens(features.unwrap_or(&self.nothing), None, needs, batch)
    }
}

/// The student on one micro-batch.
pub(super) struct StudentPass {
    global: Features,
    local: Option<Features>,
    /// Of the views of each loss.
    views: Vec<Vec<Features>>,
    /// By loss: what it drew, for the step and for each image.
    draws: Vec<[Option<Tensor>; 2]>,
}

impl StudentPass {
    pub(super) fn run(learner: &Learner, params: &Params<'_>, batch: &Batch, draws: &Draws) -> Result<Self> {
        let _scope = scope::enter("student");
        let model = &learner.model;
        let masks = model.losses.iter().any(|l| l.needs.masks).then(|| batch.masks.masks.clone());
        let [globals, locals] = model.student_sees();
        let local = batch.local.clone().filter(|_| locals);
        let mut crops = Vec::new();
        crops.extend(globals.then(|| Crops { pixels: batch.global.clone(), masks, local: false }));
        crops.extend(local.map(|pixels| Crops { pixels, masks: None, local: true }));
        let own = crops.len();
        crops.extend(views::crops(model, batch, draws)?);
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
        let views = draws.tiles.iter().map(|of_loss| of_views.by_ref().take(of_loss.len()).collect()).collect();
        let drawn = |i| Ok([draws.of_loss(i)?, views::image_draws(draws, i, batch.images())?]);
        let draws = (0..model.losses.len()).map(drawn).collect::<Result<_>>()?;
        Ok(Self { global, local, views, draws })
    }

    /// The step as loss `i` sees it on micro-batch `micro`.
    pub(super) fn outputs<'a>(
        &'a self,
        learner: &Learner,
        batch: &'a Batch,
        (i, micro): (usize, usize),
        teacher: &'a TeacherPass,
        gram: Option<&'a GramTarget>,
    ) -> Outputs<'a> {
        let needs = &learner.model.losses[i].needs;
        Outputs {
            images: batch.images(),
            globals: batch.global.dim(0) / batch.images(),
            locals: learner.locals,
            grid: self.global.grid,
            student: tokens(&self.global, self.local.as_ref(), needs, batch),
            teacher: teacher.seen_by(needs, micro, batch),
            targets: teacher.targets[i][micro].as_ref(),
            unmasked_indices: &batch.masks.unmasked,
            mask_weights: &batch.masks.weights,
            gram,
            pixels: needs.pixels.then_some(&batch.global),
            labels: needs.classes.map(|_| &batch.labels),
            draws: self.draws[i][0].as_ref(),
            image_draws: self.draws[i][1].as_ref(),
            views: &self.views[i],
            fields: if needs.fields.is_empty() { &[] } else { &batch.fields },
        }
    }
}

impl Learner {
    /// The Gram teacher's patches of one micro-batch, on the student's grid.
    pub(super) fn gram_target(&self, batch: &Batch) -> Result<GramTarget> {
        let _scope = scope::enter("gram_teacher");
        let (model, weights) = (&self.model, &self.weights);
        let flat = weights.gram().expect("a Gram teacher has weights");
        let pixels = batch.gram.as_ref().unwrap_or(&batch.global);
        let crops = Crops::global(pixels.clone());
        let mut features = model.backbone.forward(&Params::frozen(&model.layout, flat), &[crops], Mode::Eval)?;
        let features = features.pop().ok_or_else(|| Error::shape("backbone", "no features for the Gram crops"))?;
        let (from, patch) = (features.grid, model.backbone.patch_size());
        let to = Grid { height: batch.global.dim(2) / patch, width: batch.global.dim(3) / patch };
        let antialias = self.gram.as_ref().is_some_and(|g| g.antialias());
        let patches = match from == to {
            true => features.patches,
            false => {
                let (from, to) = ((from.height, from.width), (to.height, to.width));
                features.patches.resize_bicubic(from, to, antialias)?
            }
        };
        Ok(GramTarget { patches })
    }
}
