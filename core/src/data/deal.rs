//! Which images of a batch go into which of its parts.
//!
//! A batch's masks are drawn for all of its crops, whatever the number of parts. A step is recorded for given shapes, so
//! the parts have to have as many masked patches in every step: images are dealt so that each part has its even share.

/// Deals images (given the masked patches of each) to `parts` parts of as many images. Part `p` gets `total / parts`
/// masked patches, one more if `p < total % parts`, where such a dealing is found: with two images a part there often is
/// none, with eight or more there nearly always is. One part has all images in order.
///
/// # Panics
/// If the images cannot be divided evenly.
pub(super) fn deal(masked: &[usize], parts: usize) -> Vec<Vec<usize>> {
    assert!(parts > 0 && masked.len().is_multiple_of(parts), "{} images in {parts} parts", masked.len());
    if parts == 1 {
        return vec![(0..masked.len()).collect()];
    }
    let mut best: Option<(i64, Vec<Vec<usize>>)> = None;
    for start in 0..STARTS {
        let (off, dealt) = deal_from(start, masked, parts);
        if best.as_ref().is_none_or(|(least, _)| off < *least) {
            best = Some((off, dealt));
        }
        if off == 0 {
            break;
        }
    }
    let (_, mut dealt) = best.expect("there is a first start");
    dealt.iter_mut().for_each(|part| part.sort_unstable());
    dealt
}

/// Dealings that swaps begin from, until one of them succeeds.
const STARTS: usize = 16;

/// A dealing, and how many masked patches its parts have too many or too few, together.
fn deal_from(start: usize, masked: &[usize], parts: usize) -> (i64, Vec<Vec<usize>>) {
    let total: usize = masked.iter().sum();
    let share = |part: usize| (total / parts + usize::from(part < total % parts)) as i64;
    // From the most masked down, there and back again, each time from another part on.
    let mut order: Vec<usize> = (0..masked.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(masked[i]));
    let mut dealt: Vec<Vec<usize>> = vec![Vec::new(); parts];
    for (turn, images) in order.chunks(parts).enumerate() {
        for (k, &image) in images.iter().enumerate() {
            let part = if turn % 2 == 0 { k } else { parts - 1 - k };
            dealt[(part + start * turn) % parts].push(image);
        }
    }
    let count = |part: &[usize]| part.iter().map(|&i| masked[i] as i64).sum::<i64>();
    let mut over: Vec<i64> = dealt.iter().enumerate().map(|(p, part)| count(part) - share(p)).collect();
    // Parts that have too many swap with those that have too few. The sum of what is over falls with every swap.
    while let Some(Exchange { from, to, swaps, moved }) = improvement(masked, &dealt, &over) {
        for (i, j) in swaps {
            (dealt[from][i], dealt[to][j]) = (dealt[to][j], dealt[from][i]);
        }
        over[from] -= moved;
        over[to] += moved;
    }
    (over.iter().map(|x| x.abs()).sum(), dealt)
}

/// Swaps of images between two parts.
struct Exchange {
    from: usize,
    to: usize,
    /// Positions in both parts.
    swaps: Vec<(usize, usize)>,
    /// Masked patches that go over.
    moved: i64,
}

/// One or two swaps that bring two parts nearer to their share.
fn improvement(masked: &[usize], dealt: &[Vec<usize>], over: &[i64]) -> Option<Exchange> {
    let parts = |sign: i64| {
        let mut parts: Vec<usize> = (0..over.len()).filter(|&p| over[p] * sign > 0).collect();
        parts.sort_by_key(|&p| -over[p] * sign);
        parts.truncate(MOST_PARTS);
        parts
    };
    for &from in &parts(1) {
        for &to in &parts(-1) {
            let best = over[from].min(-over[to]);
            let (swaps, moved) = swaps(masked, &dealt[from], &dealt[to], best);
            if (over[from] - moved).abs() + (over[to] + moved).abs() < over[from] - over[to] {
                return Some(Exchange { from, to, swaps, moved });
            }
        }
    }
    None
}

/// Parts on either side that swaps are sought between: those that are off the most.
const MOST_PARTS: usize = 8;

/// The swaps that move `wanted` masked patches: one, or two; or the one that moves as near to that as any.
fn swaps(masked: &[usize], from: &[usize], to: &[usize], wanted: i64) -> (Vec<(usize, usize)>, i64) {
    let mut single: Vec<(i64, (usize, usize))> = Vec::with_capacity(from.len() * to.len());
    for (i, &a) in from.iter().enumerate() {
        single.extend(to.iter().enumerate().map(|(j, &b)| (masked[a] as i64 - masked[b] as i64, (i, j))));
    }
    single.sort_unstable();
    let of = |moved: i64| {
        let range = single.partition_point(|(m, _)| *m < moved)..single.partition_point(|(m, _)| *m <= moved);
        single[range].iter().map(|(_, swap)| *swap)
    };
    if let Some(swap) = of(wanted).next() {
        return (vec![swap], wanted);
    }
    for &(moved, first) in &single {
        let second = of(wanted - moved).find(|second| second.0 != first.0 && second.1 != first.1);
        if let Some(second) = second {
            return (vec![first, second], wanted);
        }
    }
    let nearest = single.iter().min_by_key(|(moved, _)| (moved - wanted).abs());
    nearest.map_or((Vec::new(), 0), |&(moved, swap)| (vec![swap], moved))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::rng::{Rng, Stream};

    proptest! {
        #[test]
        fn every_image_goes_into_one_part(images in 1usize..12, parts in 1usize..9, seed: u64) {
            let mut rng = Rng::new(seed, Stream::Plugin, 0, 0);
            let masked: Vec<usize> = (0..images * parts).map(|_| rng.below(40)).collect();
            let dealt = deal(&masked, parts);
            prop_assert!(dealt.len() == parts && dealt.iter().all(|part| part.len() == images));
            let mut all = dealt.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..images * parts).collect::<Vec<_>>());
        }
    }

    #[test]
    fn parts_of_eight_images_have_the_same_number_of_masked_patches_in_every_step() {
        for (images, parts, side) in [(8, 2, 14), (8, 4, 16), (8, 32, 16), (16, 16, 16), (32, 8, 14), (64, 2, 8)] {
            let (size, patches) = (images * parts, side * side);
            for step in 0..20 {
                let mut rng = Rng::new(1, Stream::Mask, step, 0);
                // Half of the crops have a tenth to a half of their patches masked, spread evenly.
                let of_crop = |i: usize| if i < size { patches * (size + 4 * i) / (10 * size) } else { 0 };
                let mut crops: Vec<usize> = (0..2 * size).map(of_crop).collect();
                rng.shuffle(&mut crops);
                let masked: Vec<usize> = (0..size).map(|i| crops[i] + crops[size + i]).collect();
                let total: usize = masked.iter().sum();
                for (p, part) in deal(&masked, parts).iter().enumerate() {
                    let own: usize = part.iter().map(|&i| masked[i]).sum();
                    let share = total / parts + usize::from(p < total % parts);
                    assert_eq!(own, share, "part {p} of {parts}, {images} images, step {step}");
                }
            }
        }
    }
}
