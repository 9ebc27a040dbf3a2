//! Builds the JSON documents about a client: one for operators, and one for the client itself. The latter may contain
//! the usage of an end user, and contains no information about keys.

use serde::Serialize;

use crate::policy::client::{Client, Clients, ConfiguredClient, Rules};
use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use crate::policy::units::UnixMs;
use crate::proxy::UsageTotals;
use crate::secret::UserFingerprint;

/// The document about a client for operators.
#[derive(Serialize)]
pub(crate) struct ClientDocument {
    pub(crate) name: String,
    /// The source of the client's configuration: `file`, `changed` (in the file, and changed at runtime), or `managed`
    /// (added at runtime).
    pub(crate) source: &'static str,
    /// The time at which the current token expires, or `None` if it does not expire.
    pub(crate) expires_at: Option<String>,
    /// The time at which the token that the last rotation replaced expires, or `None` if no replaced token is valid.
    pub(crate) previous_token_expires_at: Option<String>,
    #[serde(flatten)]
    pub(crate) limits: LimitsDocument,
    /// Names of the keys that may serve the client. If `keys` and `workspaces` are empty, all keys may serve it.
    pub(crate) keys: Vec<String>,
    /// Names of the workspaces whose keys may serve the client.
    pub(crate) workspaces: Vec<String>,
    /// Whether the client may bring its own provider key.
    pub(crate) bring_your_own_key: bool,
    /// Whether the client may request tokens and signed URLs of the provider despite a quota.
    pub(crate) provider_tokens: bool,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
}

/// The document that a client reads about itself. It contains no information about keys.
#[derive(Serialize)]
pub(crate) struct OwnDocument {
    pub(crate) client: String,
    #[serde(flatten)]
    pub(crate) limits: LimitsDocument,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
    /// The usage of the end user that the request names, or `None` if it names none.
    pub(crate) user: Option<UserDocument>,
}

/// The usage and the quota of an end user of a client.
#[derive(Serialize)]
pub(crate) struct UserDocument {
    /// The fingerprint of the user's id.
    pub(crate) id: String,
    pub(crate) quota: Option<QuotaDocument>,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
}

/// The limits of a client, which are a part of both documents.
#[derive(Serialize)]
pub(crate) struct LimitsDocument {
    pub(crate) quota: Option<QuotaDocument>,
    /// The quota of each end user, in the notation of the configuration.
    pub(crate) user_quota: Option<String>,
    pub(crate) rate_limit: Option<String>,
    pub(crate) max_concurrent: Option<u32>,
    /// Prefixes of the paths that the client may use. If the list is empty, the client may use all paths.
    pub(crate) paths: Vec<String>,
}

/// A quota, and its use in the current period.
#[derive(Serialize)]
pub(crate) struct QuotaDocument {
    /// The quota in the notation of the configuration.
    pub(crate) limit: String,
    pub(crate) amount: u64,
    pub(crate) unit: &'static str,
    pub(crate) period: &'static str,
    /// The used amount, including reservations of requests in progress.
    pub(crate) used: u64,
    pub(crate) remaining: u64,
    /// The time at which the period ends, or `None` if it never ends.
    pub(crate) resets_at: Option<String>,
}

/// The usage of the current day, of the current month, and of all stored hours.
#[derive(Serialize)]
pub(crate) struct UsageByPeriod {
    pub(crate) day: u64,
    pub(crate) month: u64,
    pub(crate) total: u64,
}

/// Returns the clients with a token, sorted by name. A client with two tokens is listed once.
pub(in crate::admin::api) fn sorted_clients(clients: &Clients) -> Vec<&ConfiguredClient> {
    let mut sorted_clients: Vec<&ConfiguredClient> = clients.with_token().collect();
    sorted_clients.sort_by_key(|configured| configured.client.name.as_str());
    sorted_clients.dedup_by_key(|configured| configured.client.name.as_str());
    sorted_clients
}

/// Returns the document about a client, for operators.
pub(in crate::admin::api) fn client_document(
    configured: &ConfiguredClient,
    usage: &UsageTotals,
    now: UnixMs,
) -> ClientDocument {
    let ConfiguredClient { client, tokens } = configured;
    let rules = &client.rules;
    let valid_previous_token = tokens.previous.filter(|token| !token.is_expired(now));
    ClientDocument {
        name: client.name.as_str().to_owned(),
        source: tokens.origin.as_str(),
        expires_at: tokens.current.expires_at.map(UnixMs::rfc3339),
        previous_token_expires_at: valid_previous_token
            .and_then(|token| token.expires_at)
            .map(UnixMs::rfc3339),
        limits: limits_document(rules, usage, now),
        keys: rules.allowed_keys.keys.clone(),
        workspaces: rules.allowed_keys.workspaces.clone(),
        bring_your_own_key: rules.may_bring_key,
        provider_tokens: rules.may_request_tokens,
        requests: usage_by_period(usage.requests),
        credits: usage_by_period(usage.credits),
    }
}

/// Returns the document that a client reads about itself and about the end user that its request names.
pub(in crate::admin::api) fn own_document(
    client: &Client,
    usage: &UsageTotals,
    user: Option<(UserFingerprint, UsageTotals)>,
    now: UnixMs,
) -> OwnDocument {
    let user = user.map(|(fingerprint, usage)| UserDocument {
        id: fingerprint.to_string(),
        quota: client.rules.user_quota.map(|limit| quota_document(limit, &usage, now)),
        requests: usage_by_period(usage.requests),
        credits: usage_by_period(usage.credits),
    });
    OwnDocument {
        client: client.name.as_str().to_owned(),
        limits: limits_document(&client.rules, usage, now),
        requests: usage_by_period(usage.requests),
        credits: usage_by_period(usage.credits),
        user,
    }
}

fn limits_document(rules: &Rules, usage: &UsageTotals, now: UnixMs) -> LimitsDocument {
    LimitsDocument {
        quota: rules.quota.map(|limit| quota_document(limit, usage, now)),
        user_quota: rules.user_quota.map(|limit| limit.to_string()),
        rate_limit: rules.rate_limit.map(|limit| limit.to_string()),
        max_concurrent: rules.max_concurrent,
        paths: rules.paths.clone(),
    }
}

fn quota_document(quota: ClientQuota, usage: &UsageTotals, now: UnixMs) -> QuotaDocument {
    let (unit, [day, month, total]) = match quota.unit {
        QuotaUnit::Requests => ("requests", usage.requests),
        QuotaUnit::Credits => ("credits", usage.credits),
    };
    let (period, used) = match quota.period {
        Period::Day => ("day", day),
        Period::Month => ("month", month),
        Period::Total => ("total", total),
    };
    QuotaDocument {
        limit: quota.to_string(),
        amount: quota.amount,
        unit,
        period,
        used,
        remaining: quota.amount.saturating_sub(used),
        resets_at: quota.period.end(now).map(UnixMs::rfc3339),
    }
}

fn usage_by_period([day, month, total]: [u64; 3]) -> UsageByPeriod {
    UsageByPeriod { day, month, total }
}
