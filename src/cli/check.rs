//! `keychoir check`: reports all mistakes in the configuration, and all conditions that would
//! prevent a start. A listening address that a running Keychoir uses is no mistake.

use std::process::ExitCode;

use super::server::is_keychoir_at;
use super::{
    ConfigSources, EX_CONFIG, cannot_listen, failure, files_read, load, print, print_error, runtime,
};
use crate::app::{Obstacle, dry_run};
use crate::config::Config;
use crate::telemetry::{key_name, keys_loaded};

pub(super) fn run(sources: ConfigSources) -> ExitCode {
    let loaded = match load(&sources.overrides(false)) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    for warning in &loaded.warnings {
        print_error(warning);
    }
    let config = &loaded.config;
    print(&files_read(&loaded));
    print(&keys_loaded(config.keys.len(), &config.key_source.to_string()));
    for (position, key) in config.keys.iter().enumerate() {
        print(&format_args!("{}  {}", key_name(position, key.name.as_deref()), key.key.short()));
    }
    let count = match runtime() {
        Ok(runtime) => runtime.block_on(obstacles(loaded.config)),
        Err(error) => return failure(&error),
    };
    if count > 0 {
        let plural = if count == 1 { "" } else { "s" };
        print_error(&format_args!("{count} obstacle{plural} to a start"));
        return ExitCode::from(EX_CONFIG);
    }
    print(&"The configuration is fine.");
    ExitCode::SUCCESS
}

/// Reports the conditions that would prevent a start, and returns their number.
async fn obstacles(config: Config) -> usize {
    let mut count = 0;
    for obstacle in dry_run(config).await {
        match obstacle {
            Obstacle::Address { address, source } => {
                if is_in_use(&source) && is_keychoir_at(&address).await {
                    print(&format_args!("note: a Keychoir is running at {address} already"));
                    continue;
                }
                print_error(&format_args!("keychoir: {}", cannot_listen(&address.to_string(), &source)));
            }
            Obstacle::Start(error) => print_error(&format_args!("keychoir: {error}")),
        }
        count += 1;
    }
    count
}

fn is_in_use(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrInUse
}
