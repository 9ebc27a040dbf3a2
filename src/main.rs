//! The executable. All of its code is in the library, where tests can reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    keychoir::cli::run()
}
