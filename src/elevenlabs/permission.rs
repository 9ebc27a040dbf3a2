//! The provider's permissions of a key, and which of them a request needs. A refusal names the missing
//! one; the key is restricted for requests that need it, and still serves all others.
//!
//! Source of the names: `PermissionType` of the provider's OpenAPI document.

use http::Method;

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
    /// The permission with that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.binary_search(&name).ok().and_then(|at| u8::try_from(at).ok()).map(Self::of_number)
    }

    /// The provider's name of the permission.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.get(usize::from(self.number())).copied().unwrap_or_default()
    }

    /// The permission that a request needs, by the segments of its path after the version. `None` when it
    /// is unknown and only the provider can decide.
    #[must_use]
    pub fn of(method: &Method, words: &[&str]) -> Option<Self> {
        let reads = [Method::GET, Method::HEAD].contains(method);
        // The permission for reading, and the one for any other method.
        let [reading, other] = match words {
            ["text-to-speech" | "text-to-dialogue", ..] => const { only("text_to_speech") },
            ["speech-to-speech" | "voice-changer", ..] => const { only("speech_to_speech") },
            ["speech-to-text", ..] => const { only("speech_to_text") },
            ["sound-generation", ..] => const { only("sound_generation") },
            ["audio-isolation", ..] => const { only("audio_isolation") },
            ["forced-alignment", ..] => const { only("forced_alignment") },
            ["music", ..] => const { only("music_generation") },
            ["text-to-voice", ..] => const { only("voice_generation") },
            ["dubbing", ..] => const { pair("dubbing_read", "dubbing_write") },
            ["history", ..] => const { pair("speech_history_read", "speech_history_write") },
            ["models", ..] => const { pair("models_read", "models_write") },
            ["user", ..] => const { pair("user_read", "user_write") },
            ["studio", ..] => const { pair("projects_read", "projects_write") },
            ["audio-native", ..] => const { pair("audio_native_read", "audio_native_write") },
            ["convai", ..] => const { pair("convai_read", "convai_write") },
            ["pronunciation-dictionaries", ..] => {
                const { pair("pronunciation_dictionaries_read", "pronunciation_dictionaries_write") }
            }
            ["voices", "add"] if !reads => const { only("create_instant_voice_clone") },
            ["voices", "add", ..] if !reads => const { only("add_voice_from_voice_library") },
            ["voices", "pvc", ..] if !reads => const { only("create_professional_voice_clone") },
            ["voices", ..] => const { pair("voices_read", "voices_write") },
            _ => return None,
        };
        Some(if reads { reading } else { other })
    }
}

/// The permission of a known name. Evaluated at compile time; an unknown name does not compile.
const fn named(name: &str) -> Permission {
    let mut at = 0;
    while !is_same(NAMES[at].as_bytes(), name.as_bytes()) {
        at += 1;
    }
    #[expect(clippy::cast_possible_truncation, reason = "they are few")]
    Permission::of_number(at as u8)
}

const fn pair(reading: &str, other: &str) -> [Permission; 2] {
    [named(reading), named(other)]
}

const fn only(name: &str) -> [Permission; 2] {
    pair(name, name)
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
    fn the_names_are_sorted_for_the_search() {
        assert!(NAMES.is_sorted_by(|a, b| a < b));
        for name in NAMES {
            let permission = Permission::parse(name).unwrap();
            assert_eq!(permission.name(), name);
        }
        assert_eq!(Permission::parse("fly"), None);
    }

    #[track_caller]
    fn check(method: &Method, path: &str, expected: Option<&str>) {
        let words: Vec<&str> = path.split('/').collect();
        assert_eq!(Permission::of(method, &words).map(Permission::name), expected, "{method} {path}");
    }

    #[test]
    fn a_request_needs_what_its_path_says() {
        check(&Method::POST, "text-to-speech/x/stream", Some("text_to_speech"));
        check(&Method::GET, "history/x/audio", Some("speech_history_read"));
        check(&Method::DELETE, "history/x", Some("speech_history_write"));
        check(&Method::POST, "voices/add", Some("create_instant_voice_clone"));
        check(&Method::POST, "voices/add/u/v", Some("add_voice_from_voice_library"));
        check(&Method::GET, "voices/add", Some("voices_read"));
        check(&Method::POST, "voices/x/edit", Some("voices_write"));
        check(&Method::GET, "what/comes/next", None);
    }

    #[test]
    fn every_request_with_a_rule_has_a_permission_that_exists() {
        for root in [
            "text-to-speech",
            "speech-to-speech",
            "speech-to-text",
            "sound-generation",
            "audio-isolation",
            "forced-alignment",
            "music",
            "text-to-voice",
            "dubbing",
            "history",
            "models",
            "user",
            "studio",
            "audio-native",
            "convai",
            "pronunciation-dictionaries",
            "voices",
        ] {
            for method in [Method::GET, Method::POST] {
                assert!(Permission::of(&method, &[root]).is_some(), "{method} {root}");
            }
        }
    }
}
