//! Words between ranks.

use super::Comm;
use crate::{Error, Result};

impl dyn Comm + '_ {
    /// What rank 0 says, on all ranks; the others give nothing.
    ///
    /// # Errors
    /// If a rank has failed, or rank 0 says what is no text.
    pub fn told(&self, text: Option<String>) -> Result<String> {
        let mut bytes = text.unwrap_or_default().into_bytes();
        let mut len = [bytes.len() as u64];
        self.broadcast(bytemuck::bytes_of_mut(&mut len))?;
        bytes.resize(len[0] as usize, 0);
        self.broadcast(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| Error::user("rank 0 sent no text", "start the run again"))
    }

    /// Every rank's text, in order of rank.
    ///
    /// # Errors
    /// If a rank has failed.
    pub fn gather_text(&self, text: &str) -> Result<Vec<String>> {
        let mut lens = vec![0u64; self.world()];
        self.all_gather(bytemuck::bytes_of(&(text.len() as u64)), bytemuck::cast_slice_mut(&mut lens))?;
        let most = lens.iter().copied().max().unwrap_or(0) as usize;
        if most == 0 {
            return Ok(vec![String::new(); self.world()]);
        }
        let (mut own, mut all) = (vec![0u8; most], vec![0u8; most * self.world()]);
        own[..text.len()].copy_from_slice(text.as_bytes());
        self.all_gather(&own, &mut all)?;
        let of_rank = |(bytes, &len): (&[u8], &u64)| String::from_utf8_lossy(&bytes[..len as usize]).into_owned();
        Ok(all.chunks_exact(most).zip(&lens).map(of_rank).collect())
    }

    /// Fails unless all ranks have the same `value` of `what`.
    ///
    /// # Errors
    /// If one has another: it is named.
    pub fn hold_same(&self, what: &str, value: &str) -> Result<()> {
        let all = self.gather_text(value)?;
        let Some(other) = all.iter().position(|own| *own != all[0]) else { return Ok(()) };
        let problem = format!("{what} of rank {other} is not that of rank 0: {} and {}", all[other], all[0]);
        Err(Error::user(problem, "let all ranks run the same program with the same recipe, files and data"))
    }
}
