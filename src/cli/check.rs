//! `keychoir check`: reports all mistakes in the configuration, and all problems that would prevent a
//! start. An address on which a running Keychoir listens is not a problem.

use std::io::ErrorKind;
use std::process::ExitCode;

use super::server::is_keychoir_at;
use super::{
    CommandResult, ConfigSources, EX_CONFIG, build_runtime, describe_bind_error, describe_files, load, print,
    print_error,
};
use crate::app::{StartProblem, dry_run};
use crate::config::{Config, KeyRequirement};
use crate::telemetry::{key_name, keys_loaded_message};

pub(super) fn run(sources: ConfigSources) -> CommandResult {
    let loaded = load(&sources.into_overrides(KeyRequirement::Required))?;
    for warning in &loaded.warnings {
        print_error(warning);
    }
    let config = &loaded.config;
    print(&describe_files(&loaded));
    print(&keys_loaded_message(config.keys.len(), &config.key_source.to_string()));
    for (position, key) in config.keys.iter().enumerate() {
        print(&format_args!("{}  {}", key_name(position, key.name.as_deref()), key.key.short()));
    }
    let problem_count = build_runtime()?.block_on(report_start_problems(loaded.config));
    if problem_count > 0 {
        let plural = if problem_count == 1 { "" } else { "s" };
        print_error(&format_args!("{problem_count} problem{plural} would prevent a start"));
        return Err(ExitCode::from(EX_CONFIG));
    }
    print(&"The configuration is fine.");
    Ok(())
}

/// Prints the problems that would prevent a start, and returns their number.
async fn report_start_problems(config: Config) -> usize {
    let mut problem_count = 0;
    for problem in dry_run(config).await {
        match problem {
            StartProblem::Address { address, source } => {
                if source.kind() == ErrorKind::AddrInUse && is_keychoir_at(&address).await {
                    print(&format_args!("note: a Keychoir is already running at {address}"));
                    continue;
                }
                let message = describe_bind_error(&address.to_string(), &source);
                print_error(&format_args!("keychoir: {message}"));
            }
            StartProblem::Start(error) => print_error(&format_args!("keychoir: {error}")),
        }
        problem_count += 1;
    }
    problem_count
}
