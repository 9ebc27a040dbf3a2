//! Examines whether `keychoir serve` would start, for `keychoir check` and `keychoir doctor`: makes a dry run of
//! startup, and converts its problems and warnings to findings.

use std::io::ErrorKind;

use super::Finding;
use crate::app::{DryRun, StartError, StartProblem, StartWarning, dry_run};
use crate::cli::describe_bind_error;
use crate::cli::server::is_keychoir_at;
use crate::config::{Config, ListenAddress};
use crate::control::NewAdminToken;
use crate::store::OpenError;

/// Returns the problems and warnings of startup with `config`. An address or a database that a running Keychoir with
/// this configuration uses is not a problem, because a restart of Keychoir ends that process first.
pub(in crate::cli) async fn examine_start(config: &Config) -> Vec<Finding> {
    let mut start_config = config.clone();
    // Startup generates a missing admin token, too.
    let _ = NewAdminToken::generate_into(&mut start_config);
    let DryRun { problems, warnings } = dry_run(start_config).await;
    let mut findings: Vec<Finding> = warnings.iter().map(describe_warning).collect();
    // systemd opens its sockets before the service runs, so these sockets do not show whether the service runs. If
    // there are no others, a database in use is the evidence of a running service.
    let mut is_running = config.server.listen.iter().all(|address| *address == ListenAddress::Systemd);
    let mut database_in_use = None;
    for problem in problems {
        match problem {
            StartProblem::Address { address, source } => {
                if source.kind() == ErrorKind::AddrInUse && is_keychoir_at(&address).await {
                    is_running = true;
                    let message = format!("note: a Keychoir is already running at {address}");
                    findings.push(Finding::ok("listen", message));
                    continue;
                }
                let message = describe_bind_error(&address.to_string(), &source);
                findings.push(Finding::problem("listen", message));
            }
            StartProblem::Start(error @ StartError::Database(OpenError::InUse { .. })) => {
                database_in_use = Some(error);
            }
            StartProblem::Start(error) => findings.push(describe_error(&error)),
        }
    }
    findings.extend(database_in_use.map(|error| match is_running {
        true => Finding::ok("database", format!("note: {error}")),
        false => describe_error(&error),
    }));
    findings
}

fn describe_error(error: &StartError) -> Finding {
    let area = match error {
        StartError::Database(_) | StartError::UnreadableRecords(_) => "database",
        StartError::Mirror(_) => "mirror",
        StartError::Tls(_) | StartError::Https(_) => "tls",
        StartError::Upstream(_) => "upstream",
        StartError::UnprotectedListener(_) | StartError::AdminWithoutToken(_) => "listen",
        StartError::Io(_) => "system",
    };
    let finding = Finding::problem(area, error);
    match error.advice() {
        Some(advice) => finding.with_next_step(advice),
        None => finding,
    }
}

fn describe_warning(warning: &StartWarning) -> Finding {
    let area = match warning {
        StartWarning::Database(_) | StartWarning::DamagedDatabase { .. } => "database",
        StartWarning::Connections(_) => "limits",
    };
    Finding::warning(area, warning)
}
