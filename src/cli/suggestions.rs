//! Suggests the command or flag of Keychoir for a wrong one that an operator knows from another program, such as
//! `serve` for `start`. clap itself suggests names with a similar spelling.

use clap::Command;
use clap::error::{ContextKind, ContextValue, Error, ErrorKind};

/// Names of commands in other programs, with the corresponding names of Keychoir in the order of preference. Only a
/// name that exists next to the wrong one is suggested.
const COMMANDS: &[(&[&str], &[&str])] = &[
    (&["start", "run", "up", "server", "listen", "proxy", "daemon"], &["serve"]),
    (&["validate", "verify", "test", "lint", "configtest"], &["check"]),
    (&["ps", "info", "state", "show", "top"], &["status", "show", "list"]),
    (&["ui", "web", "gui", "browser", "login", "open"], &["dashboard"]),
    (&["health", "ping", "probe", "healthz", "ready"], &["healthcheck"]),
    (&["stats", "report", "billing", "costs", "cost"], &["usage"]),
    (&["logs", "log", "history", "requests", "tail"], &["attempts", "usage"]),
    (&["users", "user", "tokens", "token", "apps"], &["clients"]),
    (&["create", "new", "generate", "register"], &["add"]),
    (&["delete", "del", "rm", "drop"], &["remove", "revoke"]),
    (&["remove"], &["revoke"]),
    (&["revoke"], &["remove"]),
    (&["disable", "stop", "suspend", "drain"], &["pause"]),
    (&["enable", "unpause", "continue"], &["resume"]),
    (&["update", "edit", "change", "modify"], &["set"]),
    (&["ls"], &["list"]),
    (&["mock", "fake", "sandbox"], &["simulate"]),
    (&["diagnose", "diag", "debug", "troubleshoot"], &["doctor", "check"]),
    (&["settings", "configuration"], &["config"]),
    (&["database", "sqlite"], &["db"]),
    (&["backup", "migrate", "upgrade"], &["db"]),
    (&["environment", "export"], &["env"]),
    (&["manual", "docs"], &["man"]),
    (&["autocomplete", "shell-completions"], &["completions"]),
];

/// Flags of other programs, with the corresponding flags of Keychoir in the order of preference.
const FLAGS: &[(&[&str], &[&str])] = &[
    (&["--port", "-p", "--bind", "--address", "--addr", "--host", "-l"], &["--listen", "--url"]),
    (&["--conf", "--cfg", "--configuration", "--config-file", "-c", "-C"], &["--config"]),
    (&["--memory", "--in-memory", "--no-database", "--no-db"], &["--ephemeral"]),
    (&["--from", "--start", "--after"], &["--since"]),
    (&["--to", "--end", "--before"], &["--until"]),
    (&["--group", "--group-by", "--per"], &["--by"]),
    (&["--format", "--output-format", "-j"], &["--json"]),
    (&["--file", "-o", "--out"], &["--output", "--config"]),
    (&["--token", "--api-key", "--password"], &["--token-file", "--key-file"]),
    (&["--tail", "-f"], &["--follow"]),
    (&["--count", "--last", "-n", "--max"], &["--limit"]),
    (&["--errors", "--failures", "--failed-only"], &["--failed", "--failures"]),
    (&["--test", "--try", "-n", "--simulate"], &["--dry-run"]),
    (&["--overwrite", "-f", "--yes", "-y"], &["--force"]),
    (&["--explain", "--reason"], &["--why"]),
];

/// Adds a suggestion to the error of the command line `arguments`, if a table contains the wrong name.
pub(super) fn add_suggestion<'a>(
    error: Error,
    command: &Command,
    arguments: impl Iterator<Item = &'a str>,
) -> Error {
    if error.kind() == ErrorKind::InvalidSubcommand {
        return add_command_suggestion(error, command, arguments);
    }
    if error.kind() == ErrorKind::UnknownArgument {
        return add_flag_suggestion(error, command, arguments);
    }
    error
}

fn add_command_suggestion<'a>(
    mut error: Error,
    root: &Command,
    arguments: impl Iterator<Item = &'a str>,
) -> Error {
    let Some(wrong) = wrong_name(&error, ContextKind::InvalidSubcommand) else { return error };
    let parent = innermost_command(root, arguments);
    let suggestion = find_suggestion(COMMANDS, &wrong, |name| parent.find_subcommand(name).is_some());
    if let Some(name) = suggestion {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![name.to_owned()]));
    }
    error
}

