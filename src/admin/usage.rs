//! The document of `GET /api/keychoir-usage`: the pool usage of the requesting client, without data
//! about keys or other clients.

use serde::Serialize;

use crate::policy::client::Client;
use crate::policy::client_quota::{ClientQuota, Measure, Period};
use crate::policy::units::UnixMs;
use crate::proxy::Used;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientUsageReport {
    client: String,
    /// `null` for a client without a quota.
    quota: Option<QuotaReport>,
    requests: Amounts,
    credits: Amounts,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct QuotaReport {
    /// In the notation of the configuration: `10,000 credits per month`.
    limit: String,
    amount: u64,
    /// Includes the reservations of concurrent requests.
    used: u64,
    remaining: u64,
    /// When the period ends; `null` for never.
    resets_at: Option<String>,
}

/// The usage of the current day, of the current month, and since records are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Amounts {
    day: u64,
    month: u64,
    total: u64,
}

impl ClientUsageReport {
    /// The document of a client with this usage.
    #[must_use]
    pub fn of(client: &Client, used: &Used, now: UnixMs) -> Self {
        Self {
            client: client.name.as_str().to_owned(),
            quota: client.rules.quota.map(|quota| QuotaReport::of(quota, used, now)),
            requests: Amounts::of(used.requests),
            credits: Amounts::of(used.credits),
        }
    }
}

impl QuotaReport {
    fn of(quota: ClientQuota, used: &Used, now: UnixMs) -> Self {
        let amounts = match quota.measure {
            Measure::Requests => used.requests,
            Measure::Credits => used.credits,
        };
        let [day, month, total] = amounts;
        let used = match quota.period {
            Period::Day => day,
            Period::Month => month,
            Period::Ever => total,
        };
        Self {
            limit: quota.to_string(),
            amount: quota.amount,
            used,
            remaining: quota.amount.saturating_sub(used),
            resets_at: quota.period.end(now).map(UnixMs::rfc3339_seconds),
        }
    }
}

impl Amounts {
    fn of([day, month, total]: [u64; 3]) -> Self {
        Self { day, month, total }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::policy::client::{ClientName, Rules};

    const NOW: UnixMs = UnixMs(1_796_000_000_000);

    #[track_caller]
    fn check(quota: Option<ClientQuota>, expected: &serde_json::Value) {
        let client = Client { name: ClientName::new("app"), rules: Rules { quota, ..Rules::default() } };
        let used = Used { client: client.name.clone(), requests: [1, 2, 3], credits: [40, 50, 60] };
        let document = serde_json::to_value(ClientUsageReport::of(&client, &used, NOW)).unwrap();
        let whole = json!({
            "client": "app",
            "quota": expected,
            "requests": {"day": 1, "month": 2, "total": 3},
            "credits": {"day": 40, "month": 50, "total": 60},
        });
        assert_eq!(document, whole);
    }

    #[test]
    fn a_client_sees_its_own_usage() {
        check(None, &json!(null));
        let quota = |amount, measure, period| Some(ClientQuota { amount, measure, period });
        check(
            quota(45, Measure::Credits, Period::Month),
            &json!({
                "limit": "45 credits per month", "amount": 45, "used": 50, "remaining": 0,
                "resetsAt": "2026-12-01T00:00:00Z",
            }),
        );
        check(
            quota(5, Measure::Requests, Period::Ever),
            &json!({"limit": "5 requests", "amount": 5, "used": 3, "remaining": 2, "resetsAt": null}),
        );
    }
}
