//! Tests that a refusal restricts only the account, the endpoint or the request that it is about, and that all other
//! requests are served with the same keys. The submodules test refusals by some accounts and by all accounts.

mod all_accounts;
mod one_account;

use std::time::Duration;

use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, start_proxy_in};
use keychoir::simulator::{Fault, KeyPlan, Plan, WorkspacePlan};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn funded_plan() -> Plan {
    Plan::with_keys(KEYS.map(|key| (key, 100_000)))
}

/// Returns one workspace with one key for each of `tiers`, each with `credits`.
fn plan_with_tiers(tiers: &[&str], credits: u64) -> Plan {
    tiers.iter().zip(KEYS).enumerate().fold(Plan::with_keys([]), |plan, (number, (tier, key))| {
        let name = format!("ws_{number}");
        let workspace = WorkspacePlan { tier: (*tier).to_owned(), ..WorkspacePlan::new(&name, credits) };
        plan.with_workspace(workspace).with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(key, 0) })
    })
}

/// Parses a fault in the notation of the simulator.
fn fault(text: &str) -> Option<Fault> {
    Some(text.parse().unwrap_or_else(|error| panic!("the fault {text:?} must be valid: {error}")))
}

/// Asserts that ordinary speech is served, that every key is active, and that the proxy is ready.
async fn assert_every_key_serves(proxy: &TestProxy, case: &str) {
    assert_eq!(proxy.request_speech(10).await.status(), 200, "{case}: speech must be served");
    assert_eq!(
        proxy.key_statuses().await,
        vec!["active"; proxy.key_statuses().await.len()],
        "{case}: every key must be active"
    );
    assert_eq!(proxy.get("/readyz").await.status(), 200, "{case}: the proxy must be ready");
}

/// Restarts the proxy with the same database and a new provider.
async fn restart_with_plan(proxy: TestProxy, plan: Plan) -> TestProxy {
    let directory = proxy.close_unchecked().await;
    start_proxy_in(directory, plan, |_| {}).await
}

/// Waits until the keys have these statuses.
async fn wait_for_key_statuses(proxy: &TestProxy, expected: &[&str], case: &str) {
    let polling = async {
        while proxy.key_statuses().await != expected {
            tokio::task::yield_now().await;
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(20), polling).await;
    assert!(
        result.is_ok(),
        "{case}: the statuses must be {expected:?}, and they are {:?}",
        proxy.key_statuses().await
    );
}
