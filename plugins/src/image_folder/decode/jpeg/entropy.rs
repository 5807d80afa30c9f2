//! The Huffman codes of a scan, walked without making a pixel: that every block is there, and nothing else.
//!
//! A code and the bits of the number behind it are passed with one look-up, so that the walk takes a fraction of the time
//! of decoding.

use super::super::Refusal;
use super::table::{far, plausible, Several, Table, END, FAST, MOST};

const CUT: &str = "the file is cut short, or damaged: the data of its picture ends early";
const BAD_CODE: &str = "the data of its picture is damaged: a code that its tables do not have";
const TOO_MANY: &str = "the data of its picture is damaged: too many numbers in a block";
const TOO_BRIGHT: &str = "the data of its picture is damaged: a block is far brighter than white or darker than black";
const LEFT_OVER: &str = "the data of its picture is damaged: more of it than the picture needs";

/// How a component is sampled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    /// Blocks in a row of a unit of the frame.
    pub h: usize,
    /// Rows of blocks in one.
    pub v: usize,
    /// Its quantisation table.
    pub table: usize,
}

/// The blocks of a frame.
#[derive(Debug)]
pub(super) struct Geometry {
    pub width: usize,
    pub height: usize,
    pub units: Vec<Unit>,
    most: [usize; 2],
    /// Units of the frame in a row and in a column.
    mcus: [usize; 2],
}

impl Geometry {
    pub fn new(width: usize, height: usize, units: Vec<Unit>) -> Self {
        let most = |f: fn(&Unit) -> usize| units.iter().map(f).max().expect("a frame has components");
        let most = [most(|u| u.h), most(|u| u.v)];
        let mcus = [width.div_ceil(8 * most[0]), height.div_ceil(8 * most[1])];
        Self { width, height, units, most, mcus }
    }

    /// Blocks of a component, those that fill up its last unit included.
    pub fn blocks(&self, component: usize) -> usize {
        let unit = &self.units[component];
        self.mcus[0] * unit.h * self.mcus[1] * unit.v
    }

    /// Blocks in a row and in a column of a component in a scan of its own.
    fn alone(&self, component: usize) -> [usize; 2] {
        let unit = &self.units[component];
        let side = |pixels: usize, factor: usize, most: usize| (pixels * factor).div_ceil(most).div_ceil(8);
        [side(self.width, unit.h, self.most[0]), side(self.height, unit.v, self.most[1])]
    }
}

/// The bits of entropy-coded data.
#[derive(Clone, Copy)]
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, from the top; zeros below them.
    buffer: u64,
    /// Of which so many are there; negative once more were taken than there are.
    count: i32,
}

