//! `keychoir check`: says what is wrong with the configuration, all of it, or that it is fine.

use std::process::ExitCode;

use super::{Sources, complain, load, print};
use crate::telemetry::keys_loaded;

pub(super) fn run(sources: Sources) -> ExitCode {
    let loaded = match load(&sources.overrides(false)) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    for warning in &loaded.warnings {
        complain(warning);
    }
    let config = &loaded.config;
    print(&keys_loaded(config.keys.len(), &config.key_source.to_string()));
    for (position, key) in config.keys.iter().enumerate() {
        print(&format_args!("key {position}  {}", key.key.short()));
    }
    print(&"The configuration is fine.");
    ExitCode::SUCCESS
}
