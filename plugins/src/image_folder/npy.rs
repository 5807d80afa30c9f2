//! Arrays of NumPy (`.npy`).

use std::path::Path;

use dinolab_core::{Error, Result};
use half::f16;
use npyz::{DType, NpyFile, Order};

/// A larger file is refused before it is read.
const MOST_BYTES: u64 = 1 << 30;

/// An array: numbers in row-major order.
#[derive(Debug, PartialEq)]
pub(super) struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    /// The greatest number of the type; `None` for floats.
    pub greatest: Option<f32>,
}

/// The array in a file.
///
/// # Errors
/// If the file cannot be read, is cut short, or holds other numbers than u8, u16, i16, f16, f32 or f64 in row-major order.
pub(super) fn read(path: &Path) -> Result<Array> {
    let length = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    let wrong = |problem: String, help: &str| Error::content(path, problem, help);
    if length > MOST_BYTES {
        return Err(wrong(format!("{length} bytes are more than the limit of {MOST_BYTES}"), "cut it into tiles"));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    parse(&bytes).map_err(|(problem, help)| wrong(problem, help))
}

/// The array in the bytes of a file, or what is wrong with them and what to do.
pub(super) fn parse(bytes: &[u8]) -> Result<Array, (String, &'static str)> {
    let damaged = |problem: String| (problem, "an array is a .npy file that numpy.save wrote: mend or replace it");
    let mut rest = bytes;
    let file = NpyFile::new(&mut rest).map_err(|e| damaged(e.to_string()))?;
    let (dtype, shape) = (file.dtype(), file.shape().to_vec());
    let again = "save it again: numpy.save(path, numpy.ascontiguousarray(array, dtype=numpy.float32))";
    if file.order() == Order::Fortran && shape.len() > 1 {
        return Err(("its numbers lie in the order of Fortran, column by column".into(), again));
    }
    let DType::Plain(kind) = &dtype else {
        return Err((format!("its elements are records: {}", dtype.descr()), again));
    };
    let kind = kind.to_string();
    let (order, kind) = kind.split_at(1);
    drop(file);
    let count = shape.iter().try_fold(1u64, |n, &side| n.checked_mul(side));
    let held = |size: usize| match count.and_then(|n| n.checked_mul(size as u64)) == Some(rest.len() as u64) {
        true => Ok(()),
        false => Err(damaged(format!("{} bytes of numbers are not {shape:?} of {size} bytes each", rest.len()))),
    };
    let swap = order == ">";
    let (values, greatest) = match kind {
        "u1" => (held(1).map(|()| rest.iter().map(|&v| f32::from(v)).collect())?, Some(f32::from(u8::MAX))),
        "u2" => (held(2).map(|()| each(rest, swap, |b| u16::from_le_bytes(b).into()))?, Some(f32::from(u16::MAX))),
        "i2" => (held(2).map(|()| each(rest, swap, |b| i16::from_le_bytes(b).into()))?, Some(f32::from(i16::MAX))),
        "f2" => (held(2).map(|()| each(rest, swap, |b| f16::from_le_bytes(b).to_f32()))?, None),
        "f4" => (held(4).map(|()| each(rest, swap, f32::from_le_bytes))?, None),
        "f8" => (held(8).map(|()| each(rest, swap, |b| f64::from_le_bytes(b) as f32))?, None),
        other => return Err((format!("its numbers are of type {other}, none of u1, u2, i2, f2, f4 and f8"), again)),
    };
    Ok(Array { shape: shape.into_iter().map(|side| side as usize).collect(), values, greatest })
}

/// Numbers of `N` bytes, the least first unless `swap` says that the greatest comes first.
fn each<const N: usize>(bytes: &[u8], swap: bool, number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let number = |mut bytes: [u8; N]| {
        if swap {
            bytes.reverse();
        }
        number(bytes)
    };
    bytes.as_chunks::<N>().0.iter().map(|&bytes| number(bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as numpy.save writes it.
    fn file(kind: &str, fortran: &str, shape: &str, content: &[u8]) -> Vec<u8> {
        let mut head = format!("{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
        while (10 + head.len() + 1) % 64 != 0 {
            head.push(' ');
        }
        head.push('\n');
        [b"\x93NUMPY\x01\0", &(head.len() as u16).to_le_bytes()[..], head.as_bytes(), content].concat()
    }

    #[test]
    fn numbers_of_every_type_are_read_and_others_refused() {
        let numbers = |kind: &str, content: &[u8]| parse(&file(kind, "False", "(1, 2)", content)).map(|a| a.values);
        assert_eq!(numbers("|u1", &[7, 255]), Ok(vec![7.0, 255.0]));
        assert_eq!(numbers("<u2", &[1, 2, 255, 255]), Ok(vec![513.0, 65535.0]));
        assert_eq!(numbers(">u2", &[2, 1, 255, 255]), Ok(vec![513.0, 65535.0]));
        assert_eq!(numbers("<i2", &[255, 255, 1, 0]), Ok(vec![-1.0, 1.0]));
        assert_eq!(numbers("<f2", &[0, 0x3c, 0, 0xc0]), Ok(vec![1.0, -2.0]));
        assert_eq!(numbers("<f4", &[1.5f32, -0.25].map(f32::to_le_bytes).concat()), Ok(vec![1.5, -0.25]));
        assert_eq!(numbers("<f8", &[1.5f64, -0.25].map(f64::to_le_bytes).concat()), Ok(vec![1.5, -0.25]));
        let problem = |bytes: Vec<u8>| parse(&bytes).unwrap_err().0;
        assert!(problem(file("<i8", "False", "(1,)", &[0; 8])).contains("type i8"));
        assert!(problem(file("<f4", "True", "(2, 1)", &[0; 8])).contains("Fortran"));
        assert!(problem(file("<f4", "False", "(2, 2)", &[0; 8])).contains("8 bytes of numbers are not [2, 2]"));
        let huge = "(4294967296, 4294967296, 4294967296)";
        assert!(problem(file("<f4", "False", huge, &[0; 8])).contains("are not"));
        assert!(parse(b"\x93NUMPY\x01\0\xff\xff{").is_err() && parse(b"").is_err());
    }
}