impl Bits<'_> {
    /// Makes at least 32 bits ready, unless a marker or the end comes first.
    #[inline(always)]
    fn fill(&mut self) {
        if self.count >= 32 {
            return;
        }
        if let Some(next) = self.data.get(self.at..self.at + 8) {
            let word = u64::from_be_bytes(next.try_into().expect("it is 8 bytes"));
            // Whether a byte is ff: one of the inverted word is 0 (Mycroft's test).
            let inverted = !word;
            if inverted.wrapping_sub(0x0101_0101_0101_0101) & word & 0x8080_8080_8080_8080 == 0 && self.count >= 0 {
                self.buffer |= word >> self.count;
                let bytes = (63 - self.count) / 8;
                self.at += bytes as usize;
                self.count += 8 * bytes;
                // Of the byte that did not fit, the bits that did are taken again later.
                self.buffer &= !0 << (64 - self.count);
                return;
            }
        }
        *self = self.filled_by_bytes();
    }

    /// By value: an address taken would keep the bits in memory.
    #[cold]
    #[inline(never)]
    fn filled_by_bytes(mut self) -> Self {
        while (0..=56).contains(&self.count) {
            let byte = match self.data.get(self.at..) {
                Some([0xff, 0, ..]) => {
                    self.at += 2;
                    0xff
                }
                Some([byte, ..]) if *byte != 0xff => {
                    self.at += 1;
                    *byte
                }
                // A marker, or the end.
                _ => break,
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
        self
    }

    #[inline(always)]
    fn skip(&mut self, bits: u32) {
        self.buffer <<= bits;
        self.count -= bits as i32;
    }

    /// The next bits, at most 16, as a number.
    fn take(&mut self, bits: u32) -> u32 {
        self.fill();
        let number = if bits == 0 { 0 } else { (self.buffer >> (64 - bits)) as u32 };
        self.skip(bits);
        number
    }

    /// Passes bits, any number of them.
    fn pass(&mut self, mut bits: u32) {
        while bits > 0 {
            self.fill();
            self.skip(bits.min(32));
            bits -= bits.min(32);
        }
    }

    /// The next symbol.
    fn symbol(&mut self, table: &Table) -> Result<u8, &'static str> {
        self.fill();
        let [symbol, length] = table.symbol[(self.buffer >> (64 - FAST)) as usize].to_be_bytes();
        if length != 0 {
            self.skip(u32::from(length));
            return Ok(symbol);
        }
        let (symbol, length) = self.long(table).ok_or(BAD_CODE)?;
        self.skip(length);
        Ok(symbol)
    }

    /// The next symbol, whose code is long, and the length of that.
    #[cold]
    #[inline(never)]
    fn long(self, table: &Table) -> Option<(u8, u32)> {
        let next = (self.buffer >> 48) as u32;
        let length = (FAST + 1..=16).find(|&n| next < table.above[n as usize])?;
        let place = (next >> (16 - length)) as i32 + table.offset[length as usize];
        Some((*table.symbols.get(usize::try_from(place).ok()?)?, length))
    }

    /// Fails if more bits were taken than there are.
    #[inline(always)]
    fn whole(&self) -> Result<(), &'static str> {
        if self.count < 0 {
            return Err(CUT);
        }
        Ok(())
    }

    /// The difference of a block's first coefficient to that of the block before (T.81, F.2.2.1).
    #[inline(always)]
    fn dc(&mut self, table: &Table) -> Result<i32, &'static str> {
        let size = u32::from(self.symbol(table)?);
        // Of no bits it is 0: the shift is taken in two.
        let number = (self.buffer >> 1 >> (63 - size)) as i32;
        self.skip(size);
        Ok(if number >> (size.max(1) - 1) == 0 { number + 1 - (1 << size) } else { number })
    }

    /// Passes the other coefficients of a baseline block.
    #[inline(always)]
    fn ac(&mut self, table: &Table, several: &Several, steps: &[u16; 64]) -> Result<(), &'static str> {
        let mut k = 1;
        while k < 64 {
            self.fill();
            let place = (self.buffer >> (64 - FAST)) as usize;
            let entry = several.0[place];
            let next = k + usize::from(entry >> 8);
            // Several at once, unless the block could end among them.
            if next < 64 || (END..END + 64).contains(&next) {
                self.skip(u32::from(entry & 0xff));
                k = next;
                continue;
            }
            let [symbol, length] = table.symbol[place].to_be_bytes();
            let (symbol, length) = match length {
                0 => self.long(table).ok_or(BAD_CODE)?,
                length => (symbol, u32::from(length)),
            };
            let size = symbol & 15;
            self.skip(length + u32::from(size));
            k += far(symbol);
            if size > 0 && !steps.get(k - 1).is_some_and(|&step| plausible(size, 0, step)) {
                return Err(if k > 64 { TOO_MANY } else { TOO_BRIGHT });
            }
        }
        if k > 64 && k < END {
            return Err(TOO_MANY);
        }
        Ok(())
    }

    /// Ends an interval: less than a byte is left, and a marker follows.
    fn end(&mut self) -> Result<(), Refusal> {
        self.fill();
        self.whole()?;
        match self.data.get(self.at..) {
            Some([0xff, ..]) if self.count < 8 => {}
            None | Some([]) if self.count < 8 => return Err(CUT.into()),
            _ => return Err(LEFT_OVER.into()),
        }
        (self.buffer, self.count) = (0, 0);
        Ok(())
    }

    /// Passes a restart marker, past fill bytes.
    fn restart(&mut self, number: usize) -> Result<(), Refusal> {
        self.end()?;
        while self.data.get(self.at + 1) == Some(&0xff) {
            self.at += 1;
        }
        match self.data.get(self.at + 1) {
            Some(&marker) if usize::from(marker) == 0xd0 + number % 8 => self.at += 2,
            Some(0xd9) | None => return Err(CUT.into()),
            _ => return Err("the data of its picture is damaged: a restart marker is missing".into()),
        }
        Ok(())
    }
}

/// A scan: what is walked, and how.
pub(super) struct Scan<'a> {
    /// Indices of its components.
    pub components: &'a [usize],
    /// Of each the steps of its coefficients, in the order of the scan.
    pub steps: &'a [&'a [u16; 64]],
    /// The lowest bit of its numbers.
    pub low: u32,
    /// Of each its DC and AC table, if it has them.
    pub tables: &'a [(Option<&'a Table>, Option<&'a Table>)],
    /// The first coefficient.
    pub start: usize,
    /// The last coefficient.
    pub end: usize,
    /// Whether it adds a bit to coefficients of earlier scans.
    pub refines: bool,
    /// Units between restart markers; 0 if there are none.
    pub restart: usize,
}

