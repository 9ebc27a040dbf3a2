//! Tests of the mirror's URL and key: their sources and precedence, the warning about an incomplete mirror, and the
//! errors about a wrong URL or key.

use super::FakeMachine;
use crate::secret::SupabaseKeyForm;

const ANON: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYW5vbiJ9.c2lnbmF0dXJl";
const SERVICE_ROLE: &str =
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl";
const SB_SECRET: &str = "sb_secret_0123456789abcdef";

/// Checks the URL and the key of the mirror.
#[track_caller]
fn check_target(machine: &FakeMachine<'_>, expected: Option<(&str, &str)>) {
    let config = machine.config();
    let target = config.supabase.target();
    assert_eq!(
        target.map(|(url, key)| (url.to_string(), key.expose())),
        expected.map(|(url, key)| (url.to_owned(), key))
    );
    if let Some((_, key)) = target {
        let is_jwt = key.form() == SupabaseKeyForm::LegacyJwt;
        assert_eq!(is_jwt, key.expose() == SERVICE_ROLE, "only the service role key must be sent as a JWT");
    }
}

#[test]
fn the_mirror_uses_the_variables_of_supabases_tools() {
    const URL: &str = "https://p.supabase.co";
    check_target(&FakeMachine::with_key(), None);
    let machine = FakeMachine::with_key().variable("SUPABASE_URL", "https://p.supabase.co/rest/v1/");
    let secret = machine.clone().variable("SUPABASE_SECRET_KEY", SB_SECRET);
    check_target(&secret, Some((URL, SB_SECRET)));
    let service_role = machine.clone().variable("SUPABASE_SERVICE_ROLE_KEY", SERVICE_ROLE);
    check_target(&service_role, Some((URL, SERVICE_ROLE)));
    let quoted_key = format!("\"{SB_SECRET}\"\n");
    let file = machine.clone().variable("SUPABASE_SECRET_KEY_FILE", "/k").file("/k", &quoted_key);
    check_target(&file, Some((URL, SB_SECRET)));
    let credential =
        machine.clone().variable("CREDENTIALS_DIRECTORY", "/c").file("/c/supabase_secret_key", SB_SECRET);
    check_target(&credential, Some((URL, SB_SECRET)));
    let toml =
        FakeMachine::with_key().toml("[supabase]\nurl = \"https://p.supabase.co\"\nsecret_key_file = \"s\"");
    check_target(&toml.file("/etc/s", SB_SECRET), Some((URL, SB_SECRET)));
    check_target(&secret.variable("KEYCHOIR_SUPABASE__ENABLED", "false"), None);
}

#[test]
fn keychoirs_variable_overrides_supabases_variable_and_the_file() {
    let file = FakeMachine::with_key()
        .variable("SUPABASE_SECRET_KEY", SB_SECRET)
        .toml("supabase.url = \"https://file\"");
    check_target(&file, Some(("https://file", SB_SECRET)));
    let supabase_variable = file.variable("SUPABASE_URL", "https://theirs");
    check_target(&supabase_variable, Some(("https://theirs", SB_SECRET)));
    let keychoir_variable = supabase_variable.variable("KEYCHOIR_SUPABASE__URL", "https://ours");
    check_target(&keychoir_variable, Some(("https://ours", SB_SECRET)));
}

#[test]
fn a_key_for_web_pages_is_refused_with_advice() {
    const ADVICE: &str = "
    = set SUPABASE_SECRET_KEY to a secret key (sb_secret_…): in the project's settings, API keys
    = or SUPABASE_SERVICE_ROLE_KEY to the older service_role key, if the project still has one";
    let machine = FakeMachine::with_key().variable("SUPABASE_URL", "https://p.supabase.co");
    machine.clone().variable("SUPABASE_SERVICE_ROLE_KEY", ANON).check_problems(&format!(
        "SUPABASE_SERVICE_ROLE_KEY: this is the anon key: it is for web pages and has no write access to the mirrored tables{ADVICE}"
    ));
    machine.variable("SUPABASE_SECRET_KEY", "sb_publishable_0123").check_problems(&format!(
        "SUPABASE_SECRET_KEY: this is a publishable key: it is for web pages and has no write access to the mirrored tables{ADVICE}"
    ));
}

#[test]
fn an_incomplete_mirror_causes_a_warning() {
    FakeMachine::with_key().variable("SUPABASE_URL", "https://p.supabase.co").check_warnings(&[
        "SUPABASE_URL: the mirror in Supabase is off because it has no key: set SUPABASE_SECRET_KEY, or supabase.enabled = false",
    ]);
    FakeMachine::with_key().variable("SUPABASE_SECRET_KEY", SB_SECRET).check_warnings(&[
        "SUPABASE_SECRET_KEY: the mirror in Supabase is off because it has no URL: set SUPABASE_URL, or supabase.enabled = false",
    ]);
    FakeMachine::with_key().variable("SUPABASE_URL", "nonsense here").check_warnings(&[]);
    FakeMachine::with_key()
        .variable("SUPABASE_URL", "http://kong:8000")
        .variable("SUPABASE_SECRET_KEY", SB_SECRET)
        .check_warnings(&["SUPABASE_URL: Supabase's key is sent over the network in clear text: use https:// if the host supports it"]);
}

#[test]
fn a_url_of_another_service_is_refused_with_advice() {
    const ADVICE: &str = "    = write the project's URL, as in https://abcdefgh.supabase.co";
    let machine = FakeMachine::with_key().variable("SUPABASE_SECRET_KEY", SB_SECRET);
    for (text, message) in [
        (
            "postgresql://postgres:hunter2@db.p.supabase.co:5432/postgres",
            "this is the URL of the database, not of its API",
        ),
        ("https://supabase.com/dashboard/project/p", "this is the URL of the dashboard, not of the project"),
    ] {
        machine
            .clone()
            .variable("SUPABASE_URL", text)
            .check_problems(&format!("SUPABASE_URL: {message}\n{ADVICE}"));
    }
}
