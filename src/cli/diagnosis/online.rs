//! Examines over the network the routes to the provider, the clock, the keys, the mirror and Redis, for
//! `keychoir check --online` and for `keychoir doctor` without `--offline`.

use std::net::IpAddr;
use std::time::Duration;

use super::{FREE_PLAN, Finding, free_plans_message};
use crate::admin::describe_refusal;
use crate::app::{
    AppConfig, CheckOutcome, CheckedKey, KeyCheck, LinkSettings, OnlineCheck, RedisProbe, RedisProbeError,
    RedisRefusal, RouteCheck, TableCheck, acl_setuser_command,
};
use crate::cli::table::abbreviate;
use crate::config::Config;
use crate::policy::units::UnixMs;
use crate::telemetry::key_name;

/// Maximum difference between this clock and the clock of the provider or of Redis without a warning. The provider's
/// `Date` header has whole seconds, and the response takes some more time.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(10);

/// Runs all examinations with the settings of `config` at the same time. Each request has a timeout:
/// `upstream.connect_timeout`, `quota_polling.timeout`, or the timeouts of `supabase` and `redis`.
pub(in crate::cli) async fn examine_online(config: &Config) -> Vec<Finding> {
    let check = AppConfig::from_config(config.clone())
        .map_err(|error| error.to_string())
        .and_then(|app_config| OnlineCheck::new(app_config).map_err(|error| error.to_string()));
    let check = match check {
        Ok(check) => check,
        Err(message) => return vec![Finding::problem("upstream", message)],
    };
    let (routes, keys, mirror, redis) =
        tokio::join!(check.check_routes(), check.check_keys(), check.check_mirror(), check.check_redis());
    let mut findings = Vec::new();
    for route in &routes {
        findings.extend(describe_route(route));
    }
    findings.extend(describe_clock(&routes));
    findings.extend(keys.iter().map(describe_key));
    findings.extend(describe_free_plans(&keys));
    findings.extend(match mirror {
        None => vec![Finding::ok("mirror", "no mirror is configured")],
        Some(Err(error)) => vec![Finding::problem("mirror", error)],
        Some(Ok(tables)) => describe_tables(check.mirror_url().unwrap_or_default(), &tables),
    });
    findings.extend(match (check.redis(), redis) {
        (Some(settings), Some(result)) => describe_redis(settings, &result),
        (_, _) => vec![Finding::ok("redis", "no Redis is configured: this is the only replica of its pool")],
    });
    findings
}

/// Describes the route: its DNS lookup, connection and certificate.
fn describe_route(route: &RouteCheck) -> Vec<Finding> {
    let RouteCheck { authority, is_used, addresses, probe, responded_at: _ } = route;
    let (name, via) = match authority.proxy() {
        Some(proxy) => (proxy.host(), format!(" through the proxy {proxy}")),
        None if *is_used => (authority.host(), String::new()),
        None => (authority.host(), " without the proxy".to_owned()),
    };
    // A firewall may block the direct route on purpose if a proxy is configured.
    let route_finding = |area, message: String| match is_used {
        true => Finding::problem(area, message),
        false => Finding::ok(area, message),
    };
    let is_address = name.parse::<IpAddr>().is_ok();
    let mut findings = Vec::new();
    findings.extend((!is_address).then(|| match addresses {
        Ok(addresses) => {
            let listed_addresses: Vec<String> = addresses.iter().take(3).map(ToString::to_string).collect();
            let more_text = if addresses.len() > listed_addresses.len() { ", …" } else { "" };
            Finding::ok("dns", format_args!("{name} resolves to {}{more_text}", listed_addresses.join(", ")))
        }
        Err(error) => {
            let finding = route_finding("dns", format!("{name} cannot be resolved: {error}"));
            finding.with_next_step("check the resolver of this machine, or set upstream.proxy")
        }
    }));
    match probe {
        Ok(probe) => {
            let milliseconds = probe.connect_time.as_millis();
            let message = format!("{authority} responds{via}, connected in {milliseconds} ms");
            findings.push(Finding::ok("route", message));
            findings.extend(route.certificate().map(|certificate| {
                let end = certificate.validity_period.until.rfc3339_seconds();
                let message = format!("issued by {}, valid until {end}", certificate.issuer);
                Finding::ok("tls", format!("the certificate of {}{via} is {message}", authority.host()))
            }));
        }
        Err(error) => {
            let finding = route_finding("route", format!("{authority} cannot be used{via}: {error}"));
            findings.push(match is_used {
                true => finding.with_next_step("check the firewall, upstream.proxy and upstream.ca_file"),
                false => finding,
            });
        }
    }
    findings
}

