//! The arguments of a run, shared by the subcommands that need one.

use std::path::PathBuf;

use clap::Args;

use super::{environment, report};
use crate::config::{self, ConfigError, Loaded, RunConfig};

#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Configuration file, TOML or JSON; keys given on the command line go over it
    #[arg(value_name = "FILE", conflicts_with = "config")]
    pub config_file: Option<PathBuf>,
    /// The same, as an option
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub keys: RunConfig,
}

impl RunArgs {
    /// Reads the file, lays the command line over it and prints warnings.
    ///
    /// # Errors
    /// As [`config::load`].
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let mut loaded = config::load(self.config.as_deref().or(self.config_file.as_deref()), &self.keys)?;
        loaded.expand_paths(&environment::variable)?;
        report::warn(&loaded.warnings);
        Ok(loaded)
    }
}
