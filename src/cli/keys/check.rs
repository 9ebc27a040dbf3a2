//! `keychoir keys check`: lets the running Keychoir check one key or all keys at ElevenLabs, and prints the plan,
//! credits, permissions and latency of each. A check charges nothing.

use std::process::ExitCode;

use clap::Args;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::control::{AdminClient, ControlOptions, Target};
use crate::cli::table::{Alignment, Table, abbreviate, truncate};
use crate::cli::{CommandResult, build_runtime, fail, print};

#[derive(Debug, Args)]
pub(super) struct CheckArguments {
    /// The name, the id or the short form of one key. By default, all keys are checked.
    #[arg(value_name = "NAME")]
    key: Option<String>,
    #[command(flatten)]
    options: ControlOptions,
}

/// The result of the check of one key, as the admin API reports it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct KeyCheckResult {
    name: Option<String>,
    short_key: String,
    outcome: String,
    plan: Option<String>,
    is_paid: Option<bool>,
    credits_remaining: Option<u64>,
    permissions: CheckedPermissions,
    max_concurrent_speech: Option<u32>,
    latency_ms: u64,
    refusal: Option<ReportedRefusal>,
    /// The reason why ElevenLabs did not respond.
    reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CheckedPermissions {
    user_read: Option<bool>,
    models_read: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ReportedRefusal {
    status: u16,
    code: String,
    meaning: String,
}

/// Checks the keys one after the other. Exits with 1 if one of them is not valid.
pub(super) fn run(arguments: &CheckArguments) -> CommandResult {
    let CheckArguments { key, options } = arguments;
    let documents = build_runtime()?.block_on(async {
        match options.connect().await? {
            Target::Server(client) => check_keys(&client, key.as_deref()).await,
            Target::Offline(_) => {
                Err(fail("keys are checked by the running server, and none responds: start it, or use `keychoir check --online`"))
            }
        }
    })?;
    let results = documents
        .iter()
        .map(KeyCheckResult::deserialize)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| fail(format_args!("the response of the server is not valid: {error}")))?;
    if options.json {
        print(&json!({"checks": documents}));
    } else {
        print(&format_results(&results));
    }
    if results.iter().all(KeyCheckResult::is_valid) { Ok(()) } else { Err(ExitCode::FAILURE) }
}

/// Requests the check of `key`, or of each key of the pool. Returns the documents of the admin API.
async fn check_keys(client: &AdminClient, key: Option<&str>) -> Result<Vec<Value>, ExitCode> {
    let ids = match key {
        Some(key) => vec![client.find_key_id(key).await?],
        None => client.key_ids().await?,
    };
    let mut documents = Vec::with_capacity(ids.len());
    for id in ids {
        documents.push(client.call(&Method::POST, &format!("/keys/{id}/check"), Some(json!({}))).await?);
    }
    Ok(documents)
}

impl KeyCheckResult {
    /// Returns whether the provider accepted the key. A key that may not read its subscription is valid.
    fn is_valid(&self) -> bool {
        matches!(self.outcome.as_str(), "valid" | "quota_unreadable")
    }

    /// Describes each problem of the key in a sentence, with advice if there is any.
    fn describe_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        match (&self.refusal, self.outcome.as_str()) {
            (Some(refusal), _) => problems.push(format!(
                "ElevenLabs responded with {} ({}): {}",
                refusal.status, refusal.code, refusal.meaning
            )),
            (None, "no_response") => {
                let reason = self.reason.as_deref().unwrap_or("no reason is known");
                problems.push(format!(
                    "ElevenLabs did not respond ({reason}): check the network with `keychoir check --online`."
                ));
            }
            (None, _) => {}
        }
        if self.is_paid == Some(false) {
            problems.push("The latest invoice of the account is not paid.".to_owned());
        }
        if self.permissions.user_read == Some(false) {
            problems.push("The key lacks the permission user_read, so its credits are unknown.".to_owned());
        }
        if self.permissions.models_read == Some(false) {
            problems.push("The key lacks the permission models_read.".to_owned());
        }
        problems
    }
}

fn format_results(results: &[KeyCheckResult]) -> String {
    let mut table = Table::new([
        ("key", Alignment::Left),
        ("name", Alignment::Left),
        ("result", Alignment::Left),
        ("plan", Alignment::Left),
        ("left", Alignment::Right),
        ("slots", Alignment::Right),
        ("ms", Alignment::Right),
    ]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for result in results {
        table.add_row([
            result.short_key.clone(),
            or_dash(result.name.as_deref().map(|name| truncate(name, 12))),
            if result.is_valid() { "valid".to_owned() } else { result.outcome.replace('_', " ") },
            or_dash(result.plan.as_deref().map(|plan| truncate(plan, 10))),
            or_dash(result.credits_remaining.map(abbreviate)),
            or_dash(result.max_concurrent_speech.map(|slots| slots.to_string())),
            result.latency_ms.to_string(),
        ]);
    }
    let mut text = table.format();
    for result in results {
        for problem in result.describe_problems() {
            text.push_str(&format!("\n{}: {problem}", result.short_key));
        }
    }
    text
}
