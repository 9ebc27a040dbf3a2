//! Tests `keychoir config show` with settings from files, variables and flags: it prints the source of each value and
//! no secret, and its output is a configuration with the same values.

use std::fs;

use serde_json::Value;

use crate::support::program::{keychoir_command, run, stderr};

const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223d452b";
const PROXY_PASSWORD: &str = "proxy-password-canary";
const TOKEN: &str = "client-token-canary-0123456789";

#[test]
fn every_value_is_printed_with_its_source_and_without_secrets() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("keychoir.toml");
    let text = format!(
        "[pool]\nqueue_timeout = \"7s\"\n[upstream]\nproxy = \"http://user:{PROXY_PASSWORD}@proxy:3128\"\n\
         [[keys]]\nname = \"main\"\nworkspace = \"team\"\nkey = \"{KEY}\"\n\
         [[clients]]\nname = \"app\"\nquota = \"3 requests\"\ntoken = \"{TOKEN}\"\n"
    );
    fs::write(&config, text).unwrap();
    let show = |more_arguments: &[&str]| {
        let arguments =
            ["config", "show", "--config", config.to_str().unwrap(), "--listen", "127.0.0.1:8123"];
        let mut command = keychoir_command(&[&arguments[..], more_arguments].concat());
        let output = run(command.env("HOME", home.path()).env("KEYCHOIR_POOL__MAX_QUEUED", "17"));
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        for secret in [KEY, PROXY_PASSWORD, TOKEN] {
            assert!(
                !text.contains(secret) && !stderr(&output).contains(secret),
                "the output must contain no secret: {text}"
            );
        }
        text
    };
    let text = show(&[]);
    let path = config.display();
    for line in [
        "listen = \"127.0.0.1:8123\"  # --listen",
        "max_queued = 17  # KEYCHOIR_POOL__MAX_QUEUED",
        &format!("queue_timeout = \"7s\"  # {path}:2:17"),
        "max_attempts = 16  # default",
        &format!("# proxy = \"http://...@proxy:3128\"  # {path}:4:9"),
        "# name = \"main\"",
        "# quota = \"3 requests\"",
    ] {
        let setting_name = line.split('=').next().unwrap();
        let setting_lines: Vec<&str> = text.lines().filter(|line| line.starts_with(setting_name)).collect();
        assert!(
            text.lines().any(|printed| printed == line),
            "{line} must be printed, and not {setting_lines:?}"
        );
    }
    let document: Value = serde_json::from_str(&show(&["--json"])).unwrap();
    let setting = |name: &str| {
        let settings = document["settings"].as_array().unwrap();
        settings.iter().find(|setting| setting["name"] == name).unwrap().clone()
    };
    assert_eq!(setting("pool.max_queued")["source"], "KEYCHOIR_POOL__MAX_QUEUED");
    assert_eq!(document["keys"][0]["name"], "main");
    assert_eq!(document["keys"][0]["source"], config.to_str().unwrap());
    assert_eq!(document["clients"][0]["name"], "app");
}

#[test]
fn the_output_is_a_configuration_with_the_same_values() {
    let home = tempfile::tempdir().unwrap();
    let pasted = home.path().join("pasted \"file\".toml");
    let show = |arguments: &[&str]| {
        let mut command = keychoir_command(&[&["config", "show"], arguments].concat());
        command.env("HOME", home.path()).env("ELEVENLABS_API_KEYS", KEY);
        if arguments.is_empty() {
            command
                .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9/below")
                .env("KEYCHOIR_SERVER__TLS", "off")
                .env("KEYCHOIR_RETRY__SPILL_DIRECTORY", home.path().join("a \"quoted\" \\directory"))
                .env("KEYCHOIR_ACCESS__HOSTS", "a.example,b.example");
        }
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let shown = show(&[]);
    fs::write(&pasted, &shown).unwrap();
    let shown_again = show(&["--config", pasted.to_str().unwrap()]);
    let parse_settings = |text: &str| {
        let document: toml::Table = text.parse().unwrap();
        assert!(document.len() >= 10, "the output must contain all settings: {text}");
        document
    };
    assert_eq!(
        parse_settings(&shown),
        parse_settings(&shown_again),
        "the pasted output must have the same effect"
    );
    assert_eq!(
        parse_settings(&shown_again)["upstream"]["base_url"].as_str(),
        Some("http://127.0.0.1:9/below")
    );
}
