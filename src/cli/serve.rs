//! `keychoir serve`: starts the proxy with the configuration, serves until a signal, and shuts down
//! gracefully.

use std::pin::pin;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc::Receiver;
use tracing::{error, info, warn};

use super::diagnosis::free_plans_message;
use super::key_table;
use super::signals::{SignalEvent, Signals};
use super::{
    CommandResult, ConfigSources, EX_CONFIG, EX_IOERR, build_runtime, describe_bind_error, describe_files,
    fail, fail_with, load, locale, print_error,
};
use crate::admin::control::{Actor, Change, ChangeOrigin, ControlRequest, ControlSender};
use crate::app::{
    self, Address, AppConfig, ConnectionLimit, DrainOutcome, HttpsState, InheritedSockets, ListenError,
    ProgramListeners, RunningApp, ShutdownReport, StartError,
};
use crate::clock;
use crate::config::{
    Config, KeyRequirement, ListenAddress, LoadedConfig, LogFormat, Overrides, ProxySetting,
};
use crate::control::{
    ConfigReloader, Controller, ControllerEvent, NewAdminToken, create_recorder, delete_leftover_key_files,
    log_reload_error, record_unrecorded_changes,
};
use crate::platform::service_manager;
use crate::pool::KeySnapshot;
use crate::telemetry::{self, FlushOnDrop, LineFormat, LogLevelHandle, LogSink, keys_loaded_message};
use crate::upstream::Reachability;

/// Maximum wait for the first polls of the quotas, which the table of keys shows. A provider that does not respond must
/// not delay startup for longer.
const FIRST_POLL_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Margin between the longest shutdown and the stop timeout of the service manager.
const STOP_MARGIN: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ServeArguments {
    #[command(flatten)]
    sources: ConfigSources,
    /// Keep usage records only in memory. They are lost when Keychoir exits.
    #[arg(long)]
    ephemeral: bool,
}

pub(super) fn run(arguments: ServeArguments) -> CommandResult {
    // This must precede the start of any thread, because it changes the environment.
    let sockets = InheritedSockets::take();
    let ServeArguments { sources, ephemeral } = arguments;
    let overrides = Overrides {
        is_ephemeral: ephemeral,
        has_passed_sockets: sockets.count() > 0,
        ..sources.into_overrides(KeyRequirement::Required)
    };
    let loaded_config = load(&overrides)?;
    let format = line_format(loaded_config.config.log.format);
    let sink = LogSink::stderr(format).map_err(fail)?;
    // The guard is dropped last, so that log lines during the shutdown of the runtime are written.
    let _flush_on_drop = FlushOnDrop;
    let level =
        telemetry::start(format, &loaded_config.config.log.level.to_string(), sink).map_err(|error| {
            print_error(&error);
            ExitCode::from(EX_CONFIG)
        })?;
    build_runtime()?.block_on(async {
        tokio::select! {
            result = serve(loaded_config, sockets, overrides, level) => result,
            never = service_manager::send_keep_alives() => match never {},
        }
    })
}

fn line_format(format: LogFormat) -> LineFormat {
    match format {
        LogFormat::Terminal => LineFormat::Terminal,
        LogFormat::Ascii => LineFormat::Ascii,
        LogFormat::Json => LineFormat::Json,
        LogFormat::Auto => telemetry::stderr_format(locale().as_deref()),
    }
}

/// Saves the admin token that was generated at the first startup.
fn save_admin_token(new_token: NewAdminToken, reloader: &mut ConfigReloader) {
    match new_token.save() {
        Ok(path) => {
            // The new file is not a change to reload.
            reloader.mark_as_loaded(&path);
            info!(event = "admin_token_generated", "Generated the admin token: {}", path.display());
        }
        Err(error) => warn!(
            event = "admin_token_not_generated",
            "The admin token cannot be written, so the admin API cannot be used: {error}"
        ),
    }
}

