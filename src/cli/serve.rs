//! `keychoir serve`: starts the proxy with the configuration, serves until a signal, and shuts down
//! gracefully.

use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tracing::{debug, error, info, warn};

use super::key_table;
use super::reload::Reloading;
use super::signals::{SignalEvent, Signals};
use super::{
    ConfigSources, EX_CONFIG, EX_IOERR, cannot_listen, failure, files_read, load, notify, print_error,
    runtime,
};
use crate::app::{
    self, Address, AppConfig, Drained, Ended, HttpsState, InheritedSockets, ListenError, Running, StartError,
};
use crate::config::{Config, Listen, Loaded, LogFormat, Overrides};
use crate::policy::files::{self, RequestedLimits};
use crate::telemetry::{self, FlushAtEnd, LineFormat, Sink, keys_loaded};
use crate::upstream::Reach;

/// Timeout of the first polls of the quotas, which the table of keys shows. A provider that does
/// not respond must not delay the start.
const QUOTAS_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Time that is added to the longest shutdown in the stop timeout of the service manager.
const END_MARGIN: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ServeArguments {
    #[command(flatten)]
    sources: ConfigSources,
    /// Keep usage records in memory only; they are lost when the program ends.
    #[arg(long)]
    ephemeral: bool,
}

pub(super) fn run(arguments: ServeArguments) -> ExitCode {
    // Called before any thread starts, because the call changes the environment.
    let sockets = InheritedSockets::take();
    let ServeArguments { sources, ephemeral } = arguments;
    let overrides = Overrides { is_ephemeral: ephemeral, ..sources.overrides(sockets.count() > 0) };
    let loaded = match load(&overrides) {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let format = line_format(loaded.config.log.format);
    let sink = match Sink::stderr(format) {
        Ok(sink) => sink,
        Err(error) => return failure(&error),
    };
    // Dropped last, so that log lines during the shutdown of the runtime are written.
    let _flushed = FlushAtEnd;
    let level = match telemetry::start(format, &loaded.config.log.level.to_string(), sink) {
        Ok(level) => level,
        Err(error) => {
            print_error(&error);
            return ExitCode::from(EX_CONFIG);
        }
    };
    let reloading = Reloading::new(overrides, level, &loaded);
    match runtime() {
        Ok(runtime) => runtime.block_on(async {
            tokio::select! {
                code = serve(loaded, sockets, reloading) => code,
                never = notify::send_keep_alives() => match never {},
            }
        }),
        Err(error) => failure(&error),
    }
}

fn line_format(format: LogFormat) -> LineFormat {
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

async fn serve(loaded: Loaded, sockets: InheritedSockets, reloading: Reloading) -> ExitCode {
    let read = files_read(&loaded);
    let Loaded { mut config, warnings, .. } = loaded;
    config.server.max_connections = max_connections(&config);
    for warning in &warnings {
        warn!("{warning}");
    }
    let text = keys_loaded(config.keys.len(), &config.key_source.to_string());
    info!(event = "keys_loaded", count = config.keys.len(), "{text}");
    info!(event = "configuration_read", "{read}");
    if sockets.count() > 0 && !config.server.listen.iter().any(|listen| *listen == Listen::Systemd) {
        let count = sockets.count();
        warn!("systemd passes {count} sockets that are not used: add \"systemd\" to server.listen");
    }

    // Signals from here on are handled.
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return failure(&error),
    };
    let listeners = match app::listen(&config.server.listen, config.server.unix_mode, sockets).await {
        Ok(listeners) => listeners,
        Err(ListenError::Address { address, source }) => return failure(&cannot_listen(&address, &source)),
        Err(error @ (ListenError::NoSockets | ListenError::InvalidSocket(_))) => {
            print_error(&format_args!("keychoir: {error}"));
            return ExitCode::from(EX_CONFIG);
        }
    };
    let started =
        AppConfig::of(config).map_err(StartError::from).and_then(|settings| app::start(settings, listeners));
    let running = match started {
        Ok(running) => running,
        Err(error) => return not_started(&error),
    };
    notify::ready(&status(&running));
    run_until_stopped(running, signals, reloading).await
}

/// The maximum of client connections: the configured one, or fewer if the system allows too few
/// open files.
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
    let addresses = running.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let count = running.keys().len();
    let plural = if count == 1 { "" } else { "s" };
    format!("Serving with {count} key{plural} at {addresses}")
}

