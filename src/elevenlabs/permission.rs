//! Lists the names of the permissions that the provider gives to keys. A refusal names the missing permission. For
//! requests that need this permission, the pool then tries the key last. Other requests are not affected. The table
//! of endpoints contains the permission that each request needs.
//!
//! Source of the names: `PermissionType` of the provider's OpenAPI document.

use crate::policy::permission::Permission;

/// The permissions that requests through a pool can need, sorted by name.
#[rustfmt::skip] // Each line has several names.
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
    /// Parses the name of a permission. Returns `None` if the name is unknown.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.binary_search(&name).ok().and_then(|index| u8::try_from(index).ok()).map(Self::from_number)
    }

    /// Returns the provider's name of the permission.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.get(usize::from(self.number())).copied().unwrap_or_default()
    }
}

/// Returns the permission with a name. An unknown name in a constant is a compile error.
pub(super) const fn permission(name: &str) -> Permission {
    let mut index = 0;
    while !is_equal(NAMES[index].as_bytes(), name.as_bytes()) {
        index += 1;
    }
    #[expect(clippy::cast_possible_truncation, reason = "NAMES has fewer than 256 entries")]
    Permission::from_number(index as u8)
}

/// Returns whether two names are equal. The operator `==` is not available in constant functions.
const fn is_equal(left: &[u8], right: &[u8]) -> bool {
    let mut index = 0;
    while index < left.len() && index < right.len() && left[index] == right[index] {
        index += 1;
    }
    index == left.len() && index == right.len()
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
    fn the_names_are_sorted_and_can_be_parsed() {
        assert!(NAMES.is_sorted_by(|left, right| left < right), "the names must be sorted and distinct");
        for name in NAMES {
            let permission = Permission::parse(name).unwrap();
            assert_eq!(permission.name(), name);
        }
        assert_eq!(Permission::parse("fly"), None);
    }
}
