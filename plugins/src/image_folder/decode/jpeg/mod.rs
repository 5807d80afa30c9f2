//! JPEG: read strictly, or refused by name.
//!
//! zune-jpeg makes the pixels: of the decoders in Rust it is the fastest (`jpeg-decoder` takes two to three times as long),
//! and libjpeg-turbo needs more than `rustup` to build (cmake, and nasm for its speed). But it fills up what is missing or
//! damaged without a word, and gets some rare layouts wrong. So a file is walked first: every marker, every Huffman code of
//! every block ([`entropy`]), without making a pixel. What libjpeg warns of is an error here, and so is a layout that the
//! decoder is not known to get right. The walk takes a fifth of the time of decoding, and a run does it once for every
//! file: content that was found whole is known by its hash. `tests/image_corpus.py` holds both to libjpeg-turbo.
//!
//! ITU-T T.81; B.2 has the order of markers, G.1.1.1 what progressive scans may hold.

mod entropy;
mod table;

use super::Refusal;
use entropy::{Geometry, Scan, Unit};
use image::{DynamicImage, RgbImage};
use table::Table;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Scans of a file: a progressive one of libjpeg has ten.
const MOST_SCANS: usize = 100;
const CUT: &str = "the file is cut short";

/// The picture, and its EXIF data. The scans of a file that is `known` to be whole are not walked.
///
/// # Errors
/// What is wrong with the file, or not supported.
pub(super) fn decode(bytes: &[u8], known: bool) -> Result<(DynamicImage, Option<Vec<u8>>), Refusal> {
    let frame = Walk::new(bytes).frame(!known)?;
    let colours = frame.colours()?;
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let options = options.jpeg_set_max_scans(MOST_SCANS).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let (width, height) = (frame.geometry.width as u32, frame.geometry.height as u32);
    // It names three components after a transform that is meant for four, and treats them rightly.
    let taken = match decoder.input_colorspace() {
        Some(ColorSpace::CMYK) if frame.ids.len() == 3 => Some(ColorSpace::RGB),
        Some(ColorSpace::YCCK) if frame.ids.len() == 3 => Some(ColorSpace::YCbCr),
        other => other,
    };
    if taken != Some(colours) || decoder.dimensions() != Some((width as usize, height as usize)) {
        return Err("its headers contradict each other about size or colours".into());
    }
    let pixels = decoder.decode().map_err(|e| e.to_string())?;
    let image = RgbImage::from_raw(width, height, pixels).ok_or("the decoder gave too few pixels")?;
    Ok((image.into(), decoder.exif().cloned()))
}

/// Whether a file has one component, grey; [`decode`] triples it.
pub(super) fn is_grey(bytes: &[u8]) -> Result<bool, Refusal> {
    Ok(Walk::new(bytes).frame(false)?.ids.len() == 1)
}

/// What the headers say of the picture.
struct Frame {
    geometry: Geometry,
    progressive: bool,
    ids: Vec<u8>,
    /// A JFIF segment came before it.
    jfif: bool,
    /// The colour transform of an Adobe segment before it.
    adobe: Option<u8>,
}

impl Frame {
    /// The colours of the components, by libjpeg's rules.
    fn colours(&self) -> Result<ColorSpace, Refusal> {
        match (self.ids.len(), self.jfif, self.adobe, &self.ids[..]) {
            (1, ..) => Ok(ColorSpace::Luma),
            (3, true, Some(0), _) => {
                Err("one header says that its colours are YCbCr, another that they are RGB".into())
            }
            (3, false, Some(0), _) | (3, false, None, b"RGB") => Ok(ColorSpace::RGB),
            (3, ..) => Ok(ColorSpace::YCbCr),
            (_, _, Some(2), _) => Ok(ColorSpace::YCCK),
            (_, _, Some(0) | None, _) => Ok(ColorSpace::CMYK),
            (_, _, Some(n), _) => Err(format!("four components with the Adobe colour transform {n}").into()),
        }
    }