/// Compares the clock of this machine with the clock of the first host that reports its time.
fn describe_clock(routes: &[RouteCheck]) -> Option<Finding> {
    let reported_time =
        routes.iter().find_map(|route| Some((route.probe.as_ref().ok()?.date?, route.responded_at)));
    let (provider_time, local_time) = reported_time?;
    Some(compare_clocks(provider_time, local_time))
}

fn compare_clocks(provider_time: UnixMs, local_time: UnixMs) -> Finding {
    let (difference, direction) = if local_time > provider_time {
        (local_time.since(provider_time), "ahead of")
    } else {
        (provider_time.since(local_time), "behind")
    };
    let seconds = difference.as_secs();
    if difference > MAX_CLOCK_DIFFERENCE {
        let message = format_args!("this clock is {seconds} s {direction} that of the provider").to_string();
        return Finding::warning("clock", message)
            .with_next_step("synchronize it (NTP): resets of quotas and certificates depend on it");
    }
    Finding::ok("clock", "this clock agrees with that of the provider")
}

fn describe_key(checked: &CheckedKey) -> Finding {
    let CheckedKey { key, result } = checked;
    let short = key.api_key().short();
    let name = format!("{} ({short})", key_name(key.position(), key.name()));
    let KeyCheck { outcome, latency, may_read_user: _, may_read_models, max_concurrent_speech } = match result
    {
        Ok(check) => check,
        Err(error) => return Finding::warning("keys", format_args!("{name}: {error}")),
    };
    let milliseconds = latency.as_millis();
    match outcome {
        CheckOutcome::Valid { plan, quota, is_paid } => {
            let plan = plan.as_deref().unwrap_or("unknown");
            let credits = match quota.limit {
                Some(limit) => {
                    let remaining = abbreviate(quota.remaining());
                    format!("{remaining} of {} credits left", abbreviate(limit))
                }
                None => format!("{} credits used", abbreviate(quota.count)),
            };
            let lacks_models = if *may_read_models == Some(false) { ", without models_read" } else { "" };
            let concurrent = max_concurrent_speech.map(|count| format!(", {count} concurrent requests"));
            let concurrent = concurrent.unwrap_or_default();
            let message =
                format!("{name}: plan {plan}, {credits}{concurrent}{lacks_models}, {milliseconds} ms");
            if *is_paid == Some(false) {
                let finding =
                    Finding::warning("keys", format_args!("{message}; the latest invoice is not paid"));
                finding.with_next_step("pay it at elevenlabs.io: the workspace will be locked otherwise")
            } else if quota.limit.is_some() && quota.remaining() == 0 {
                Finding::warning("keys", message)
                    .with_next_step("wait for the reset, or add a key of another workspace")
            } else {
                Finding::ok("keys", message)
            }
        }
        CheckOutcome::QuotaUnreadable => {
            let message =
                format!("{name}: valid, but it may not read its credits (user_read), {milliseconds} ms");
            Finding::warning("keys", message)
                .with_next_step("give the key the permission User: read at elevenlabs.io")
        }
        CheckOutcome::Refused { status, verdict } => {
            let message = format!("{name} is refused: {status} {}", verdict.as_str());
            Finding::problem("keys", message).with_next_step(describe_refusal(*verdict))
        }
        CheckOutcome::NoResponse { reason } => {
            Finding::problem("keys", format_args!("{name}: no response: {reason}"))
                .with_next_step("see the findings about the route")
        }
    }
}

