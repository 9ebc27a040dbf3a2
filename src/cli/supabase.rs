//! `keychoir supabase migrate --print`: prints the SQL of the mirror's tables. An operator runs the
//! SQL, because Keychoir's key may write rows and should not change tables.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{print, print_error};

/// The SQL file of the repository, which the program contains.
const MIGRATION: &str = include_str!("../../config/supabase/migrations/002_elevenlabs_key_tracking.sql");

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The tables, the view and who may read them, as SQL; it may be run any number of times.
    Migrate {
        /// Print it, to be run in Supabase's SQL editor or with psql.
        #[arg(long)]
        print: bool,
    },
}

/// The exit code of clap for a wrong command line.
const EX_USAGE: u8 = 2;

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    match arguments.command {
        Command::Migrate { print: true } => {
            print(&MIGRATION.trim_end());
            ExitCode::SUCCESS
        }
        Command::Migrate { print: false } => {
            print_error(
                &"Keychoir does not change tables itself. Print the SQL and run it in Supabase's SQL editor, or:\n\n  \
                  keychoir supabase migrate --print | psql \"$DATABASE_URL\"",
            );
            ExitCode::from(EX_USAGE)
        }
    }
}
