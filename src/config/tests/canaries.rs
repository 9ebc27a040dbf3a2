//! Tests that no output of a load contains a secret that was pasted into any part of a file or into a variable, and
//! that no input causes a panic.

use super::{FakeMachine, KEY, OTHER_KEY, TOKEN};
use crate::config::KeyRequirement;

/// Returns all texts that can be printed after the configuration is resolved.
pub(super) fn all_output(machine: &FakeMachine<'_>) -> String {
    match machine.resolve() {
        Ok(loaded) => {
            let warnings: String = loaded.warnings.iter().map(ToString::to_string).collect();
            format!("{loaded:?}{loaded:#?}{warnings}{}", loaded.config.key_source)
        }
        Err(problems) => format!("{problems}{problems:?}{problems:#?}"),
    }
}

#[test]
fn no_output_contains_a_key_or_a_token() {
    let hexadecimal_key = "0123456789abcdef0123456789abcdef";
    let files = [
        "[[keys]]\nkey = KEY\n",
        "[[keys]]\nkey = \"KEY\n",
        "[[keys]]\nkey = \"KEY\"\nkey_file = \"KEY\"\n",
        "[[keys]]\nkey_file = \"KEY\"\n",
        "[[keys]]\nname = \"KEY\"\nworkspace = \"KEY\"\n",
        "[[keys]]\nKEY = \"KEY\"\n",
        "[[keys]]\nkey KEY\n",
        "[[keys]]\nkey = [\n\"KEY\",\n\"KEY\n]\n",
        "[[keys]]\nkey = \"\"\"\nKEY\nKEY\n",
        "[[keys]]\nkey = \"KEY KEY\"\n",
        "[[keys]]\nkey = \"KEY\"\n[[keys]]\nkey = \"KEY\"\n",
        "[keys]\nkey = \"KEY\"\n",
        "[[kyes]]\nkey = \"KEY\"\nfoo = = KEY\n",
        "[KEY]\n[\"KEY\"]\n[[KEY]]\nKEY = 3\n\"KEY\" = 3\nKEY\n",
        "keys = [\"KEY\", KEY]\n",
        "keys = \"KEY\"\nKEY = \"KEY\"\n",
        "elevenlabs = \"KEY\"\nelevenlabs = \"KEY\"\n",
        "[server]\nlisten = \"KEY\"\nlisten = KEY\nKEY = 3\n",
        "[pool]\nstrategy = \"KEY\"\nstrategi = \"KEY\"\nnear_limit_ratio = \"KEY\"\n",
        "[upstream]\nbase_url = \"https://KEY@host/?key=KEY\"\n",
        "[upstream]\nbase_url = \"https://host/KEY/../x\"\nbase_uri = 'https://KEY'\n",
        "[upstream]\nbase_url = \"KEY\"\n[websocket]\nsigned_url_base = \"KEY\"\n[admin]\nlisten = \"KEY\"\n",
        "[[keys]]\nkey = \"sk_other\"\nbase_url = \"KEY\"\n",
        "[log]\nlevel = \"KEY=KEY\"\nformat = \"KEY\"\n[quota_polling]\nenabled = \"KEY\"\n",
        "[storage]\npath = [\"KEY\"]\nqueue_max = \"KEY\"\n",
        "[retry]\ntimeout = \"KEY\"\nbuffer_size = \"KEY\"\nmax_attempts = \"KEY\"\n",
        "[replay]\ndirectory = \"KEY\"\ndeadline_ms = \"KEY\"\nKEY = 3\n[watch]\nenabled = \"KEY\"\n",
        "watch = \"KEY\"\nreplay = { directory = \"/KEY\", disk_max = \"KEY\" }\n",
        "[server]\ntls = \"KEY\"\ntls_directory = [\"KEY\"]\n",
        "[server.tls]\ncert = \"KEY\"\nkey = \"KEY\"\n",
        "server.tls = { cert = \"KEY\", key = \"KEY\", kye = \"KEY\" }\n",
    ];
    for text in files {
        for secret in [KEY, hexadecimal_key] {
            let text = text.replace("KEY", secret);
            let printed_text = all_output(
                &FakeMachine { key_requirement: KeyRequirement::Optional, ..FakeMachine::without_key() }
                    .toml(&text),
            );
            // A short form shows eleven and five characters of a key, and nothing between them.
            let has_key = printed_text.contains(&secret[12..24]);
            assert!(!has_key, "no output must contain the key of this file:\n{text}\n{printed_text}");
        }
    }
    let clients = [
        "[[clients]]\ntoken = TOKEN\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken_sha256 = \"TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken_file = \"TOKEN\"\n",
        "[[clients]]\nname = \"TOKEN!\"\ntoken = \"TOKEN\"\n",
        "[[clients]]\nname = \"a\"\ntoken = \"TOKEN\"\n",
        "[[clinets]]\ntokn = \"TOKEN\ntoken = TOKEN\n",
        "clients = [ { name = \"a\", token = \"TOKEN\", token = 3 }, \"TOKEN\" ]\n",
        "[clients]\na = \"TOKEN\"\n",
        "[[clients]]\nallowance = \"TOKEN\"\nrate = \"TOKEN\"\nconcurrency = \"TOKEN\"\n",
    ];
    for text in clients {
        let text = text.replace("TOKEN", TOKEN);
        let printed_text = all_output(&FakeMachine::with_key().toml(&text));
        assert!(
            !printed_text.contains(&TOKEN[..10]) && !printed_text.contains(&TOKEN[10..]),
            "no output must contain the token of this file:\n{text}\n{printed_text}"
        );
    }
    for value in ["KEY\u{e9}", "KEY,KEY", "[KEY]", "KEY$x", "\"KEY\" OTHER", "KEY\nOTHER"] {
        let value = value.replace("KEY", KEY).replace("OTHER", OTHER_KEY);
        for name in [
            "ELEVENLABS_API_KEYS",
            "ELEVENLABS_API_KEYS_FILE",
            "ELEVENLABS_API_KEY",
            "KEYCHOIR_KEYS",
            "KEYCHOIR_CONFIG",
            "KEYCHOIR_SERVER__LISTEN",
            "KEYCHOIR_UPSTREAM__BASE_URL",
            "KEYCHOIR_POOL__STRATEGY",
            "KEYCHOIR_LOG__LEVEL",
            "KEYCHOIR_QUOTA_POLLING__ENABLED",
            "KEYCHOIR_QUOTA_POLLING__INTERVAL",
            "KEYCHOIR_RETRY__BUFFER_SIZE",
            "KEYCHOIR_REPLAY__DIRECTORY",
            "KEYCHOIR_REPLAY__DEADLINE_MS",
            "KEYCHOIR_WATCH__ENABLED",
            "KEYCHOIR_SUPABASE__URL",
            "KEYCHOIR_SUPABASE__SECRET_KEY_FILE",
            "SUPABASE_URL",
            "SUPABASE_SECRET_KEY",
            "SUPABASE_SECRET_KEY_FILE",
            "SUPABASE_SERVICE_ROLE_KEY",
        ] {
            let machine = FakeMachine::with_key()
                .variable("SUPABASE_URL", "https://p")
                .variable("SUPABASE_SECRET_KEY_FILE", "/k");
            let with_mirror = all_output(&machine.variable(name, &value));
            let printed_text = all_output(&FakeMachine::without_key().variable(name, &value)) + &with_mirror;
            assert!(
                !printed_text.contains(&KEY[12..24]) && !printed_text.contains(&OTHER_KEY[12..24]),
                "no output must contain the keys in {name}:\n{printed_text}"
            );
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_input_causes_a_panic(
        line in "\\PC{0,40}",
        text in "(\\[{0,2}(server|keys|clients|x)\\]{0,2}|listen|key|token|=|\"{1,3}|'|ä|\t|\r?\n|#|[{},.0-9 -]){0,30}",
    ) {
        let machine = FakeMachine::with_key()
            .toml(&text)
            .variable("KEYCHOIR_SERVER__LISTEN", &line)
            .variable("KEYCHOIR_UPSTREAM__BASE_URL", &line)
            .variable("KEYCHOIR_LOG__LEVEL", &line)
            .variable("KEYCHOIR_RETRY__BUFFER_SIZE", &line)
            .variable("KEYCHOIR_RETRY__TIMEOUT", &line)
            .variable("KEYCHOIR_REPLAY__DIRECTORY", &line)
            .variable("SUPABASE_URL", &line)
            .variable("SUPABASE_SECRET_KEY", &line)
            .variable("SUPABASE_SERVICE_ROLE_KEY", &text)
            .variable("ELEVENLABS_API_KEYS", &text);
        let _ = all_output(&machine);
        let _ = all_output(&FakeMachine::without_key().toml(&line));
    }
}
