//! Soft tokens: rows that stand before each row's own from the embedding on, in the passes over packed rows.
//!
//! Shapes: P soft tokens of each row, S = T + R P tokens in all.

use candle_core::{Result, Tensor, bail};

use super::chatglm2::Tokens;
use crate::kernels::attention::Rows;

/// Packed rows with their soft tokens in front.
#[derive(Debug)]
pub(super) struct Extended {
    /// P
    num_soft: usize,
    /// `[S]` 0 to P - 1, then P + the token's own position.
    positions: Vec<u32>,
    /// `[R + 1]`
    bounds: Vec<usize>,
    /// `[S]`; a soft token is never padding.
    keep: Option<Vec<bool>>,
}

impl Extended {
    pub(super) fn new(tokens: Tokens, num_soft: usize) -> Self {
        let (mut positions, mut bounds) = (Vec::new(), vec![0]);
        let mut keep = tokens.rows.keep.map(|_| Vec::new());
        for row in tokens.rows.bounds.windows(2) {
            positions.extend(0..num_soft as u32);
            positions.extend(tokens.positions[row[0]..row[1]].iter().map(|&position| num_soft as u32 + position));
            bounds.push(positions.len());
            if let (Some(all), Some(own)) = (&mut keep, tokens.rows.keep) {
                all.extend(std::iter::repeat_n(true, num_soft));
                all.extend_from_slice(&own[row[0]..row[1]]);
            }
        }
        Self { num_soft, positions, bounds, keep }
    }

    pub(super) fn positions(&self) -> &[u32] {
        &self.positions
    }

    pub(super) fn rows(&self) -> Rows<'_> {
        Rows { bounds: &self.bounds, keep: self.keep.as_deref(), tables: None }
    }

    /// soft `[P, H]` and the rows' own x `[T, H]` -> `[S, H]`.
    pub(super) fn join(&self, soft_PH: &Tensor, x_TH: &Tensor) -> Result<Tensor> {
        if soft_PH.dim(1)? != x_TH.dim(1)? {
            bail!("soft tokens: {} values each, expected the hidden size {}", soft_PH.dim(1)?, x_TH.dim(1)?);
        }
        let mut parts = Vec::with_capacity(2 * self.bounds.len());
        for (start, len) in self.own() {
            parts.extend([soft_PH.clone(), x_TH.narrow(0, start, len)?]);
        }
        Tensor::cat(&parts, 0)
    }

    /// x `[S, H]` -> (the soft tokens' `[R, P, H]`, the rows' own `[T, H]`).
    pub(super) fn split(&self, x_SH: &Tensor) -> Result<(Tensor, Tensor)> {
        let (mut soft, mut own) = (Vec::new(), Vec::new());
        for (row, &start) in self.bounds.windows(2).zip(&self.bounds) {
            soft.push(x_SH.narrow(0, start, self.num_soft)?);
            own.push(x_SH.narrow(0, start + self.num_soft, row[1] - row[0] - self.num_soft)?);
        }
        // Stacked and joined anew, so that both lie dense.
        Ok((Tensor::stack(&soft, 0)?, Tensor::cat(&own, 0)?.contiguous()?))
    }

    /// (first token, tokens) of each row among the rows' own.
    fn own(&self) -> impl Iterator<Item = (usize, usize)> {
        self.bounds.windows(2).enumerate().map(|(r, row)| (row[0] - r * self.num_soft, row[1] - row[0] - self.num_soft))
    }
}
