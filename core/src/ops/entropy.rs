//! Entropies of the rows of a matrix, for diagnoses: a GPU gives one number a row to the host, not the matrix.

use crate::cuda::args;
use crate::tensor::blocks::*;
use crate::{cuda_source, DType, Result, Tensor};

cuda_source! { static ENTROPY = "entropy" { include_str!("entropy.cu") } }

/// The entropy in nats of each row of `p` `[n, k]`, distributions over k: `-sum p ln p`, where what is not above 0 adds
/// nothing.
pub(crate) fn row_entropies(p: &Tensor) -> Result<Vec<f64>> {
    let (n, k) = (p.dim(0), p.dim(1));
    if let (Some(gpu), DType::F32 | DType::BF16) = (p.gpu(), p.dtype()) {
        let mut out = p.device().with(|| Tensor::zeros(&[n], DType::F32));
        let launch = gpu.kernel(&ENTROPY, "row_entropy", p.dtype())?.grid(n, 256);
        launch.work(0.0, (p.len() * p.dtype().size()) as f64).launch(args![&mut out, p, k as i32])?;
        return Ok(out.to_f64_vec());
    }
    let of_row = |row: &[f64]| row.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum::<f64>();
    Ok(p.to_f64_vec().par_chunks(k.max(1)).map_to_vec(of_row))
}
