//! `keychoir check`: reports all mistakes in the configuration, and all problems that would prevent startup. With
//! `--online`, it also examines the provider, the keys, the mirror and Redis. An address or a database that a running
//! Keychoir uses is not a problem. The exit code distinguishes a problem of startup from a problem that only `--online`
//! finds.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::color::Palette;
use super::diagnosis::{self, Finding, Severity, examine_online, examine_start, worst_severity};
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
const ONLINE_PROBLEM_EXIT_CODE: u8 = 1;

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
    let (start_findings, online_findings) = runtime.block_on(async {
        let start_findings = examine_start(&loaded_config.config).await;
        let online_findings = if online { examine_online(&loaded_config.config).await } else { Vec::new() };
        (start_findings, online_findings)
    });
    // A lookup that exceeded its timeout may still block a thread.
    runtime.shutdown_background();
    if json {
        print_json(&loaded_config, &start_findings, &online_findings);
    } else {
        print_findings(&start_findings, &online_findings);
    }
    match (worst_severity(&start_findings), worst_severity(&online_findings)) {
        (Severity::Problem, _) => Err(ExitCode::from(EX_CONFIG)),
        (Severity::Ok | Severity::Warning, Severity::Problem) => {
            Err(ExitCode::from(ONLINE_PROBLEM_EXIT_CODE))
        }
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

/// Prints the findings, and whether startup would succeed. Warnings and problems of startup go to standard error.
fn print_findings(start_findings: &[Finding], online_findings: &[Finding]) {
    for finding in start_findings {
        match finding.severity {
            Severity::Ok => print(finding),
            Severity::Warning => print_error(finding),
            Severity::Problem => print_error(&format_args!("keychoir: {finding}")),
        }
    }
    for finding in online_findings {
        print(&finding.format(Palette::default()));
    }
    let problem_count = start_findings.iter().filter(|finding| finding.severity == Severity::Problem).count();
    if problem_count > 0 {
        let plural_suffix = if problem_count == 1 { "" } else { "s" };
        print_error(&format_args!("{problem_count} problem{plural_suffix} would prevent a start"));
    } else if worst_severity(online_findings) != Severity::Problem {
        print(&"The configuration is fine.");
    }
}

fn print_json(loaded: &LoadedConfig, start_findings: &[Finding], online_findings: &[Finding]) {
    let config = &loaded.config;
    let warnings = loaded.warnings.iter().map(|warning| Finding::warning("config", warning));
    let findings: Vec<_> =
        warnings.chain(start_findings.iter().cloned()).chain(online_findings.iter().cloned()).collect();
    let keys = config.keys.iter().map(|key| json!({"name": key.name, "short_key": key.key.short().as_str()}));
    print(&json!({
        "status": worst_severity(&findings),
        "starts": worst_severity(start_findings) != Severity::Problem,
        "file": loaded.file,
        "files": loaded.contents.stamps().existing().collect::<Vec<_>>(),
        "keys": keys.collect::<Vec<_>>(),
        "findings": findings,
    }));
}
