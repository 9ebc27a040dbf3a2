//! Commands: arguments in, exit codes out; one file a command. Data goes to standard output,
//! messages to standard error.

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

mod ask;
mod books;
mod key_table;
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
/// Point an ElevenLabs SDK at Keychoir's address; it sets a key from its pool, replays a refused
/// request with the next key, and keeps the books. Without a command, it serves.
#[derive(Debug, Parser)]
#[command(name = "keychoir", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Serving,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve; keys come from ELEVENLABS_API_KEYS or a configuration file.
    Serve(serve::Serving),
    /// Check the configuration and say what is wrong with it, without serving.
    Check(Sources),
    /// Show how the keys of a running Keychoir stand.
    Status(status::Arguments),
    /// Show what was spent, by key, client, model or route.
    Usage(usage::Arguments),
    /// The keys of the pool; never a key itself.
    Keys(keys::Arguments),
    /// Add, list and revoke clients and their tokens.
    Clients(clients::Arguments),
    /// Print what a shell must know so that apps find Keychoir and trust its https.
    Env(Sources),
    /// See it work without any key: the proxy before a simulated ElevenLabs.
    Demo(demo::Arguments),
    /// Serve an offline ElevenLabs to develop against.
    Simulate(simulate::Arguments),
    /// What the mirror in Supabase needs.
    Supabase(supabase::Arguments),
}

/// Where the configuration comes from.
#[derive(Clone, Debug, Default, Args)]
struct Sources {
    /// Listen here: HOST:PORT, unix:/PATH or systemd. May be given several times.
    #[arg(long, value_name = "PLACE")]
    listen: Vec<String>,
    /// Read this configuration file. Without it: KEYCHOIR_CONFIG, $XDG_CONFIG_HOME/keychoir/keychoir.toml,
    /// /etc/keychoir/keychoir.toml, the first that there is.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Sources {
    /// What the command line says.
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

/// The configuration; what is wrong with it goes to standard error.
fn load(overrides: &Overrides) -> Result<Loaded, ExitCode> {
    config::load(overrides).map_err(|problems| {
        complain(&problems);
        ExitCode::from(EX_CONFIG)
    })
}

/// Says which files the configuration is from.
fn files_read(loaded: &Loaded) -> String {
    let read: Vec<String> = loaded.files.read().map(|path| path.display().to_string()).collect();
    match (&loaded.file, read.as_slice()) {
        (None, []) => "No configuration file: defaults and the environment".to_owned(),
        (None, read) => format!("No configuration file; read {}", read.join(", ")),
        (Some(_), read) => format!("Read {}", read.join(", ")),
    }
}

/// What clap says, too, when an argument is wrong.
const EX_USAGE: u8 = 2;

/// `sysexits.h`: the configuration is wrong. A service manager need not try again.
const EX_CONFIG: u8 = 78;

/// `sysexits.h`: something could not be written.
const EX_IOERR: u8 = 74;

/// Runs the program with the arguments it was started with.
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

/// A message for the person at the terminal.
fn complain(message: &dyn Display) {
    // What the log has said before stands before it.
    telemetry::flush();
    // Nobody is left to be told that telling failed.
    let _ = writeln!(io::stderr(), "{message}");
}

/// Data for whoever reads standard output. A reader that has gone away ends it quietly.
fn print(data: &dyn Display) {
    let _ = writeln!(io::stdout(), "{data}");
}

/// A failure that is not the configuration's.
fn failed(message: &dyn Display) -> ExitCode {
    complain(&format_args!("keychoir: {message}"));
    ExitCode::FAILURE
}

/// The runtime of a command, on its own thread. Who serves has workers beside it.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().thread_name("keychoir").build()
}

/// The runtime of a command that is an ElevenLabs, too, on all cores.
fn wide_runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("keychoir").build()
}

/// Why an address cannot be listened on, and what to do.
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
    let other = if is_file { "path with --listen unix:/PATH" } else { "address with --listen HOST:PORT" };
    format!("cannot listen on {address}: {error}. {reason}Choose another {other}.")
}
