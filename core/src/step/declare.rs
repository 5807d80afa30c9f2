//! The model of a recipe: backbone, losses, and the layout of all parameters. Nothing is allocated.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::contract::{Augmentation, Backbone, BackboneContext, Loss, LossContext, Needs, Schedule};
use crate::params::{Layout, ParamBuilder};
use crate::recipe::Recipe;
use crate::registry::Chosen;
use crate::Result;

/// Global crops an image.
pub const GLOBALS: usize = 2;

/// What a recipe trains, declared but without weights. A 7B model is declared in microseconds.
#[derive(Debug)]
pub struct Declared {
    /// The model; its parameters are named `backbone.*`.
    pub backbone: Box<dyn Backbone>,
    /// The enabled losses by name.
    pub losses: Vec<DeclaredLoss>,
    /// All parameters: the backbone, then those of the losses, in their order.
    pub layout: Arc<Layout>,
    /// Channels of the images.
    pub channels: usize,
}

impl Declared {
    /// Whether the student sees the global crops, and whether the local ones: if a loss reads what it makes of them.
    pub fn student_sees(&self) -> [bool; 2] {
        let globals = |needs: &Needs| needs.globals || needs.masks || needs.tokens || !needs.layers.is_empty();
        let locals = |needs: &Needs| needs.locals || needs.tokens;
        [self.losses.iter().any(|l| globals(&l.needs)), self.losses.iter().any(|l| locals(&l.needs))]
    }

    /// After how many blocks losses ask for tokens, in order.
    pub fn layers(&self) -> Vec<usize> {
        let asked = self.losses.iter().flat_map(|l| l.needs.layers.iter().copied());
        asked.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The augmentations of `[augmentations]` that views of losses are cut from, by name.
    pub fn augmentations(&self, recipe: &Recipe) -> Vec<(String, Chosen<dyn Augmentation>)> {
        let views = self.losses.iter().flat_map(|l| l.loss.views(recipe.crops.global_size).unwrap_or_default());
        let asked: BTreeSet<String> = views.filter_map(|view| view.augmentation).collect();
        let there = recipe.augmentations.0.iter().filter(|(name, _)| asked.contains(*name));
        there.map(|(name, entry)| (name.clone(), entry.clone())).collect()
    }

    /// Names of the teachers of `[teachers]` that losses ask for.
    pub fn teachers(&self) -> BTreeSet<&str> {
        self.losses.iter().flat_map(|l| &l.needs.teachers).map(String::as_str).collect()
    }

    /// The enabled loss of that name.
    pub fn loss(&self, name: &str) -> Option<&DeclaredLoss> {
        self.losses.iter().find(|l| l.name == name)
    }
}

/// An enabled loss.
#[derive(Debug)]
pub struct DeclaredLoss {
    /// Its name in the recipe.
    pub name: String,
    /// What it is multiplied by in the total.
    pub weight: Schedule,
    /// Its plugin and keys.
    pub chosen: Chosen<dyn Loss>,
    /// The loss.
    pub loss: Box<dyn Loss>,
    /// What it asks of a step.
    pub needs: Needs,
}

/// Builds the backbone and the enabled losses of a recipe and declares their parameters.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn declare(recipe: &Recipe) -> Result<Declared> {
    let mut params = ParamBuilder::new();
    let backbone = params.scope("backbone", |params| build_backbone(recipe, params))?;
    let losses = recipe.losses.0.iter().filter(|(_, entry)| entry.enabled);
    let losses = losses.map(|(name, entry)| {
        let loss = params
            .scope(format!("{name}_head"), |params| build_loss(recipe, backbone.as_ref(), params, &entry.loss))?;
        let (needs, chosen) = (loss.needs(), entry.loss.clone());
        Ok(DeclaredLoss { name: name.clone(), weight: entry.weight.clone(), chosen, loss, needs })
    });
    let losses = losses.collect::<Result<_>>()?;
    Ok(Declared { backbone, losses, layout: params.finish(), channels: recipe.crops.channels() })
}

/// Builds the backbone of a recipe and declares its parameters.
///
/// # Errors
/// If the plugin refuses its configuration, or declares a parameter twice.
pub(crate) fn build_backbone(recipe: &Recipe, params: &mut ParamBuilder) -> Result<Box<dyn Backbone>> {
    let (global_size, channels) = (recipe.crops.global_size, recipe.crops.channels());
    let built = recipe.backbone.plugin.build(&mut BackboneContext { params, global_size, channels })?;
    params.check().map(|()| built)
}

/// Builds a loss of a recipe and declares its parameters.
///
/// # Errors
/// If the plugin refuses its configuration, or declares a parameter twice.
pub(crate) fn build_loss(
    recipe: &Recipe,
    backbone: &dyn Backbone,
    params: &mut ParamBuilder,
    chosen: &Chosen<dyn Loss>,
) -> Result<Box<dyn Loss>> {
    let built = chosen.build(&mut LossContext {
        params,
        dim: backbone.dim(),
        images: recipe.batch.images(),
        globals: GLOBALS,
        locals: recipe.crops.local_count,
        patches: (recipe.crops.global_size / backbone.patch_size()).pow(2),
        patch_size: backbone.patch_size(),
        channels: recipe.crops.channels(),
    })?;
    params.check().map(|()| built)
}
