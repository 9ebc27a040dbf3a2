//! `keychoir serve`: starts the proxy with the configuration, and shuts it down gracefully.

use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tracing::{debug, error, info, warn};

use super::key_table;
use super::reload::Reloading;
use super::signals::{SignalEvent, Signals};
use super::{
    EX_CONFIG, EX_IOERR, Sources, cannot_listen, complain, failed, files_read, load, notify, runtime,
};
use crate::app::{
    self, Address, AppConfig, Drained, Ended, HttpsState, InheritedSockets, ListenError, Running, StartError,
};
use crate::config::{Config, Listen, Loaded, LogFormat, Overrides};
use crate::policy::files::{self, RequestedLimits};
use crate::telemetry::{self, FlushAtEnd, LineFormat, Sink, keys_loaded};
use crate::upstream::Reach;

/// Maximum wait for the first poll of the quotas, which the table of keys shows: a provider that
/// does not respond must not delay the start.
const QUOTAS_WAIT_MAX: Duration = Duration::from_millis(1_500);

/// Time that a service manager should allow beyond the longest shutdown.
const END_MARGIN: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct Serving {
    #[command(flatten)]
    sources: Sources,
    /// Keep usage records in memory only; they are lost when the program ends.
    #[arg(long)]
    ephemeral: bool,
}

pub(super) fn run(arguments: Serving) -> ExitCode {
    // Called before any thread starts, because it changes the environment.
    let passed = InheritedSockets::take();
    let Serving { sources, ephemeral } = arguments;
    let overrides = Overrides { is_ephemeral: ephemeral, ..sources.overrides(passed.count() > 0) };
    let loaded = match load(&overrides) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let form = form(loaded.config.log.format);
    let sink = match Sink::stderr(form) {
        Ok(sink) => sink,
        Err(error) => return failed(&error),
    };
    // Dropped last, so that log lines of the runtime's shutdown are written, too.
    let _flushed = FlushAtEnd;
    let level = match telemetry::start(form, &loaded.config.log.level.to_string(), sink) {
        Ok(level) => level,
        Err(error) => {
            complain(&error);
            return ExitCode::from(EX_CONFIG);
        }
    };
    let reloading = Reloading::new(overrides, level, &loaded);
    match runtime() {
        Ok(runtime) => runtime.block_on(async {
            tokio::select! {
                code = serve(loaded, passed, reloading) => code,
                never = notify::beat() => match never {},
            }
        }),
        Err(error) => failed(&error),
    }
}

fn form(format: LogFormat) -> LineFormat {
    match format {
        LogFormat::Terminal => LineFormat::Terminal,
        LogFormat::Ascii => LineFormat::Ascii,
        LogFormat::Json => LineFormat::Json,
        LogFormat::Auto => {
            let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| std::env::var(name).ok());
            telemetry::form_of_stderr(locale.as_deref())
        }
    }
}

async fn serve(loaded: Loaded, passed: InheritedSockets, reloading: Reloading) -> ExitCode {
    let read = files_read(&loaded);
    let Loaded { mut config, warnings, .. } = loaded;
    config.server.max_connections = max_connections(&config);
    for warning in &warnings {
        warn!("{warning}");
    }
    let text = keys_loaded(config.keys.len(), &config.key_source.to_string());
    info!(event = "keys_loaded", count = config.keys.len(), "{text}");
    info!(event = "configuration_read", "{read}");
    if passed.count() > 0 && !config.server.listen.iter().any(|listen| *listen == Listen::Systemd) {
        let count = passed.count();
        warn!("systemd passes {count} sockets that are not listened on: add \"systemd\" to server.listen");
    }

    // From here on no signal is lost.
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return failed(&error),
    };
    let listeners = match app::listen(&config.server.listen, config.server.unix_mode, passed).await {
        Ok(listeners) => listeners,
        Err(ListenError::Place { place, source }) => return failed(&cannot_listen(&place, &source)),
        Err(error @ (ListenError::NothingPassed | ListenError::Passed(_))) => {
            complain(&format_args!("keychoir: {error}"));
            return ExitCode::from(EX_CONFIG);
        }
    };
    let started =
        AppConfig::of(config).map_err(StartError::from).and_then(|parts| app::start(parts, listeners));
    let running = match started {
        Ok(running) => running,
        Err(error) => return not_started(&error),
    };
    notify::ready(&status(&running));
    until_told(running, signals, reloading).await
}

/// The maximum of client connections: as configured, or less if the system allows too few open
/// files.
fn max_connections(config: &Config) -> usize {
    let limit = app::raise_open_files().unwrap_or_else(|error| {
        debug!("the limit of open files cannot be raised: {error}");
        app::open_files_max()
    });
    let (connections, requests) = (config.server.max_connections, config.server.max_requests);
    let idle_connections = config.upstream.max_idle_connections;
    let fitting = files::connections(limit, RequestedLimits { connections, requests, idle_connections });
    if fitting < connections {
        warn!(
            event = "connections_limited",
            open_files_max = limit,
            max_connections = fitting,
            "The system allows {limit} open files, so {fitting} clients can be connected at once instead of \
             {connections} (server.max_connections); raise the hard limit (LimitNOFILE in a unit, ulimit -Hn in a shell)"
        );
    }
    fitting
}

/// The status line for a service manager: the number of keys, and the addresses.
fn status(running: &Running) -> String {
    let places = running.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let count = running.keys().len();
    let plural = if count == 1 { "" } else { "s" };
    format!("Serving with {count} key{plural} at {places}")
}

