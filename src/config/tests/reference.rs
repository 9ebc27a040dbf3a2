//! Tests that the reference file `config/keychoir.toml` lists all settings with their defaults, and
//! that its examples are valid.

use std::path::Path;

use super::{FakeMachine, KEY};
use crate::config::value::{BaseDirectories, RawValue};
use crate::config::{Config, setting};

const REFERENCE: &str = include_str!("../../../config/keychoir.toml");

/// Returns the reference file with uncommented settings. A setting is a line `#name`, and other comments are lines
/// `# text`.
fn uncommented_reference() -> String {
    let is_setting = |line: &&str| {
        line.strip_prefix('#')
            .is_some_and(|rest| rest.starts_with(|character: char| character.is_ascii_lowercase()))
    };
    REFERENCE
        .lines()
        .map(|line| if is_setting(&line) { &line[1..] } else { line }.to_owned() + "\n")
        .collect()
}

#[test]
fn the_reference_file_is_valid_and_contains_the_defaults() {
    let commented = FakeMachine::with_key().toml(REFERENCE).resolve().unwrap();
    let uncommented = uncommented_reference();
    let uncommented = FakeMachine::with_key().toml(&uncommented).resolve().unwrap();
    assert!(commented.warnings.is_empty() && uncommented.warnings.is_empty());
    let (mut commented, mut uncommented, mut default) =
        (commented.config, uncommented.config, FakeMachine::with_key().config());
    for setting in setting::SETTINGS {
        let expected = setting.format_value(&mut default);
        assert_eq!(
            setting.format_value(&mut commented),
            expected,
            "{} must have its default with the unchanged reference file",
            setting.path
        );
        assert_eq!(
            setting.format_value(&mut uncommented),
            expected,
            "{} must have its default with the uncommented settings",
            setting.path
        );
    }
}

#[test]
fn the_reference_file_contains_exactly_the_settings_of_the_table() {
    let text = uncommented_reference();
    let root = toml::de::DeTable::parse(&text).unwrap().into_inner();
    let mut paths = Vec::new();
    for (section, table) in &root {
        for (name, value) in table.get_ref().as_table().unwrap() {
            let path = format!("{}.{}", section.get_ref(), name.get_ref());
            let mut config = Config::default();
            let directories = BaseDirectories { home: Some(Path::new("/home/me")), base: None };
            setting::find(&path)
                .unwrap()
                .parse_into(RawValue::Toml(value.get_ref()), directories, &mut config)
                .unwrap();
            // The reference file contains a value in the same notation as the table of settings. The default of this
            // path depends on the environment.
            if path != "storage.path" {
                let written_value = &text[value.span()];
                assert_eq!(written_value, setting::find(&path).unwrap().format_value(&mut Config::default()));
            }
            paths.push(path);
        }
    }
    paths.sort();
    // The file describes nested settings only in comments.
    let written_settings = setting::SETTINGS.iter().filter(|setting| !setting.is_nested());
    let mut expected: Vec<_> = written_settings.map(|setting| setting.path.to_owned()).collect();
    expected.sort();
    assert_eq!(paths, expected);
}

#[test]
fn the_examples_in_the_reference_file_are_valid() {
    let example: String = REFERENCE
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| {
            line.starts_with("[[") || line.split_once(" = ").is_some_and(|(name, _)| !name.contains(' '))
        })
        .map(|line| line.to_owned() + "\n")
        .collect();
    let config = FakeMachine::without_key().file("/run/secrets/elevenlabs_key", KEY).toml(&example).config();
    assert_eq!((config.keys.len(), config.clients.len()), (1, 1));
    assert_eq!(config.keys[0].workspace.as_deref(), Some("studio"));
}
