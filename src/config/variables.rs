//! Finds the settings in the environment. An unknown variable with the prefix `KEYCHOIR_` is an error, so that a typo
//! is noticed. Variables that Kubernetes sets for a service named `keychoir` are ignored.

use super::mask::quote_masked;
use super::old_names;
use super::problem::{Problem, SourceSpan, ValueError, ValueOrigin};
use super::setting::{self, Setting};
use super::source::Environment;
use crate::policy::similar::find_similar;

/// The variable that names the configuration file.
pub(super) const CONFIG: &str = "KEYCHOIR_CONFIG";

/// The variable with the admin token.
pub(super) const ADMIN_TOKEN: &str = "KEYCHOIR_ADMIN_TOKEN";

/// The variable that names the file with the token of the client `default`.
pub(super) const CLIENT_TOKEN_FILE: &str = "KEYCHOIR_CLIENT_TOKEN_FILE";

/// The variables of Keychoir that are not settings.
const OTHER_VARIABLES: [&str; 3] = [CONFIG, ADMIN_TOKEN, CLIENT_TOKEN_FILE];

const VARIABLE_PREFIX: &str = "KEYCHOIR_";

/// A setting that a variable sets, with the text and the source of its value.
pub(super) struct AssignedVariable<'e> {
    pub(super) setting: &'static Setting,
    pub(super) text: &'e str,
    pub(super) span: SourceSpan,
}

/// Returns the settings in the environment, and reports unknown variables.
pub(super) fn find_settings<'e>(
    environment: &'e Environment,
    problems: &mut Vec<Problem>,
) -> Vec<AssignedVariable<'e>> {
    for name in &environment.non_utf8_names {
        let error = ValueError::new("the value is not UTF-8 text");
        problems.push(SourceSpan::new(ValueOrigin::Variable(name.clone())).problem(error));
    }
    let mut settings = Vec::new();
    let must_be_setting = |name: &str| name.starts_with(VARIABLE_PREFIX) && !OTHER_VARIABLES.contains(&name);
    for (name, text) in environment.iter().filter(|(name, _)| must_be_setting(name)) {
        let span = SourceSpan::new(ValueOrigin::Variable(name.to_owned()));
        match setting::SETTINGS.iter().find(|setting| setting.variable_name() == name) {
            Some(setting) => settings.push(AssignedVariable { setting, text, span }),
            None if is_set_by_kubernetes(name, text) => {}
            None => {
                let error = old_names::error_in_environment(name, text)
                    .unwrap_or_else(|| unknown_variable_error(name));
                problems.push(span.problem(error));
            }
        }
    }
    settings
}

/// Returns whether Kubernetes set this variable. For a service named `keychoir`, it adds variables such as
/// `KEYCHOIR_SERVICE_HOST` and `KEYCHOIR_PORT=tcp://…` to every container of the namespace.
fn is_set_by_kubernetes(name: &str, value: &str) -> bool {
    let is_address = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let is_protocol = ["_TCP_", "_UDP_", "_SCTP_"].iter().any(|protocol| name.contains(protocol));
    let is_service = name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT");
    !name.contains("__") && (is_service || (name.contains("_PORT") && (is_address || is_protocol)))
}

