//! Numbers of the host that kernels read.

use std::sync::OnceLock;

use candle_core::{Result, Tensor, bail};

use super::on_gpu::OnGpu;

/// Ids, rows or positions, `[N]`. A GPU is sent them when a kernel first reads them, and once.
#[derive(Debug, Default)]
pub struct Ids {
    host: Vec<u32>,
    sent: OnceLock<Tensor>,
}

impl Ids {
    pub fn new(ids: impl Into<Vec<u32>>) -> Self {
        Self { host: ids.into(), sent: OnceLock::new() }
    }

    pub fn len(&self) -> usize {
        self.host.len()
    }

    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    pub fn as_slice(&self) -> &[u32] {
        &self.host
    }

    /// `[N]` u32 on the GPU.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn on(&self, gpu: &OnGpu) -> Result<&Tensor> {
        if self.sent.get().is_none() {
            _ = self.sent.set(gpu.upload(&self.host)?);
        }
        let Some(sent) = self.sent.get() else { bail!("ids that were not sent") };
        Ok(sent)
    }
}
