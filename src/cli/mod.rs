//! Parses the command line and runs one command per file. Data is printed to standard output,
//! messages to standard error, and each command returns an exit code.

mod serve;

mod check;
mod clients;
mod demo;
mod env;
mod keys;
mod simulate;
mod status;
mod supabase;
mod usage;

mod database;
mod key_table;
mod server;
mod table;

mod notify;
mod reload;
mod signals;

use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Loaded, Need, Overrides};
use crate::telemetry;

/// One base URL for all your ElevenLabs keys.
///
/// Point an ElevenLabs SDK at Keychoir's address; it sets a key from its pool, retries a refused
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
    /// Serve; keys come from ELEVENLABS_API_KEYS or a configuration file.
    Serve(serve::ServeArguments),
    /// Check the configuration and report its mistakes, without serving.
    Check(ConfigSources),
    /// Show the state of the keys of a running Keychoir.
    Status(status::Arguments),
    /// Show what was spent, by key, client, model or route.
    Usage(usage::Arguments),
    /// The keys of the pool; never a key itself.
    Keys(keys::Arguments),
    /// Add, list and revoke clients and their tokens.
    Clients(clients::Arguments),
    /// Print the environment variables by which apps find Keychoir and trust its https.
    Env(ConfigSources),
    /// Try it without any key: the proxy in front of a simulated ElevenLabs.
    Demo(demo::Arguments),
    /// Serve an offline ElevenLabs to develop against.
    Simulate(simulate::Arguments),
    /// Print the SQL that the mirror in Supabase needs.
    Supabase(supabase::Arguments),
}

/// The sources of the configuration.
#[derive(Clone, Debug, Default, Args)]
struct ConfigSources {
    /// Listen here: HOST:PORT, unix:/PATH or systemd. May be given several times.
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Read this configuration file. Without it: KEYCHOIR_CONFIG, $XDG_CONFIG_HOME/keychoir/keychoir.toml,
    /// /etc/keychoir/keychoir.toml, the first that there is.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigSources {
    /// The values that the command line sets.
    fn overrides(self, has_passed_sockets: bool) -> Overrides {
        Overrides {
            config_file: self.config,
            listen: self.listen,
            is_ephemeral: false,
            has_passed_sockets,
            keys: Need::Required,
        }
    }
}

/// Loads the configuration and prints its mistakes to standard error.
fn load(overrides: &Overrides) -> Result<Loaded, ExitCode> {
    config::load(overrides).map_err(|problems| {
        print_error(&problems);
        ExitCode::from(EX_CONFIG)
    })
}

/// Lists the files that the configuration was read from.
fn files_read(loaded: &Loaded) -> String {
    let read: Vec<String> = loaded.files.read().map(|path| path.display().to_string()).collect();
    match (&loaded.file, read.as_slice()) {
        (None, []) => "No configuration file: defaults and the environment".to_owned(),
        (None, read) => format!("No configuration file; read {}", read.join(", ")),
        (Some(_), read) => format!("Read {}", read.join(", ")),
    }
}

/// The exit code for wrong arguments, as of clap.
const EX_USAGE: u8 = 2;

/// `sysexits.h`: the configuration is invalid. A service manager should not restart the program.
const EX_CONFIG: u8 = 78;

/// `sysexits.h`: a file could not be written.
const EX_IOERR: u8 = 74;

/// Runs the program with its command line arguments.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command.unwrap_or(Command::Serve(arguments.serve)) {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(sources) => check::run(sources),
        Command::Status(arguments) => status::run(arguments),
        Command::Usage(arguments) => usage::run(arguments),
        Command::Keys(arguments) => keys::run(arguments),
        Command::Clients(arguments) => clients::run(arguments),
        Command::Env(sources) => env::run(sources),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Simulate(arguments) => simulate::run(arguments),
        Command::Supabase(arguments) => supabase::run(&arguments),
    }
}

/// Prints a message to standard error.
fn print_error(message: &dyn Display) {
    // Earlier log lines are printed first.
    telemetry::flush();
    // A failure to write to standard error cannot be reported.
    let _ = writeln!(io::stderr(), "{message}");
}

/// Prints data to standard output. A closed pipe is no error.
fn print(data: &dyn Display) {
    let _ = writeln!(io::stdout(), "{data}");
}

/// Prints the message of a failed command, and returns its exit code.
fn failure(message: &dyn Display) -> ExitCode {
    print_error(&format_args!("keychoir: {message}"));
    ExitCode::FAILURE
}

/// Creates the single-threaded runtime of a command. `serve` starts additional worker threads.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().thread_name("keychoir").build()
}

/// Creates the multi-threaded runtime of a command that includes the simulator.
fn multi_thread_runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("keychoir").build()
}

/// Formats the error of an address that cannot be bound, with advice.
#[expect(clippy::wildcard_enum_match_arm, reason = "the standard library's list of errors grows")]
fn cannot_listen(address: &str, error: &io::Error) -> String {
    let is_file = address.starts_with("unix:");
    let reason = match error.kind() {
        io::ErrorKind::NotFound if is_file => "Its folder is missing. ",
        io::ErrorKind::PermissionDenied if is_file => "This user may not write there. ",
        io::ErrorKind::AddrInUse => "Another program listens there, maybe another Keychoir. ",
        io::ErrorKind::PermissionDenied => "Ports below 1024 need a privilege. ",
        io::ErrorKind::AddrNotAvailable => "This machine does not have that address. ",
        _ => "",
    };
    let alternative =
        if is_file { "path with --listen unix:/PATH" } else { "address with --listen HOST:PORT" };
    format!("cannot listen on {address}: {error}. {reason}Choose another {alternative}.")
}
