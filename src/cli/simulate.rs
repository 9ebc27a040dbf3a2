//! `keychoir simulate`: serves an offline ElevenLabs on a port for the development of apps.

use std::process::ExitCode;

use clap::Args;
use tokio::net::TcpListener;

use super::signals::Signals;
use super::{cannot_listen, failure, multi_thread_runtime, print};
use crate::simulator::{Fault, FaultError, KeyPlan, Plan, PlanError, Simulator};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Listen on this address; port 0 chooses a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:11012")]
    listen: String,
    /// A key and its credits; may be given several times. Three keys by default.
    ///
    /// The tier is the plan of its workspace, such as free, starter, creator (the default), pro or
    /// payg, whose subscription does not show its credits. It decides on voices of the library,
    /// formats, the length of a text, and clones.
    #[arg(long = "key", value_name = "KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME]", value_parser = parse_key)]
    keys: Vec<KeyPlan>,
    /// A fault of every request with a key, such as `sk_one:invalid` or `sk_one:stall=5s`.
    ///
    /// With a route behind the key, the fault applies only to requests whose path begins with the
    /// route, as in `sk_one@/v1/dubbing:invalid` or `sk_one@POST /v1/voices:voice_limit_reached`;
    /// the key `*` then stands for every key.
    ///
    /// FAULT is a refusal (quota, key_cap, invalid, concurrency, rate_limit=SECONDS, …) or one of
    /// pass, stall=TIME, slow_head=TIME, slow_body=TIME, cut=BYTES, close, close_unread, huge,
    /// endless, garbled, early:REFUSAL, mid=BYTES:REFUSAL, gzip:REFUSAL,
    /// encoded=ENCODING,ENCODING:REFUSAL (gzip, deflate, br, zstd), or a full response,
    /// answer=STATUS/BODY or answer=STATUS[NAME: VALUE]/BODY. A WebSocket session is refused in its
    /// own format, and with early:REFUSAL or gzip:REFUSAL before it begins; after=MESSAGES:TURN
    /// applies after a number of messages, where TURN is a refusal, close=CODE[/REASON], cut,
    /// reset, stall, say=TEXT or last=CODE/TEXT. An unknown name prints the list of all names.
    #[arg(long = "fault", value_name = "KEY[@ROUTE]:FAULT", value_parser = parse_fault)]
    faults: Vec<FaultArgument>,
}

/// A fault, and the requests that it applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FaultArgument {
    key: String,
    route: Option<String>,
    fault: Fault,
}

/// The wildcard for all keys.
const EVERY_KEY: &str = "*";

fn parse_key(text: &str) -> Result<KeyPlan, PlanError> {
    KeyPlan::parse(text)
}

#[derive(Debug, thiserror::Error)]
enum FaultArgumentError {
    #[error("a fault is written KEY:FAULT, for example sk_one:invalid")]
    NoKey,
    #[error("`*` needs a route, for example *@/v1/dubbing:invalid")]
    NoRoute,
    #[error(transparent)]
    Fault(#[from] FaultError),
}

fn parse_fault(text: &str) -> Result<FaultArgument, FaultArgumentError> {
    let (key, fault) = text.split_once(':').ok_or(FaultArgumentError::NoKey)?;
    // A key may contain an `@`. Only a text with a slash behind the `@` is a route.
    let (key, route) = match key.split_once('@').filter(|(_, route)| route.contains('/')) {
        Some((key, route)) => (key, Some(route.to_owned())),
        None => (key, None),
    };
    if key == EVERY_KEY && route.is_none() {
        return Err(FaultArgumentError::NoRoute);
    }
    Ok(FaultArgument { key: key.to_owned(), route, fault: fault.parse()? })
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    match multi_thread_runtime() {
        Ok(runtime) => runtime.block_on(simulate(arguments)),
        Err(error) => failure(&error),
    }
}

async fn simulate(arguments: Arguments) -> ExitCode {
    let Arguments { listen, keys, faults } = arguments;
    let is_default = keys.is_empty();
    let plan = if is_default { Plan::default() } else { Plan { keys, ..Plan::of([]) } };
    if let Err(error) = plan.check() {
        return failure(&error);
    }
    let is_known = |key: &str| key == EVERY_KEY || plan.keys.iter().any(|known| known.key == key);
    if !faults.iter().all(|argument| is_known(&argument.key)) {
        return failure(&"--fault names a key that no --key defines");
    }
    let listener = match TcpListener::bind(&listen).await {
        Ok(listener) => listener,
        Err(error) => return failure(&cannot_listen(&listen, &error)),
    };
    // The default keys are valid nowhere, so they are printed. Keys of the command line are not
    // printed.
    let made_up: Vec<String> =
        if is_default { plan.keys.iter().map(|key| key.key.clone()).collect() } else { Vec::new() };
    let simulator = match Simulator::start(listener, plan).await {
        Ok(simulator) => simulator,
        Err(error) => return failure(&error),
    };
    for FaultArgument { key, route, fault } in faults {
        match route {
            None => simulator.always(&key, Some(fault)),
            Some(route) if key == EVERY_KEY => simulator.for_all_requests_on(&route, Some(fault)),
            Some(route) => simulator.always_on(&key, &route, Some(fault)),
        }
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
        Err(error) => failure(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, key: &str, route: Option<&str>, fault: &str) {
        let argument = parse_fault(text).unwrap();
        assert_eq!((&*argument.key, argument.route.as_deref()), (key, route));
        assert_eq!(argument.fault.to_string(), fault);
    }

    #[test]
    fn a_fault_has_a_key_and_an_optional_route() {
        check("sk_one:invalid", "sk_one", None, "invalid");
        check("sk@one:gzip:quota", "sk@one", None, "gzip:quota");
        check("sk@/v1/dubbing:answer=402/{\"a\":1}", "sk", Some("/v1/dubbing"), "answer=402/{\"a\":1}");
        check("*@POST /v1/voices:quota", "*", Some("POST /v1/voices"), "quota");
    }

    #[test]
    fn a_fault_without_a_key_or_for_all_keys_and_routes_is_refused() {
        for (text, message) in [
            ("invalid", "a fault is written KEY:FAULT, for example sk_one:invalid"),
            ("*:invalid", "`*` needs a route, for example *@/v1/dubbing:invalid"),
        ] {
            assert_eq!(parse_fault(text).unwrap_err().to_string(), message);
        }
    }
}
