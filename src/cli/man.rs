//! `keychoir man`: writes one manual page for each command. `clap_mangen` renders the pages, and this module adds
//! their examples, exit codes and files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

use super::help::{self, CommandHelp};
use super::{CommandResult, command, fail, print};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The directory for the manual pages, such as /usr/local/share/man/man1. It is created if it is missing.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// The section FILES of the page `keychoir(1)`: paths, each with the meaning of the file.
const FILES: &[(&str, &str)] = &[
    (
        "/etc/keychoir/keychoir.toml, $XDG_CONFIG_HOME/keychoir/keychoir.toml",
        "The configuration. The file config/keychoir.toml in the source code describes every setting.",
    ),
    ("$XDG_STATE_HOME/keychoir/keychoir.db, /var/lib/keychoir/keychoir.db", "The usage database."),
];

pub(super) fn run(arguments: &Arguments) -> CommandResult {
    let directory = &arguments.directory;
    let pages = render_pages().and_then(|pages| {
        fs::create_dir_all(directory)?;
        for (name, page) in &pages {
            fs::write(directory.join(name), page)?;
        }
        Ok(pages)
    });
    let pages = pages.map_err(|error| {
        fail(format_args!("the manual pages cannot be written to {}: {error}", directory.display()))
    })?;
    print(&format_args!("Wrote {} manual pages to {}", pages.len(), directory.display()));
    print(&format_args!("Read the main page with: man {}", main_page_path(directory).display()));
    Ok(())
}

/// Returns the absolute path of `keychoir.1`. `man` interprets a name without a slash as the name of an installed page.
fn main_page_path(directory: &Path) -> PathBuf {
    std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned()).join("keychoir.1")
}

/// Renders all pages. Returns their file names and contents.
fn render_pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut root = command().disable_help_subcommand(true);
    root.build();
    let mut pages = Vec::new();
    add_pages(&root, "", &mut pages)?;
    Ok(pages)
}

/// Adds the pages of `command` and of its visible subcommands. `command_path` is the full name of the command without
/// `keychoir`, such as `keys add`.
fn add_pages(command: &Command, command_path: &str, pages: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    let page_name = format!("keychoir {command_path}").trim_end().replace(' ', "-");
    pages.push((format!("{page_name}.1"), render_page(command, &page_name, command_path)?));
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        add_pages(subcommand, format!("{command_path} {}", subcommand.get_name()).trim_start(), pages)?;
    }
    Ok(())
}

/// Renders the page of a command. `page_name` is the file name without `.1`.
fn render_page(command: &Command, page_name: &str, command_path: &str) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    // `clap_mangen` omits an empty date, and `man` would then misread the fields after it.
    let (title, version) = (page_name.to_uppercase(), env!("CARGO_PKG_VERSION"));
    let mut page = format!(".TH {title} 1 \"\" \"keychoir {version}\" \"Keychoir Manual\"\n").into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::new();
    if let Some(help) = help::find_help(command_path) {
        add_examples_and_exit_codes(&mut roff, help);
    }
    if command_path.is_empty() {
        roff.control("SH", ["FILES"]);
        for (file, meaning) in FILES {
            add_definition(&mut roff, file, meaning);
        }
    } else {
        roff.control("SH", ["SEE ALSO"]);
        roff.text([bold("keychoir"), roman("(1)")]);
    }
    roff.to_writer(&mut page)?;
    Ok(remove_redundant_breaks(&page))
}

/// Removes the roff request `.br` (line break) before and after an empty line, which breaks the line anyway.
/// `clap_mangen` writes such a request before the possible values of an option, and `mandoc` warns about it.
fn remove_redundant_breaks(page: &[u8]) -> Vec<u8> {
    let lines: Vec<&[u8]> = page.split(|byte| *byte == b'\n').collect();
    let is_empty =
        |index: Option<usize>| index.and_then(|index| lines.get(index)).is_some_and(|line| line.is_empty());
    let is_redundant = |index: usize, line: &[u8]| {
        line == b".br" && (is_empty(index.checked_sub(1)) || is_empty(index.checked_add(1)))
    };
    let kept_lines = lines.iter().enumerate().filter(|(index, line)| !is_redundant(*index, line));
    kept_lines.map(|(_, line)| *line).collect::<Vec<_>>().join(&b'\n')
}

fn add_examples_and_exit_codes(roff: &mut Roff, help: &CommandHelp) {
    roff.control("SH", ["EXAMPLES"]);
    for (command_line, effect) in help.examples {
        add_definition(roff, command_line, effect);
    }
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in help.exit_codes {
        add_definition(roff, &code.to_string(), meaning);
    }
}

fn add_definition(roff: &mut Roff, term: &str, meaning: &str) {
    roff.control("TP", []);
    roff.text([bold(term)]);
    roff.text([Inline::from(meaning)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the text of a page without roff escapes.
    fn plain_text(page: &[u8]) -> String {
        let text = std::str::from_utf8(page).unwrap();
        text.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    }

    /// Checks the pages of `command` and of its subcommands.
    fn check_pages(command: &Command, command_path: &str, pages: &[(String, Vec<u8>)]) {
        let page_name = format!("keychoir {command_path}").trim_end().replace(' ', "-");
        let file_name = format!("{page_name}.1");
        let (_, page) = pages
            .iter()
            .find(|(name, _)| *name == file_name)
            .unwrap_or_else(|| panic!("the page {file_name} must exist"));
        let page = plain_text(page);
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let argument_name = match (argument.get_long(), argument.get_value_names()) {
                (Some(long), _) => format!("--{long}"),
                (None, Some([value, ..])) => value.to_string(),
                (None, _) => continue,
            };
            assert!(page.contains(&argument_name), "{file_name} must describe {argument_name}:\n{page}");
        }
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "\"EXIT STATUS\""] {
            assert!(
                page.contains(&format!(".SH {section}\n")),
                "{file_name} must contain the section {section}:\n{page}"
            );
        }
        for subcommand in command.get_subcommands() {
            let name = subcommand.get_name();
            assert!(page.contains(name), "{file_name} must name the subcommand {name}");
            check_pages(subcommand, format!("{command_path} {name}").trim_start(), pages);
        }
    }

    #[test]
    fn the_pages_describe_every_command_and_every_flag() {
        let pages = render_pages().unwrap();
        let mut root = command().disable_help_subcommand(true);
        root.build();
        check_pages(&root, "", &pages);
    }
}