    /// Fails if the decoder is not known to be right about the layout.
    fn supported(&self) -> Result<(), Refusal> {
        let units = &self.geometry.units;
        let power = |n: usize| n.is_power_of_two();
        let regular = units.iter().all(|u| u.h <= units[0].h && u.v <= units[0].v && power(u.h) && power(u.v));
        if !regular {
            let factors: Vec<String> = units.iter().map(|u| format!("{}x{}", u.h, u.v)).collect();
            let problem = format!("its components are sampled {}, which is not supported", factors.join(", "));
            return Err(Refusal::unsupported(problem));
        }
        Ok(())
    }
}

/// A walk from marker to marker.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    jfif: bool,
    adobe: Option<u8>,
    dc: [Option<Table>; 4],
    ac: [Option<Table>; 4],
    /// The quantisation tables that were defined: steps of coefficients, in the order of a scan.
    quantisation: [Option<[u16; 64]>; 4],
    restart: usize,
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let (dc, ac) = (Default::default(), Default::default());
        Self { bytes, at: 0, jfif: false, adobe: None, dc, ac, quantisation: [None; 4], restart: 0 }
    }

    /// Walks the file: the `whole` of it, or the headers before its first scan.
    fn frame(mut self, whole: bool) -> Result<Frame, Refusal> {
        if !self.bytes.starts_with(&[0xff, 0xd8]) {
            return Err("it does not begin as a JPEG".into());
        }
        self.at = 2;
        let (mut found, mut scans): (Option<(Frame, Progress)>, usize) = (None, 0);
        loop {
            let marker = self.marker()?;
            match marker {
                0xd9 => break,
                0xda if !whole => break,
                0xc0..=0xc2 if found.is_none() => found = Some(self.start_of_frame(marker)?),
                0xc0..=0xc2 => return Err("it holds a second frame".into()),
                0xc3 | 0xc7 | 0xcb | 0xcf => return Err(Refusal::unsupported("lossless JPEG is not supported")),
                0xc9 | 0xca => return Err(Refusal::unsupported("JPEG with arithmetic coding is not supported")),
                0xc5 | 0xc6 | 0xcd | 0xce => return Err(Refusal::unsupported("hierarchical JPEG is not supported")),
                0xc4 => self.huffman_tables()?,
                0xda => {
                    let (frame, progress) = found.as_mut().ok_or("a scan comes before the frame's header")?;
                    scans += 1;
                    if scans > MOST_SCANS {
                        return Err(format!("more than {MOST_SCANS} scans").into());
                    }
                    self.scan(frame, progress)?;
                }
                0xdb => self.quantisation_tables()?,
                0xdd => self.restart = usize::from(word(self.segment()?, 0)?),
                0xe0 => self.jfif |= self.segment()?.starts_with(b"JFIF\0"),
                0xee => {
                    let body = self.segment()?;
                    if body.starts_with(b"Adobe") && body.len() >= 12 {
                        self.adobe = Some(body[11]);
                    }
                }
                0xe1..=0xef | 0xfe => drop(self.segment()?),
                other => return Err(format!("the marker ff{other:02x} is out of place: the file is damaged").into()),
            }
        }
        let (frame, progress) = found.ok_or("it holds no picture")?;
        if whole {
            progress.complete()?;
        }
        Ok(frame)
    }

    /// The next marker, past fill bytes.
    fn marker(&mut self) -> Result<u8, Refusal> {
        if *self.bytes.get(self.at).ok_or(CUT)? != 0xff {
            return Err("there are bytes between its segments that belong to none: the file is damaged".into());
        }
        while *self.bytes.get(self.at).ok_or(CUT)? == 0xff {
            self.at += 1;
        }
        self.at += 1;
        Ok(self.bytes[self.at - 1])
    }

    /// The body of the segment that begins here.
    fn segment(&mut self) -> Result<&'a [u8], Refusal> {
        let length = usize::from(word(self.bytes, self.at).map_err(|_| CUT)?);
        if length < 2 {
            return Err("a segment has no length: the file is damaged".into());
        }
        let body = self.bytes.get(self.at + 2..self.at + length).ok_or(CUT)?;
        self.at += length;
        Ok(body)
    }

    fn start_of_frame(&mut self, marker: u8) -> Result<(Frame, Progress), Refusal> {
        let body = self.segment()?;
        let damaged = "the frame's header is damaged";
        let [precision, _, _, _, _, count, ..] = *body else { return Err(damaged.into()) };
        let (height, width) = (usize::from(word(body, 1)?), usize::from(word(body, 3)?));
        if precision != 8 {
            return Err(Refusal::unsupported(format!("JPEG with {precision} bits a sample is not supported")));
        }
        if width == 0 || height == 0 {
            return Err(format!("its size is {width}x{height}").into());
        }
        super::affordable(width as u64, height as u64)?;
        if !matches!(count, 1 | 3 | 4) {
            return Err(Refusal::unsupported(format!("JPEG with {count} components is not supported")));
        }
        let components = &body[6..];
        if components.len() != 3 * usize::from(count) {
            return Err(damaged.into());
        }
        let (mut ids, mut units) = (Vec::new(), Vec::new());
        for part in components.chunks_exact(3) {
            let (h, v) = (usize::from(part[1] >> 4), usize::from(part[1] & 15));
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) || ids.contains(&part[0]) || part[2] > 3 {
                return Err(damaged.into());
            }
            ids.push(part[0]);
            units.push(Unit { h, v, table: usize::from(part[2]) });
        }
        // The only component has no other to be sampled less than.
        if let [only] = &mut units[..] {
            (only.h, only.v) = (1, 1);
        }
        let geometry = Geometry::new(width, height, units);
        let frame = Frame { progressive: marker == 0xc2, ids, jfif: self.jfif, adobe: self.adobe, geometry };
        frame.supported()?;
        let progress = Progress::new(&frame);
        Ok((frame, progress))
    }

    fn huffman_tables(&mut self) -> Result<(), Refusal> {
        let mut body = self.segment()?;
        while !body.is_empty() {
            let (table, length) = Table::read(body)?;
            let slot = usize::from(body[0] & 15);
            match body[0] >> 4 {
                0 if slot < 4 => self.dc[slot] = Some(table),
                1 if slot < 4 => self.ac[slot] = Some(table),
                _ => return Err("a Huffman table has no place: the file is damaged".into()),
            }
            body = &body[length..];
        }
        Ok(())
    }

    fn quantisation_tables(&mut self) -> Result<(), Refusal> {
        let mut body = self.segment()?;
        while let Some(&head) = body.first() {
            let length = if head >> 4 == 0 { 65 } else { 129 };
            if head >> 4 > 1 || head & 15 > 3 || body.len() < length {
                return Err("a quantisation table is damaged".into());
            }
            let step = |i: usize| match length {
                65 => u16::from(body[1 + i]),
                _ => u16::from_be_bytes([body[1 + 2 * i], body[2 + 2 * i]]),
            };
            self.quantisation[usize::from(head & 15)] = Some(std::array::from_fn(step));
            body = &body[length..];
        }
        Ok(())
    }

    /// Walks one scan: its header, and every code of every block.
    fn scan(&mut self, frame: &Frame, progress: &mut Progress) -> Result<(), Refusal> {
        let body = self.segment()?;
        let damaged = || Refusal::from("a scan's header is damaged");
        let count = usize::from(*body.first().ok_or_else(damaged)?);
        if body.len() != 4 + 2 * count || !(1..=4).contains(&count) {
            return Err(damaged());
        }
        let [start, end, approximation] = body[1 + 2 * count..] else { return Err(damaged()) };
        let (start, end) = (usize::from(start), usize::from(end));
        let (high, low) = (approximation >> 4, approximation & 15);
        let mut components: Vec<(usize, usize, usize)> = Vec::new();
        let mut steps = Vec::new();
        for part in body[1..=2 * count].chunks_exact(2) {
            let index = frame.ids.iter().position(|&id| id == part[0]).ok_or_else(damaged)?;
            if components.iter().any(|&(c, ..)| c == index) {
                return Err(damaged());
            }
            steps.push(self.quantisation[frame.geometry.units[index].table].as_ref().ok_or_else(damaged)?);
            components.push((index, usize::from(part[1] >> 4), usize::from(part[1] & 15)));
        }
        let indices: Vec<usize> = components.iter().map(|&(c, ..)| c).collect();
        let blocks: usize = indices.iter().map(|&c| frame.geometry.units[c].h * frame.geometry.units[c].v).sum();
        if count > 1 && blocks > 10 {
            return Err(format!("{blocks} blocks in a unit of a scan, more than the 10 that JPEG allows").into());
        }
        if !frame.progressive && count < frame.ids.len() {
            return Err(Refusal::unsupported(
                "its components lie in separate scans, which is not supported in baseline JPEG",
            ));
        }
        progress.scan(frame.progressive, &indices, [start, end], [high, low])?;
        fn find(tables: &[Option<Table>; 4], slot: usize) -> Option<&Table> {
            tables.get(slot).and_then(Option::as_ref)
        }
        let tables: Vec<_> = components.iter().map(|&(_, dc, ac)| (find(&self.dc, dc), find(&self.ac, ac))).collect();
        let (refines, restart, low) = (high > 0, self.restart, u32::from(low));
        let scan = Scan { components: &indices, steps: &steps, low, tables: &tables, start, end, refines, restart };
        let at = scan.walk(&frame.geometry, frame.progressive, &mut progress.nonzero, self.bytes, self.at)?;
        self.at = at;
        Ok(())
    }
}

