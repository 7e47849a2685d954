//! What a run says about itself: messages by rank, the step line and progress bar, `trainer_log.jsonl`, phase timings, peak memory.
//!
//! Messages go to stderr through `tracing`; data goes to stdout, and never from here. Nothing here reads the environment or knows a tensor.

mod console;
mod error;
mod format;
mod free_memory;
mod log;
mod logged;
mod memory;
mod numbers;
mod phase;
mod record;
mod run_log;
mod step_clock;

pub use console::{ByteBar, Console, StepBar};
pub use error::TelemetryError;
pub use format::step_line;
pub use free_memory::Memory;
pub use log::{Verbosity, init};
pub use logged::{LoggedStep, logged_steps};
pub use memory::{peak_rss_bytes, reset_peak_rss};
pub use numbers::{bytes, hours, si, thousands};
pub use phase::{Phase, PhaseTimer, PhaseTimes};
pub use record::{EvalRecord, PhaseMillis, StepRecord};
pub use run_log::{RUN_LOG_FILE, RunLog, Truncation};
pub use step_clock::StepClock;