/// Returns the error for an unknown variable. It suggests the variable of a setting, or else lists those of the
/// section.
fn unknown_variable_error(name: &str) -> ValueError {
    let error = ValueError::new("unknown setting");
    let uppercase_name = name.to_uppercase();
    let name_without_prefix = uppercase_name.trim_start_matches(VARIABLE_PREFIX);
    if name_without_prefix.contains("API_KEY")
        || name_without_prefix == "KEYS"
        || name_without_prefix == "KEY"
    {
        return error.suggest(Some("ELEVENLABS_API_KEYS"));
    }
    // The operator may have omitted the section, as in `KEYCHOIR_LISTEN`.
    let with_section = setting::find_by_name(&name_without_prefix.to_lowercase()).map(Setting::variable_name);
    let known_names =
        || setting::SETTINGS.iter().map(Setting::variable_name).chain(OTHER_VARIABLES.map(str::to_owned));
    let suggestion = with_section.or_else(|| find_similar(&uppercase_name, known_names()));
    match suggestion {
        Some(suggestion) => error.suggest(Some(suggestion)),
        None => {
            let section = name_without_prefix.split("__").next().unwrap_or_default().to_lowercase();
            let siblings: Vec<_> =
                setting::SETTINGS.iter().filter(|setting| setting.section() == section).collect();
            if siblings.is_empty() {
                return error.advise("write KEYCHOIR_SECTION__NAME, for example KEYCHOIR_SERVER__LISTEN");
            }
            let names = siblings.iter().map(|setting| setting.variable_name()).collect::<Vec<_>>().join(", ");
            error.advise(format!("the settings of {} are {names}", quote_masked(&section)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_unknown(name: &str, expected: &str) {
        let environment: Environment = [(name.into(), "1".into())].into_iter().collect();
        let mut problems = Vec::new();
        assert!(find_settings(&environment, &mut problems).is_empty());
        let printed_text = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert_eq!(printed_text, format!("{name}: unknown setting\n    = {expected}"));
    }

    #[track_caller]
    fn check_ignored(name: &str, value: &str) {
        let environment: Environment = [(name.into(), value.into())].into_iter().collect();
        let mut problems = Vec::new();
        assert!(find_settings(&environment, &mut problems).is_empty());
        assert!(problems.is_empty(), "{name}={value} must cause no problem: {problems:?}");
    }

    #[test]
    fn an_unknown_variable_is_an_error_with_a_suggestion() {
        check_unknown("KEYCHOIR_SERVER_LISTEN", "did you mean `KEYCHOIR_SERVER__LISTEN`?");
        check_unknown("KEYCHOIR_SERVER__LISTNE", "did you mean `KEYCHOIR_SERVER__LISTEN`?");
        check_unknown("KEYCHOIR_LISTEN", "did you mean `KEYCHOIR_SERVER__LISTEN`?");
        check_unknown("KEYCHOIR_server__listen", "did you mean `KEYCHOIR_SERVER__LISTEN`?");
        check_unknown("KEYCHOIR_CONFG", "did you mean `KEYCHOIR_CONFIG`?");
        check_unknown("KEYCHOIR_CLIENT_TOKENFILE", "did you mean `KEYCHOIR_CLIENT_TOKEN_FILE`?");
        check_unknown("KEYCHOIR_API_KEYS", "did you mean `ELEVENLABS_API_KEYS`?");
        check_unknown(
            "KEYCHOIR_LOG__COLOUR_OF_THE_MOON",
            "the settings of `log` are KEYCHOIR_LOG__FORMAT, KEYCHOIR_LOG__LEVEL",
        );
        check_unknown("KEYCHOIR_XYZ", "write KEYCHOIR_SECTION__NAME, for example KEYCHOIR_SERVER__LISTEN");
    }

    #[test]
    fn variables_that_are_not_meant_as_settings_are_ignored() {
        check_ignored("KEYCHOIR_CONFIG", "/etc/keychoir.toml");
        check_ignored("PATH", "/bin");
        check_ignored("KEYCHOIR_SERVICE_HOST", "10.0.0.1");
        check_ignored("KEYCHOIR_SERVICE_PORT", "80");
        check_ignored("KEYCHOIR_SERVICE_PORT_HTTP", "80");
        check_ignored("KEYCHOIR_PORT", "tcp://10.0.0.1:80");
        check_ignored("KEYCHOIR_PORT_80_TCP_ADDR", "10.0.0.1");
    }

    #[test]
    fn a_port_without_an_address_is_not_set_by_kubernetes() {
        check_unknown("KEYCHOIR_PORT", "write KEYCHOIR_SECTION__NAME, for example KEYCHOIR_SERVER__LISTEN");
    }
}