/// Which bits of which coefficients were seen.
struct Progress {
    /// Of every component and coefficient, the lowest bit that was seen.
    lowest: Vec<[Option<u8>; 64]>,
    /// Of every component of a progressive file and every block, which coefficients are not zero.
    nonzero: Vec<Vec<u64>>,
}

impl Progress {
    fn new(frame: &Frame) -> Self {
        let blocks = |c: usize| if frame.progressive { frame.geometry.blocks(c) } else { 0 };
        let nonzero = (0..frame.ids.len()).map(|c| vec![0; blocks(c)]).collect();
        Self { lowest: vec![[None; 64]; frame.ids.len()], nonzero }
    }

    /// Notes a scan of coefficients `start..=end`, whose bits down to `low` follow those down to `high`.
    fn scan(
        &mut self,
        progressive: bool,
        components: &[usize],
        [start, end]: [usize; 2],
        [high, low]: [u8; 2],
    ) -> Result<(), Refusal> {
        let valid = match (progressive, start) {
            (false, _) => (start, end, high, low) == (0, 63, 0, 0),
            (true, 0) => end == 0,
            (true, _) => start <= end && end < 64 && components.len() == 1,
        };
        if !valid || low > 13 || (high > 0 && low + 1 != high) {
            return Err("a scan holds what it must not: the file is damaged".into());
        }
        for &component in components {
            let lowest = &mut self.lowest[component];
            // The first coefficient comes before all others.
            let early = start > 0 && lowest[0].is_none();
            let expected = (high > 0).then_some(high);
            if early || lowest[start..=end].iter().any(|&seen| seen != expected) {
                return Err("its scans do not follow each other: the file is damaged".into());
            }
            lowest[start..=end].fill(Some(low));
        }
        Ok(())
    }

    /// Fails if the last scan was not the last: the picture would be coarse.
    fn complete(&self) -> Result<(), Refusal> {
        let complete = self.lowest.iter().flatten().all(|&seen| seen == Some(0));
        complete.then_some(()).ok_or_else(|| "scans are missing: the picture is not complete".into())
    }
}

/// The big-endian number at a place.
fn word(bytes: &[u8], at: usize) -> Result<u16, Refusal> {
    let word = bytes.get(at..at + 2).ok_or("a segment is too short: the file is damaged")?;
    Ok(u16::from_be_bytes([word[0], word[1]]))
}
