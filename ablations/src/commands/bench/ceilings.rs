//! What a machine could do at most, and how near each kind of operation or launch comes.

use std::time::Instant;

use dinolab_core::profile::Profile;
use dinolab_core::profile::ProfileRow;
use dinolab_core::{DType, Result, Tensor};

use crate::style;

/// Of a card what makers publish: dense bf16 products with f32 sums, and memory. Of a CPU what one large product reaches.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(super) struct Ceiling {
    /// TFLOP/s.
    pub(super) tflops: f64,
    /// GB/s.
    memory: Option<f64>,
}

/// The ceilings of a card by the driver's name for it, if they are known. The first that fits counts.
pub(super) fn ceiling(card: &str) -> Option<Ceiling> {
    let known = [
        ("H200", 989.0, 4800.0),
        ("H100 PCIe", 756.0, 2000.0),
        ("H100 NVL", 835.0, 3900.0),
        ("H100", 989.0, 3350.0),
        ("A100-PCIE-40GB", 312.0, 1555.0),
        ("A100-SXM4-40GB", 312.0, 1555.0),
        ("A100", 312.0, 2039.0),
        ("B200", 2250.0, 8000.0),
        ("RTX 4090", 165.0, 1008.0),
    ];
    let found = known.into_iter().find(|(name, ..)| card.contains(name));
    found.map(|(_, tflops, memory)| Ceiling { tflops, memory: Some(memory) })
}

/// What a matrix product in f32 of 1024 x 1024 x 1024 reaches here, all threads working: the best of several.
///
/// # Errors
/// If there is no memory for it.
pub(super) fn of_cpu() -> Result<Ceiling> {
    let (n, tries) = (1024, 8);
    let x = Tensor::full(&[n, n], DType::F32, 0.5)?;
    let mut best = f64::INFINITY;
    for _ in 0..tries {
        let start = Instant::now();
        x.matmul(&x)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(Ceiling { tflops: 2.0 * (n as f64).powi(3) / best / 1e12, memory: None })
}

/// The longest rows of a profile as a table: launches, time, share, and what was reached of the nearer ceiling.
pub(super) fn table(profile: &Profile, ceiling: Option<Ceiling>) -> String {
    let total = profile.ms();
    let head = ["", "times", "ms", "share", "reached", "of the ceiling"].map(String::from).to_vec();
    let row = |r: &ProfileRow| {
        let (reached, share) = reached(r, ceiling);
        let share = share.map_or(String::new(), |s| format!("{:.0}%", 100.0 * s));
        vec![
            r.name.clone(),
            r.launches.to_string(),
            format!("{:.3}", r.ms),
            format!("{:.1}%", 100.0 * r.ms / total),
            reached,
            share,
        ]
    };
    let rows = profile.rows.iter().map(row);
    style::table(std::iter::once(head).chain(rows))
}

/// Operations or bytes a second, whichever is nearer to its ceiling, and how near.
fn reached(row: &ProfileRow, ceiling: Option<Ceiling>) -> (String, Option<f64>) {
    let seconds = row.ms / 1e3;
    let (flops, bytes) = (row.flops / seconds / 1e12, row.bytes / seconds / 1e9);
    let compute = ceiling.map(|c| flops / c.tflops);
    let memory = ceiling.and_then(|c| Some(bytes / c.memory?));
    match (row.flops > 0.0, row.bytes > 0.0) {
        (false, false) => (String::new(), None),
        (true, _) if compute >= memory || row.bytes == 0.0 => match flops < 10.0 {
            true => (format!("{:.0} GFLOP/s", 1e3 * flops), compute),
            false => (format!("{flops:.0} TFLOP/s"), compute),
        },
        _ => (format!("{bytes:.0} GB/s"), memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_the_drivers_names() {
        let tflops = |name: &str| ceiling(name).map(|c| c.tflops);
        assert_eq!(tflops("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(tflops("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(tflops("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(tflops("NVIDIA GeForce RTX 4090"), Some(165.0));
        assert_eq!(tflops("A card of next year"), None);
    }

    #[test]
    fn a_launch_is_held_against_the_ceiling_that_it_is_nearer_to() {
        let row = |flops, bytes| ProfileRow { ms: 1.0, flops, bytes, launches: 1, name: String::new() };
        let h100 = ceiling("H100");
        assert_eq!(reached(&row(500e9, 1e6), h100).0, "500 TFLOP/s");
        assert_eq!(reached(&row(1e9, 2e9), h100).0, "2000 GB/s");
        assert_eq!(reached(&row(0.0, 0.0), h100), (String::new(), None));
    }
}
