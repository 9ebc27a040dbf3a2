//! Lists every setting in force with its source, for operators who ask where a value comes from. Keys and client
//! tokens are not settings of the table, so the list contains no secret; passwords in URLs are masked.

use serde::Serialize;

use super::Config;
use super::setting::SETTINGS;

/// A setting in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingValue {
    /// `section.name`, as in the configuration file.
    pub name: &'static str,
    /// The value in TOML notation.
    pub value: String,
    /// The flag, the variable, or the file with line and column that sets it; `default` if none does.
    pub source: String,
    /// Whether a part of the value is secret and replaced by dots.
    #[serde(skip)]
    pub is_masked: bool,
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
                is_masked: value != unmasked,
                value,
                source: source.unwrap_or_else(|| "default".to_owned()),
            }
        };
        SETTINGS.iter().map(value).collect()
    }
}

/// Replaces the user information of a URL in `value` by three dots.
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
