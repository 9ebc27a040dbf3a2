//! Examines the local files and limits for `keychoir doctor`: the configuration with its files, keys, certificate and
//! forward proxies, the private key of the local CA, the limit of open files, and the database with its disk.

use std::path::Path;
use std::time::Duration;

use super::Finding;
use crate::app::ConnectionLimit;
use crate::certificate::{self, CaLocation};
use crate::clock;
use crate::config::{Config, LoadedConfig};
use crate::platform::files;
use crate::policy::certificate::Validity;
use crate::policy::units::Grouped;
use crate::store::{DatabaseInspection, DatabaseIntegrity, ReadError, UsageReader};

/// Maximum time of SQLite's integrity check, which reads the whole file, at about 200 MB per second.
const INTEGRITY_TIMEOUT: Duration = Duration::from_secs(10);

/// Less free space than this on the disk of the database causes a warning, because uploads are buffered on the same
/// disk by default. Less than twice the size of the database also causes a warning, because an upgrade needs as much.
const MIN_FREE_BYTES: u64 = 256 * 1024 * 1024;

/// A shorter remaining validity of the certificate causes a warning.
const MIN_REMAINING_VALIDITY: Duration = Duration::from_secs(14 * 24 * 3_600);

/// Describes the sources of the configuration, the files with their modes, the route to the provider, the number of
/// keys, the certificate, and the limit of open files.
pub(in crate::cli) fn examine_files(loaded: &LoadedConfig) -> Vec<Finding> {
    let LoadedConfig { config, warnings, file, contents, .. } = loaded;
    let files = contents.stamps();
    let mut findings = vec![match file {
        Some(path) => Finding::ok("config", format_args!("read from {}", path.display())),
        None => Finding::ok("config", "no configuration file: defaults and the environment"),
    }];
    findings.extend(warnings.iter().map(|warning| Finding::warning("config", warning)));
    findings.extend(files.existing().map(describe_file));
    findings.extend(describe_ca_key(config));
    findings.extend(
        config.proxy_routes().describe(&config.upstream.base_url).map(|route| Finding::ok("proxy", route)),
    );
    findings.push(if config.keys.is_empty() {
        Finding::problem("keys", "no keys are configured").with_next_step(
            "set ELEVENLABS_API_KEYS=sk_first,sk_second, or run `keychoir keys add NAME < key`",
        )
    } else {
        Finding::ok("keys", format_args!("{} from {}", config.keys.len(), config.describe_key_sources()))
    });
    findings.extend(describe_certificate(config));
    let limit = ConnectionLimit::determine(config);
    // `examine_start` warns about a reduced limit.
    if !limit.is_reduced() {
        let message = format_args!(
            "{} open files suffice for {} connections",
            Grouped(limit.open_files),
            Grouped(limit.configured as u64)
        );
        findings.push(Finding::ok("limits", message));
    }
    findings
}

fn describe_file(path: &Path) -> Finding {
    match path.metadata() {
        // If other users can read the file, the configuration has already warned about it.
        Ok(metadata) => {
            let mode = files::mode(&metadata).map(|mode| format!(" (mode {:04o})", mode & 0o7777));
            Finding::ok("files", format_args!("{}{}", path.display(), mode.unwrap_or_default()))
        }
        Err(error) => Finding::warning("files", format_args!("{}: {error}", path.display())),
    }
}

/// Describes the private key of the local CA, which the configuration does not read.
fn describe_ca_key(config: &Config) -> Option<Finding> {
    let CaLocation::Directory(directory) = config.ca_location() else { return None };
    let path = certificate::ca_key_file(&directory);
    let mode = files::mode(&path.metadata().ok()?);
    let finding = describe_file(&path);
    if mode.is_none_or(|mode| mode & 0o077 == 0) {
        return Some(finding);
    }
    let message = format!("other users of this machine can read {}", finding.message);
    Some(Finding::warning("files", message).with_next_step("restrict it with `chmod 600`"))
}

/// Describes the certificate in the files of `server.tls`.
fn describe_certificate(config: &Config) -> Option<Finding> {
    let period = config.certificate.as_ref()?.validity_period();
    let now = clock::now();
    let end = period.until.rfc3339_seconds();
    Some(match period.validity(now) {
        // If the certificate is not valid, the configuration has already warned about it.
        Validity::NotYet | Validity::Expired => return None,
        Validity::Valid if period.until.since(now) < MIN_REMAINING_VALIDITY => {
            Finding::warning("tls", format_args!("the certificate of server.tls expires at {end}"))
                .with_next_step("renew it; a reload reads the new files")
        }
        Validity::Valid => {
            Finding::ok("tls", format_args!("the certificate of server.tls is valid until {end}"))
        }
    })
}

