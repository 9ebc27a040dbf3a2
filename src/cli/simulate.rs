//! `keychoir simulate`: an offline ElevenLabs on a port, to develop an app against.

use std::process::ExitCode;

use clap::Args;
use tokio::net::TcpListener;

use super::signals::Signals;
use super::{cannot_listen, failed, print, wide_runtime};
use crate::simulator::{Fault, FaultError, KeyPlan, Plan, PlanError, Simulator};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Listen on this address; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:11012")]
    listen: String,
    /// A key and its credits; may be given several times. Three keys by default.
    #[arg(long = "key", value_name = "KEY=CREDITS[@WORKSPACE][:cap=N]", value_parser = parse_key)]
    keys: Vec<KeyPlan>,
    /// What every request with a key meets, such as `sk_one:invalid` or `sk_one:stall=5s`.
    ///
    /// FAULT is a refusal (quota, key_cap, invalid, concurrency, rate_limit=SECONDS, …) or one of
    /// pass, stall=TIME, slow_head=TIME, slow_body=TIME, cut=BYTES, close, close_unread, huge,
    /// endless, garbled, early:REFUSAL, mid=BYTES:REFUSAL, gzip:REFUSAL. A session on a socket is
    /// refused in its own form, and with early:REFUSAL or gzip:REFUSAL before it begins;
    /// after=MESSAGES:TURN lets it go on for a while, where TURN is a refusal, close=CODE[/REASON],
    /// cut, reset, stall or say=TEXT. A name that there is not lists them all.
    #[arg(long = "fault", value_name = "KEY:FAULT", value_parser = parse_fault)]
    faults: Vec<(String, Fault)>,
}

fn parse_key(text: &str) -> Result<KeyPlan, PlanError> {
    KeyPlan::parse(text)
}

#[derive(Debug, thiserror::Error)]
enum FaultArgumentError {
    #[error("a fault is written KEY:FAULT, for example sk_one:invalid")]
    NoKey,
    #[error(transparent)]
    Fault(#[from] FaultError),
}

fn parse_fault(text: &str) -> Result<(String, Fault), FaultArgumentError> {
    let (key, fault) = text.split_once(':').ok_or(FaultArgumentError::NoKey)?;
    Ok((key.to_owned(), fault.parse()?))
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    match wide_runtime() {
        Ok(runtime) => runtime.block_on(simulate(arguments)),
        Err(error) => failed(&error),
    }
}

async fn simulate(arguments: Arguments) -> ExitCode {
    let Arguments { listen, keys, faults } = arguments;
    let is_default = keys.is_empty();
    let plan = if is_default { Plan::default() } else { Plan { keys, ..Plan::of([]) } };
    if let Err(error) = plan.check() {
        return failed(&error);
    }
    if faults.iter().any(|(key, _)| !plan.keys.iter().any(|known| known.key == *key)) {
        return failed(&"--fault names a key that no --key gives");
    }
    let listener = match TcpListener::bind(&listen).await {
        Ok(listener) => listener,
        Err(error) => return failed(&cannot_listen(&listen, &error)),
    };
    // The default keys are made up and open nothing; whoever gave others knows them.
    let made_up: Vec<String> =
        if is_default { plan.keys.iter().map(|key| key.key.clone()).collect() } else { Vec::new() };
    let simulator = match Simulator::start(listener, plan).await {
        Ok(simulator) => simulator,
        Err(error) => return failed(&error),
    };
    for (key, fault) in faults {
        simulator.always(&key, Some(fault));
    }
    print(&format_args!("Simulated ElevenLabs at {}", simulator.base_url()));
    if is_default {
        print(&format_args!("   export ELEVENLABS_API_KEYS={}", made_up.join(",")));
    }
    print(&format_args!("   export KEYCHOIR_UPSTREAM__BASE_URL={}", simulator.base_url()));
    print(&format_args!("   ledger: {}/_simulator/ledger", simulator.base_url()));
    match Signals::new() {
        Ok(mut signals) => {
            signals.end().await;
            simulator.stop().await;
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
    }
}
