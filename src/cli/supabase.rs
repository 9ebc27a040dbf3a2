//! `keychoir supabase migrate --print`: prints the SQL that creates the mirror's tables. An operator runs
//! the SQL, because Keychoir's key must be able to write rows but should not be able to change tables. Without
//! `--print`, the command prints advice and fails.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{CommandResult, EX_INVALID_ARGUMENTS, print, print_error};

/// The SQL that creates the tables, the view and their permissions.
const MIGRATION: &str = include_str!("../../config/supabase/migrations/002_elevenlabs_key_tracking.sql");

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create the tables, the view and their permissions. Running the SQL again changes nothing.
    Migrate {
        /// Print the SQL, to be run in Supabase's SQL editor or with psql.
        #[arg(long)]
        print: bool,
    },
}

pub(super) fn run(arguments: &Arguments) -> CommandResult {
    match arguments.command {
        Command::Migrate { print: true } => {
            print(&MIGRATION.trim_end());
            Ok(())
        }
        Command::Migrate { print: false } => {
            print_error(
                &"Keychoir does not change tables. Print the SQL and run it in Supabase's SQL editor, or:\n\n  \
                  keychoir supabase migrate --print | psql \"$DATABASE_URL\"",
            );
            Err(ExitCode::from(EX_INVALID_ARGUMENTS))
        }
    }
}
