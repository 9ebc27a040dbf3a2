//! Builds the calls of `quotas.lua`, which divides the quotas of clients and users between replicas, and parses the
//! replies. `clients.rs` sends the calls with beats, and `link.rs` for single requests.

use std::time::{Duration, Instant};

use redis::Value;

use super::credits::{GRANT_LEASE, LEASE_MARGIN};
use super::link::client_id;
use super::reply::{parse_amount, parse_integer, parse_tuple};
use super::scripts::{Keyspace, QUOTAS, ScriptCall};
use crate::policy::client_quota::{Period, QuotaUnit};
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::proxy::{QuotaGrant, QuotaKey, QuotaReply, QuotaStatement};

/// Time to live of the use of a quota without a period after the last statement about it.
const TOTAL_TTL: Duration = Duration::from_secs(400 * 24 * 3_600);
/// The time for which Redis keeps the use of a quota after the end of its period.
const PERIOD_MARGIN: Duration = Duration::from_secs(24 * 3_600);

/// Returns the call of `quotas.lua` with these statements. `replicas` is the number of live replicas.
pub(super) fn quota_call(
    keyspace: &Keyspace,
    replica: &str,
    replicas: u32,
    statements: &[QuotaStatement],
) -> ScriptCall {
    let mut arguments =
        vec![replica.to_owned(), replicas.max(1).to_string(), GRANT_LEASE.as_millis().to_string()];
    for statement in statements {
        let QuotaStatement { key, limit, used, held, generation, needed, wanted } = statement;
        let ttl = ttl(key).as_millis();
        arguments
            .extend([*limit, *used, *held, *generation, *needed, *wanted].map(|number| number.to_string()));
        arguments.push(ttl.to_string());
    }
    let keys = statements.iter().map(|statement| quota_key(keyspace, &statement.key)).collect();
    ScriptCall { script: QUOTAS, keys, arguments }
}

/// Parses the reply to a statement that was sent at `sent_at`. A reply of an unexpected shape counts as unknown.
pub(super) fn parse_quota_reply(reply: &Value, sent_at: Instant) -> QuotaReply {
    let parse = || {
        let [is_granted, granted, used_by_others] = parse_tuple(reply)?;
        let grant = QuotaGrant {
            granted: parse_amount(granted)?,
            used_by_others: parse_amount(used_by_others)?,
            valid_until: sent_at + GRANT_LEASE - LEASE_MARGIN,
        };
        Ok::<_, super::reply::UnexpectedReply>(match parse_integer(is_granted)? {
            1 => QuotaReply::Granted(grant),
            _ => QuotaReply::Denied(grant),
        })
    };
    parse().unwrap_or(QuotaReply::Unknown)
}

fn quota_key(keyspace: &Keyspace, key: &QuotaKey) -> String {
    let owner = match key.user {
        Some(user) => {
            SharedId::new(SharedKind::User, &[key.client.as_str().as_bytes(), user.to_string().as_bytes()])
        }
        None => client_id(&key.client),
    };
    let unit = match key.unit {
        QuotaUnit::Requests => "requests",
        QuotaUnit::Credits => "credits",
    };
    let period = match key.period {
        Period::Day => "day",
        Period::Month => "month",
        Period::Total => "total",
    };
    keyspace.quota(owner, unit, period, key.period_start.0)
}

fn ttl(key: &QuotaKey) -> Duration {
    match key.period {
        Period::Day => Duration::from_secs(24 * 3_600) + PERIOD_MARGIN,
        Period::Month => Duration::from_secs(31 * 24 * 3_600) + PERIOD_MARGIN,
        Period::Total => TOTAL_TTL,
    }
}
