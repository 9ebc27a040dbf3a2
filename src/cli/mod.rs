//! Parses the command line and runs the command. Each command is a module, which prints data to standard
//! output and messages to standard error, and returns an exit code. The functions at the end of this file print, build
//! the runtime, determine the locale and describe errors for all commands, and `load` loads the configuration.

mod serve;

mod admin_token;
mod attempts;
mod check;
mod clients;
mod completions;
mod config_show;
mod dashboard;
mod db;
mod demo;
mod doctor;
mod env;
mod healthcheck;
mod keys;
mod man;
mod simulate;
mod status;
mod supabase;
mod usage;

mod color;
mod control;
mod database;
mod diagnosis;
mod help;
mod key_table;
mod server;
mod suggestions;
mod table;

mod signals;

use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};

use crate::config::{self, KeyRequirement, LoadedConfig, Overrides};
use crate::telemetry;

/// One base URL for all your ElevenLabs keys.
///
/// Point an ElevenLabs SDK at Keychoir's address: it sets a key from its pool, retries a refused
/// request with the next key, and records the usage. Without a command, it serves.
#[derive(Debug, Parser)]
#[command(name = "keychoir", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::ServeArguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve with keys from ELEVENLABS_API_KEYS or a configuration file.
    Serve(serve::ServeArguments),
    /// Check the configuration and report its mistakes, without serving.
    Check(check::Arguments),
    /// Examine the configuration, the files, the network, the keys and the running Keychoir.
    Doctor(doctor::Arguments),
    /// Show the effective settings and where each comes from.
    Config(config_show::Arguments),
    /// Show the state of the keys of a running Keychoir.
    Status(status::Arguments),
    /// Print a link that opens the dashboard, and open it.
    Dashboard(dashboard::Arguments),
    /// Report in the exit code whether a running Keychoir can serve, for the health checks of containers.
    Healthcheck(healthcheck::Arguments),
    /// Show the recorded usage by key, client, model, route, hour or day.
    Usage(usage::Arguments),
    /// Show single attempts to serve requests, the latest last.
    Attempts(attempts::Arguments),
    /// List, add, remove, pause and resume the keys of the pool.
    Keys(keys::Arguments),
    /// Add, list, change and revoke clients and their tokens.
    Clients(clients::Arguments),
    /// Print the environment variables with which apps find Keychoir and trust its certificate.
    Env(ConfigSources),
    /// Try Keychoir without a key, in front of a simulated ElevenLabs.
    Demo(demo::Arguments),
    /// Serve an offline ElevenLabs for the development of apps.
    Simulate(simulate::Arguments),
    /// Print the SQL that creates the tables of the mirror in Supabase.
    Supabase(supabase::Arguments),
    /// Back up the usage database, or upgrade it to this version.
    Db(db::Arguments),
    /// Print the completion script of a shell.
    Completions(completions::Arguments),
    /// Write the manual pages, one for each command.
    Man(man::Arguments),
}

/// The sources of the configuration.
#[derive(Clone, Debug, Default, Args)]
struct ConfigSources {
    /// Listen on this address: HOST:PORT, unix:/PATH or systemd. May be repeated.
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Read this configuration file. By default: the file that KEYCHOIR_CONFIG names, or else the first
    /// existing one of $XDG_CONFIG_HOME/keychoir/keychoir.toml and /etc/keychoir/keychoir.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigSources {
    fn into_overrides(self, key_requirement: KeyRequirement) -> Overrides {
        Overrides { config_file: self.config, listen: self.listen, key_requirement, ..Overrides::default() }
    }
}

/// Loads the configuration and prints its mistakes to standard error.
fn load(overrides: &Overrides) -> Result<LoadedConfig, ExitCode> {
    config::load(overrides).map_err(|problems| {
        print_error(&problems);
        ExitCode::from(EX_CONFIG)
    })
}

/// Describes the files from which the configuration was loaded, in one line.
fn describe_files(loaded: &LoadedConfig) -> String {
    let files = loaded.contents.stamps();
    let paths: Vec<String> = files.existing().map(|path| path.display().to_string()).collect();
    match (&loaded.file, paths.as_slice()) {
        (None, []) => "No configuration file: defaults and the environment".to_owned(),
        (None, paths) => format!("No configuration file; read {}", paths.join(", ")),
        (Some(_), paths) => format!("Read {}", paths.join(", ")),
    }
}

/// The exit code for invalid arguments. clap uses the same code, which differs from `EX_USAGE` in `sysexits.h`.
const EX_INVALID_ARGUMENTS: u8 = 2;

