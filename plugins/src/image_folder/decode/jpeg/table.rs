//! Huffman tables, made for passing codes and the numbers behind them.

use super::super::Refusal;

/// Bits of the first look-up; longer codes are rare.
pub(super) const FAST: u32 = 10;
/// The largest coefficient that is let pass: twice that of a block of white or black.
pub(super) const MOST: i32 = 2048;
/// An entry that is never used: it goes between the last coefficient and the end.
const NEVER: u16 = 64 << 8;
/// What the end of a block adds to the place in it: more than there are coefficients.
pub(super) const END: usize = 128;

/// A Huffman table.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// By the next bits: the symbol and the length of its code; 0 if that is longer.
    pub symbol: Box<[u16; 1 << FAST]>,
    /// By length: the first code, shifted to 16 bits, that is longer.
    pub above: [u32; 17],
    /// By length: what is added to a code to get the place of its symbol.
    pub offset: [i32; 17],
    pub symbols: Vec<u8>,
}

impl Table {
    /// The table that a segment begins with, and the bytes that it takes.
    pub fn read(body: &[u8]) -> Result<(Self, usize), Refusal> {
        let damaged = || Refusal::from("a Huffman table is damaged");
        let counts = body.get(1..17).ok_or_else(damaged)?;
        let total: usize = counts.iter().map(|&n| usize::from(n)).sum();
        let symbols = body.get(17..17 + total).filter(|s| s.len() <= 256).ok_or_else(damaged)?;
        let mut table =
            Self { symbol: Box::new([0; 1 << FAST]), above: [0; 17], offset: [0; 17], symbols: symbols.to_vec() };
        let (mut code, mut next) = (0u32, 0usize);
        for length in 1..=16u32 {
            table.offset[length as usize] = next as i32 - code as i32;
            for _ in 0..counts[length as usize - 1] {
                let symbol = symbols[next];
                if length <= FAST {
                    let first = (code << (FAST - length)) as usize;
                    let range = first..first + (1usize << (FAST - length));
                    let entries = table.symbol.get_mut(range).ok_or_else(damaged)?;
                    entries.fill(u16::from_be_bytes([symbol, length as u8]));
                }
                (code, next) = (code + 1, next + 1);
            }
            // Codes of a length must not run into the next bit.
            if code > 1 << length {
                return Err(damaged());
            }
            table.above[length as usize] = code << (16 - length);
            code <<= 1;
        }
        // A DC table's symbols are sizes of numbers.
        if body[0] >> 4 == 0 && symbols.iter().any(|&s| s > 15) {
            return Err(damaged());
        }
        Ok((table, 17 + total))
    }
}

/// By the next bits of a baseline block: how far the symbols go whose codes and numbers they hold, and the length of these.
pub(super) struct Several(pub Box<[u16; 1 << FAST]>);

impl Several {
    /// Of the symbols of a table whose numbers are plausible wherever they are in a block of these `steps`.
    pub fn new(table: &Table, steps: &[u16; 64]) -> Self {
        let coarsest = steps[1..].iter().max().expect("there are 63");
        let mut entries = Box::new([NEVER; 1 << FAST]);
        for (place, entry) in entries.iter_mut().enumerate() {
            let (mut bits, mut reach) = (0, 0);
            // The first symbol's number may go beyond the bits that are looked at; further symbols have to lie in them.
            while bits < FAST && reach < END {
                let [symbol, length] = table.symbol[place << bits & ((1 << FAST) - 1)].to_be_bytes();
                let ends = length == 0 || (bits > 0 && bits + u32::from(length) > FAST);
                if ends || !plausible(symbol & 15, 0, *coarsest) {
                    break;
                }
                bits += u32::from(length) + u32::from(symbol & 15);
                reach += far(symbol);
            }
            if bits > 0 && reach < END + 64 {
                *entry = (reach << 8) as u16 | bits as u16;
            }
        }
        Self(entries)
    }
}

/// Whether a number of `size` bits, shifted by `low`, can be that of a picture: in steps of its coefficient, no pattern
/// goes further than from black to white and as far beyond. Decoders differ in what they make of larger ones.
#[inline(always)]
pub(super) fn plausible(size: u8, low: u32, step: u16) -> bool {
    (1u64 << size >> 1 << low) * u64::from(step) <= MOST as u64
}

/// How far a symbol of a baseline block goes: zeros and the number behind them, 16 zeros, or to the end.
pub(super) fn far(symbol: u8) -> usize {
    match (symbol >> 4, symbol & 15) {
        (15, 0) => 16,
        (_, 0) => END,
        (run, _) => usize::from(run) + 1,
    }
}
