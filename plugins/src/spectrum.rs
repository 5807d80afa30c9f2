//! Singular values of features, and the rank that they amount to.

use dinolab_core::{Error, Result};
use faer::Mat;

/// Singular values of a matrix given by its rows, in falling order.
///
/// # Errors
/// If the features are not finite.
pub(crate) fn singular_values(rows: &[&[f64]]) -> Result<Vec<f64>> {
    let columns = rows.first().map_or(0, |row| row.len());
    if rows.iter().any(|row| row.iter().any(|x| !x.is_finite())) {
        return Err(Error::user("the features are not finite", "the run diverged; see its health lines"));
    }
    let matrix = Mat::from_fn(rows.len(), columns, |i, k| rows[i][k]);
    matrix.singular_values().map_err(|e| {
        Error::user(format!("the singular values did not converge: {e:?}"), "the features may be degenerate")
    })
}

/// `exp(-sum p ln p)` with `p = s / sum s + epsilon`: the rank of a matrix with these singular values, counted softly (Roy and
/// Vetterli, "The effective rank", EUSIPCO 2007). Of a matrix of zeros it is 0.
pub(crate) fn effective_rank(values: &[f64], epsilon: f64) -> f64 {
    let total: f64 = values.iter().sum();
    if total == 0.0 {
        return 0.0;
    }
    let entropy = |s: &f64| {
        let p = s / total + epsilon;
        -p * p.ln()
    };
    values.iter().map(entropy).sum::<f64>().exp()
}

/// The rows of a `[.., D]` tensor's values.
pub(crate) fn rows(values: &[f64], dim: usize) -> Vec<&[f64]> {
    values.chunks_exact(dim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_singular_values_count_as_many_and_one_counts_as_one() {
        assert!((effective_rank(&[2.0; 5], 1e-12) - 5.0).abs() < 1e-9);
        assert!((effective_rank(&[3.0, 0.0, 0.0], 1e-12) - 1.0).abs() < 1e-9);
        assert_eq!(effective_rank(&[0.0; 3], 1e-12), 0.0);
    }

    #[test]
    fn features_that_are_not_finite_are_refused() {
        assert!(singular_values(&[&[1.0, f64::NAN]]).is_err());
        assert_eq!(singular_values(&[&[3.0, 0.0], &[0.0, -4.0]]).unwrap(), [4.0, 3.0]);
    }
}
