//! What a recipe costs, by formula: parameters, operations and memory, without allocating any of it.
//!
//! The rule for operations: a student is counted three times its forward (forward, and twice that backward), a teacher
//! once; a vector through a head costs twice the head's parameters forward. Softmax, norms and the optimizer are not
//! counted.

use super::Recipe;
use crate::contract::{Grid, HeadInput};
use crate::recipe::Precision;
use crate::step::{declare, distilled_model, Declared, GLOBALS};
use crate::Result;

/// What a recipe costs.
#[derive(Clone, Debug, PartialEq)]
pub struct RunCost {
    /// Trainable numbers of each sub-model: `backbone`, `<loss>_head`.
    pub modules: Vec<(String, usize)>,
    /// Operations for one image of a step in which everything is active.
    pub flops_per_image: f64,
    /// Parts of the memory, in bytes.
    pub memory: Vec<(&'static str, f64)>,
}

impl RunCost {
    /// Trainable numbers.
    pub fn parameters(&self) -> usize {
        self.modules.iter().map(|(_, n)| n).sum()
    }

    /// Bytes of everything together.
    pub fn total_memory(&self) -> f64 {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What `recipe` costs.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn cost(recipe: &Recipe) -> Result<RunCost> {
    Ok(cost_of(recipe, &declare(recipe)?))
}

/// What `recipe` costs, its model declared already.
pub fn cost_of(recipe: &Recipe, model: &Declared) -> RunCost {
    let backbone = model.backbone.as_ref();
    let grid = |side: usize| Grid { height: side / backbone.patch_size(), width: side / backbone.patch_size() };
    let globals = (GLOBALS, grid(recipe.crops.global_size));
    let locals = (recipe.crops.local_count, grid(recipe.crops.local_size));
    let student = backbone.cost(&[globals, locals]);
    // A model to distil from whose run is not there yet is counted like the student.
    let distilled = distilled_model(recipe);
    let teacher_model = distilled.as_ref().unwrap_or(model);
    let teacher = teacher_model.backbone.cost(&[globals]);
    let mut flops = 3.0 * student.forward_flops + teacher.forward_flops;
    // The student keeps everything for the backward pass; a teacher only what its widest layer needs, which is less.
    let mut kept = student.activations;

    let has_gram = gram_is_used(recipe, model);
    if has_gram {
        flops += backbone.cost(&[(GLOBALS, grid(gram_side(recipe)))]).forward_flops;
    }
    let count_in = |model: &Declared, prefix: &str| {
        let inside = model.layout.specs().iter().filter(|s| s.name.starts_with(prefix));
        inside.map(|s| s.range().len()).sum::<usize>()
    };
    let count = |prefix: &str| count_in(model, prefix);
    for loss in &model.losses {
        let Some((input, head)) = &loss.needs.head else { continue };
        let (of_student, of_teacher) = match input {
            HeadInput::Cls => ((GLOBALS + recipe.crops.local_count) as f64, GLOBALS as f64),
            HeadInput::MaskedPatches => (masked_patches(recipe, globals.1), masked_patches(recipe, globals.1)),
        };
        let parameters = |model| count_in(model, &format!("{}_head.", loss.name)) as f64;
        flops += 2.0 * (3.0 * parameters(model) * of_student + parameters(teacher_model) * of_teacher);
        // Kept: input of every layer, pre-activations, logits; targets of the teacher beside them.
        let hidden = 2.0 * (head.layers.saturating_sub(1) * head.hidden) as f64;
        let per_vector = backbone.dim() as f64 + hidden + 2.0 * head.bottleneck as f64 + head.prototypes as f64;
        kept += of_student * per_vector + of_teacher * head.prototypes as f64;
    }

    let modules: Vec<(String, usize)> =
        model.layout.modules().into_iter().map(|m| (m.clone(), count(&format!("{m}.")))).collect();
    let number = if recipe.precision == Precision::F64 { 8.0 } else { 4.0 };
    let all = model.layout.len() as f64 * number;
    let images = (recipe.batch.size / recipe.batch.micro_batches.max(1)) as f64;
    let mut memory = vec![
        ("student", all),
        ("gradients", all),
        ("optimizer (2 moments)", 2.0 * all),
        ("EMA teacher", all),
        ("activations (estimate)", kept * images * number),
    ];
    if let Some(teacher) = &distilled {
        memory.insert(4, ("teacher to distil from", teacher.layout.len() as f64 * number));
    }
    if has_gram {
        memory.insert(4, ("Gram teacher", model.layout.range_of("backbone.").len() as f64 * number));
    }
    RunCost { modules, flops_per_image: flops, memory }
}

fn gram_is_used(recipe: &Recipe, model: &Declared) -> bool {
    recipe.gram_teacher.is_some() && model.losses.iter().any(|l| l.needs.gram_teacher)
}

/// Side of the crops that the Gram teacher sees.
fn gram_side(recipe: &Recipe) -> usize {
    let policy = recipe.gram_teacher.as_ref().and_then(|t| t.build(&mut ()).ok());
    policy.and_then(|p| p.crop_size()).unwrap_or(recipe.crops.global_size)
}

/// Masked patches an image, on average.
fn masked_patches(recipe: &Recipe, grid: Grid) -> f64 {
    let ratio = recipe.masking.ratio.iter().sum::<f64>() / 2.0;
    (GLOBALS * grid.patches()) as f64 * recipe.masking.probability * ratio
}
