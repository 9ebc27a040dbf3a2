//! Formats text tables for all commands, and shortens numbers and texts for their cells. Each column has the width of
//! its widest cell. Callers limit their cells so that a line has at most 80 characters.

use std::iter;

use super::color::visible_width;
use crate::policy::units::Grouped;

/// The alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alignment {
    /// The alignment of words.
    Left,
    /// The alignment of numbers.
    Right,
}

/// Maximum number of characters of a short key form, such as `sk_6c036526...d452b`.
pub(super) const MAX_SHORT_KEY_CHARS: usize = 19;

/// A text table with `N` columns.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    alignments: [Alignment; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// Creates a table with the column titles `columns`.
    pub(super) fn new(columns: [(&str, Alignment); N]) -> Self {
        Self {
            alignments: columns.map(|(_, alignment)| alignment),
            rows: vec![columns.map(|(title, _)| title.to_owned())],
        }
    }

    pub(super) fn add_row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    /// Formats the table without a trailing line break.
    pub(super) fn format(&self) -> String {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(visible_width(cell));
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), alignment) in row.iter().zip(widths).zip(self.alignments) {
                // The width of the formatter would count the escape sequences of coloured cells.
                let padding = iter::repeat_n(' ', width - visible_width(cell));
                match alignment {
                    Alignment::Left => {
                        line.push_str(cell);
                        line.extend(padding);
                    }
                    Alignment::Right => {
                        line.extend(padding);
                        line.push_str(cell);
                    }
                }
                line.push_str("  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text
    }
}

/// Formats a number in at most seven characters: as `94,580` below a million, and otherwise as `1.23M`,
/// rounded down.
pub(super) fn abbreviate(number: u64) -> String {
    const UNITS: [(u64, char); 5] = [
        (1_000_000_000_000_000_000, 'E'),
        (1_000_000_000_000_000, 'P'),
        (1_000_000_000_000, 'T'),
        (1_000_000_000, 'G'),
        (1_000_000, 'M'),
    ];
    match UNITS.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{}.{:02}{unit}", number / size, number % size / (size / 100)),
        None => Grouped(number).to_string(),
    }
}

/// Truncates `text` to `max_chars` characters and replaces its control characters, which could change the terminal.
pub(super) fn truncate(text: &str, max_chars: usize) -> String {
    let replace_control = |character: char| if character.is_control() { '\u{fffd}' } else { character };
    if text.chars().count() <= max_chars {
        return text.chars().map(replace_control).collect();
    }
    let mut truncated: String = text.chars().take(max_chars.saturating_sub(3)).map(replace_control).collect();
    truncated.push_str("...");
    truncated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_has_the_width_of_its_widest_cell() {
        let mut table =
            Table::new([("name", Alignment::Left), ("n", Alignment::Right), ("rest", Alignment::Left)]);
        table.add_row(["a".to_owned(), "1,000".to_owned(), String::new()]);
        table.add_row(["longer".to_owned(), "7".to_owned(), "x".to_owned()]);
        assert_eq!(table.format(), "name        n  rest\na       1,000\nlonger      7  x");
    }

    #[test]
    fn a_number_is_abbreviated_and_rounded_down() {
        for (number, text) in [
            (0, "0"),
            (999_999, "999,999"),
            (1_000_000, "1.00M"),
            (1_239_999, "1.23M"),
            (999_999_999, "999.99M"),
            (1_000_000_000, "1.00G"),
            (u64::MAX, "18.44E"),
        ] {
            assert_eq!(abbreviate(number), text);
            assert!(text.len() <= 7, "{text} must have at most seven characters");
        }
    }

    #[test]
    fn text_is_truncated_and_its_control_characters_are_replaced() {
        assert_eq!(truncate("abcdef", 6), "abcdef");
        assert_eq!(truncate("abcdefg", 6), "abc...");
        assert_eq!(truncate("a\u{1b}[31m", 6), "a\u{fffd}[31m");
    }
}
