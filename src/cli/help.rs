//! Lists the examples and exit codes of all commands in one table, and adds them to the texts of `--help`. `man` reads
//! the same table for the manual pages, which have a different layout.

use std::fmt::Write as _;

use clap::Command;

/// The examples and exit codes of one command.
#[derive(Debug)]
pub(super) struct CommandHelp {
    /// The names after `keychoir`, separated by spaces.
    command: &'static str,
    /// Command lines, each with its effect.
    pub(super) examples: &'static [(&'static str, &'static str)],
    /// The exit codes, each with its meaning.
    pub(super) exit_codes: &'static [ExitCodeMeaning],
}

/// An exit code and its meaning.
type ExitCodeMeaning = (u8, &'static str);

const SUCCESS: ExitCodeMeaning = (0, "success");
const FAILURE: ExitCodeMeaning = (1, "failed; standard error names the cause");
const INVALID_ARGUMENTS: ExitCodeMeaning = (2, "invalid arguments");
const INVALID_CONFIG: ExitCodeMeaning = (78, "invalid configuration");

/// The exit codes of commands that do not load the configuration.
const PLAIN_CODES: &[ExitCodeMeaning] = &[SUCCESS, FAILURE, INVALID_ARGUMENTS];
/// The exit codes of commands that load the configuration.
const CONFIG_CODES: &[ExitCodeMeaning] = &[SUCCESS, FAILURE, INVALID_ARGUMENTS, INVALID_CONFIG];
const SERVE_CODES: &[ExitCodeMeaning] = &[
    (0, "ended after a signal"),
    (1, "a system error, or a second signal aborted running requests"),
    INVALID_ARGUMENTS,
    (74, "ended, but usage records could not be written"),
    (78, "invalid configuration, or an unusable database"),
];

const HELP: &[CommandHelp] = &[
    CommandHelp {
        command: "",
        examples: &[
            ("keychoir demo", "see it work, without a key"),
            ("ELEVENLABS_API_KEYS=sk_first,sk_second keychoir", "serve on 127.0.0.1:11011"),
            ("keychoir status", "show the keys of the running Keychoir"),
        ],
        exit_codes: SERVE_CODES,
    },
    CommandHelp {
        command: "serve",
        examples: &[
            ("keychoir serve --config /etc/keychoir/keychoir.toml", "serve with this configuration"),
            ("keychoir serve --listen 127.0.0.1:8080", "serve on another port"),
        ],
        exit_codes: SERVE_CODES,
    },
    CommandHelp {
        command: "check",
        examples: &[
            ("keychoir check --config keychoir.toml", "report all mistakes of this file"),
            ("keychoir check --online", "also try ElevenLabs, each key, the mirror and Redis"),
        ],
        exit_codes: &[
            (0, "a start would succeed"),
            (1, "with --online, ElevenLabs cannot be reached, or a key, the mirror or Redis has a problem"),
            INVALID_ARGUMENTS,
            (78, "an invalid configuration, or a problem that would prevent a start"),
        ],
    },
    CommandHelp {
        command: "doctor",
        examples: &[
            ("keychoir doctor", "examine everything"),
            ("keychoir doctor --offline", "without a connection to ElevenLabs"),
            ("keychoir doctor --json", "for a monitoring system"),
        ],
        exit_codes: &[
            (0, "everything is as it should be"),
            (1, "warnings, and no problems"),
            (2, "problems; or invalid arguments"),
        ],
    },
    CommandHelp {
        command: "config",
        examples: &[("keychoir config show", "print all settings and their sources")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "config show",
        examples: &[
            ("keychoir config show", "print all settings and their sources"),
            ("keychoir config show --json", "print them as JSON"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "status",
        examples: &[
            ("keychoir status", "show the state of all keys"),
            ("keychoir status --why 2", "explain the state of the second key"),
            ("keychoir status --watch 5s", "show the state again every five seconds"),
            ("keychoir status --check", "report the state as an exit code, for monitoring"),
        ],
        exit_codes: &[
            (0, "success; with --check, all keys are active and nothing else has a problem"),
            (
                1,
                "Keychoir does not respond; with --check, a key, the records, ElevenLabs or Redis has a problem",
            ),
            (2, "invalid arguments; with --check, no key can serve, or Keychoir does not respond"),
            INVALID_CONFIG,
        ],
    },
    CommandHelp {
        command: "dashboard",
        examples: &[
            ("keychoir dashboard", "open the dashboard of the Keychoir at the configured address"),
            ("keychoir dashboard --no-open", "only print the link"),
            ("keychoir dashboard --url https://keys.example --admin-token-file token", "of another machine"),
        ],
        exit_codes: &[
            (0, "the link was printed"),
            (1, "Keychoir does not respond, or rejects the admin token"),
            INVALID_ARGUMENTS,
            INVALID_CONFIG,
        ],
    },
    CommandHelp {
        command: "healthcheck",
        examples: &[
            ("keychoir healthcheck", "check the Keychoir at the configured address"),
            (
                "keychoir healthcheck --url unix:/run/keychoir/keychoir.sock",
                "check the Keychoir at this Unix socket",
            ),
            ("keychoir healthcheck --timeout 1s", "wait at most one second"),
        ],
        exit_codes: &[
            (0, "at least one key can serve"),
            (1, "no key can serve, Keychoir is shutting down, or it does not respond in time"),
            INVALID_ARGUMENTS,
        ],
    },
    CommandHelp {
        command: "usage",
        examples: &[
            ("keychoir usage", "the last seven days by key"),
            ("keychoir usage --since 2026-11-01 --by client", "by client since a day"),
            ("keychoir usage --since 30d --until 7d --by day", "day by day"),
            ("keychoir usage --failures --by key", "count the failures of each key"),
            ("keychoir usage --csv > usage.csv", "for a spreadsheet"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "attempts",
        examples: &[
            ("keychoir attempts --failed --limit 50", "the latest failures"),
            ("keychoir attempts --follow", "print attempts as they are recorded"),
            ("keychoir attempts --request 01a22743a37777d9 --json", "all attempts of one request"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys",
        examples: &[("keychoir keys list", "list the keys by their short forms")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys list",
        examples: &[("keychoir keys list --json", "list the keys as JSON")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys add",
        examples: &[
            ("keychoir keys add spare < spare.key", "add a key that is in a file"),
            ("keychoir keys add spare --workspace team --key-file spare.key", "add a key of a workspace"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys remove",
        examples: &[("keychoir keys remove spare", "remove a key that was added with `keys add`")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys pause",
        examples: &[
            ("keychoir keys pause spare --until 2h", "use the key again in two hours"),
            ("keychoir keys pause spare --reason \"billing dispute\"", "show a reason in the status"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys resume",
        examples: &[("keychoir keys resume spare", "use the key again")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "keys check",
        examples: &[
            ("keychoir keys check", "check all keys"),
            ("keychoir keys check spare --json", "check one key"),
        ],
        exit_codes: &[
            (0, "all checked keys are valid"),
            (1, "a key is not valid, or Keychoir does not respond"),
            INVALID_ARGUMENTS,
            INVALID_CONFIG,
        ],
    },
    CommandHelp {
        command: "clients",
        examples: &[("keychoir clients list", "list the clients with their limits")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients add",
        examples: &[("keychoir clients add app", "add a client and print its token")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients list",
        examples: &[("keychoir clients list --json", "list the clients as JSON")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients show",
        examples: &[("keychoir clients show app", "show the limits of a client and the ends of its tokens")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients rotate",
        examples: &[(
            "keychoir clients rotate app --grace 1h",
            "print a new token; the old one stays valid for an hour",
        )],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients set",
        examples: &[
            ("keychoir clients set app --max-concurrent 3", "change a rule"),
            ("keychoir clients set app --expires 30d", "let its token expire in 30 days"),
            ("keychoir clients set app --expires never", "let its token stay valid"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "clients revoke",
        examples: &[("keychoir clients revoke app", "make the token of a client invalid")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "env",
        examples: &[("eval \"$(keychoir env)\"", "set the variables in this shell")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "demo",
        examples: &[("keychoir demo --output choir.mp3", "run the demo and keep its audio")],
        exit_codes: PLAIN_CODES,
    },
    CommandHelp {
        command: "simulate",
        examples: &[
            ("keychoir simulate", "serve on 127.0.0.1:11012 with three keys"),
            ("keychoir simulate --key sk_one=500 --fault sk_one:invalid", "with a key that is refused"),
        ],
        exit_codes: PLAIN_CODES,
    },
    CommandHelp {
        command: "supabase",
        examples: &[("keychoir supabase migrate --print", "print the SQL of the tables")],
        exit_codes: PLAIN_CODES,
    },
    CommandHelp {
        command: "supabase migrate",
        examples: &[("keychoir supabase migrate --print | psql \"$DATABASE_URL\"", "create the tables")],
        exit_codes: PLAIN_CODES,
    },
    CommandHelp {
        command: "db",
        examples: &[("keychoir db backup /backup/keychoir.db", "copy the database while Keychoir runs")],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "db backup",
        examples: &[
            ("keychoir db backup /backup/keychoir.db", "copy the database while Keychoir runs"),
            ("keychoir db backup --force /backup/keychoir.db", "replace the last copy"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "db migrate",
        examples: &[
            ("keychoir db migrate --dry-run", "try the upgrade on a copy"),
            ("keychoir db migrate --file /backup/keychoir.db", "upgrade a backup"),
        ],
        exit_codes: CONFIG_CODES,
    },
    CommandHelp {
        command: "completions",
        examples: &[
            ("keychoir completions bash > /etc/bash_completion.d/keychoir", "install for bash"),
            ("keychoir completions zsh > ~/.zfunc/_keychoir", "install for zsh, with ~/.zfunc in $fpath"),
            ("keychoir completions fish > ~/.config/fish/completions/keychoir.fish", "install for fish"),
        ],
        exit_codes: PLAIN_CODES,
    },
    CommandHelp {
        command: "man",
        examples: &[
            ("keychoir man /usr/local/share/man/man1", "install the manual pages"),
            ("man keychoir-serve", "read the manual page of `keychoir serve`"),
        ],
        exit_codes: PLAIN_CODES,
    },
];

/// Returns the help of a command. `command` contains its names after `keychoir`, separated by spaces.
pub(super) fn find_help(command: &str) -> Option<&'static CommandHelp> {
    HELP.iter().find(|help| help.command == command)
}

/// Adds the examples and exit codes to the help of `command` and of all its subcommands.
pub(super) fn add_help(command: Command) -> Command {
    add_help_below(command, "")
}

/// `path` contains the names of `command` after `keychoir`, separated by spaces.
fn add_help_below(command: Command, path: &str) -> Command {
    let command = match find_help(path) {
        Some(help) => command.after_help(help.format()),
        None => command,
    };
    command.mut_subcommands(|subcommand| {
        let path = format!("{path} {}", subcommand.get_name());
        add_help_below(subcommand, path.trim_start())
    })
}

impl CommandHelp {
    fn format(&self) -> String {
        let mut text = "Examples:".to_owned();
        for (line, effect) in self.examples {
            let _ = write!(text, "\n  # {effect}\n  {line}");
        }
        text.push_str("\n\nExit codes:");
        for (code, meaning) in self.exit_codes {
            let _ = write!(text, "\n  {code:>2}  {meaning}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command;

    fn check_help(command: &Command, path: &str) {
        let help = command.clone().render_help().to_string();
        let long_help = command.clone().render_long_help().to_string();
        for section in ["Examples:\n", "Exit codes:\n"] {
            for text in [&help, &long_help] {
                assert!(text.contains(section), "`keychoir {path} --help` must contain {section:?}:\n{text}");
            }
        }
        for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
            check_help(subcommand, &format!("{path} {}", subcommand.get_name()));
        }
    }

    #[test]
    fn every_help_has_examples_and_exit_codes() {
        let mut command = command();
        command.build();
        check_help(&command, "");
    }

    #[test]
    fn every_example_is_a_valid_command_line() {
        let mut checked_examples = 0;
        for (line, _) in HELP.iter().flat_map(|help| help.examples) {
            let Some(start) = line.find("keychoir ").filter(|_| !line.starts_with("man ")) else { continue };
            let line = line[start..].split(['<', '>', '|', ')']).next().unwrap();
            let words: Vec<String> = split_words(line);
            let parse_result = command().try_get_matches_from(&words);
            assert!(parse_result.is_ok(), "`{line}` must be valid: {}", parse_result.unwrap_err());
            checked_examples += 1;
        }
        assert!(
            checked_examples >= HELP.len() - 1,
            "every command must have an example with its name, but there are only {checked_examples}"
        );
    }

    /// Splits a command line like a shell. Quotation marks join words.
    fn split_words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (index, part) in line.split('"').enumerate() {
            match index % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    #[test]
    fn every_entry_belongs_to_a_command() {
        for help in HELP {
            let mut subcommand = Some(command());
            for name in help.command.split_whitespace() {
                subcommand = subcommand.and_then(|command| command.find_subcommand(name).cloned());
            }
            assert!(subcommand.is_some(), "the command `{}` must exist", help.command);
        }
    }
}