/// The exit code for an invalid configuration (`sysexits.h`). A service manager should not restart the
/// program.
const EX_CONFIG: u8 = 78;

/// The exit code for a failed write (`sysexits.h`).
const EX_IOERR: u8 = 74;

/// Runs the command that the command line arguments name.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = parse_arguments();
    let result = match arguments.command.unwrap_or(Command::Serve(arguments.serve)) {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Config(arguments) => config_show::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Dashboard(arguments) => dashboard::run(&arguments),
        Command::Healthcheck(arguments) => healthcheck::run(arguments),
        Command::Usage(arguments) => usage::run(arguments),
        Command::Attempts(arguments) => attempts::run(arguments),
        Command::Keys(arguments) => keys::run(arguments),
        Command::Clients(arguments) => clients::run(arguments),
        Command::Env(sources) => env::run(sources),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Simulate(arguments) => simulate::run(arguments),
        Command::Supabase(arguments) => supabase::run(&arguments),
        Command::Db(arguments) => db::run(arguments),
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

/// Returns the command line interface.
fn command() -> clap::Command {
    help::add_help(Arguments::command())
}

/// Parses the arguments of the process. After an error, or for an argument such as `--help`, prints and ends the
/// process.
fn parse_arguments() -> Arguments {
    let parse_result = command().try_get_matches().and_then(|matches| Arguments::from_arg_matches(&matches));
    parse_result.unwrap_or_else(|error| {
        let words: Vec<String> =
            std::env::args_os().skip(1).filter_map(|word| word.into_string().ok()).collect();
        suggestions::add_suggestion(error, &command(), words.iter().map(String::as_str)).exit()
    })
}

/// The result of a command. On failure, the command has printed a message.
type CommandResult = Result<(), ExitCode>;

/// Prints a message to standard error.
fn print_error(message: &dyn Display) {
    // Log lines that were written earlier must be printed first.
    telemetry::flush();
    // A failed write to standard error cannot be reported.
    let _ = writeln!(io::stderr(), "{message}");
}

/// Prints data to standard output. A failed write, for example to a closed pipe, is ignored.
fn print(data: &dyn Display) {
    let _ = writeln!(io::stdout(), "{data}");
}

/// Writes a generated file to standard output. A closed pipe is not an error.
fn print_bytes(bytes: &[u8]) -> io::Result<()> {
    match io::stdout().write_all(bytes) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Prints the error of a failed command, and returns the exit code 1.
fn fail(error: impl Display) -> ExitCode {
    fail_with(1, error)
}

/// Prints the error of a failed command, and returns `code` as its exit code.
fn fail_with(code: u8, error: impl Display) -> ExitCode {
    print_error(&format_args!("keychoir: {error}"));
    ExitCode::from(code)
}

/// Builds the single-threaded runtime of a command. `serve` starts additional worker threads.
fn build_runtime() -> Result<Runtime, ExitCode> {
    Builder::new_current_thread().enable_all().thread_name("keychoir").build().map_err(fail)
}

/// Builds the multi-threaded runtime of a command that includes the simulator.
fn build_multi_thread_runtime() -> Result<Runtime, ExitCode> {
    Builder::new_multi_thread().enable_all().thread_name("keychoir").build().map_err(fail)
}

/// Returns the locale for messages, from the variables of POSIX in their order of precedence.
fn locale() -> Option<String> {
    ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| std::env::var(name).ok())
}

/// Describes why an address cannot be bound, with advice.
#[expect(clippy::wildcard_enum_match_arm, reason = "`io::ErrorKind` is non-exhaustive")]
fn describe_bind_error(address: &str, error: &io::Error) -> String {
    let is_unix_socket = address.starts_with("unix:");
    let reason = match error.kind() {
        io::ErrorKind::NotFound if is_unix_socket => "Its directory does not exist. ",
        io::ErrorKind::PermissionDenied if is_unix_socket => "This user may not write there. ",
        io::ErrorKind::AddrInUse => "Another program listens there, perhaps another Keychoir. ",
        io::ErrorKind::PermissionDenied => "Ports below 1024 require a privilege. ",
        io::ErrorKind::AddrNotAvailable => "This machine does not have that address. ",
        _ => "",
    };
    let alternative =
        if is_unix_socket { "path with --listen unix:/PATH" } else { "address with --listen HOST:PORT" };
    format!("cannot listen on {address}: {error}. {reason}Choose another {alternative}.")
}
