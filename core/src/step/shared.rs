//! A frozen teacher that several students have in common: its weights are read once, and it sees a step's crops once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::contract::{At, Crops, Features, Mode, View};
use crate::cuda::{self, Gpu};
use crate::data::Batch;
use crate::params::Params;
use crate::scope;
use crate::{Error, Result, Tensor};

use super::Learner;

/// The frozen model from which several students of one process learn, each in turn doing a step on the same images (multi-student
/// distillation: Siméoni et al., arXiv:2508.10104, section 5.2).
#[derive(Default)]
pub struct SharedTeacher {
    weights: Arc<OnceLock<Tensor>>,
    seen: Mutex<Seen>,
}

/// What the teacher gave of the newest step.
#[derive(Default)]
struct Seen {
    /// After how many blocks a student asks for tokens.
    layers: BTreeSet<usize>,
    step: Option<u64>,
    /// By micro-batch.
    features: Vec<Features>,
    /// On a GPU features lie in memory that lasts, the same for all steps of the same shapes: recorded steps know it by its
    /// addresses.
    places: Vec<Vec<Features>>,
    passes: u64,
}

impl SharedTeacher {
    /// How many steps' crops the teacher has seen.
    pub fn passes(&self) -> u64 {
        self.seen().passes
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After how many blocks the features of the newest step have tokens, and these features.
    pub(super) fn given(&self) -> (Vec<usize>, Vec<Features>) {
        let seen = self.seen();
        (seen.layers.iter().copied().collect(), seen.features.clone())
    }
}

impl Seen {
    /// Copies features to where recorded steps of their shapes look for them.
    fn place(&mut self, gpu: &Gpu, features: &[Features]) -> Result<Vec<Features>> {
        let tensors = |of: &[Features]| of.iter().flat_map(Features::tensors).cloned().collect::<Vec<Tensor>>();
        let shapes = |of: &[Features]| tensors(of).iter().map(|t| t.shape().to_vec()).collect::<Vec<_>>();
        let Some(place) = self.places.iter().find(|place| shapes(place) == shapes(features)) else {
            let _lasting = cuda::lasting_scope();
            let place: Vec<Features> = features.iter().map(|of| of.map(|x| Ok(x.to_owned()))).collect::<Result<_>>()?;
            self.places.push(place.clone());
            return Ok(place);
        };
        for (to, from) in tensors(place).iter().zip(tensors(features)) {
            gpu.copy(to.device_address(), from.device_address(), from.len() * from.dtype().size())?;
        }
        Ok(place.clone())
    }
}

impl Learner {
    /// Has the frozen teacher in common with the other students that `teacher` is shared with. All of them have to share it before
    /// the first does a step, and from then on to do the same steps on the same batches.
    ///
    /// # Errors
    /// If it learns from no frozen teacher, or shows it crops that a loss cuts for itself.
    pub(super) fn share(&mut self, teacher: &Arc<SharedTeacher>, global_size: usize) -> Result<()> {
        let Some(own) = &mut self.distilled else {
            let help = "set teacher.plugin = \"frozen\" and teacher.checkpoint, or train it by itself";
            return Err(Error::user("the student learns from no frozen teacher that it could share", help));
        };
        for declared in &self.model.losses {
            if declared.loss.views(global_size)?.iter().any(View::for_teacher) {
                let problem = format!("the loss `{}` shows the teacher crops of its own", declared.name);
                return Err(Error::user(problem, "train this student by itself"));
            }
        }
        own.weights = teacher.weights.clone();
        teacher.seen().layers.extend(self.model.layers());
        self.shared = Some(teacher.clone());
        Ok(())
    }

    /// Shows a shared teacher the step's global crops, unless another student has.
    pub(super) fn teach(&self, at: At, batches: &[Batch]) -> Result<()> {
        let (Some(shared), Some(teacher)) = (&self.shared, &self.distilled) else { return Ok(()) };
        let mut seen = shared.seen();
        if seen.step == Some(at.step) {
            return Ok(());
        }
        let _scope = scope::enter("teacher");
        let _step = cuda::step_scope();
        let params = Params::frozen(&teacher.model.layout, teacher.flat());
        let layers: Vec<usize> = seen.layers.iter().copied().collect();
        let forward = |batch: &Batch| {
            let crops = [Crops::global(batch.global.clone()).with_layers(layers.clone())];
            let features = teacher.model.backbone.forward(&params, &crops, Mode::Eval)?.pop();
            features.ok_or_else(|| Error::shape("backbone", "no features of the global crops"))
        };
        let features: Vec<Features> = batches.iter().map(forward).collect::<Result<_>>()?;
        seen.step = None;
        seen.features = match self.device.gpu() {
            Some(gpu) => seen.place(gpu, &features)?,
            None => features,
        };
        seen.step = Some(at.step);
        seen.passes += 1;
        Ok(())
    }

    /// Where what a shared teacher gave of the newest step lies on a GPU.
    pub(super) fn places_of_teacher(&self) -> Vec<u64> {
        let features = self.shared.as_ref().map_or_else(Vec::new, |shared| shared.given().1);
        features.iter().flat_map(Features::tensors).map(Tensor::device_address).collect()
    }
}
