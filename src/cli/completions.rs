//! `keychoir completions`: prints the completion script of a shell.

use clap::Args;
use clap_complete::Shell;

use super::{CommandResult, command, fail, print_bytes};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The shell for which the script is printed.
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments) -> CommandResult {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command(), "keychoir", &mut script);
    print_bytes(&script).map_err(fail)
}
