//! The executable; all of its code is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    keychoir::cli::run()
}
