//! Reads the values of settings and entries from files that other settings and fields name. No message contains the
//! content of a file, because it is usually a secret.

use std::collections::HashMap;
use std::path::Path;

use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::source::{ReadFileError, ValueSources};
use super::value::BaseDirectories;

/// Reads the value of a setting from the file at `path`, and parses it with `parse`. `names` are the setting and the
/// setting that names the file. Reports a problem if the file is invalid, or if the setting itself is set as well
/// (`is_set`).
pub(super) fn read_value_file<T>(
    path: &Path,
    names: [&str; 2],
    is_set: bool,
    sources: &ValueSources<'_>,
    spans: &HashMap<&'static str, SourceSpan>,
    report: &mut Report,
    parse: fn(&str) -> Result<T, ValueError>,
) -> Option<T> {
    let [name, file_setting_name] = names;
    let span = spans.get(file_setting_name).cloned();
    let span = span.unwrap_or_else(|| SourceSpan::new(ValueOrigin::File(path.to_owned())));
    let text = (sources.read_file)(path).map_err(|reason| unreadable_file_error("the file", &reason));
    let error = match text.and_then(|text| parse(&text)) {
        Ok(value) if !is_set => return Some(value),
        Ok(_) => conflicting_settings_error(name, file_setting_name),
        Err(error) => error,
    };
    report.problems.push(span.problem(error));
    None
}

/// Returns the error for a value that is set both directly and by a file.
pub(super) fn conflicting_settings_error(setting: &str, file_setting: &str) -> ValueError {
    ValueError::new(format!("both `{setting}` and `{file_setting}` are set")).advise("remove one of them")
}

/// Reads a file that a field of an entry names. No message contains the name of the file, because the operator may have
/// written a secret in its place.
pub(super) fn read_secret_file(
    sources: &ValueSources<'_>,
    directories: BaseDirectories<'_>,
    path: &str,
) -> Result<String, ValueError> {
    (sources.read_file)(&directories.resolve(path)?).map_err(|reason| {
        unreadable_file_error("the file", &reason)
            .advise("a relative path starts at the directory of the configuration file")
    })
}

/// Returns the error for a file that cannot be read. `subject` is the name of the file in the message.
pub(super) fn unreadable_file_error(subject: &str, reason: &ReadFileError) -> ValueError {
    ValueError::new(format!("{subject} cannot be read: {reason}"))
}
