//! The names of the provider's permissions of a key. A refusal names the missing one; the key is
//! restricted for requests that need it, and still serves all others. The table of endpoints has the
//! permissions that requests need.
//!
//! Source of the names: `PermissionType` of the provider's OpenAPI document.

use crate::policy::permission::Permission;

/// Permissions that requests through a pool can need, sorted.
#[rustfmt::skip]
const NAMES: [&str; 35] = [
    "add_voice_from_voice_library", "audio_isolation", "audio_native_read", "audio_native_write",
    "convai_read", "convai_write", "create_instant_voice_clone", "create_professional_voice_clone",
    "dubbing_read", "dubbing_write", "flows", "forced_alignment", "image_video_generation", "models_read",
    "models_write", "music_generation", "projects_read", "projects_write",
    "pronunciation_dictionaries_read", "pronunciation_dictionaries_write", "sound_generation",
    "speech_history_read", "speech_history_write", "speech_to_speech", "speech_to_text", "templates",
    "text_to_speech", "user_read", "user_write", "voice_generation", "voices_read", "voices_write",
    "workspace_analytics_full_read", "workspace_read", "workspace_write",
];

impl Permission {
    /// Parses the name of a permission; `None` for an unknown one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.binary_search(&name).ok().and_then(|at| u8::try_from(at).ok()).map(Self::of_number)
    }

    /// The provider's name of the permission.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.get(usize::from(self.number())).copied().unwrap_or_default()
    }
}

/// The permission of a known name. Evaluated at compile time; an unknown name does not compile.
pub(super) const fn named(name: &str) -> Permission {
    let mut at = 0;
    while !is_same(NAMES[at].as_bytes(), name.as_bytes()) {
        at += 1;
    }
    #[expect(clippy::cast_possible_truncation, reason = "they are few")]
    Permission::of_number(at as u8)
}

const fn is_same(one: &[u8], other: &[u8]) -> bool {
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

impl std::fmt::Debug for Permission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_sorted_and_parsed() {
        assert!(NAMES.is_sorted_by(|a, b| a < b));
        for name in NAMES {
            let permission = Permission::parse(name).unwrap();
            assert_eq!(permission.name(), name);
        }
        assert_eq!(Permission::parse("fly"), None);
    }
}