async fn serve(
    mut loaded: LoadedConfig,
    sockets: InheritedSockets,
    overrides: Overrides,
    level: LogLevelHandle,
) -> CommandResult {
    let files = describe_files(&loaded);
    let max_connections = max_connections(&loaded.config);
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    let config = &loaded.config;
    let keys_message = keys_loaded_message(config.keys.len(), &config.describe_key_sources());
    info!(event = "keys_loaded", count = config.keys.len(), "{keys_message}");
    info!(event = "configuration_read", "{files}");
    if let Some(text) = proxy_message(config) {
        info!(event = "upstream_proxy", "{text}");
    }
    if sockets.count() > 0 && !config.server.listen.iter().any(|listen| *listen == ListenAddress::Systemd) {
        let count = sockets.count();
        warn!("systemd passes {count} sockets that are not used: add \"systemd\" to server.listen");
    }

    delete_leftover_key_files(&loaded.config);
    let new_token = NewAdminToken::generate_into(&mut loaded.config);
    let (sender, requests, generation) = ControlSender::channel();
    generation.store(loaded.config.generation, Ordering::Release);
    let mut reloader = ConfigReloader::new(Some(level), &loaded);
    let mut config = loaded.config;
    config.server.max_connections = max_connections;

    // Signals are handled from here on.
    let signals = Signals::new().map_err(fail)?;
    let mode = config.server.unix_mode;
    let clients = app::listen(&config.server.listen, mode, sockets).await;
    let operators = || app::listen_for_operators(&config.admin.listen, mode);
    let listeners = match clients.and_then(|clients| Ok((clients, operators()?))) {
        Ok((clients, operators)) => ProgramListeners { clients, operators },
        Err(ListenError::Address { address, source }) => {
            return Err(fail(describe_bind_error(&address, &source)));
        }
        Err(error @ (ListenError::NoSockets | ListenError::InvalidSocket(_))) => {
            return Err(fail_with(EX_CONFIG, error));
        }
    };
    let app = AppConfig::from_config(config)
        .map_err(StartError::from)
        .and_then(|app_config| app::start(AppConfig { control: Some(sender), ..app_config }, listeners))
        .map_err(report_start_error)?;
    if let Some(new_token) = new_token {
        save_admin_token(new_token, &mut reloader);
    }
    record_unrecorded_changes(&app.history(), generation.load(Ordering::Acquire), clock::now()).await;
    let controller =
        Controller::new(overrides, reloader, generation, create_recorder(app.history(), app.events()));
    service_manager::report_ready(&status_line(&app));
    run_until_stopped(app, signals, controller, requests).await
}

/// Describes the route to the provider, if a setting or the environment is about a forward proxy.
fn proxy_message(config: &Config) -> Option<String> {
    let text = config.proxy_routes().describe(&config.upstream.base_url);
    let own_count = config.keys.iter().filter(|key| key.proxy != ProxySetting::Inherited).count();
    let own_text = match own_count {
        0 => return text,
        1 => "1 key has its own proxy setting".to_owned(),
        count => format!("{count} keys have their own proxy settings"),
    };
    Some(text.map_or_else(|| own_text.clone(), |text| format!("{text}; {own_text}")))
}

/// Returns the maximum number of client connections, and warns if the system allows too few open files.
fn max_connections(config: &Config) -> usize {
    let limit = ConnectionLimit::determine(config);
    if limit.is_reduced() {
        warn!(
            event = "connections_limited",
            open_files_max = limit.open_files,
            max_connections = limit.allowed,
            "{limit}"
        );
    }
    limit.allowed
}

/// Formats the status line for a service manager, with the number of keys and the addresses.
fn status_line(running: &RunningApp) -> String {
    let addresses = running.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let count = running.keys().len();
    let plural = if count == 1 { "" } else { "s" };
    format!("Serving with {count} key{plural} at {addresses}")
}

/// Prints the error of a failed start, with advice, and returns the exit code.
fn report_start_error(error: StartError) -> ExitCode {
    let advice = error.advice();
    let code = fail_with(if error.is_system_error() { 1 } else { EX_CONFIG }, error);
    if let Some(advice) = advice {
        print_error(&advice);
    }
    code
}

