//! `keychoir serve`: starts Keychoir with the configuration, serves until a signal to stop, and shuts down gracefully.
//! Meanwhile, it makes the changes of operators and of other replicas, and reloads the configuration.

mod welcome;

use std::pin::pin;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc::Receiver;
use tracing::{error, info, warn};

use super::signals::{SignalEvent, Signals};
use super::{
    CommandResult, ConfigSources, EX_CONFIG, EX_IOERR, build_runtime, describe_bind_error, describe_files,
    fail, fail_with, load, locale, print_error,
};
use crate::admin::control::{Actor, Change, ChangeOrigin, ControlRequest, ControlSender};
use crate::app::{
    self, AppConfig, ConnectionLimit, DrainOutcome, InheritedSockets, ListenError, ProgramListeners,
    RunningApp, ShutdownReport, StartError,
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
use crate::telemetry::{self, FlushOnDrop, LineFormat, LogLevelHandle, LogSink, keys_loaded_message};
use welcome::log_welcome;

/// Time that the service manager allows for a stop in addition to the longest shutdown.
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
    // This call must precede the start of any thread, because it changes the environment.
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
    if let Some(message) = proxy_message(config) {
        info!(event = "upstream_proxy", "{message}");
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

/// Describes the route to the provider, if a setting or an environment variable configures a forward proxy.
fn proxy_message(config: &Config) -> Option<String> {
    let route = config.proxy_routes().describe(&config.upstream.base_url);
    let key_count = config.keys.iter().filter(|key| key.proxy != ProxySetting::Inherited).count();
    let key_note = match key_count {
        0 => return route,
        1 => "1 key has its own proxy setting".to_owned(),
        count => format!("{count} keys have their own proxy settings"),
    };
    Some(route.map_or_else(|| key_note.clone(), |route| format!("{route}; {key_note}")))
}

/// Returns the maximum number of client connections, and warns if it is reduced because the system allows too few open
/// files.
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
    let plural_suffix = if count == 1 { "" } else { "s" };
    format!("Serving with {count} key{plural_suffix} at {addresses}")
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

/// Logs the keys and the addresses, for which it may wait for the provider. Returns the last signal that arrived
/// during the wait. A signal to stop ends the wait.
async fn log_welcome_until_stop(running: &mut RunningApp, signals: &mut Signals) -> Option<SignalEvent> {
    let mut welcome = pin!(log_welcome(running));
    let mut last_signal = None;
    while last_signal != Some(SignalEvent::Stop) {
        tokio::select! {
            () = welcome.as_mut() => break,
            signal = signals.next() => last_signal = Some(signal),
        }
    }
    last_signal
}

/// Makes a change. A change may wait for another process, but a stop must not wait. A signal to stop therefore abandons
/// the change and is returned immediately. A signal to reload is returned after the change.
async fn make_change(change: impl Future<Output = ()>, signals: &mut Signals) -> Option<SignalEvent> {
    let mut reload = None;
    let mut change = Box::pin(change);
    loop {
        tokio::select! {
            () = &mut change => return reload,
            signal = signals.next() => match signal {
                SignalEvent::Stop => return Some(signal),
                SignalEvent::Reload => reload = Some(signal),
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

/// Waits for a signal, or for a change by an operator or another replica, and makes the change. Returns the signal,
/// or a reload if the files of the configuration have changed.
async fn make_next_change(
    app: &RunningApp,
    signals: &mut Signals,
    controller: &mut Controller,
    requests: &mut Receiver<ControlRequest>,
) -> Option<SignalEvent> {
    tokio::select! {
        signal = signals.next() => Some(signal),
        Some(request) = requests.recv() => make_change(controller.answer_request(request, app), signals).await,
        event = controller.next_event() => match event {
            ControllerEvent::FilesChanged => Some(SignalEvent::Reload),
            ControllerEvent::OverlayReceived(overlay) => {
                make_change(controller.merge_overlay(overlay, Some(app)), signals).await
            }
        },
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
    let mut pending_signal = make_change(share_overlay(&mut controller, &app), &mut signals).await;
    if pending_signal != Some(SignalEvent::Stop) {
        pending_signal = log_welcome_until_stop(&mut app, &mut signals).await.or(pending_signal);
    }
    loop {
        let signal = match pending_signal.take() {
            Some(signal) => Some(signal),
            None => make_next_change(&app, &mut signals, &mut controller, &mut requests).await,
        };
        match signal {
            None => {}
            Some(SignalEvent::Stop) => break,
            Some(SignalEvent::Reload) => {
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
    let mut is_shutdown_aborted = false;
    let abort_signal = async {
        signals.wait_for_stop().await;
        is_shutdown_aborted = true;
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
    if is_shutdown_aborted { Err(ExitCode::FAILURE) } else { Ok(()) }
}
