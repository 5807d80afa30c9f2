//! Whether a recipe can be held at all: by numbers that count it, and by the memory of a machine.
//!
//! What no number can count, or no machine hold, is an error of the recipe. What only this machine cannot hold is a warning
//! where a recipe is checked, since it may be meant for another machine, and an error where it is to be trained.

use figment::value::Value;
use serde_json::Value as Json;

use super::cost::{cost_on, shared_on, RunCost};
use crate::problem::Problem;
use crate::recipe::Recipe;
use crate::text::bytes;
use crate::{cuda::Gpu, Device, Error, Result};

/// More memory than any machine has: 1 PiB.
const MOST: f64 = (1u64 << 50) as f64;
/// Most elements that a place in a tensor is counted with: indices of patches are 32 bits wide.
const MOST_PATCHES: f64 = u32::MAX as f64;

/// What `recipe` takes on a machine.
#[derive(Clone, Debug)]
pub struct Fit {
    /// The key that matters most, and its value.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl Fit {
    /// As an error.
    pub fn into_error(self) -> Error {
        Error::user(format!("{}: {}", self.key, self.message), self.help)
    }
}

/// The memory of a device in bytes, where it can be known: a GPU's, or what this process may have of the host's.
pub fn memory(device: Device) -> Option<f64> {
    match device {
        Device::Cuda(ordinal) => Gpu::get(ordinal).ok().map(|gpu| gpu.info().memory as f64),
        Device::Cpu => {
            use sysinfo::{MemoryRefreshKind, RefreshKind, System};
            let wanted = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram().with_swap());
            let system = System::new_with_specifics(wanted);
            let host = (system.total_memory() + system.total_swap()) as f64;
            let allowed = system.cgroup_limits().map(|limits| limits.total_memory as f64).filter(|bytes| *bytes > 0.0);
            (host > 0.0).then_some(allowed.map_or(host, |allowed| allowed.min(host)))
        }
    }
}

/// What keeps `recipe`, shared by so many processes, from fitting into `device`; `None` if it fits, or nobody knows.
///
/// # Errors
/// If a plugin refuses its configuration.
pub fn fit(recipe: &Recipe, device: Device, ranks: usize) -> Result<Option<Fit>> {
    let Some(room) = memory(device) else { return Ok(None) };
    let cost = shared_on(recipe, device, ranks)?.own;
    let total = cost.total_memory();
    let whose = if device == Device::Cpu { "this machine" } else { "the GPU" };
    Ok((total > room).then(|| {
        let message = format!("needs about {}, and {whose} has {}", bytes(total), bytes(room));
        worst(recipe, (device, ranks), &cost, (room, message))
    }))
}

/// What keeps students of one frozen teacher, which do a step each in turn, from fitting into `device` together: the weights of all
/// of them, the teacher's once, and a step of the one whose takes most.
///
/// # Errors
/// As [`fit`].
pub fn fit_students(recipes: &[&Recipe], device: Device) -> Result<Option<Fit>> {
    let Some(room) = memory(device) else { return Ok(None) };
    let costs: Vec<RunCost> = recipes.iter().map(|recipe| cost_on(recipe, device)).collect::<Result<_>>()?;
    let most = |of: fn(&RunCost) -> f64| costs.iter().map(of).fold(0.0, f64::max);
    let own: f64 = costs.iter().map(|cost| cost.lasting_memory() - cost.frozen_teacher()).sum();
    let total = own + most(RunCost::frozen_teacher) + most(|cost| cost.total_memory() - cost.lasting_memory());
    Ok((total > room).then(|| Fit {
        key: "students".into(),
        message: format!("the {} need about {} together, and there are {}", costs.len(), bytes(total), bytes(room)),
        help: "train fewer of them side by side".into(),
    }))
}

/// What is too large for any machine. The recipe's plugins have to be ones that can be built.
pub(super) fn overflow(recipe: &Recipe) -> Option<Problem> {
    let cost = cost_on(recipe, Device::Cpu).ok()?;
    let what = if cost.most_patches > MOST_PATCHES {
        format!("has {:.1e} patches in a micro-batch; they are counted to {:.1e}", cost.most_patches, MOST_PATCHES)
    } else if cost.total_memory() > MOST || cost.parameters() > isize::MAX as usize / 8 {
        format!("needs about {}, which no machine has", bytes(cost.total_memory()))
    } else {
        return None;
    };
    let Fit { key, message, help } = worst(recipe, (Device::Cpu, 1), &cost, (MOST, what));
    Some(Problem::error(key, message).help(help))
}

/// The key of which half saves most in one of so many processes on a device; and what is needed when it is halved until the run fits
/// into `room`, or saves nothing more.
fn worst(recipe: &Recipe, (device, ranks): (Device, usize), cost: &RunCost, (room, what): (f64, String)) -> Fit {
    let Ok(Value::Dict(tag, root)) = Value::serialize(recipe) else { unreachable!("a recipe is a table") };
    let whole = Value::Dict(tag, root);
    let mut keys = Vec::new();
    integers(&serde_json::to_value(recipe).expect("a recipe is plain data"), String::new(), &mut keys);
    let size = |cost: &RunCost| (cost.total_memory(), cost.most_patches);
    // A multiple of many numbers stays one that heads and patches divide.
    let half = |n: u64| if n > 2 * ROUND { n / 2 / ROUND * ROUND } else { n / 2 };
    let with = |key: &str, n: u64| {
        let smaller = figment::Figment::from(figment::providers::Serialized::defaults(&whole))
            .merge(figment::providers::Serialized::default(key, n))
            .extract::<Recipe>()
            .ok()?;
        Some(size(&shared_on(&smaller, device, ranks).ok()?.own))
    };
    let halved = keys.into_iter().filter_map(|(key, n)| {
        let smaller = with(&key, half(n)).filter(|smaller| *smaller < size(cost))?;
        Some((key, n, half(n), smaller))
    });
    // Of several that matter the one that is largest: a width of a million is the odd one, not the sixteen pixels of a patch.
    let halved: Vec<_> = halved.collect();
    let least = halved.iter().map(|(.., (left, _))| *left).fold(f64::INFINITY, f64::min);
    let saves = |left: f64| size(cost).0 - left >= 0.3 * (size(cost).0 - least);
    let best = halved.into_iter().filter(|(.., (left, _))| saves(*left)).max_by_key(|(_, n, ..)| *n);
    match best {
        Some((key, n, mut less, (mut left, _))) => {
            while let Some((smaller, _)) = with(&key, half(less)).filter(|smaller| left > room && smaller.0 < left) {
                (less, left) = (half(less), smaller);
            }
            let help = match left <= room {
                true => format!("lower it: with {less} it would be {}", bytes(left)),
                false => format!("lower it and others, or choose a smaller model: all else needs {}", bytes(left)),
            } + "; `dinolab recipe check --cost` lists the parts";
            Fit { key, message: format!("with {n} the run {what}"), help }
        }
        None => Fit { key: "backbone".into(), message: what, help: "choose a smaller model".into() },
    }
}

/// What divides usual numbers of channels, heads and pixels: 2^6 3 5 7.
const ROUND: u64 = 6720;

/// All whole numbers of a recipe by dotted key.
fn integers(value: &Json, path: String, found: &mut Vec<(String, u64)>) {
    match value {
        Json::Object(table) => {
            for (key, value) in table {
                let inside = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                integers(value, inside, found);
            }
        }
        Json::Number(n) => found.extend(n.as_u64().filter(|n| *n > 1).map(|n| (path, n))),
        _ => {}
    }
}