/// Logs the addresses and the keys.
async fn log_welcome(running: &mut RunningApp) {
    if running.wait_for_first_poll(FIRST_POLL_TIMEOUT).await {
        let keys = running.keys();
        let mut lines = key_table::format_lines(&keys).into_iter();
        if let Some(titles) = lines.next() {
            info!(event = "key_states", keys = keys.len(), "{titles}");
        }
        for (snapshot, line) in keys.iter().zip(lines) {
            let (key, name, number) =
                (snapshot.key.api_key().short().as_str(), snapshot.key.name(), snapshot.key.position() + 1);
            info!(event = "key_state", key, name, number, "{line}");
        }
        let is_free =
            |snapshot: &&KeySnapshot| snapshot.key.workspace().tier().is_some_and(|tier| *tier == "free");
        let free_keys = keys.iter().filter(is_free).count();
        if free_keys > 1 {
            warn!("{}", free_plans_message(free_keys));
        }
    }
    if running.reachability() == Reachability::Unreachable {
        warn!(
            event = "upstream_unreachable",
            "ElevenLabs cannot be reached: connections to it fail. Requests get 502 until a connection succeeds; \
             `keychoir status` shows when it does"
        );
    }
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

/// Returns the URL of a listener for messages.
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

/// Logs the addresses and keys, for which it may wait for the provider. Returns the last signal that arrived
/// during the wait. A signal to stop ends the wait.
async fn welcome_until_signal(running: &mut RunningApp, signals: &mut Signals) -> Option<SignalEvent> {
    let mut welcome = pin!(log_welcome(running));
    let mut event = None;
    while event != Some(SignalEvent::Stop) {
        tokio::select! {
            () = welcome.as_mut() => break,
            next = signals.next() => event = Some(next),
        }
    }
    event
}

/// Makes a change. A change may wait for another process, which must not delay a stop: returns the stop immediately,
/// and a reload after the change.
async fn make_change(change: impl Future<Output = ()>, signals: &mut Signals) -> Option<SignalEvent> {
    let mut reload = None;
    let mut change = Box::pin(change);
    loop {
        tokio::select! {
            () = &mut change => return reload,
            event = signals.next() => match event {
                SignalEvent::Stop => return Some(event),
                SignalEvent::Reload => reload = Some(event),
            },
        }
    }
}

/// Shares the changes of operators with the other replicas, if there are any.
async fn share_overlay(controller: &mut Controller, app: &RunningApp) {
    if !app.has_replicas() {
        return;
    }
    match Box::pin(controller.share_overlay(Some(app))).await {
        Ok(port) => app.share_overlay(port),
        Err(error) => warn!(
            event = "overlay_not_shared",
            "Changes of operators at this replica do not apply to the others: {error}"
        ),
    }
}

/// Serves and reloads until a signal to stop, and then shuts down gracefully. A second signal to stop
/// aborts the running requests.
async fn run_until_stopped(
    mut app: RunningApp,
    mut signals: Signals,
    mut controller: Controller,
    mut requests: Receiver<ControlRequest>,
) -> CommandResult {
    let mut pending_event = make_change(share_overlay(&mut controller, &app), &mut signals).await;
    if pending_event != Some(SignalEvent::Stop) {
        pending_event = welcome_until_signal(&mut app, &mut signals).await.or(pending_event);
    }
    loop {
        let event = match pending_event.take() {
            Some(event) => event,
            None => tokio::select! {
                event = signals.next() => event,
                Some(request) = requests.recv() => {
                    match make_change(controller.answer_request(request, &app), &mut signals).await {
                        Some(event) => event,
                        None => continue,
                    }
                }
                event = controller.next_event() => match event {
                    ControllerEvent::FilesChanged => SignalEvent::Reload,
                    ControllerEvent::OverlayReceived(overlay) => {
                        match make_change(controller.merge_overlay(overlay, Some(&app)), &mut signals).await {
                            Some(event) => event,
                            None => continue,
                        }
                    }
                },
            },
        };
        match event {
            SignalEvent::Stop => break,
            SignalEvent::Reload => {
                service_manager::report_reloading();
                let origin = ChangeOrigin { actor: Actor::Reload, address: None };
                let reload = controller.make(Change::Reload, None, origin, Some(&app));
                if let Err(error) = Box::pin(reload).await {
                    log_reload_error(&error);
                }
                service_manager::report_ready(&status_line(&app));
            }
        }
    }
    // Callers that wait for a change receive an error immediately.
    drop(requests);
    let drain_timeout = controller.drain_timeout();
    service_manager::report_stopping(drain_timeout + app.max_duration_after_drain() + STOP_MARGIN);
    info!(
        event = "server_ending",
        "Shutting down: running requests may take up to {} s",
        drain_timeout.as_secs()
    );
    let mut is_aborted = false;
    let abort_signal = async {
        signals.wait_for_stop().await;
        is_aborted = true;
    };
    let ShutdownReport { drain_outcome, records_lost } = app.shut_down(drain_timeout, abort_signal).await;
    match drain_outcome {
        DrainOutcome::Completed => info!(event = "server_ended", "Ended"),
        DrainOutcome::Aborted => warn!(event = "server_ended", "Ended; running requests were aborted"),
    }
    if records_lost > 0 {
        error!(
            event = "usage_records_dropped_at_end",
            records_lost, "{records_lost} usage records could not be written and are lost"
        );
        return Err(ExitCode::from(EX_IOERR));
    }
    if is_aborted { Err(ExitCode::FAILURE) } else { Ok(()) }
}
