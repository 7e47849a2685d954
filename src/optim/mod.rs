//! From a summed gradient to changed parameters: finite check, clipping, learning rate, AdamW.
//!
//! All of it works on flat f32 buffers. Sums over elements run over fixed chunks, everything else is element by element: the number
//! of threads changes no bit.

mod adamw;
mod norm;
mod schedule;

pub use crate::kernels::adamw::CHUNK;
pub use adamw::{AdamW, AdamWConfig, OptimError};
pub use norm::{NonFinite, Norm, chunk_square_sums, first_non_finite};
pub use schedule::{Schedule, SchedulerType, Warmup};
