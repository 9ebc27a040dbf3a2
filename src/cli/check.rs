//! `keychoir check`: reports all mistakes of the configuration and all obstacles to a start. An
//! address in use by a running Keychoir is no mistake.

use std::process::ExitCode;

use super::ask::is_keychoir_at;
use super::{EX_CONFIG, Sources, cannot_listen, complain, failed, files_read, load, print, runtime};
use crate::app::{Obstacle, rehearse};
use crate::config::Config;
use crate::telemetry::{key_name, keys_loaded};

pub(super) fn run(sources: Sources) -> ExitCode {
    let loaded = match load(&sources.overrides(false)) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    for warning in &loaded.warnings {
        complain(warning);
    }
    let config = &loaded.config;
    print(&files_read(&loaded));
    print(&keys_loaded(config.keys.len(), &config.key_source.to_string()));
    for (position, key) in config.keys.iter().enumerate() {
        print(&format_args!("{}  {}", key_name(position, key.name.as_deref()), key.key.short()));
    }
    let found = match runtime() {
        Ok(runtime) => runtime.block_on(obstacles(loaded.config)),
        Err(error) => return failed(&error),
    };
    if found > 0 {
        let plural = if found == 1 { "" } else { "s" };
        complain(&format_args!("{found} obstacle{plural} to a start"));
        return ExitCode::from(EX_CONFIG);
    }
    print(&"The configuration is fine.");
    ExitCode::SUCCESS
}

/// Reports the obstacles to a start; returns their number.
async fn obstacles(config: Config) -> usize {
    let mut found = 0;
    for obstacle in rehearse(config).await {
        match obstacle {
            Obstacle::Place { place, source } => {
                if is_taken(&source) && is_keychoir_at(&place).await {
                    print(&format_args!("note: a Keychoir is running at {place} already"));
                    continue;
                }
                complain(&format_args!("keychoir: {}", cannot_listen(&place.to_string(), &source)));
            }
            Obstacle::Start(error) => complain(&format_args!("keychoir: {error}")),
        }
        found += 1;
    }
    found
}

fn is_taken(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrInUse
}