impl Scan<'_> {
    /// Walks the data from `at`; gives where the next marker is. `nonzero` has the coefficients of earlier scans.
    ///
    /// # Errors
    /// If codes, blocks or restart markers are wrong, too few or too many.
    pub fn walk(
        &self,
        geometry: &Geometry,
        progressive: bool,
        nonzero: &mut [Vec<u64>],
        data: &[u8],
        at: usize,
    ) -> Result<usize, Refusal> {
        let mut bits = Bits { data, at, buffer: 0, count: 0 };
        // Blocks that are known to hold nothing more.
        let mut run = 0;
        let mut last = [0i32; 4];
        let most: Vec<i32> = self.steps.iter().map(|s| MOST / (i32::from(s[0]).max(1) << self.low) + 1).collect();
        let several: Vec<Several> = match progressive {
            true => Vec::new(),
            false => self.tables.iter().zip(self.steps).filter_map(|(t, s)| Some(Several::new(t.1?, s))).collect(),
        };
        let missing = "a scan has no Huffman table: the file is damaged";
        let single = self.components.len() == 1;
        let [columns, rows] = if single { geometry.alone(self.components[0]) } else { geometry.mcus };
        for unit in 0..columns * rows {
            if self.restart > 0 && unit > 0 && unit % self.restart == 0 {
                if run > 0 {
                    return Err(LEFT_OVER.into());
                }
                bits.restart(unit / self.restart - 1)?;
                last = [0; 4];
            }
            for (i, (&component, (dc, ac))) in self.components.iter().zip(self.tables).enumerate() {
                let (last, steps) = (&mut last[i], self.steps[i]);
                let Unit { h, v, .. } = geometry.units[component];
                let blocks = if single { 1 } else { h * v };
                if !progressive {
                    let (dc, ac) = (dc.ok_or(missing)?, ac.ok_or(missing)?);
                    let several = several.get(i).ok_or(missing)?;
                    // A copy of its own stays in registers.
                    let mut own = bits;
                    for _ in 0..blocks {
                        *last += own.dc(dc)?;
                        own.ac(ac, several, steps)?;
                        own.whole()?;
                        if last.abs() > most[i] {
                            return Err(TOO_BRIGHT.into());
                        }
                    }
                    bits = own;
                } else if self.start == 0 {
                    for _ in 0..blocks {
                        match self.refines {
                            true => bits.pass(1),
                            false => *last += bits.dc(dc.ok_or(missing)?)?,
                        }
                        bits.whole()?;
                        if last.abs() > most[i] {
                            return Err(TOO_BRIGHT.into());
                        }
                    }
                } else {
                    // Such a scan has one component, whose rows are as wide as whole units are.
                    let place = unit / columns * geometry.mcus[0] * h + unit % columns;
                    let block = &mut nonzero[component][place];
                    let ac = ac.ok_or(missing)?;
                    match self.refines {
                        true => self.refine(&mut bits, ac, block, &mut run)?,
                        false => self.first(&mut bits, ac, steps, block, &mut run)?,
                    }
                    bits.whole()?;
                }
            }
        }
        if run > 0 {
            return Err(LEFT_OVER.into());
        }
        bits.end()?;
        Ok(bits.at)
    }

    /// The first bits of a block's coefficients (T.81, G.1.2.2).
    fn first(
        &self,
        bits: &mut Bits<'_>,
        table: &Table,
        steps: &[u16; 64],
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Refusal> {
        if *run > 0 {
            *run -= 1;
            return Ok(());
        }
        let mut k = self.start;
        while k <= self.end {
            let symbol = bits.symbol(table)?;
            let (zeros, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            match (zeros, size) {
                (15, 0) => k += 16,
                (_, 0) => {
                    *run = (1 << zeros) + bits.take(zeros) - 1;
                    return Ok(());
                }
                _ => {
                    k += zeros as usize;
                    if k > self.end {
                        return Err(TOO_MANY.into());
                    }
                    if !plausible(size as u8, self.low, steps[k]) {
                        return Err(TOO_BRIGHT.into());
                    }
                    *nonzero |= 1 << k;
                    bits.skip(size);
                    k += 1;
                }
            }
        }
        Ok(())
    }

    /// One more bit of a block's coefficients (T.81, G.1.2.3).
    fn refine(&self, bits: &mut Bits<'_>, table: &Table, nonzero: &mut u64, run: &mut u32) -> Result<(), Refusal> {
        let mut k = self.start;
        while *run == 0 && k <= self.end {
            let symbol = bits.symbol(table)?;
            let (zeros, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            match (zeros, size) {
                (_, 1) => bits.skip(1),
                (15, 0) => {}
                (_, 0) => {
                    *run = (1 << zeros) + bits.take(zeros);
                    break;
                }
                _ => return Err(BAD_CODE.into()),
            }
            // Past so many coefficients that are still zero; each other one on the way has a bit.
            let (mut left, mut known) = (zeros, 0);
            while k <= self.end {
                if *nonzero >> k & 1 == 1 {
                    known += 1;
                } else if left == 0 {
                    break;
                } else {
                    left -= 1;
                }
                k += 1;
            }
            bits.pass(known);
            if size == 1 {
                if k > self.end {
                    return Err(TOO_MANY.into());
                }
                *nonzero |= 1 << k;
            }
            k += 1;
        }
        if *run > 0 {
            *run -= 1;
            if k <= self.end {
                let rest = (*nonzero >> k) & (!0 >> (63 - (self.end - k)));
                bits.pass(rest.count_ones());
            }
        }
        Ok(())
    }
}
