//! Messages by rank: rank 0 says everything, the others only warnings, marked with their rank.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::console::Console;
use super::error::TelemetryError;

/// How much rank 0 says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Warnings and errors.
    Quiet,
    #[default]
    Normal,
    Debug,
    Trace,
}

impl Verbosity {
    fn filter(self, rank: usize) -> &'static str {
        match (rank, self) {
            (0, Self::Normal) => "warn,glmddp=info",
            (0, Self::Debug) => "info,glmddp=debug",
            (0, Self::Trace) => "info,glmddp=trace",
            _ => "warn",
        }
    }
}

/// Sends this process's `tracing` messages to stderr and returns the console that keeps them and the progress bar apart. Rank 0 says what `verbosity` asks
/// for, the others warnings and errors; `filter` (the syntax of `RUST_LOG`), where given, replaces that choice on every rank.
///
/// Where a subscriber is already set (ranks as threads of one process), that one stays.
///
/// # Errors
/// A filter that cannot be read.
pub fn init(rank: usize, world_size: usize, verbosity: Verbosity, filter: Option<&str>) -> Result<Console, TelemetryError> {
    let directives = filter.unwrap_or_else(|| verbosity.filter(rank));
    let env_filter = EnvFilter::try_new(directives)
        .map_err(|error| TelemetryError::BadFilter { filter: directives.to_owned(), reason: error.to_string() })?;
    let console = if rank == 0 { Console::stderr() } else { Console::without_bar() };
    let writer = console.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(env_filter)
        .with_writer(move || writer.clone())
        .event_format(RankFormat { rank, world_size })
        .finish();
    if subscriber.try_init().is_err() {
        tracing::debug!("messages already have a subscriber");
    }
    Ok(console)
}

/// `warning: text (field: value)`; other ranks than 0 start with `rank 3: `.
struct RankFormat {
    rank: usize,
    world_size: usize,
}

impl<S, N> FormatEvent<S, N> for RankFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.world_size > 1 && self.rank > 0 {
            write!(writer, "rank {}: ", self.rank)?;
        }
        let metadata = event.metadata();
        match *metadata.level() {
            Level::ERROR => write!(writer, "error: ")?,
            Level::WARN => write!(writer, "warning: ")?,
            Level::INFO => {}
            level => write!(writer, "{} {}: ", if level == Level::DEBUG { "debug" } else { "trace" }, metadata.target())?,
        }
        let mut line = Line::default();
        event.record(&mut line);
        let separator = if line.message.is_empty() || line.fields.is_empty() { "" } else { " " };
        writeln!(writer, "{}{separator}{}", line.message, line.fields)
    }
}

/// An event's message, and its other fields as `(name: value, name: value)`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
            return;
        }
        let _ = self.fields.pop();
        let start = if self.fields.is_empty() { "(" } else { ", " };
        self.fields += &format!("{start}{}: {value:?})", field.name());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::console::captured;

    fn said(rank: usize, verbosity: Verbosity) -> String {
        let (console, text) = captured();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(verbosity.filter(rank)))
            .with_writer(move || console.clone())
            .event_format(RankFormat { rank, world_size: 2 })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "glmddp::train", rows = 3, file = "a.json", "read the rows");
            tracing::info!(target: "other_crate", "noise");
            tracing::debug!(target: "glmddp::data", "detail");
            tracing::warn!(target: "glmddp::data", line = 7, "bad row");
        });
        text()
    }

    #[test]
    fn rank_zero_says_what_the_verbosity_asks_for() {
        assert_eq!(said(0, Verbosity::Quiet), "warning: bad row (line: 7)\n");
        assert_eq!(said(0, Verbosity::Normal), "read the rows (rows: 3, file: a.json)\nwarning: bad row (line: 7)\n");
        assert!(said(0, Verbosity::Debug).contains("debug glmddp::data: detail\n"));
    }

    #[test]
    fn other_ranks_say_warnings_with_their_rank() {
        assert_eq!(said(1, Verbosity::Trace), "rank 1: warning: bad row (line: 7)\n");
    }

    #[test]
    fn unreadable_filter_is_refused() {
        let error = init(0, 1, Verbosity::Normal, Some("glmddp=loud")).unwrap_err();
        assert!(error.to_string().starts_with("bad log filter `glmddp=loud`: "), "{error}");
        assert!(error.hint().is_some());
    }
}