fn not_started(error: &StartError) -> ExitCode {
    complain(&format_args!("keychoir: {error}"));
    match error {
        StartError::Books(_) | StartError::Unreadable(_) => {
            complain(
                &"Give the usage records another place with storage.path (or KEYCHOIR_STORAGE__PATH), or keep none \
                  with storage.ephemeral = true (or --ephemeral).",
            );
            ExitCode::from(EX_CONFIG)
        }
        StartError::Exposed(_) => {
            complain(&"Write a [[clients]] entry with `name` and `token_sha256`, or listen on 127.0.0.1.");
            ExitCode::from(EX_CONFIG)
        }
        StartError::Upstream(_) | StartError::Tls(_) | StartError::Https(_) => ExitCode::from(EX_CONFIG),
        StartError::Mirror(_) => ExitCode::from(EX_CONFIG),
        StartError::System(_) => ExitCode::FAILURE,
    }
}

/// Logs the addresses and the keys.
async fn welcome(running: &mut Running) {
    if running.first_round(QUOTAS_WAIT_MAX).await {
        let keys = running.keys();
        let mut lines = key_table::lines(&keys).into_iter();
        if let Some(titles) = lines.next() {
            info!(event = "key_states", keys = keys.len(), "{titles}");
        }
        for (seen, line) in keys.iter().zip(lines) {
            let (key, name, number) =
                (seen.key.api_key().short().as_str(), seen.key.name(), seen.key.position() + 1);
            info!(event = "key_state", key, name, number, "{line}");
        }
        let free =
            keys.iter().filter(|key| key.key.workspace().tier().is_some_and(|tier| *tier == "free")).count();
        if free > 1 {
            warn!(
                "{free} keys are of free plans: ElevenLabs' terms frown on many free accounts and its abuse \
                 detection finds them; pool only workspaces that you are entitled to use"
            );
        }
    }
    if running.reach() == Reach::Unreachable {
        warn!(
            event = "upstream_unreachable",
            "ElevenLabs cannot be reached: connections to it fail. Requests get 502 until one succeeds; `keychoir \
             status` says when that is"
        );
    }
    for address in running.addresses() {
        let place = match address {
            Address::Tcp(address) => format!("http://{address}"),
            Address::Unix(_) => address.to_string(),
        };
        info!(event = "server_started", address = %address, "Server started at {place}");
    }
    let base = match running.addresses().iter().find(|address| matches!(address, Address::Tcp(_))) {
        Some(address) => format!("http://{address}"),
        // Clients need a host name, which is ignored on a Unix socket.
        None => "http://keychoir".to_owned(),
    };
    let tokens = running.client_names();
    let key = if tokens.is_empty() { "\"anything\"" } else { "TOKEN" };
    info!(event = "server_base_url", "├─ Base URL:  {base}   ElevenLabs(base_url=…, api_key={key})");
    if !tokens.is_empty() {
        info!(event = "server_tokens", "├─ TOKEN:     {}", token_line(&tokens));
    }
    if let Some(how) = running.addresses().iter().find_map(|address| https_line(running.https(address))) {
        info!(event = "server_https", "├─ https:     {how}");
    }
    info!(event = "server_status_url", "└─ Status:    {base}/api/elevenlabs-status");
}

/// The names of the clients whose tokens are accepted.
fn token_line(names: &[String]) -> String {
    const SHOWN_MAX: usize = 3;
    let more = match names.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = names.iter().take(SHOWN_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    format!("of a client: {shown}{more}")
}

/// Advice on how apps use https on the same port.
fn https_line(state: HttpsState) -> Option<&'static str> {
    match state {
        HttpsState::Off => None,
        HttpsState::Local => Some("on the same port; apps trust it after  eval \"$(keychoir env)\""),
        HttpsState::LocalInMemory => Some(
            "on the same port, by an authority in memory that no client can trust (server.tls_directory)",
        ),
        HttpsState::Given => Some("on the same port, with the certificate of server.tls"),
    }
}

/// Prints the welcome, which may wait for the provider, and returns a signal that came meanwhile; a
/// shutdown does not wait for the welcome.
async fn told_meanwhile(running: &mut Running, signals: &mut Signals) -> Option<SignalEvent> {
    let mut welcoming = pin!(welcome(running));
    let mut told = None;
    while told != Some(SignalEvent::End) {
        tokio::select! {
            () = welcoming.as_mut() => break,
            next = signals.next() => told = Some(next),
        }
    }
    told
}

/// Serves and reloads until a signal to stop, and shuts down gracefully; a second such signal
/// aborts the remaining requests.
async fn until_told(mut running: Running, mut signals: Signals, mut reloading: Reloading) -> ExitCode {
    let mut told = told_meanwhile(&mut running, &mut signals).await;
    loop {
        let next = match told.take() {
            Some(told) => told,
            None => tokio::select! {
                told = signals.next() => told,
                () = reloading.changed() => SignalEvent::Reload,
            },
        };
        match next {
            SignalEvent::End => break,
            SignalEvent::Reload => {
                notify::reloading();
                reloading.reload(&running);
                notify::ready(&status(&running));
            }
        }
    }
    let grace = reloading.grace();
    notify::stopping(grace + running.end_max() + END_MARGIN);
    info!(event = "server_ending", "Ending: running requests have {} s", grace.as_secs());
    let mut is_hurried = false;
    let hurry = async {
        signals.end().await;
        is_hurried = true;
    };
    let Ended { drained, records_lost } = running.drain_unless(grace, hurry).await;
    match drained {
        Drained::Clean => info!(event = "server_ended", "Ended"),
        Drained::Cut => warn!(event = "server_ended", "Ended; requests that still ran were cut"),
    }
    if records_lost > 0 {
        error!(
            event = "usage_records_dropped_at_end",
            records_lost, "{records_lost} usage records could not be written and are lost"
        );
        return ExitCode::from(EX_IOERR);
    }
    if is_hurried { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
