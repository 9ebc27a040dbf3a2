//! `keychoir check`: reports all mistakes in the configuration, and all problems that would prevent startup. With
//! `--online`, it also examines the provider, the mirror and Redis. An address or a database that a running Keychoir
//! uses is not a problem.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::color::Palette;
use super::diagnosis::{self, Finding, Severity, examine_online, examine_start};
use super::{CommandResult, ConfigSources, EX_CONFIG, build_runtime, describe_files, print, print_error};
use crate::config::{self, KeyRequirement, LoadedConfig, Overrides};
use crate::telemetry::{key_name, keys_loaded_message};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    sources: ConfigSources,
    /// Check as for `keychoir serve --ephemeral`.
    #[arg(long)]
    ephemeral: bool,
    /// Also connect to ElevenLabs, and check each key, the tables of the mirror, and Redis.
    #[arg(long)]
    online: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The exit code if startup would succeed, and the provider, a key, the mirror or Redis has a problem.
const ONLINE_PROBLEM: u8 = 1;

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { sources, ephemeral, online, json } = arguments;
    let overrides = Overrides { is_ephemeral: ephemeral, ..sources.into_overrides(KeyRequirement::Required) };
    let loaded_config = match config::load(&overrides) {
        Ok(loaded_config) => loaded_config,
        Err(problems) => {
            if json {
                let findings: Vec<_> =
                    problems.iter().map(|problem| Finding::problem("config", problem.summary())).collect();
                print(&diagnosis::to_json(&findings));
            } else {
                print_error(&problems);
            }
            return Err(ExitCode::from(EX_CONFIG));
        }
    };
    if !json {
        print_configuration(&loaded_config);
    }
    let runtime = build_runtime()?;
    let (start, network) = runtime.block_on(async {
        let start = examine_start(&loaded_config.config).await;
        let network = if online { examine_online(&loaded_config.config).await } else { Vec::new() };
        (start, network)
    });
    // A lookup that exceeded its timeout may still block a thread.
    runtime.shutdown_background();
    if json {
        print_json(&loaded_config, &start, &network);
    } else {
        print_findings(&start, &network);
    }
    match (diagnosis::worst(&start), diagnosis::worst(&network)) {
        (Severity::Problem, _) => Err(ExitCode::from(EX_CONFIG)),
        (Severity::Ok | Severity::Warning, Severity::Problem) => Err(ExitCode::from(ONLINE_PROBLEM)),
        (Severity::Ok | Severity::Warning, Severity::Ok | Severity::Warning) => Ok(()),
    }
}

fn print_configuration(loaded: &LoadedConfig) {
    for warning in &loaded.warnings {
        print_error(warning);
    }
    let config = &loaded.config;
    print(&describe_files(loaded));
    print(&keys_loaded_message(config.keys.len(), &config.describe_key_sources()));
    for (position, key) in config.keys.iter().enumerate() {
        print(&format_args!("{}  {}", key_name(position, key.name.as_deref()), key.key.short()));
    }
}

/// Prints the findings about startup, problems to standard error, and all findings about the network.
fn print_findings(start: &[Finding], network: &[Finding]) {
    for finding in start {
        match finding.severity {
            Severity::Ok => print(finding),
            Severity::Warning => print_error(finding),
            Severity::Problem => print_error(&format_args!("keychoir: {finding}")),
        }
    }
    for finding in network {
        print(&finding.format(Palette::default()));
    }
    let problem_count = start.iter().filter(|finding| finding.severity == Severity::Problem).count();
    if problem_count > 0 {
        let plural = if problem_count == 1 { "" } else { "s" };
        print_error(&format_args!("{problem_count} problem{plural} would prevent a start"));
    } else {
        print(&"The configuration is fine.");
    }
}

fn print_json(loaded: &LoadedConfig, start: &[Finding], network: &[Finding]) {
    let config = &loaded.config;
    let warnings = loaded.warnings.iter().map(|warning| Finding::warning("config", warning));
    let findings: Vec<_> = warnings.chain(start.iter().cloned()).chain(network.iter().cloned()).collect();
    let keys = config.keys.iter().map(|key| json!({"name": key.name, "short_key": key.key.short().as_str()}));
    print(&json!({
        "status": diagnosis::worst(&findings),
        "starts": diagnosis::worst(start) != Severity::Problem,
        "file": loaded.file,
        "files": loaded.contents.stamps().existing().collect::<Vec<_>>(),
        "keys": keys.collect::<Vec<_>>(),
        "findings": findings,
    }));
}
