//! Lists every effective setting with its source, so that an operator can find the origin of a value. After a reload,
//! the list also contains the values that need a restart. The list contains no secret: keys and client tokens are not
//! settings of the table, and passwords in URLs are masked.

use serde::Serialize;

use super::Config;
use super::setting::{SETTINGS, Setting};

/// An effective setting with its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingValue {
    /// The section and the name in the configuration file, as `section.name`.
    pub name: &'static str,
    /// The value in TOML notation.
    pub value: String,
    /// The flag, the variable, or the file with line and column that sets the value, or `default`.
    pub source: String,
    /// Whether a part of the value is secret and therefore masked.
    #[serde(skip)]
    pub is_masked: bool,
    /// The value in the configuration that was read last, if it applies only after a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<String>,
}

impl Config {
    /// Lists every setting in the order of the table `SETTINGS`.
    #[must_use]
    pub fn setting_values(&self) -> Vec<SettingValue> {
        let mut config = self.clone();
        let describe = |setting: &Setting| {
            let formatted_value = setting.format_value(&mut config);
            let value = mask_password(&formatted_value);
            let source = self.setting_sources.get(setting.path).cloned();
            SettingValue {
                name: setting.path,
                is_masked: value != formatted_value || setting.contains_secret(&mut config),
                value,
                source: source.unwrap_or_else(|| "default".to_owned()),
                pending: None,
            }
        };
        SETTINGS.iter().map(describe).collect()
    }

    /// Lists every effective setting after a reload. `loaded` is the configuration that was read. If it contains a
    /// different value of a setting, that value is the pending value of the setting.
    #[must_use]
    pub fn setting_values_with_pending(&self, loaded: &Self) -> Vec<SettingValue> {
        let (mut in_force, mut loaded) = (self.clone(), loaded.clone());
        let mut setting_values = self.setting_values();
        for (setting, setting_value) in SETTINGS.iter().zip(&mut setting_values) {
            let is_pending = setting.differs(&mut in_force, &mut loaded);
            setting_value.pending = is_pending.then(|| mask_password(&setting.format_value(&mut loaded)));
        }
        setting_values
    }
}

/// Replaces the user and the password of a URL in `value` with three dots.
fn mask_password(value: &str) -> String {
    const SCHEME_END: &str = "://";
    let Some(start) = value.find(SCHEME_END).map(|index| index + SCHEME_END.len()) else {
        return value.to_owned();
    };
    let end = value[start..].find(['/', '"']).map_or(value.len(), |length| start + length);
    match value[start..end].rfind('@') {
        Some(length) => format!("{}...{}", &value[..start], &value[start + length..]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::listen::ListenAddresses;
    use super::*;

    #[test]
    fn every_setting_has_a_value_and_a_source() {
        let mut config = Config::default();
        config.setting_sources.insert("pool.max_queued", "KEYCHOIR_POOL__MAX_QUEUED".to_owned());
        let settings = config.setting_values();
        assert_eq!(settings.len(), SETTINGS.len());
        let find_setting = |name: &str| settings.iter().find(|setting| setting.name == name).unwrap();
        assert_eq!(find_setting("pool.max_queued").source, "KEYCHOIR_POOL__MAX_QUEUED");
        assert_eq!(find_setting("log.level").source, "default");
        assert_eq!(find_setting("retry.timeout").value, "\"2m\"");
    }

    #[test]
    fn a_value_that_needs_a_restart_is_pending() {
        let start = Config::default();
        let mut loaded_config = start.clone();
        loaded_config.setting_sources.insert("server.listen", "keychoir.toml:2:1".to_owned());
        loaded_config.server.listen = ListenAddresses::parse(&["127.0.0.1:1"]).unwrap();
        loaded_config.pool.max_queued = 7;
        loaded_config.upstream.proxy = "http://alice:hunter2@proxy:1".parse().unwrap();
        let settings =
            loaded_config.with_restart_settings_of(&start).setting_values_with_pending(&loaded_config);
        let find_setting = |name: &str| settings.iter().find(|setting| setting.name == name).unwrap();
        let listen = find_setting("server.listen");
        assert_eq!((listen.value.as_str(), listen.source.as_str()), ("\"127.0.0.1:11011\"", "default"));
        assert_eq!(listen.pending.as_deref(), Some("\"127.0.0.1:1\""));
        let max_queued = find_setting("pool.max_queued");
        assert_eq!((max_queued.value.as_str(), &max_queued.pending), ("7", &None));
        assert_eq!(find_setting("upstream.proxy").pending.as_deref(), Some("\"http://...@proxy:1\""));
        assert_eq!(settings.iter().filter(|setting| setting.pending.is_some()).count(), 2);
    }

    #[test]
    fn passwords_in_urls_are_masked() {
        for (value, masked) in [
            ("\"http://user:secret@proxy:3128\"", "\"http://...@proxy:3128\""),
            ("\"http://user:sec@ret@proxy/\"", "\"http://...@proxy/\""),
            ("\"https://api.elevenlabs.io/a@b\"", "\"https://api.elevenlabs.io/a@b\""),
            ("5", "5"),
        ] {
            assert_eq!(mask_password(value), masked);
        }
    }
}
