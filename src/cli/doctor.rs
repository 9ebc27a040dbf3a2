//! `keychoir doctor`: examines everything that Keychoir depends on, and prints one line per finding with the next
//! step.

use std::process::ExitCode;

use clap::Args;

use super::color::ColorOption;
use super::control::ControlOptions;
use super::diagnosis::{
    self, Finding, Severity, examine_files, examine_online, examine_server, examine_start, examine_storage,
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
    /// Do not connect to ElevenLabs and the mirror.
    #[arg(long)]
    offline: bool,
}

/// The exit code if there are warnings and no problems.
const WARNINGS_EXIT_CODE: u8 = 1;
/// The exit code if there are problems.
const PROBLEMS_EXIT_CODE: u8 = 2;

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { options, color, offline } = arguments;
    // Missing keys and clients are findings.
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
    match diagnosis::worst(&findings) {
        Severity::Ok => Ok(()),
        Severity::Warning => Err(ExitCode::from(WARNINGS_EXIT_CODE)),
        Severity::Problem => Err(ExitCode::from(PROBLEMS_EXIT_CODE)),
    }
}

/// Runs all examinations at the same time. Each has separate timeouts.
async fn examine_configuration(
    loaded: &LoadedConfig,
    options: &ControlOptions,
    offline: bool,
) -> Vec<Finding> {
    let config = &loaded.config;
    let mut findings = examine_files(loaded);
    // The check of a large database would delay the timeouts of the other examinations.
    let storage = {
        let config = config.clone();
        tasks::spawn_blocking(move || examine_storage(&config))
    };
    let mut start = examine_start(config).await;
    if diagnosis::worst(&start) != Severity::Problem {
        start.push(Finding::ok("start", "`keychoir serve` starts with this configuration"));
    }
    let (address, token) = (options.address(config), options.find_token(config));
    let server = examine_server(config, address, token.as_deref());
    let network = async { if offline { Vec::new() } else { examine_online(config).await } };
    let (storage, server, network) = tokio::join!(storage, server, network);
    findings.extend(start);
    findings.extend(storage.unwrap_or_else(|error| vec![Finding::problem("database", error)]));
    findings.extend(server);
    findings.extend(network);
    findings
}

fn format_summary(findings: &[Finding]) -> String {
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let plural = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    let (problems, warnings) = (count(Severity::Problem), count(Severity::Warning));
    format!("{}, {}", plural(problems, "problem"), plural(warnings, "warning"))
}
