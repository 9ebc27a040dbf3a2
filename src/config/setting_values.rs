//! Lists every effective setting with its source, so that an operator can find the origin of a value. The list contains
//! no secret: keys and client tokens are not settings of the table, and passwords in URLs are masked.

use serde::Serialize;

use super::Config;
use super::setting::SETTINGS;

/// An effective setting, with its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingValue {
    /// `section.name`, as in the configuration file.
    pub name: &'static str,
    /// The value in TOML notation.
    pub value: String,
    /// The flag, the variable, or the file with line and column that sets the value, or `default`.
    pub source: String,
    /// Whether a part of the value is secret and replaced by dots.
    #[serde(skip)]
    pub is_masked: bool,
    /// The value in the configuration that was read last, if it needs a restart to apply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<String>,
}

impl Config {
    /// Lists every setting in the order of the reference.
    #[must_use]
    pub fn setting_values(&self) -> Vec<SettingValue> {
        let mut config = self.clone();
        let value = |setting: &super::setting::Setting| {
            let unmasked = setting.format_value(&mut config);
            let value = mask_password(&unmasked);
            let source = self.setting_sources.get(setting.path).cloned();
            SettingValue {
                name: setting.path,
                is_masked: value != unmasked || setting.contains_secret(&mut config),
                value,
                source: source.unwrap_or_else(|| "default".to_owned()),
                pending: None,
            }
        };
        SETTINGS.iter().map(value).collect()
    }

    /// Lists every effective setting after a reload, and the different values of `loaded`, the configuration that
    /// was read.
    #[must_use]
    pub fn setting_values_with_pending(&self, loaded: &Self) -> Vec<SettingValue> {
        let (mut in_force, mut loaded) = (self.clone(), loaded.clone());
        let mut values = self.setting_values();
        for (setting, value) in SETTINGS.iter().zip(&mut values) {
            let is_pending = setting.differs(&mut in_force, &mut loaded);
            value.pending = is_pending.then(|| mask_password(&setting.format_value(&mut loaded)));
        }
        values
    }
}

/// Replaces the user information of a URL in `value` with three dots.
fn mask_password(value: &str) -> String {
    let Some(start) = value.find("://").map(|index| index + 3) else { return value.to_owned() };
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
        let values = config.setting_values();
        assert_eq!(values.len(), SETTINGS.len());
        let value = |name: &str| values.iter().find(|value| value.name == name).unwrap();
        assert_eq!(value("pool.max_queued").source, "KEYCHOIR_POOL__MAX_QUEUED");
        assert_eq!(value("log.level").source, "default");
        assert_eq!(value("retry.timeout").value, "\"2m\"");
    }

    #[test]
    fn a_value_that_needs_a_restart_is_pending() {
        let start = Config::default();
        let mut loaded_config = start.clone();
        loaded_config.setting_sources.insert("server.listen", "keychoir.toml:2:1".to_owned());
        loaded_config.server.listen = ListenAddresses::parse(&["127.0.0.1:1"]).unwrap();
        loaded_config.pool.max_queued = 7;
        loaded_config.upstream.proxy = "http://alice:hunter2@proxy:1".parse().unwrap();
        let values =
            loaded_config.with_restart_settings_of(&start).setting_values_with_pending(&loaded_config);
        let value = |name: &str| values.iter().find(|value| value.name == name).unwrap();
        let listen = value("server.listen");
        assert_eq!((listen.value.as_str(), listen.source.as_str()), ("\"127.0.0.1:11011\"", "default"));
        assert_eq!(listen.pending.as_deref(), Some("\"127.0.0.1:1\""));
        assert_eq!(
            (value("pool.max_queued").value.as_str(), &value("pool.max_queued").pending),
            ("7", &None)
        );
        assert_eq!(value("upstream.proxy").pending.as_deref(), Some("\"http://...@proxy:1\""));
        assert!(values.iter().filter(|value| value.pending.is_some()).count() == 2);
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