/// Describes the database and its disk. The integrity check of the database takes at most [`INTEGRITY_TIMEOUT`].
pub(in crate::cli) fn examine_storage(config: &Config) -> Vec<Finding> {
    let Some(path) = config.storage.file() else {
        return vec![Finding::ok("database", "usage records are kept in memory only (storage.ephemeral)")];
    };
    match UsageReader::open(path).and_then(|mut reader| reader.inspect(INTEGRITY_TIMEOUT)) {
        Ok(inspection) => describe_database(path, &inspection),
        Err(error) => vec![match &error {
            ReadError::NoFile(_) | ReadError::Empty(_) => Finding::ok("database", &error),
            ReadError::Older(_) => Finding::warning("database", &error)
                .with_next_step("try it with `keychoir db migrate --dry-run`"),
            ReadError::Newer { .. } => Finding::problem("database", &error)
                .with_next_step("install that version, or restore a backup"),
            ReadError::Corrupt { .. } => Finding::problem("database", &error).with_next_step(RESTORE_ADVICE),
            ReadError::Unreadable { .. } => Finding::problem("database", &error)
                .with_next_step("run this command as the user of the service"),
            // The message of the error contains the advice.
            ReadError::Unusable { .. } => Finding::problem("database", &error),
        }],
    }
}

/// The advice for a damaged database.
const RESTORE_ADVICE: &str =
    "restore a backup (docs/operations.md), or restart: a damaged database is set aside";

fn describe_database(path: &Path, inspection: &DatabaseInspection) -> Vec<Finding> {
    let DatabaseInspection { bytes, schema, current_schema, free_bytes, integrity } = inspection;
    let path = path.display();
    let mebibytes = |bytes: u64| format!("{}.{} MiB", bytes >> 20, (bytes % (1 << 20)) * 10 / (1 << 20));
    let size = mebibytes(*bytes);
    let mut findings = vec![match integrity {
        DatabaseIntegrity::Intact => {
            Finding::ok("database", format_args!("{path} is intact: {size}, schema {schema}"))
        }
        DatabaseIntegrity::Unfinished => {
            let seconds = INTEGRITY_TIMEOUT.as_secs();
            let message =
                format_args!("{path}: {size}, schema {schema}; a check of {seconds} s found no damage");
            Finding::ok("database", message)
        }
        DatabaseIntegrity::Damaged(report) => {
            Finding::problem("database", format_args!("{path} is damaged: {report}"))
                .with_next_step(RESTORE_ADVICE)
        }
    }];
    if schema < current_schema {
        let message =
            format_args!("{path} has schema {schema}; the next start upgrades it to {current_schema}");
        findings.push(
            Finding::warning("database", message)
                .with_next_step("try it with `keychoir db migrate --dry-run`"),
        );
    }
    findings.extend(free_bytes.map(|free| {
        let message = format_args!("{} free for {path}", mebibytes(free)).to_string();
        if free < MIN_FREE_BYTES.max(bytes.saturating_mul(2)) {
            Finding::warning("disk", message)
                .with_next_step("free some space, or set storage.path to another disk")
        } else {
            Finding::ok("disk", message)
        }
    }));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::diagnosis::Severity;

    #[track_caller]
    fn check_findings(inspection: DatabaseInspection, expected: &[(Severity, &str)]) {
        let findings = describe_database(Path::new("/k.db"), &inspection);
        let severities: Vec<_> = findings.iter().map(|finding| (finding.severity, finding.area)).collect();
        assert_eq!(severities, expected, "the severities and areas must be the expected ones: {findings:?}");
    }

    #[test]
    fn a_damaged_database_an_old_schema_and_a_full_disk_are_reported() {
        const INTACT: DatabaseInspection = DatabaseInspection {
            bytes: 1 << 30,
            schema: 13,
            current_schema: 13,
            free_bytes: Some(1 << 40),
            integrity: DatabaseIntegrity::Intact,
        };
        check_findings(INTACT, &[(Severity::Ok, "database"), (Severity::Ok, "disk")]);
        check_findings(
            DatabaseInspection { schema: 12, free_bytes: None, ..INTACT },
            &[(Severity::Ok, "database"), (Severity::Warning, "database")],
        );
        for (free, expected) in [(2 << 30, Severity::Ok), ((2 << 30) - 1, Severity::Warning)] {
            let inspection = DatabaseInspection { free_bytes: Some(free), ..INTACT };
            check_findings(inspection, &[(Severity::Ok, "database"), (expected, "disk")]);
        }
        let integrity = DatabaseIntegrity::Damaged("row 1 missing".to_owned());
        let damaged = DatabaseInspection { integrity, free_bytes: None, ..INTACT };
        check_findings(damaged, &[(Severity::Problem, "database")]);
        let integrity = DatabaseIntegrity::Unfinished;
        check_findings(
            DatabaseInspection { integrity, free_bytes: None, ..INTACT },
            &[(Severity::Ok, "database")],
        );
    }
}
