//! Logs facts for operators at startup: the keys with their quotas, the addresses, how an app connects over HTTP and
//! HTTPS, and the URLs of the dashboard and the status. Warns about an unreachable provider and about free plans.

use std::time::Duration;

use tracing::{info, warn};

use crate::app::{Address, HttpsState, RunningApp};
use crate::cli::diagnosis::{FREE_PLAN, free_plans_message};
use crate::cli::key_table;
use crate::pool::KeySnapshot;
use crate::upstream::Reachability;

/// Maximum wait for the first polls of the quotas, which the table of keys shows. A provider that does not respond must
/// not delay startup for longer.
const FIRST_POLL_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Logs the keys and the addresses. Waits at most [`FIRST_POLL_TIMEOUT`] for the quotas of the keys, and does not log
/// the keys without them.
pub(super) async fn log_welcome(running: &mut RunningApp) {
    if running.wait_for_first_poll(FIRST_POLL_TIMEOUT).await {
        log_keys(&running.keys());
    }
    if running.reachability() == Reachability::Unreachable {
        warn!(
            event = "upstream_unreachable",
            "ElevenLabs cannot be reached: connections to it fail. Requests get 502 until a connection succeeds; \
             `keychoir status` shows when it does"
        );
    }
    log_addresses(running);
}

/// Logs the table of keys, and a warning if several keys belong to free plans.
fn log_keys(keys: &[KeySnapshot]) {
    let mut lines = key_table::format_lines(keys).into_iter();
    if let Some(titles) = lines.next() {
        info!(event = "key_states", keys = keys.len(), "{titles}");
    }
    for (snapshot, line) in keys.iter().zip(lines) {
        let (key, name, number) =
            (snapshot.key.api_key().short().as_str(), snapshot.key.name(), snapshot.key.position() + 1);
        info!(event = "key_state", key, name, number, "{line}");
    }
    let is_free =
        |snapshot: &&KeySnapshot| snapshot.key.workspace().tier().is_some_and(|tier| *tier == FREE_PLAN);
    let free_keys = keys.iter().filter(is_free).count();
    if free_keys > 1 {
        warn!("{}", free_plans_message(free_keys));
    }
}

/// Logs the addresses of Keychoir, and how an app uses them.
fn log_addresses(running: &RunningApp) {
    for address in running.addresses() {
        info!(event = "server_started", address = %address, "Server started at {}", listener_url(address));
    }
    let base_url = match running.addresses().iter().find(|address| matches!(address, Address::Tcp(_))) {
        Some(address) => format!("http://{address}"),
        // Clients require a host name in the URL, although it is not used on a Unix socket.
        None => "http://keychoir".to_owned(),
    };
    let client_names = running.client_names();
    let api_key = if client_names.is_empty() { "\"anything\"" } else { "TOKEN" };
    info!(event = "server_base_url", "├─ Base URL:  {base_url}   ElevenLabs(base_url=…, api_key={api_key})");
    if !client_names.is_empty() {
        info!(event = "server_tokens", "├─ TOKEN:     {}", token_line(&client_names));
    }
    if let Some(advice) = running.addresses().iter().find_map(|address| https_line(running.https(address))) {
        info!(event = "server_https", "├─ HTTPS:     {advice}");
    }
    for address in running.operator_addresses() {
        info!(event = "admin_started", address = %address, "├─ Admin API: {}", listener_url(address));
    }
    let status_url = match running.operator_addresses().first() {
        Some(Address::Unix(_)) => None,
        Some(address @ Address::Tcp(_)) => Some(listener_url(address)),
        None => Some(base_url),
    };
    match status_url {
        Some(url) => {
            info!(event = "dashboard_url", "├─ Dashboard: {url}/_/   run `keychoir dashboard` to sign in");
            info!(event = "server_status_url", "└─ Status:    {url}/api/elevenlabs-status");
        }
        None => info!(event = "server_status_url", "└─ Status:    run `keychoir status`"),
    }
}

/// Formats the address of a listener for a message: as a URL, or as the path of a Unix socket.
fn listener_url(address: &Address) -> String {
    match address {
        Address::Tcp(address) => format!("http://{address}"),
        Address::Unix(_) => address.to_string(),
    }
}

/// Names the clients whose tokens are accepted.
fn token_line(names: &[String]) -> String {
    const MAX_LISTED: usize = 3;
    let more_text = match names.len().saturating_sub(MAX_LISTED) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    let listed_names = names.iter().take(MAX_LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
    format!("of a client: {listed_names}{more_text}")
}

/// Describes how apps can use HTTPS on the same port.
fn https_line(state: HttpsState) -> Option<&'static str> {
    match state {
        HttpsState::Off => None,
        HttpsState::LocalCa => Some("on the same port; apps trust it after  eval \"$(keychoir env)\""),
        HttpsState::InMemoryCa => {
            Some("on the same port, with a CA in memory that clients cannot trust (server.tls_directory)")
        }
        HttpsState::Configured => Some("on the same port, with the certificate of server.tls"),
    }
}
