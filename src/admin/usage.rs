//! Renders the document of `GET /api/keychoir-usage`: the usage of the client that requests it, without data about
//! keys or other clients.

use serde::Serialize;

use crate::policy::client::Client;
use crate::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use crate::policy::units::UnixMs;
use crate::proxy::UsageTotals;

/// The document of `GET /api/keychoir-usage`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientUsageDocument {
    client: String,
    /// `null` for a client without a quota.
    quota: Option<QuotaUsage>,
    requests: PeriodTotals,
    credits: PeriodTotals,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct QuotaUsage {
    /// The quota in the notation of the configuration, for example `10,000 credits per month`.
    limit: String,
    amount: u64,
    /// The used amount, including the reservations of requests in flight.
    used: u64,
    remaining: u64,
    /// The end of the period, or `null` if the period never ends.
    resets_at: Option<String>,
}

/// The usage of the current day, of the current month, and of all stored hours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct PeriodTotals {
    day: u64,
    month: u64,
    total: u64,
}

impl ClientUsageDocument {
    /// Creates the document of a client from its usage.
    #[must_use]
    pub fn new(client: &Client, totals: &UsageTotals, now: UnixMs) -> Self {
        Self {
            client: client.name.as_str().to_owned(),
            quota: client.rules.quota.map(|quota| QuotaUsage::new(quota, totals, now)),
            requests: PeriodTotals::new(totals.requests),
            credits: PeriodTotals::new(totals.credits),
        }
    }
}

impl QuotaUsage {
    fn new(quota: ClientQuota, totals: &UsageTotals, now: UnixMs) -> Self {
        let [day, month, total] = match quota.unit {
            QuotaUnit::Requests => totals.requests,
            QuotaUnit::Credits => totals.credits,
        };
        let used_amount = match quota.period {
            Period::Day => day,
            Period::Month => month,
            Period::Total => total,
        };
        Self {
            limit: quota.to_string(),
            amount: quota.amount,
            used: used_amount,
            remaining: quota.amount.saturating_sub(used_amount),
            resets_at: quota.period.end(now).map(UnixMs::rfc3339_seconds),
        }
    }
}

impl PeriodTotals {
    fn new([day, month, total]: [u64; 3]) -> Self {
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
    fn check_document(quota: Option<ClientQuota>, expected_quota: &serde_json::Value) {
        let client = Client { name: ClientName::new("app"), rules: Rules { quota, ..Rules::default() } };
        let totals = UsageTotals { client: client.name.clone(), requests: [1, 2, 3], credits: [40, 50, 60] };
        let document = serde_json::to_value(ClientUsageDocument::new(&client, &totals, NOW)).unwrap();
        let expected = json!({
            "client": "app",
            "quota": expected_quota,
            "requests": {"day": 1, "month": 2, "total": 3},
            "credits": {"day": 40, "month": 50, "total": 60},
        });
        assert_eq!(document, expected);
    }

    #[test]
    fn a_client_sees_its_own_usage() {
        check_document(None, &json!(null));
        let quota = |amount, unit, period| Some(ClientQuota { amount, unit, period });
        check_document(
            quota(45, QuotaUnit::Credits, Period::Month),
            &json!({
                "limit": "45 credits per month", "amount": 45, "used": 50, "remaining": 0,
                "resetsAt": "2026-12-01T00:00:00Z",
            }),
        );
        check_document(
            quota(5, QuotaUnit::Requests, Period::Total),
            &json!({"limit": "5 requests", "amount": 5, "used": 3, "remaining": 2, "resetsAt": null}),
        );
    }
}