fn not_started(error: &StartError) -> ExitCode {
    print_error(&format_args!("keychoir: {error}"));
    match error {
        StartError::Database(_) | StartError::Unreadable(_) => {
            print_error(
                &"Write the usage records to another path with storage.path (or KEYCHOIR_STORAGE__PATH), or write none \
                  with storage.ephemeral = true (or --ephemeral).",
            );
            ExitCode::from(EX_CONFIG)
        }
        StartError::Exposed(_) => {
            print_error(&"Write a [[clients]] entry with `name` and `token_sha256`, or listen on 127.0.0.1.");
            ExitCode::from(EX_CONFIG)
        }
        StartError::Upstream(_) | StartError::Tls(_) | StartError::Https(_) => ExitCode::from(EX_CONFIG),
        StartError::Mirror(_) => ExitCode::from(EX_CONFIG),
        StartError::System(_) => ExitCode::FAILURE,
    }
}

/// Logs the addresses and the keys.
async fn log_welcome(running: &mut Running) {
    if running.first_round(QUOTAS_TIMEOUT).await {
        let keys = running.keys();
        let mut lines = key_table::lines(&keys).into_iter();
        if let Some(titles) = lines.next() {
            info!(event = "key_states", keys = keys.len(), "{titles}");
        }
        for (snapshot, line) in keys.iter().zip(lines) {
            let (key, name, number) =
                (snapshot.key.api_key().short().as_str(), snapshot.key.name(), snapshot.key.position() + 1);
            info!(event = "key_state", key, name, number, "{line}");
        }
        let free =
            keys.iter().filter(|key| key.key.workspace().tier().is_some_and(|tier| *tier == "free")).count();
        if free > 1 {
            warn!(
                "{free} keys are of free plans: ElevenLabs' terms discourage many free accounts and its abuse \
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
        let url = match address {
            Address::Tcp(address) => format!("http://{address}"),
            Address::Unix(_) => address.to_string(),
        };
        info!(event = "server_started", address = %address, "Server started at {url}");
    }
    let base = match running.addresses().iter().find(|address| matches!(address, Address::Tcp(_))) {
        Some(address) => format!("http://{address}"),
        // Clients require a host name in the URL. It is ignored on a Unix socket.
        None => "http://keychoir".to_owned(),
    };
    let tokens = running.client_names();
    let key = if tokens.is_empty() { "\"anything\"" } else { "TOKEN" };
    info!(event = "server_base_url", "├─ Base URL:  {base}   ElevenLabs(base_url=…, api_key={key})");
    if !tokens.is_empty() {
        info!(event = "server_tokens", "├─ TOKEN:     {}", token_line(&tokens));
    }
    if let Some(advice) = running.addresses().iter().find_map(|address| https_line(running.https(address))) {
        info!(event = "server_https", "├─ https:     {advice}");
    }
    info!(event = "server_status_url", "└─ Status:    {base}/api/elevenlabs-status");
}

/// The names of the clients, whose tokens are accepted.
fn token_line(names: &[String]) -> String {
    const MAX_SHOWN: usize = 3;
    let more = match names.len().saturating_sub(MAX_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = names.iter().take(MAX_SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    format!("of a client: {shown}{more}")
}

/// Advice for apps about https on the same port.
fn https_line(state: HttpsState) -> Option<&'static str> {
    match state {
        HttpsState::Off => None,
        HttpsState::Local => Some("on the same port; apps trust it after  eval \"$(keychoir env)\""),
        HttpsState::LocalInMemory => Some(
            "on the same port, by an authority in memory that no client can trust (server.tls_directory)",
        ),
        HttpsState::Configured => Some("on the same port, with the certificate of server.tls"),
    }
}

/// Logs the addresses and keys, which may wait for the provider. Returns a signal that arrives
/// meanwhile, so that a shutdown is not delayed.
async fn welcome_until_signal(running: &mut Running, signals: &mut Signals) -> Option<SignalEvent> {
    let mut welcome = pin!(log_welcome(running));
    let mut event = None;
    while event != Some(SignalEvent::End) {
        tokio::select! {
            () = welcome.as_mut() => break,
            next = signals.next() => event = Some(next),
        }
    }
    event
}

/// Serves and reloads until a signal to stop, and then shuts down gracefully. A second signal to
/// stop aborts the running requests.
async fn run_until_stopped(mut running: Running, mut signals: Signals, mut reloading: Reloading) -> ExitCode {
    let mut event = welcome_until_signal(&mut running, &mut signals).await;
    loop {
        let next = match event.take() {
            Some(event) => event,
            None => tokio::select! {
                event = signals.next() => event,
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
    let drain_timeout = reloading.drain_timeout();
    notify::stopping(drain_timeout + running.max_end_duration() + END_MARGIN);
    info!(event = "server_ending", "Ending: requests under way may take up to {} s", drain_timeout.as_secs());
    let mut is_aborted = false;
    let abort_signal = async {
        signals.end().await;
        is_aborted = true;
    };
    let Ended { drained, records_lost } = running.drain_unless(drain_timeout, abort_signal).await;
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
    if is_aborted { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
