//! Tests the table of settings: each path and each field is used once, each setting parses, prints and copies its
//! values, and errors show the valid notation.

use toml::de::DeValue;

use super::*;

/// Parses a value in TOML notation into the setting, and checks the printed form or the error.
#[track_caller]
fn check_toml(path: &str, toml: &str, expected: &str) {
    let value = DeValue::parse(toml).unwrap();
    check_value(path, RawValue::Toml(value.get_ref()), expected);
}

/// Parses the text of a variable into the setting, and checks the printed form or the error.
#[track_caller]
fn check_text(path: &str, text: &str, expected: &str) {
    check_value(path, RawValue::Text(text), expected);
}

#[track_caller]
fn check_value(path: &str, raw: RawValue<'_>, expected: &str) {
    let directories = BaseDirectories { base: Some(Path::new("/etc/k")), home: Some(Path::new("/home/me")) };
    let mut config = Config::default();
    let setting = find(path).unwrap();
    let printed_text = match setting.parse_into(raw, directories, &mut config) {
        Ok(()) => setting.format_value(&mut config),
        Err(error) => format!("! {error}"),
    };
    assert_eq!(printed_text, expected);
}

#[test]
fn each_path_is_unique_and_has_one_section() {
    for (index, setting) in SETTINGS.iter().enumerate() {
        let part_count = if setting.is_nested() { 3 } else { 2 };
        assert_eq!(
            setting.path.split('.').count(),
            part_count,
            "{} must have {part_count} parts",
            setting.path
        );
        let is_unique = SETTINGS[..index].iter().all(|other| other.path != setting.path);
        assert!(is_unique, "{} must be in the table only once", setting.path);
    }
}

/// Values of which each setting accepts at least one that is not its default.
const SAMPLES: [&str; 21] = [
    "3h",
    "status",
    "/below",
    "999",
    "99",
    "70ms",
    "7s",
    "7d",
    "9KiB",
    "0.5",
    "true",
    "false",
    "json",
    "trace",
    "https://h",
    "wss://h",
    "redis://h",
    "127.0.0.1:1",
    "0600",
    "off",
    "round-robin",
];

#[test]
fn each_setting_changes_one_field() {
    for setting in SETTINGS {
        let settings_changed_by = |text: &str| -> Vec<&str> {
            let (mut config, mut default) = (Config::default(), Config::default());
            let _ = setting.parse_into(RawValue::Text(text), BaseDirectories::default(), &mut config);
            let differs =
                |other: &&Setting| other.format_value(&mut config) != other.format_value(&mut default);
            SETTINGS.iter().filter(differs).map(|other| other.path).collect()
        };
        let changes: Vec<_> =
            SAMPLES.into_iter().map(settings_changed_by).filter(|paths| !paths.is_empty()).collect();
        assert!(!changes.is_empty(), "a sample must change {}", setting.path);
        assert!(
            changes.iter().all(|paths| *paths == [setting.path]),
            "each sample must change only {}, but the changes are {changes:?}",
            setting.path
        );
    }
}

#[test]
fn every_setting_can_be_copied() {
    for setting in SETTINGS {
        for text in SAMPLES {
            let (mut source, mut target) = (Config::default(), Config::default());
            let _ = setting.parse_into(RawValue::Text(text), BaseDirectories::default(), &mut source);
            setting.copy_value(&mut source, &mut target);
            let is_copied = !setting.differs(&mut source, &mut target);
            assert!(is_copied, "{} = {text} must be the same after it is copied", setting.path);
        }
    }
}

#[test]
fn every_default_is_valid() {
    for setting in SETTINGS {
        let mut config = Config::default();
        let default = setting.format_value(&mut config);
        let value = DeValue::parse(&default).unwrap();
        setting.parse_into(RawValue::Toml(value.get_ref()), BaseDirectories::default(), &mut config).unwrap();
        assert_eq!(setting.format_value(&mut config), default);
    }
}

#[test]
fn addresses_are_a_list_in_a_file_and_separated_by_commas_in_a_variable() {
    let addresses = "[\"127.0.0.1:1\", \"unix:/k\"]";
    check_toml("server.listen", addresses, addresses);
    check_toml("server.listen", "\"127.0.0.1:1\"", "\"127.0.0.1:1\"");
    check_text("server.listen", "127.0.0.1:1 , unix:/k", addresses);
    check_toml("server.listen", "[1]", "! this is a number, but should be a string; write it in quotes");
    check_text(
        "server.listen",
        "127.0.0.1:1,",
        "! `` has no port; write HOST:PORT, for example 127.0.0.1:11011",
    );
}

#[test]
fn two_underscores_separate_section_and_name_in_a_variable() {
    assert_eq!(find("server.listen").unwrap().variable_name(), "KEYCHOIR_SERVER__LISTEN");
    assert_eq!(find("upstream.base_url").unwrap().variable_name(), "KEYCHOIR_UPSTREAM__BASE_URL");
}

