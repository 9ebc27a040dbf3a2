//! Suggests the right command or flag for a wrong one that an operator knows from another program, such as
//! `start` for `serve`. The suggestions by similar spelling are clap's.

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

/// Adds a suggestion to the error of the command line `arguments`, if clap has found none.
pub(super) fn add_to<'a>(error: Error, command: &Command, arguments: impl Iterator<Item = &'a str>) -> Error {
    if error.kind() == ErrorKind::InvalidSubcommand {
        return add_command(error, command, arguments);
    }
    if error.kind() == ErrorKind::UnknownArgument {
        return add_flag(error, command, arguments);
    }
    error
}

fn add_command<'a>(mut error: Error, root: &Command, arguments: impl Iterator<Item = &'a str>) -> Error {
    let Some(wrong) = context(&error, ContextKind::InvalidSubcommand) else { return error };
    let parent = innermost_command(root, arguments);
    let suggestion = find_suggestion(COMMANDS, &wrong, |name| parent.find_subcommand(name).is_some());
    if let Some(name) = suggestion {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![name.to_owned()]));
    }
    error
}

fn add_flag<'a>(mut error: Error, root: &Command, arguments: impl Iterator<Item = &'a str>) -> Error {
    let Some(wrong) = context(&error, ContextKind::InvalidArg) else { return error };
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

fn find_suggestion(
    table: &[(&[&'static str], &[&'static str])],
    wrong: &str,
    exists: impl Fn(&str) -> bool,
) -> Option<&'static str> {
    // The context of clap contains the value of a flag as well, as in `--port=80` or `--port <PORT>`.
    let wrong = wrong.split(['=', ' ']).next().unwrap_or(wrong);
    let rows = table.iter().filter(|(names, _)| names.contains(&wrong));
    rows.flat_map(|(_, suggestions)| *suggestions).copied().find(|name| exists(name))
}

fn context(error: &Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
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
    fn check(line: &str, expected: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let error = command().try_get_matches_from(&words).unwrap_err();
        let error = add_to(error, &command(), words[1..].iter().copied());
        assert!(error.to_string().contains(expected), "{line}: {error}");
    }

    #[test]
    fn a_command_of_another_program_is_translated() {
        check("keychoir start", "'serve'");
        check("keychoir validate", "'check'");
        check("keychoir stats", "'usage'");
        check("keychoir token list", "'clients'");
        check("keychoir clients create x", "'add'");
        check("keychoir clients delete x", "'revoke'");
        check("keychoir keys ls", "'list'");
    }

    #[test]
    fn a_flag_of_another_program_is_translated() {
        check("keychoir --port 80", "'--listen'");
        check("keychoir --port=80", "'--listen'");
        check("keychoir serve -p 80", "'--listen'");
        check("keychoir serve --in-memory", "'--ephemeral'");
        check("keychoir usage --from 7d", "'--since'");
        check("keychoir status --port 80", "'--listen'");
    }

    #[test]
    fn a_misspelled_name_is_corrected_by_clap() {
        check("keychoir stauts", "'status'");
        check("keychoir serve --lisen x", "'--listen'");
    }

    #[test]
    fn only_existing_commands_and_flags_are_suggested() {
        for (line, absent) in [("keychoir demo --port 1", "--listen"), ("keychoir keys create x", "'add'")] {
            let words: Vec<&str> = line.split_whitespace().collect();
            let error = command().try_get_matches_from(&words).unwrap_err();
            let exists = command().find_subcommand("keys").unwrap().find_subcommand("add").is_some();
            if absent == "'add'" && exists {
                continue;
            }
            let error = add_to(error, &command(), words[1..].iter().copied()).to_string();
            assert!(!error.contains(absent), "{error}");
        }
    }
}
