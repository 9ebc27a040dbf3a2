//! Creates the errors for invalid syntax and for unknown, misplaced and old names of settings and sections in a TOML
//! file. The advice of an error names the right section, the new name or a similar name.

use toml::de::DeValue;

use super::super::mask::quote_masked;
use super::super::old_names;
use super::super::problem::ValueError;
use super::super::setting::{self, Setting};
use crate::policy::similar::find_similar;

/// Converts an error message of the TOML parser about the part `text` of the file.
pub(super) fn syntax_error(message: &str, text: &str) -> ValueError {
    if message == "duplicate key" {
        return ValueError::new(format!("{} is set twice", quote_masked(text)))
            .advise("remove one of the lines");
    }
    let (message, expected) = message.split_once(", expected ").unwrap_or((message, ""));
    // The parser infers the type of an unquoted string, such as an address, from its first character,
    // and its message names that type.
    let inferred_types = ["quoted", "float", "integer", "date", "time", "leading zero", "boolean"];
    let error = ValueError::new(message);
    if inferred_types.iter().any(|inferred_type| message.contains(inferred_type)) {
        return error.advise("write a string in quotes, and a number in digits only");
    }
    if expected.is_empty() { error } else { error.advise(format!("expected {expected}")) }
}

/// Returns the error for a section with an old name.
pub(super) fn old_section_error(old: &str, new: &str) -> ValueError {
    ValueError::new(format!("`{old}` has a new name")).advise(format!("write [{new}]"))
}

/// Returns the error for an unknown setting of a section.
pub(super) fn unknown_setting_error(section: &str, name: &str) -> ValueError {
    if let Some(new) = old_names::new_section(section) {
        return old_section_error(section, new);
    }
    let error = ValueError::new(format!("unknown setting {} in [{section}]", quote_masked(name)));
    if let Some(other_section) = setting::find_by_name(name) {
        return error.advise(format!("`{name}` belongs in [{}]", other_section.section()));
    }
    let siblings = setting::SETTINGS.iter().filter(|setting| setting.section() == section).map(Setting::name);
    let suggestion = find_similar(name, siblings).map(str::to_owned);
    error.suggest(suggestion.or_else(|| find_similar_path(name)))
}

/// Returns the error for an unknown name outside all sections. Whether it is called a section depends on its value.
pub(super) fn unknown_section_error(name: &str, value: &DeValue<'_>) -> ValueError {
    let is_table = matches!(value, DeValue::Table(_) | DeValue::Array(_));
    let error = ValueError::new(format!(
        "unknown {} {}",
        if is_table { "section" } else { "setting" },
        quote_masked(name)
    ));
    if let Some(setting) = setting::find_by_name(name) {
        return error.advise(format!("`{name}` belongs in [{}]", setting.section()));
    }
    let sections = setting::SETTINGS.iter().map(Setting::section).chain(["keys", "clients"]);
    let suggestion = find_similar(name, sections).map(str::to_owned);
    error.suggest(suggestion.or_else(|| find_similar_path(name)))
}

/// Finds the path of the setting with the most similar name in all sections.
fn find_similar_path(name: &str) -> Option<String> {
    let names = setting::SETTINGS.iter().filter(|setting| !setting.is_nested()).map(Setting::name);
    setting::find_by_name(find_similar(name, names)?).map(|setting| setting.path.to_owned())
}