#[test]
fn a_number_is_parsed_in_every_notation_of_toml() {
    for toml in ["3000", "3_000", "+3000", "0xbb8"] {
        check_toml("server.max_requests", toml, "3000");
    }
    check_text("server.max_requests", "3_000", "3000");
}

#[test]
fn the_number_of_workers_is_from_0_to_1024() {
    check_toml("server.workers", "0", "0");
    check_text("server.workers", "1024", "1024");
    let advice = "write a whole number from 0 to 1024; the default is 0";
    check_toml("server.workers", "1025", &format!("! 1025 is too large for `server.workers`; {advice}"));
}

#[test]
fn a_value_outside_its_range_is_refused() {
    let size = "write a size from 8KiB to 1MiB; the default is \"64KiB\"";
    let duration = "write a duration from 1s to 1d; the default is \"10m\"";
    for (path, value, expected) in [
        ("server.max_request_headers_size", "8KiB", "\"8KiB\""),
        (
            "server.max_request_headers_size",
            "8191B",
            &format!("! 8191B is too small for `server.max_request_headers_size`; {size}"),
        ),
        ("server.max_request_headers_size", "1024KiB", "\"1MiB\""),
        (
            "server.max_request_headers_size",
            "1048577B",
            &format!("! 1048577B is too large for `server.max_request_headers_size`; {size}"),
        ),
        ("server.max_request_headers_size", "99999999TiB", &format!("! the size is too large; {size}")),
        ("quota_polling.interval", "1s", "\"1s\""),
        (
            "quota_polling.interval",
            "999ms",
            &format!("! 999ms is too short for `quota_polling.interval`; {duration}"),
        ),
        ("quota_polling.interval", "24h", "\"1d\""),
        (
            "quota_polling.interval",
            "24h1ms",
            &format!("! 1d1ms is too long for `quota_polling.interval`; {duration}"),
        ),
        ("server.drain_timeout", "0s", "\"0s\""),
        ("upstream.max_idle_connections", "0", "0"),
        ("retry.buffer_size", "0B", "\"0B\""),
    ] {
        check_text(path, value, expected);
    }
}

#[test]
fn a_retention_is_in_days_or_unlimited() {
    let advice = "write a duration from 1d to 36500d, or 0s for unlimited; the default is \"30d\"";
    check_toml("storage.attempts_retention", "\"0s\"", "\"0s\"");
    check_toml("storage.attempts_retention", "\"1d\"", "\"1d\"");
    check_toml("storage.attempts_retention", "\"36h\"", "\"36h\"");
    check_toml("storage.attempts_retention", "\"36500d\"", "\"36500d\"");
    check_toml(
        "storage.attempts_retention",
        "\"23h\"",
        &format!("! 23h is too short for `storage.attempts_retention`; {advice}"),
    );
    check_toml(
        "storage.attempts_retention",
        "\"36501d\"",
        &format!("! 36501d is too long for `storage.attempts_retention`; {advice}"),
    );
    check_toml(
        "storage.attempts_retention",
        "30",
        &format!("! a duration needs a unit; write \"30d\" for 30 days; {advice}"),
    );
    check_text(
        "storage.attempts_retention",
        "18446744073709551615",
        &format!("! a duration needs a unit; {advice}"),
    );
}

#[test]
fn the_error_for_an_invalid_duration_shows_the_notation() {
    let advice = "write a duration from 1ms to 10m; the default is \"10s\"";
    let units = "the units are ms, s, m, h, d and w";
    for (toml, message) in [
        ("75000", "a duration needs a unit; write \"75s\" for 75000 milliseconds"),
        ("0", "a duration needs a unit; write \"0s\" for 0 milliseconds"),
        ("0x3e8", "a duration needs a unit; write \"1s\" for 1000 milliseconds"),
        ("\"500\"", "a duration needs a unit; write \"500ms\" for 500 milliseconds"),
        ("-1", "the number is negative"),
        ("99999999999999999999", "the number is too large"),
        ("1.5", "a duration is a whole number with a unit"),
        ("\"-1s\"", "the duration is negative"),
        ("\"1.5s\"", "`1.5s` has a fraction; write \"1s500ms\""),
        ("\"0.5ms\"", "`0.5ms` has a fraction"),
        ("\"30x\"", &format!("`30x` has the unknown unit `x`; {units}")),
        ("\"5min\"", &format!("`5min` has the unknown unit `min`; {units}; did you mean `5m`?")),
        ("\"5 min\"", "`5 min` is not a duration; did you mean `5m`?"),
        ("\"1m1h\"", "`1m1h` has its units in the wrong order; write the largest unit first, as in 1h30m"),
        ("\"99999999999999999999s\"", "the duration is too large"),
        ("\"\"", "`` is not a duration"),
        ("\"soon\"", "`soon` is not a duration"),
        ("true", "this is a boolean, but should be a duration in quotes"),
        ("[1]", "this is a list, but should be a duration in quotes"),
        ("\"0s\"", "0s is too short for `upstream.connect_timeout`"),
    ] {
        check_toml("upstream.connect_timeout", toml, &format!("! {message}; {advice}"));
    }
    // A variable is not quoted.
    for (text, message) in [
        ("75000", "a duration needs a unit; write 75s for 75000 milliseconds"),
        ("\"75s\"", "`\\\"75s\\\"` is not a duration; did you mean `75s`?"),
        ("1.5s", "`1.5s` has a fraction; write 1s500ms"),
        ("-1", "the duration is negative"),
    ] {
        check_text("upstream.connect_timeout", text, &format!("! {message}; {advice}"));
    }
}

