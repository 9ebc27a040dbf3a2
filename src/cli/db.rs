//! `keychoir db`: copies the usage database while it is used, and upgrades a database of an earlier version or
//! tries the upgrade on a copy.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::database::DatabaseOptions;
use super::{CommandResult, fail, print};
use crate::policy::units::Grouped;
use crate::store::{
    Backup, ExistingFile, MigrationOutcome, MigrationReport, SnapshotError, back_up, dry_run_migration,
    migrate,
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Copy the database into FILE, even while Keychoir uses it, and check the copy.
    Backup(BackupArguments),
    /// Copy the database, and upgrade it to this version of Keychoir.
    ///
    /// The next start of `keychoir serve` would do the same. Keychoir must not be running, except for
    /// a dry run.
    Migrate(MigrateArguments),
}

#[derive(Debug, Args)]
struct BackupArguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// The path of the copy.
    #[arg(value_name = "FILE")]
    target: PathBuf,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct MigrateArguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// Try the upgrade on a temporary copy next to the database, and report what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    match arguments.command {
        Command::Backup(arguments) => run_backup(arguments),
        Command::Migrate(arguments) => run_migration(arguments),
    }
}

fn run_backup(arguments: BackupArguments) -> CommandResult {
    let BackupArguments { database, target, force, json } = arguments;
    let path = database.path()?;
    let existing = if force { ExistingFile::Replace } else { ExistingFile::Keep };
    let backup = back_up(&path, &target, existing).map_err(|error| match &error {
        SnapshotError::Exists(_) => fail(format_args!("{error}: use another path, or --force to replace it")),
        SnapshotError::NoFile(_)
        | SnapshotError::Foreign { .. }
        | SnapshotError::Itself(_)
        | SnapshotError::NoSpace { .. }
        | SnapshotError::NoAccess { .. }
        | SnapshotError::Unreadable { .. }
        | SnapshotError::Unwritable { .. }
        | SnapshotError::Corrupt { .. } => fail(error),
    })?;
    let Backup { bytes, version, attempts, duration } = backup;
    if json {
        print(&json!({
            "database": path,
            "file": target,
            "bytes": bytes,
            "schema": version,
            "attempts": attempts,
            "duration_ms": saturating_ms(duration),
        }));
        return Ok(());
    }
    print(&format_args!(
        "Copied {} to {}: {} attempts, {} bytes, schema {version}, checked, in {} ms",
        path.display(),
        target.display(),
        Grouped(attempts),
        Grouped(bytes),
        duration.as_millis()
    ));
    Ok(())
}

fn run_migration(arguments: MigrateArguments) -> CommandResult {
    let MigrateArguments { database, dry_run, json } = arguments;
    let path = database.path()?;
    let outcome = if dry_run { dry_run_migration(&path) } else { migrate(&path) }.map_err(fail)?;
    if json {
        print(&outcome_json(&outcome, dry_run));
        return Ok(());
    }
    match outcome {
        MigrationOutcome::Current(version) => {
            print(&format_args!("{} has schema {version}: there is nothing to upgrade", path.display()));
        }
        MigrationOutcome::Migrated(report) => print(&format_report(&path.display().to_string(), &report)),
    }
    Ok(())
}

/// Formats the report of an upgrade, or of a dry run, which makes no copy.
fn format_report(path: &str, report: &MigrationReport) -> String {
    let MigrationReport {
        from,
        to,
        changes,
        copy,
        warning,
        attempts_before,
        attempts_after,
        bytes,
        duration,
    } = report;
    let mut text = match copy {
        Some(copy) => {
            format!(
                "Upgraded {path} from schema {from} to {to}. The copy of the earlier version is {}",
                copy.display()
            )
        }
        None => format!("Dry run: {path} can be upgraded from schema {from} to {to}. It was not changed"),
    };
    for (version, change) in (from + 1..).zip(*changes) {
        text.push_str(&format!("\n  {version:>2}  {change}"));
    }
    let format_count =
        |count: Option<u64>| count.map_or("unknown".to_owned(), |count| Grouped(count).to_string());
    let (before, after) = (format_count(*attempts_before), format_count(*attempts_after));
    text.push_str(&format!(
        "\nAttempts before {before}, after {after}; {} bytes; {} ms",
        Grouped(*bytes),
        duration.as_millis()
    ));
    if let Some(warning) = warning {
        text.push_str(&format!("\nWarning: {warning}"));
    }
    text
}

fn outcome_json(outcome: &MigrationOutcome, dry_run: bool) -> Value {
    match outcome {
        MigrationOutcome::Current(version) => {
            json!({"dry_run": dry_run, "from": version, "to": version, "changes": []})
        }
        MigrationOutcome::Migrated(report) => json!({
            "dry_run": dry_run,
            "from": report.from,
            "to": report.to,
            "changes": report.changes,
            "copy": report.copy,
            "warning": report.warning,
            "attempts_before": report.attempts_before,
            "attempts_after": report.attempts_after,
            "bytes": report.bytes,
            "duration_ms": saturating_ms(report.duration),
        }),
    }
}

fn saturating_ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
