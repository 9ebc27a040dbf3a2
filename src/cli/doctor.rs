//! `keychoir doctor`: runs all examinations of [`diagnosis`], with `--offline` only those without a connection to other
//! services, and prints one line for each finding, with the next step for the operator. The exit code reports the
//! highest severity.

use std::process::ExitCode;

use clap::Args;

use super::color::ColorOption;
use super::control::ControlOptions;
use super::diagnosis::{
    self, Finding, Severity, examine_files, examine_online, examine_server, examine_start, examine_storage,
    worst_severity,
};
use super::{CommandResult, build_runtime, print};
use crate::config::{self, LoadedConfig, Overrides};
use crate::tasks;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    options: ControlOptions,
    #[command(flatten)]
    color: ColorOption,
    /// Do not connect to ElevenLabs, the mirror and Redis.
    #[arg(long)]
    offline: bool,
}

/// The exit code if there are warnings and no problems.
const WARNINGS_EXIT_CODE: u8 = 1;
/// The exit code if there are problems.
const PROBLEMS_EXIT_CODE: u8 = 2;

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { options, color, offline } = arguments;
    // Missing keys, and an address that requires client tokens, are findings.
    let overrides = Overrides { allows_exposure: true, ..options.overrides() };
    let findings = match config::load(&overrides) {
        Ok(loaded) => {
            let runtime = build_runtime()?;
            let findings = runtime.block_on(examine_configuration(&loaded, &options, offline));
            // A lookup that exceeded its timeout may still block a thread.
            runtime.shutdown_background();
            findings
        }
        Err(problems) => {
            problems.iter().map(|problem| Finding::problem("config", problem.summary())).collect()
        }
    };
    if options.json {
        print(&diagnosis::to_json(&findings));
    } else {
        let palette = color.palette();
        for finding in &findings {
            print(&finding.format(palette));
        }
        print(&format_summary(&findings));
    }
    match worst_severity(&findings) {
        Severity::Ok => Ok(()),
        Severity::Warning => Err(ExitCode::from(WARNINGS_EXIT_CODE)),
        Severity::Problem => Err(ExitCode::from(PROBLEMS_EXIT_CODE)),
    }
}

/// Runs all examinations. The database is examined on another thread, and the running Keychoir and the network at the
/// same time.
async fn examine_configuration(
    loaded: &LoadedConfig,
    options: &ControlOptions,
    offline: bool,
) -> Vec<Finding> {
    let config = &loaded.config;
    let mut findings = examine_files(loaded);
    // On this thread, the integrity check of a large database would delay the timeouts of the other examinations.
    let storage_examination = {
        let config = config.clone();
        tasks::spawn_blocking(move || examine_storage(&config))
    };
    let mut start_findings = examine_start(config).await;
    if worst_severity(&start_findings) != Severity::Problem {
        start_findings.push(Finding::ok("start", "`keychoir serve` starts with this configuration"));
    }
    let (address, token) = (options.address(config), options.find_token(config));
    let server_examination = examine_server(config, address, token.as_deref());
    let online_examination = async { if offline { Vec::new() } else { examine_online(config).await } };
    let (storage_findings, server_findings, online_findings) =
        tokio::join!(storage_examination, server_examination, online_examination);
    findings.extend(start_findings);
    findings.extend(storage_findings.unwrap_or_else(|error| vec![Finding::problem("database", error)]));
    findings.extend(server_findings);
    findings.extend(online_findings);
    findings
}

fn format_summary(findings: &[Finding]) -> String {
    let format_count = |severity, noun: &str| {
        let count = findings.iter().filter(|finding| finding.severity == severity).count();
        format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
    };
    let (problems, warnings) =
        (format_count(Severity::Problem, "problem"), format_count(Severity::Warning, "warning"));
    format!("{problems}, {warnings}")
}
