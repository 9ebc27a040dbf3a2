//! Starts the command line. All other code is in the library, so that tests can call it.

use std::process::ExitCode;

fn main() -> ExitCode {
    keychoir::cli::run()
}
