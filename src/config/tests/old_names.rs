//! Tests of the old names of settings, sections, fields of clients and strategies. Each of them is refused, and the
//! error contains the new name and, if the value is valid, the value in the new notation.

use std::time::Duration;

use super::FakeMachine;
use crate::config::old_names::{OldUnit, RENAMED_CLIENT_FIELDS, RENAMED_SECTIONS, RENAMED_SETTINGS};
use crate::config::value::{self, RawValue};
use crate::config::{Config, setting};

/// Returns the default of a setting in the new notation, and in the notation of its old name.
fn default_in_both_notations(path: &str, old_unit: OldUnit) -> (String, String) {
    let new_value = setting::find(path).unwrap().format_value(&mut Config::default());
    let unquoted = new_value.trim_matches('"');
    let milliseconds = |text| value::parse_duration(RawValue::Text(text)).unwrap().as_millis();
    let old_value = match old_unit {
        OldUnit::Milliseconds => milliseconds(unquoted).to_string(),
        OldUnit::Days => (milliseconds(unquoted) / Duration::from_secs(24 * 3_600).as_millis()).to_string(),
        OldUnit::Bytes => value::parse_size(RawValue::Text(unquoted)).unwrap().to_string(),
        OldUnit::Same => {
            assert!(
                value::parse_duration(RawValue::Text(unquoted)).is_err()
                    && value::parse_size(RawValue::Text(unquoted)).is_err()
            );
            new_value.clone()
        }
    };
    (new_value, old_value)
}

#[test]
fn each_old_name_in_a_file_is_reported_with_the_line_to_write() {
    for (old, new, old_unit) in RENAMED_SETTINGS {
        let (value, old_value) = default_in_both_notations(new, *old_unit);
        let ((section, name), (new_section, new_name)) =
            (old.split_once('.').unwrap(), new.split_once('.').unwrap());
        let toml = format!("[{section}]\n{name} = {old_value}\n");
        let section_advice =
            if section == new_section { String::new() } else { format!(" in [{new_section}]") };
        FakeMachine::with_key().toml(&toml).check_problems(&format!(
            "/etc/k.toml:2:1: `{old}` has a new name\n  2 | {name} = {old_value}\n    | {}\n    = write `{new_name} = {value}`{section_advice}",
            "^".repeat(name.len()),
        ));
        FakeMachine::with_key().toml(&format!("[{new_section}]\n{new_name} = {value}\n")).config();
    }
}

#[test]
fn each_old_variable_is_reported_with_the_one_to_set() {
    for (old, new, old_unit) in RENAMED_SETTINGS {
        let (value, old_value) = default_in_both_notations(new, *old_unit);
        let (value, old_value) = (value.trim_matches('"'), old_value.trim_matches('"'));
        if value.is_empty() {
            // A blank variable counts as unset.
            continue;
        }
        let (variable, new) = (setting::variable_name(old), setting::variable_name(new));
        FakeMachine::with_key()
            .variable(&variable, old_value)
            .check_problems(&format!("{variable}: this setting has a new name\n    = set {new}={value}"));
        FakeMachine::with_key().variable(&new, value).config();
    }
}

#[test]
fn old_names_are_not_settings() {
    for (index, (old, new, old_unit)) in RENAMED_SETTINGS.iter().enumerate() {
        assert_eq!(
            *old_unit == OldUnit::Days,
            old.contains("days"),
            "{old} must be in days only if its name contains `days`"
        );
        assert!(setting::find(old).is_none(), "{old} must not be a setting");
        assert!(setting::find(new).is_some(), "{new} must be a setting");
        assert!(
            RENAMED_SETTINGS[..index].iter().all(|(other, other_new, _)| other != old && other_new != new),
            "{old} and {new} must be in the table only once"
        );
    }
    for (old, new) in RENAMED_SECTIONS {
        assert!(!setting::is_section(old), "[{old}] must not be a section");
        assert!(setting::is_section(new), "[{new}] must be a section");
        // Every setting of an old section has its own message.
        for setting in setting::SETTINGS.iter().filter(|setting| setting.section() == *new) {
            let has_message = |(old_path, new_path, _): &&(&str, &str, OldUnit)| {
                *new_path == setting.path && old_path.starts_with(&format!("{old}."))
            };
            let is_renamed = RENAMED_SETTINGS.iter().any(|renamed| has_message(&renamed));
            assert!(is_renamed, "the table must contain the old name of {}", setting.path);
        }
    }
}

#[test]
fn the_name_of_a_setting_has_no_unit_and_no_limit_suffix() {
    for setting in setting::SETTINGS {
        for part in setting.path.split(['.', '_']) {
            let is_unit = ["ms", "bytes", "days", "seconds"].contains(&part);
            assert!(!is_unit, "{} must not contain a unit", setting.path);
        }
        let has_limit_suffix = setting.path.ends_with("_max") || setting.path.ends_with("_min");
        assert!(!has_limit_suffix, "the name of a limit must begin with `max` or `min`: {}", setting.path);
    }
}

#[test]
fn an_invalid_old_value_is_not_converted() {
    FakeMachine::with_key()
        .toml("[server]\nconnections_max = []\n[watch]\ninterval_ms = \"x\"\n")
        .variable("KEYCHOIR_REPLAY__DEADLINE_MS", "soon")
        .check_problems(
            "
/etc/k.toml:2:1: `server.connections_max` has a new name
  2 | connections_max = []
    | ^^^^^^^^^^^^^^^
    = write `max_connections`
/etc/k.toml:4:1: `watch.interval_ms` has a new name
  4 | interval_ms = \"x\"
    | ^^^^^^^^^^^
    = write `interval` in [quota_polling]
KEYCHOIR_REPLAY__DEADLINE_MS: this setting has a new name
    = set KEYCHOIR_RETRY__TIMEOUT
",
        );
}

#[test]
fn an_old_section_is_reported_with_and_without_settings() {
    FakeMachine::with_key()
        .toml("[watch]\ninterval = \"10m\"\n[replay]\n[sockets]\nidle = 3\n")
        .check_problems(
            "
/etc/k.toml:2:1: `watch` has a new name
  2 | interval = \"10m\"
    | ^^^^^^^^
    = write [quota_polling]
/etc/k.toml:3:2: `replay` has a new name
  3 | [replay]
    |  ^^^^^^
    = write [retry]
/etc/k.toml:5:1: `sockets` has a new name
  5 | idle = 3
    | ^^^^
    = write [websocket]
",
        );
}

#[test]
fn the_old_name_of_a_clients_limit_is_reported_with_the_line_to_write() {
    let lines = ["\"3 requests\"", "\"60 per minute\"", "4"];
    for ((old, new), line) in RENAMED_CLIENT_FIELDS.iter().zip(lines) {
        let toml = format!("[[clients]]\nname = \"a\"\ntoken = \"0123456789abcdef\"\n{old} = {line}\n");
        FakeMachine::with_key().toml(&toml).check_problems(&format!(
            "/etc/k.toml:4:1: `{old}` has a new name\n  4 | {old} = ***\n    | {}\n    = write `{new} = {line}`",
            "^".repeat(old.len()),
        ));
    }
}

#[test]
fn the_old_name_of_a_strategy_is_reported_with_the_new_one() {
    FakeMachine::with_key().variable("KEYCHOIR_POOL__STRATEGY", "least-busy").check_problems(
        "
KEYCHOIR_POOL__STRATEGY: unknown strategy `least-busy`
    = use one of `fill-first`, `round-robin`, `most-remaining`, `least-requests`, `soonest-reset`
    = did you mean `least-requests`?
",
    );
}