#[test]
fn the_error_for_an_invalid_size_shows_the_notation() {
    let advice = "write a size from 0B to 1GiB; the default is \"16MiB\"";
    let units = "the units are B, KiB, MiB, GiB and TiB (of 1024), kB, MB, GB and TB (of 1000)";
    for (toml, message) in [
        ("16777216", "a size needs a unit; write \"16MiB\" for 16777216 bytes"),
        ("0", "a size needs a unit; write \"0B\" for 0 bytes"),
        ("\"64k\"", &format!("`64k` has the unknown unit `k`; {units}; did you mean `64KiB`?")),
        ("\"64KB\"", &format!("`64KB` has the unknown unit `KB`; {units}; did you mean `64kB`?")),
        ("\"1 MiB\"", "`1 MiB` is not a size; did you mean `1MiB`?"),
        ("\"1.5MiB\"", "`1.5MiB` has a fraction; write \"1536KiB\""),
        ("\"-1MiB\"", "the size is negative"),
        ("false", "this is a boolean, but should be a size in quotes"),
    ] {
        check_toml("retry.buffer_size", toml, &format!("! {message}; {advice}"));
    }
    check_toml("retry.buffer_size", "\"1GB\"", "\"1GB\"");
}

#[test]
fn the_error_for_an_invalid_number_shows_the_notation() {
    let advice = "write a whole number from 1 to 1000; the default is 16";
    for (toml, message) in [
        ("-1", "the number is negative"),
        ("1.5", "the number has a fraction"),
        ("\"30\"", "this number is in quotes; did you mean `30`?"),
        ("\"x\"", "this number is in quotes"),
        ("true", "this is a boolean, but should be a number"),
        ("[1]", "this is a list, but should be a number"),
        ("99999999999999999999999", "the number is too large"),
        ("0", "0 is too small for `retry.max_attempts`"),
    ] {
        check_toml("retry.max_attempts", toml, &format!("! {message}; {advice}"));
    }
    for (text, message) in [
        ("-1", "the number is negative"),
        ("1.5", "`1.5` is not a whole number"),
        ("_", "`_` is not a whole number"),
    ] {
        check_text("retry.max_attempts", text, &format!("! {message}; {advice}"));
    }
}

#[test]
fn a_ratio_is_above_0_and_up_to_1() {
    const ADVICE: &str = "write a number above 0 and up to 1, for example 0.8 for 80 %";
    check_toml("pool.near_limit_ratio", "1", "1");
    check_toml("pool.near_limit_ratio", "1.0", "1");
    check_text("pool.near_limit_ratio", "0.01", "0.01");
    check_toml(
        "pool.near_limit_ratio",
        "80",
        &format!("! the ratio is above 1; {ADVICE}; did you mean `0.8`?"),
    );
    for toml in ["0", "0.0", "-0.5", "nan", "inf", "101"] {
        check_toml("pool.near_limit_ratio", toml, &format!("! the ratio is out of range; {ADVICE}"));
    }
    check_text("pool.near_limit_ratio", "80%", &format!("! this is not a number; {ADVICE}"));
}

#[test]
fn a_boolean_is_true_or_false() {
    check_toml("quota_polling.enabled", "false", "false");
    check_text("quota_polling.enabled", "true", "true");
    check_text(
        "quota_polling.enabled",
        "yes",
        "! `yes` is neither true nor false; write `true` or `false`; did you mean `true`?",
    );
    check_toml(
        "quota_polling.enabled",
        "\"off\"",
        "! this boolean is in quotes; write `true` or `false`; did you mean `false`?",
    );
    check_toml(
        "quota_polling.enabled",
        "1",
        "! this is a number, but should be `true` or `false`; write `true` or `false`",
    );
}

#[test]
fn a_relative_path_starts_at_the_directory_of_its_file() {
    check_toml("storage.path", "\"a.db\"", "\"/etc/k/a.db\"");
    check_toml("storage.path", "\"/a.db\"", "\"/a.db\"");
    check_toml("storage.path", "\"~/a.db\"", "\"/home/me/a.db\"");
    check_toml("storage.path", "\" \"", "! the path is empty");
    check_toml("storage.path", "3", "! this is a number, but should be a string; write it in quotes");
    assert!(BaseDirectories::default().resolve("~/a").is_err());
    assert_eq!(BaseDirectories::default().resolve("a").unwrap(), Path::new("a"));
}
