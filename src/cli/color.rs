//! Decides from the option `--color`, the environment and the terminal whether the output of a command is coloured,
//! colours parts of it, and counts the visible characters of coloured text.

use std::io::{self, IsTerminal};

use clap::{Args, ValueEnum};

/// The option that determines whether the output is coloured.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct ColorOption {
    /// Whether to colour the output. By default, the output on a terminal is coloured unless NO_COLOR is set, and
    /// CLICOLOR_FORCE colours any output.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    color: ColorChoice,
}

/// When the output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ColorChoice {
    /// Colour the output on a terminal, unless an environment variable overrides this.
    #[default]
    Auto,
    /// Colour any output.
    Always,
    /// Do not colour the output.
    Never,
}

/// The meaning of a coloured text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// The state is as it should be.
    Good,
    /// An operator may have to act.
    Warning,
    /// An operator must act.
    Bad,
    /// Less important than the surrounding text.
    Muted,
}

/// Colours parts of the output if the output is coloured. The default palette leaves them unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Palette {
    is_colored: bool,
}

impl ColorOption {
    /// Returns the palette for the standard output.
    pub(super) fn palette(self) -> Palette {
        let read_variable = |name: &str| std::env::var(name).unwrap_or_default();
        Palette { is_colored: is_colored(self.color, read_variable, io::stdout().is_terminal()) }
    }
}

/// Decides whether the output is coloured. `read_variable` returns an empty string for an unset variable.
fn is_colored(choice: ColorChoice, read_variable: impl Fn(&str) -> String, is_terminal: bool) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        // https://no-color.org and https://bixense.com/clicolors define these variables.
        ColorChoice::Auto if !read_variable("NO_COLOR").is_empty() => false,
        ColorChoice::Auto if !matches!(&*read_variable("CLICOLOR_FORCE"), "" | "0") => true,
        ColorChoice::Auto => {
            is_terminal && read_variable("TERM") != "dumb" && read_variable("CLICOLOR") != "0"
        }
    }
}

impl Palette {
    /// Colours one line or a part of it.
    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        if !self.is_colored || text.is_empty() {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Muted => "2",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// Counts the characters of a line without the escape sequences of [`Palette::paint`].
pub(super) fn visible_width(text: &str) -> usize {
    let mut is_escape = false;
    let is_visible = |character: &char| {
        let was_escape = is_escape;
        is_escape = if is_escape { *character != 'm' } else { *character == '\u{1b}' };
        !was_escape && !is_escape
    };
    text.chars().filter(is_visible).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_precedes_the_variables_and_these_precede_the_terminal() {
        let check_decision = |choice, variables: &[(&str, &str)], is_terminal, expected| {
            let read_variable = |name: &str| {
                let variable = variables.iter().find(|(known, _)| *known == name);
                variable.map(|(_, value)| (*value).to_owned()).unwrap_or_default()
            };
            assert_eq!(
                is_colored(choice, read_variable, is_terminal),
                expected,
                "the decision must be right for {choice:?} with the variables {variables:?}"
            );
        };
        check_decision(ColorChoice::Auto, &[], true, true);
        check_decision(ColorChoice::Auto, &[], false, false);
        check_decision(ColorChoice::Auto, &[("TERM", "dumb")], true, false);
        check_decision(ColorChoice::Auto, &[("CLICOLOR", "0")], true, false);
        check_decision(ColorChoice::Auto, &[("CLICOLOR_FORCE", "1")], false, true);
        check_decision(ColorChoice::Auto, &[("CLICOLOR_FORCE", "0")], false, false);
        check_decision(ColorChoice::Auto, &[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")], true, false);
        check_decision(ColorChoice::Always, &[("NO_COLOR", "1")], false, true);
        check_decision(ColorChoice::Never, &[("CLICOLOR_FORCE", "1")], true, false);
    }

    #[test]
    fn colours_do_not_change_the_width() {
        let palette = Palette { is_colored: true };
        for text in ["", "active", "m3 [x]", "ä"] {
            let painted = palette.paint(Tone::Bad, text);
            assert_eq!(
                visible_width(&painted),
                text.chars().count(),
                "{painted:?} must have the width of {text:?}"
            );
            assert_eq!(visible_width(&format!("{painted}{painted} ")), 2 * text.chars().count() + 1);
        }
        assert_eq!(Palette::default().paint(Tone::Bad, "x"), "x");
    }
}