/// Warns if several keys belong to free plans.
fn describe_free_plans(keys: &[CheckedKey]) -> Option<Finding> {
    let is_free = |checked: &&CheckedKey| match &checked.result {
        Ok(KeyCheck { outcome: CheckOutcome::Valid { plan, .. }, .. }) => plan.as_deref() == Some(FREE_PLAN),
        Ok(_) | Err(_) => false,
    };
    let count = keys.iter().filter(is_free).count();
    (count > 1).then(|| {
        Finding::warning("keys", free_plans_message(count))
            .with_next_step("use one paid workspace, or one free account only")
    })
}

fn describe_tables(url: &str, tables: &[TableCheck]) -> Vec<Finding> {
    let describe = |TableCheck { table, result }: &TableCheck| match result {
        Ok(()) => Finding::ok("mirror", format_args!("{url} has the table {table}")),
        Err(reason) => Finding::problem("mirror", format_args!("{table} at {url}: {reason}")),
    };
    tables.iter().map(describe).collect()
}

/// Describes the Redis server in `settings`, and the ACL permissions that Keychoir's Redis user needs.
fn describe_redis(settings: &LinkSettings, result: &Result<RedisProbe, RedisProbeError>) -> Vec<Finding> {
    let acl = acl_setuser_command(settings);
    let probe = match result {
        Ok(probe) => probe,
        Err(error) if error.refusal() == Some(&RedisRefusal::PermissionDenied) => {
            return vec![Finding::problem("redis", error).with_next_step(format!("run in Redis: {acl}"))];
        }
        Err(error) => return vec![Finding::problem("redis", error)],
    };
    let RedisProbe { server, round_trip, server_time, local_time } = probe;
    let milliseconds = round_trip.as_secs_f64() * 1_000.0;
    let message = format!(
        "{} ({} {}) accepts the pool {}, round trip {milliseconds:.1} ms",
        server.address, server.product, server.version, settings.pool
    );
    let round_trip_finding = if *round_trip > settings.wait_timeout {
        let next = "place Redis near the replicas, or raise redis.wait_timeout";
        let limit = settings.wait_timeout.as_millis();
        Finding::warning("redis", format_args!("{message}, longer than redis.wait_timeout ({limit} ms)"))
            .with_next_step(next)
    } else {
        Finding::ok("redis", message)
    };
    let difference = server_time.since(*local_time).max(local_time.since(*server_time));
    let clock = (difference > MAX_CLOCK_DIFFERENCE).then(|| {
        let seconds = difference.as_secs();
        Finding::warning("redis", format_args!("this clock and that of Redis differ by {seconds} s"))
            .with_next_step("synchronize both (NTP): replicas compare times by the clock of Redis")
    });
    let permissions = Finding::ok("redis", format_args!("a user with these permissions suffices: {acl}"));
    [round_trip_finding].into_iter().chain(clock).chain([permissions]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::diagnosis::Severity;
    use crate::clock;

    #[test]
    fn a_clock_that_differs_by_more_than_ten_seconds_is_reported() {
        let now = clock::now();
        let later = |seconds| now.plus(Duration::from_secs(seconds));
        for (provider_time, local_time, severity, message_part) in [
            (now, later(10), Severity::Ok, "agrees"),
            (later(10), now, Severity::Ok, "agrees"),
            (now, later(11), Severity::Warning, "11 s ahead of"),
            (later(3_600), now, Severity::Warning, "3600 s behind"),
        ] {
            let finding = compare_clocks(provider_time, local_time);
            assert_eq!(finding.severity, severity, "the finding must have this severity: {finding}");
            assert!(finding.message.contains(message_part), "{message_part:?} must be in: {finding}");
        }
    }
}
