//! Renders the JSON document of a client, for operators and for the client itself.

use serde::Serialize;

use crate::policy::client::{Client, Clients, ConfiguredClient, Rules};
use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use crate::policy::units::UnixMs;
use crate::proxy::UsageTotals;
use crate::secret::UserFingerprint;

#[derive(Serialize)]
pub(crate) struct ClientDocument {
    pub(crate) name: String,
    /// `file`, `changed` or `managed`.
    pub(crate) source: &'static str,
    /// The time at which its token expires.
    pub(crate) expires_at: Option<String>,
    /// The time at which the token before the last rotation expires, while that token is valid.
    pub(crate) previous_token_expires_at: Option<String>,
    #[serde(flatten)]
    pub(crate) limits: LimitsDocument,
    /// Names of the keys that may serve it, or empty for all.
    pub(crate) keys: Vec<String>,
    pub(crate) workspaces: Vec<String>,
    pub(crate) bring_your_own_key: bool,
    pub(crate) provider_tokens: bool,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
}

/// The document that a client reads about itself. It contains nothing about keys.
#[derive(Serialize)]
pub(crate) struct OwnDocument {
    pub(crate) client: String,
    #[serde(flatten)]
    pub(crate) limits: LimitsDocument,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
    /// The end user that the request names.
    pub(crate) user: Option<UserDocument>,
}

#[derive(Serialize)]
pub(crate) struct UserDocument {
    /// The fingerprint of the user's id.
    pub(crate) id: String,
    pub(crate) quota: Option<QuotaDocument>,
    pub(crate) requests: UsageByPeriod,
    pub(crate) credits: UsageByPeriod,
}

#[derive(Serialize)]
pub(crate) struct LimitsDocument {
    pub(crate) quota: Option<QuotaDocument>,
    /// The quota of each end user, in the notation of the configuration.
    pub(crate) user_quota: Option<String>,
    pub(crate) rate_limit: Option<String>,
    pub(crate) max_concurrent: Option<u32>,
    /// Prefixes of the paths that it may use, or empty for all.
    pub(crate) paths: Vec<String>,
}

#[derive(Serialize)]
pub(crate) struct QuotaDocument {
    /// The quota in the notation of the configuration.
    pub(crate) limit: String,
    pub(crate) amount: u64,
    pub(crate) unit: &'static str,
    pub(crate) period: &'static str,
    /// The used amount, including the reservations of requests in progress.
    pub(crate) used: u64,
    pub(crate) remaining: u64,
    pub(crate) resets_at: Option<String>,
}

/// The usage of the current day, of the current month, and of all stored hours.
#[derive(Serialize)]
pub(crate) struct UsageByPeriod {
    pub(crate) day: u64,
    pub(crate) month: u64,
    pub(crate) total: u64,
}

/// Returns the clients with a token, by name. A client with two tokens is listed once.
pub(in crate::admin::api) fn clients_by_name(clients: &Clients) -> Vec<&ConfiguredClient> {
    let mut sorted_clients: Vec<&ConfiguredClient> = clients.with_token().collect();
    sorted_clients.sort_by_key(|configured| configured.client.name.as_str());
    sorted_clients.dedup_by_key(|configured| configured.client.name.as_str());
    sorted_clients
}

/// Returns the document of a client with this usage.
pub(in crate::admin::api) fn client_document(
    configured: &ConfiguredClient,
    used: &UsageTotals,
    now: UnixMs,
) -> ClientDocument {
    let ConfiguredClient { client, tokens } = configured;
    let rules = &client.rules;
    let previous = tokens.previous.filter(|token| !token.is_expired(now));
    ClientDocument {
        name: client.name.as_str().to_owned(),
        source: tokens.origin.as_str(),
        expires_at: tokens.current.expires_at.map(UnixMs::rfc3339),
        previous_token_expires_at: previous.and_then(|token| token.expires_at).map(UnixMs::rfc3339),
        limits: limits_document(rules, used, now),
        keys: rules.allowed_keys.keys.clone(),
        workspaces: rules.allowed_keys.workspaces.clone(),
        bring_your_own_key: rules.may_bring_key,
        provider_tokens: rules.may_request_tokens,
        requests: totals(used.requests),
        credits: totals(used.credits),
    }
}

/// Returns the document that a client reads about itself, and about the end user that it names.
pub(in crate::admin::api) fn own_document(
    client: &Client,
    used: &UsageTotals,
    user: Option<(UserFingerprint, UsageTotals)>,
    now: UnixMs,
) -> OwnDocument {
    let user = user.map(|(fingerprint, used)| UserDocument {
        id: fingerprint.to_string(),
        quota: client.rules.user_quota.map(|limit| quota_document(limit, &used, now)),
        requests: totals(used.requests),
        credits: totals(used.credits),
    });
    OwnDocument {
        client: client.name.as_str().to_owned(),
        limits: limits_document(&client.rules, used, now),
        requests: totals(used.requests),
        credits: totals(used.credits),
        user,
    }
}

fn limits_document(rules: &Rules, used: &UsageTotals, now: UnixMs) -> LimitsDocument {
    LimitsDocument {
        quota: rules.quota.map(|limit| quota_document(limit, used, now)),
        user_quota: rules.user_quota.map(|limit| limit.to_string()),
        rate_limit: rules.rate_limit.map(|limit| limit.to_string()),
        max_concurrent: rules.max_concurrent,
        paths: rules.paths.clone(),
    }
}

fn quota_document(quota: ClientQuota, used: &UsageTotals, now: UnixMs) -> QuotaDocument {
    let (unit, [day, month, total]) = match quota.unit {
        QuotaUnit::Requests => ("requests", used.requests),
        QuotaUnit::Credits => ("credits", used.credits),
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

fn totals([day, month, total]: [u64; 3]) -> UsageByPeriod {
    UsageByPeriod { day, month, total }
}
