//! Tests of forward proxies in settings, files and the environment: their precedence, their errors, and the masking of
//! their credentials.

use super::{FakeMachine, KEY};
use crate::config::{Config, ProxySetting};

/// Returns the forward proxy for the configured host of the provider, without credentials.
fn upstream_proxy(config: &Config) -> Option<String> {
    let url = &config.upstream.base_url;
    config.proxy_routes().for_upstream(url, &ProxySetting::Inherited).map(|proxy| proxy.to_string())
}

#[test]
fn a_proxy_comes_from_a_setting_a_file_or_the_environment() {
    let from_setting = FakeMachine::with_key().toml("[upstream]\nproxy = \"http://a:b@p:1\"\n");
    assert_eq!(upstream_proxy(&from_setting.config()), Some("http://p:1".into()));
    let from_file = FakeMachine::with_key()
        .toml("[upstream]\nproxy_file = \"proxy\"\n")
        .file("/etc/proxy", "http://a:b@q:2\n");
    assert_eq!(upstream_proxy(&from_file.config()), Some("http://q:2".into()));
    let from_environment = FakeMachine::with_key().variable("HTTPS_PROXY", "http://a:b@r:3");
    assert_eq!(upstream_proxy(&from_environment.config()), Some("http://r:3".into()));
    let overridden = from_setting.variable("KEYCHOIR_UPSTREAM__PROXY", "direct");
    assert_eq!(upstream_proxy(&overridden.variable("HTTPS_PROXY", "r:3").config()), None);
    assert_eq!(upstream_proxy(&FakeMachine::with_key().config()), None);
}

#[test]
fn a_key_and_the_mirror_may_have_their_own_proxies() {
    let config = FakeMachine::without_key()
        .file("/etc/proxy", "off\n")
        .file("/etc/k", KEY)
        .toml(
            "[upstream]\nproxy = \"http://p:1\"\n[supabase]\nproxy = \"socks5h://s:1\"\n\
             [[keys]]\nkey_file = \"k\"\nproxy_file = \"proxy\"\n",
        )
        .config();
    assert_eq!(config.keys[0].proxy, ProxySetting::Direct);
    assert_eq!(config.supabase.proxy.to_string(), "socks5h://s:1");
}

#[test]
fn two_values_of_one_proxy_and_invalid_proxies_are_errors() {
    FakeMachine::with_key()
        .file("/etc/proxy", "http://q:2")
        .toml("[upstream]\nproxy = \"http://p:1\"\nproxy_file = \"proxy\"\n")
        .check_problems(
            "
/etc/k.toml:3:14: both `upstream.proxy` and `upstream.proxy_file` are set
  3 | proxy_file = ***
    |              ^^^
    = remove one of them",
        );
    FakeMachine::with_key().toml("[upstream]\nproxy_file = \"none\"\n").check_problems(
        "
/etc/k.toml:2:14: the file cannot be read: it does not exist
  2 | proxy_file = ***
    |              ^^^",
    );
    FakeMachine::with_key().variable("https_proxy", "socks4://alice:hunter2@p").check_problems(
        "https_proxy: the proxy's scheme is not http, https or socks5h
    = write http://HOST:PORT, https://HOST:PORT or socks5h://HOST:PORT, with USER:PASSWORD@ before the host if the proxy requires it, or \"direct\" for no proxy
    = or set upstream.proxy, which has precedence over this variable",
    );
    let ignored = FakeMachine::with_key().variable("https_proxy", "socks4://p");
    assert!(ignored.variable("KEYCHOIR_UPSTREAM__PROXY", "direct").resolve().is_ok());
}

#[test]
fn a_proxy_at_an_address_of_this_program_is_an_error() {
    FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__PROXY", "http://localhost:11011").check_problems(
        "KEYCHOIR_UPSTREAM__PROXY: 127.0.0.1:11011 is an address on which Keychoir itself listens, and not a forward proxy
    = set the proxy to one that leads to ElevenLabs, or to \"direct\"",
    );
}

#[test]
fn a_configuration_file_with_the_password_of_a_proxy_contains_secrets() {
    let contains_secrets = |machine: FakeMachine<'_>| machine.resolve().unwrap().file_contains_secrets;
    assert!(contains_secrets(FakeMachine::with_key().toml("[upstream]\nproxy = \"http://a:b@p\"\n")));
    assert!(!contains_secrets(FakeMachine::with_key().toml("[upstream]\nproxy = \"http://p\"\n")));
    let variable = FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__PROXY", "http://a:b@p");
    assert!(!contains_secrets(variable.toml("[pool]\n")));
}

#[test]
fn no_output_contains_the_credentials_of_a_proxy() {
    for url in [
        "http://USER:PASS@p:1",
        "http://USER:PASS@",
        "http://USER:PA/SS@p",
        "http://USER:PASS",
        "USER:PASS@p:1",
        "USER:PASS",
        "socks4://USER:PASS@p",
        "http://USER:PASS@p:port",
        "http://p/USER:PASS",
    ] {
        let url = url.replace("USER", "aliceaccount").replace("PA", "hunt").replace("SS", "erpass");
        let quoted_setting = format!("[upstream]\nproxy = \"{url}\"\n");
        let unquoted_setting = format!("[upstream]\nproxy = {url}\n");
        let key_with_proxy = format!("[[keys]]\nkey = \"{KEY}\"\nproxy = \"{url}\"\n");
        for machine in [
            FakeMachine::with_key().toml(&quoted_setting),
            FakeMachine::with_key().toml(&unquoted_setting),
            FakeMachine::without_key().toml(&key_with_proxy),
            FakeMachine::with_key().toml("[upstream]\nproxy_file = \"f\"\n").file("/etc/f", &url),
            FakeMachine::with_key().variable("KEYCHOIR_UPSTREAM__PROXY", &url),
            FakeMachine::with_key().variable("KEYCHOIR_SUPABASE__PROXY", &url),
            FakeMachine::with_key().variable("HTTPS_PROXY", &url),
            FakeMachine::with_key().variable("all_proxy", &url),
        ] {
            let printed_text = super::canaries::all_output(&machine);
            let is_clean =
                ["aliceaccount", "hunt", "erpass"].iter().all(|secret| !printed_text.contains(secret));
            assert!(is_clean, "no output must contain the credentials of {url}:\n{printed_text}");
        }
    }
}