fn add_flag_suggestion<'a>(
    mut error: Error,
    root: &Command,
    arguments: impl Iterator<Item = &'a str>,
) -> Error {
    let Some(wrong) = wrong_name(&error, ContextKind::InvalidArg) else { return error };
    let command = innermost_command(root, arguments);
    let is_flag_of = |command: &Command, flag: &str| {
        let name = flag.trim_start_matches('-');
        command.get_arguments().any(|argument| argument.get_long() == Some(name))
    };
    if let Some(flag) = find_suggestion(FLAGS, &wrong, |flag| is_flag_of(command, flag)) {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(flag.to_owned()));
        return error;
    }
    // An unexpected word may be a wrong command name.
    if let Some(name) = find_suggestion(COMMANDS, &wrong, |name| command.find_subcommand(name).is_some()) {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::String(name.to_owned()));
    }
    error
}

/// Returns the first suggestion for the name `wrong` that `exists`.
fn find_suggestion(
    table: &[(&[&'static str], &[&'static str])],
    wrong: &str,
    exists: impl Fn(&str) -> bool,
) -> Option<&'static str> {
    // The context of the error contains the value of a flag as well, as in `--port=80` or `--port <PORT>`.
    let wrong = wrong.split(['=', ' ']).next().unwrap_or(wrong);
    let rows = table.iter().filter(|(names, _)| names.contains(&wrong));
    rows.flat_map(|(_, suggestions)| *suggestions).copied().find(|name| exists(name))
}

/// Returns the wrong name in the context of the error.
fn wrong_name(error: &Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(name)) => Some(name.clone()),
        _ => None,
    }
}

/// Returns the innermost command that the valid names among the arguments select.
fn innermost_command<'c, 'a>(root: &'c Command, arguments: impl Iterator<Item = &'a str>) -> &'c Command {
    let mut command = root;
    for argument in arguments.filter(|argument| !argument.starts_with('-')) {
        if let Some(subcommand) = command.find_subcommand(argument) {
            command = subcommand;
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command;

    #[track_caller]
    fn check_suggestion(line: &str, expected: &str) {
        let message = error_message(line);
        assert!(message.contains(expected), "the error of `{line}` must suggest {expected}: {message}");
    }

    /// Returns the error of an invalid command line with its suggestion.
    fn error_message(line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let error = command().try_get_matches_from(&words).unwrap_err();
        add_suggestion(error, &command(), words[1..].iter().copied()).to_string()
    }

    #[test]
    fn a_command_of_another_program_is_translated() {
        check_suggestion("keychoir start", "'serve'");
        check_suggestion("keychoir validate", "'check'");
        check_suggestion("keychoir stats", "'usage'");
        check_suggestion("keychoir token list", "'clients'");
        check_suggestion("keychoir clients create x", "'add'");
        check_suggestion("keychoir clients delete x", "'revoke'");
        check_suggestion("keychoir keys ls", "'list'");
    }

    #[test]
    fn a_flag_of_another_program_is_translated() {
        check_suggestion("keychoir --port 80", "'--listen'");
        check_suggestion("keychoir --port=80", "'--listen'");
        check_suggestion("keychoir serve -p 80", "'--listen'");
        check_suggestion("keychoir serve --in-memory", "'--ephemeral'");
        check_suggestion("keychoir usage --from 7d", "'--since'");
        check_suggestion("keychoir status --port 80", "'--listen'");
    }

    #[test]
    fn a_misspelled_name_is_corrected_by_clap() {
        check_suggestion("keychoir stauts", "'status'");
        check_suggestion("keychoir serve --lisen x", "'--listen'");
    }

    #[test]
    fn only_existing_commands_and_flags_are_suggested() {
        for (line, missing) in [("keychoir demo --port 1", "--listen"), ("keychoir config create", "'add'")] {
            let message = error_message(line);
            assert!(
                !message.contains(missing),
                "the error of `{line}` must not suggest {missing}: {message}"
            );
        }
    }
}
