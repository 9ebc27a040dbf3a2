//! `keychoir serve`: from the configuration to a running proxy and back to a clean end.

use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::{debug, error, info, warn};

use super::{EX_CONFIG, Sources, cannot_listen, complain, failed, runtime, told_to_end};
use crate::app::{self, Drained, Parts, Running, StartError};
use crate::config::{Listen, Loaded, LogFormat};
use crate::telemetry::{self, Form, Sink, key_line, keys_loaded};

/// The table of keys is shown once the provider has told their quotas, but a provider that does
/// not answer must not keep the start waiting.
const QUOTAS_WAIT_MAX: Duration = Duration::from_millis(1_500);

pub(super) fn run(sources: Sources) -> ExitCode {
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let form = form(loaded.config.log.format);
    if let Err(error) = telemetry::start(form, &loaded.config.log.level.to_string(), Sink::stderr()) {
        complain(&error);
        return ExitCode::from(EX_CONFIG);
    }
    match runtime() {
        Ok(runtime) => runtime.block_on(serve(loaded)),
        Err(error) => failed(&error),
    }
}

fn form(format: LogFormat) -> Form {
    match format {
        LogFormat::Terminal => Form::Terminal,
        LogFormat::Ascii => Form::Ascii,
        LogFormat::Json => Form::Json,
        LogFormat::Auto => {
            let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| std::env::var(name).ok());
            telemetry::form_of_stderr(locale.as_deref())
        }
    }
}

async fn serve(loaded: Loaded) -> ExitCode {
    let Loaded { config, warnings, .. } = loaded;
    for warning in &warnings {
        warn!("{warning}");
    }
    let text = keys_loaded(config.keys.len(), &config.key_source.to_string());
    info!(event = "keys_loaded", count = config.keys.len(), "{text}");

    let listeners = match listen(&config.server.listen).await {
        Ok(listeners) => listeners,
        Err(message) => return failed(&message),
    };
    let grace = config.server.shutdown_grace;
    let running = match Parts::of(config)
        .map_err(StartError::from)
        .and_then(|parts| app::start(parts, listeners.into_iter().map(Into::into).collect()))
    {
        Ok(running) => running,
        Err(error) => return not_started(&error),
    };
    until_told(welcome(running).await, grace).await
}

/// Listens on every address that is meant; only the first must be there.
async fn listen(meant: &Listen) -> Result<Vec<TcpListener>, String> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    for mut address in meant.socket_addresses() {
        if let Some(first) = listeners.first().and_then(|first| first.local_addr().ok()) {
            address.set_port(first.port());
        }
        match TcpListener::bind(address).await {
            Ok(listener) => listeners.push(listener),
            Err(error) if listeners.is_empty() => return Err(cannot_listen(&address.to_string(), &error)),
            Err(error) => debug!("{address} is not listened on: {error}"),
        }
    }
    Ok(listeners)
}

fn not_started(error: &StartError) -> ExitCode {
    complain(&format_args!("keychoir: {error}"));
    match error {
        StartError::Books(_) | StartError::Unreadable(_) => {
            complain(
                &"Give the usage records another place with storage.path (or KEYCHOIR_STORAGE__PATH), or keep none \
                  with storage.ephemeral = true.",
            );
            ExitCode::from(EX_CONFIG)
        }
        StartError::Upstream(_) | StartError::Tls(_) => ExitCode::from(EX_CONFIG),
        StartError::System(_) => ExitCode::FAILURE,
    }
}

/// Tells where it runs and with what.
async fn welcome(mut running: Running) -> Running {
    if let Some(aside) = running.set_aside() {
        let aside = aside.display();
        error!("the usage records were broken; they are kept as {aside}, and new ones were begun");
    }
    if running.first_round(QUOTAS_WAIT_MAX).await {
        let keys = running.keys();
        for key in &keys {
            info!(event = "key_state", position = key.key.position(), "{}", key_line(key));
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
    let address = running.address();
    info!(event = "server_started", address = %address, "Server started at http://{address}");
    info!(
        event = "server_base_url",
        "├─ Base URL:  http://{address}   ElevenLabs(base_url=…, api_key=\"anything\")"
    );
    info!(event = "server_status_url", "└─ Status:    http://{address}/api/elevenlabs-status");
    running
}

/// Serves until a signal comes, and ends cleanly; a second signal ends it at once.
async fn until_told(running: Running, grace: Duration) -> ExitCode {
    if let Err(error) = told_to_end().await {
        return failed(&error);
    }
    info!(event = "server_ending", "Ending: no new connections, {} s for running requests", grace.as_secs());
    tokio::select! {
        drained = running.drain(grace) => {
            match drained {
                Drained::Clean => info!(event = "server_ended", "Ended"),
                Drained::Cut => warn!(event = "server_ended", "Ended; requests that still ran were cut"),
            }
            ExitCode::SUCCESS
        }
        _ = told_to_end() => {
            warn!(event = "server_ended", "Ended at once; running requests were cut");
            ExitCode::FAILURE
        }
    }
}
