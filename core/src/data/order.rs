//! The order in which samples are read: a random permutation an epoch, in constant memory.

use crate::rng::{Rng, Stream};

/// Rounds of the network; four make a random function into a random permutation, more make tiny datasets uniform too.
const ROUNDS: u64 = 8;

/// Which sample is read at each position of a run: positions `0..len` are epoch 0, in a random order, and so on.
///
/// Each epoch is an alternating Feistel network over `a x b >= len` cells whose round function is Philox; cells that
/// are no sample are walked over (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). So a
/// dataset of a billion images needs no table, and any position is found at once after a resume.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    seed: u64,
    len: u64,
    a: u64,
    b: u64,
}

impl Order {
    /// The order of `len` samples.
    ///
    /// # Panics
    /// If `len` is 0: a dataset has at least one sample.
    pub fn new(seed: u64, len: usize) -> Self {
        assert!(len > 0, "a dataset has at least one sample");
        let len = len as u64;
        let mut a = (len as f64).sqrt().ceil() as u64;
        // A square root in f64 can be one short for very long datasets.
        while a * a < len {
            a += 1;
        }
        Self { seed, len, a, b: len.div_ceil(a) }
    }

    /// The sample at `position`.
    pub fn sample(&self, position: u64) -> usize {
        let epoch = position / self.len;
        let mut cell = position % self.len;
        loop {
            cell = self.permute(epoch, cell);
            if cell < self.len {
                return cell as usize;
            }
        }
    }

    /// What is read in place of broken sample `index`, at the given try: the same for every epoch.
    pub fn replacement(&self, index: usize, attempt: u64) -> usize {
        // Epochs never get near 2^48, so this does not meet the streams of `permute`.
        Rng::new(self.seed, Stream::Order, (1 << 48) + attempt, index as u64).below(self.len as usize)
    }

    fn permute(&self, epoch: u64, cell: u64) -> u64 {
        let (mut left, mut right) = (cell % self.a, cell / self.a);
        for round in 0..ROUNDS {
            let (half, modulus) = if round % 2 == 0 { (right, self.a) } else { (left, self.b) };
            let draw = Rng::new(self.seed, Stream::Order, epoch, round << 32 | half).u32();
            let shift = (u64::from(draw) * modulus) >> 32;
            if round % 2 == 0 {
                left = (left + shift) % modulus;
            } else {
                right = (right + shift) % modulus;
            }
        }
        left + self.a * right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_reads_every_sample_once_and_in_another_order() {
        for len in [1, 2, 3, 7, 64, 1000, 4097] {
            let order = Order::new(5, len);
            let epoch = |e: usize| -> Vec<usize> { (0..len).map(|i| order.sample((e * len + i) as u64)).collect() };
            for e in 0..3 {
                let mut seen = epoch(e);
                seen.sort_unstable();
                assert_eq!(seen, (0..len).collect::<Vec<_>>(), "epoch {e} of {len}");
            }
            if len >= 64 {
                assert_ne!(epoch(0), epoch(1));
            }
        }
    }

    #[test]
    fn short_orders_are_uniform() {
        // All 24 orders of 4 samples; 99.9% point of chi-square with 23 degrees of freedom: 49.7.
        let draws = 24_000u64;
        let mut counts = std::collections::BTreeMap::new();
        let order = Order::new(11, 4);
        for e in 0..draws {
            let key: Vec<usize> = (0..4).map(|i| order.sample(e * 4 + i)).collect();
            *counts.entry(key).or_insert(0u64) += 1;
        }
        let expected = draws as f64 / 24.0;
        let chi2: f64 = counts.values().map(|&n| (n as f64 - expected).powi(2) / expected).sum();
        assert!(counts.len() == 24 && chi2 < 49.7, "{} orders, chi-square {chi2}", counts.len());
    }

    #[test]
    fn a_huge_dataset_costs_no_memory() {
        let order = Order::new(0, 10_000_000_000);
        assert!((0..1000).all(|p| order.sample(p) < 10_000_000_000));
    }
}
