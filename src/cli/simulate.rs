//! `keychoir simulate`: serves an offline ElevenLabs for the development of apps. It starts the simulator with the keys
//! and faults of the options, prints the variables with which Keychoir uses it, and serves until a signal to stop.

use clap::Args;
use tokio::net::TcpListener;

use super::signals::Signals;
use super::{CommandResult, build_multi_thread_runtime, describe_bind_error, fail, print};
use crate::simulator::{Fault, FaultError, KeyPlan, Plan, Simulator};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Listen on this address. With port 0, the system chooses a free port.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:11012")]
    listen: String,
    /// A key and its credits. May be repeated. By default, there are three keys.
    ///
    /// The tier is the plan of the key's workspace, such as free, starter, creator (the default), pro or
    /// payg, whose subscription does not show its credits. It determines the library voices, formats,
    /// text lengths and clones.
    #[arg(long = "key", value_name = "KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME]", value_parser = KeyPlan::parse)]
    keys: Vec<KeyPlan>,
    /// A fault of every request with a key, such as `sk_one:invalid` or `sk_one:stall=5s`.
    ///
    /// With a route after the key, the fault applies only to requests whose path begins with the route,
    /// as in `sk_one@/v1/dubbing:invalid` or `sk_one@POST /v1/voices:voice_limit_reached`. With a route,
    /// the key `*` stands for all keys.
    ///
    /// FAULT is a refusal (quota, key_cap, invalid, concurrency, rate_limit=SECONDS, …) or one of
    /// pass, stall=TIME, slow_head=TIME, slow_body=TIME, cut=BYTES, close, close_unread, huge,
    /// endless, garbled, early:REFUSAL, mid=BYTES:REFUSAL, gzip:REFUSAL,
    /// encoded=ENCODING,ENCODING:REFUSAL (gzip, deflate, br, zstd), or a complete response,
    /// answer=STATUS/BODY or answer=STATUS[NAME: VALUE]/BODY. A WebSocket session is refused in its
    /// own format, and with early:REFUSAL or gzip:REFUSAL before it starts. after=MESSAGES:TURN
    /// applies after a number of messages, where TURN is a refusal, close=CODE[/REASON], cut,
    /// reset, stall, say=TEXT or last=CODE/TEXT. An unknown name prints the list of all names.
    #[arg(long = "fault", value_name = "KEY[@ROUTE]:FAULT", value_parser = parse_fault)]
    faults: Vec<FaultArgument>,
}

/// A fault and the requests to which it applies.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FaultArgument {
    key: String,
    route: Option<String>,
    fault: Fault,
}

/// The key of a fault that applies to all keys.
const ALL_KEYS: &str = "*";

/// The reason why the value of `--fault` is not valid.
#[derive(Debug, thiserror::Error)]
enum FaultArgumentError {
    #[error("the key is missing: write KEY:FAULT, for example sk_one:invalid")]
    NoKey,
    #[error("`*` requires a route, for example *@/v1/dubbing:invalid")]
    NoRoute,
    #[error(transparent)]
    Fault(#[from] FaultError),
}

fn parse_fault(text: &str) -> Result<FaultArgument, FaultArgumentError> {
    let (key_and_route, fault) = text.split_once(':').ok_or(FaultArgumentError::NoKey)?;
    // A key may contain an `@`. The part after the `@` is a route only if it contains a slash.
    let (key, route) = match key_and_route.split_once('@').filter(|(_, route)| route.contains('/')) {
        Some((key, route)) => (key, Some(route.to_owned())),
        None => (key_and_route, None),
    };
    if key == ALL_KEYS && route.is_none() {
        return Err(FaultArgumentError::NoRoute);
    }
    Ok(FaultArgument { key: key.to_owned(), route, fault: fault.parse()? })
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    build_multi_thread_runtime()?.block_on(simulate(arguments))
}

async fn simulate(arguments: Arguments) -> CommandResult {
    let Arguments { listen, keys, faults } = arguments;
    let has_default_keys = keys.is_empty();
    let plan = if has_default_keys { Plan::default() } else { Plan { keys, ..Plan::with_keys([]) } };
    plan.validate().map_err(fail)?;
    let is_known = |key: &str| key == ALL_KEYS || plan.keys.iter().any(|known| known.key == key);
    if !faults.iter().all(|argument| is_known(&argument.key)) {
        return Err(fail("--fault names a key that no --key defines"));
    }
    let listener =
        TcpListener::bind(&listen).await.map_err(|error| fail(describe_bind_error(&listen, &error)))?;
    // Only the default keys are printed, because keys of the command line may be real keys.
    let default_keys =
        has_default_keys.then(|| plan.keys.iter().map(|key| key.key.as_str()).collect::<Vec<_>>().join(","));
    let simulator = Simulator::start(listener, plan).await.map_err(fail)?;
    for FaultArgument { key, route, fault } in faults {
        match route {
            None => simulator.set_fault(&key, Some(fault)),
            Some(route) if key == ALL_KEYS => simulator.set_route_fault_for_all(&route, Some(fault)),
            Some(route) => simulator.set_route_fault(&key, &route, Some(fault)),
        }
    }
    let base_url = simulator.base_url();
    print(&format_args!("Simulated ElevenLabs at {base_url}"));
    if let Some(default_keys) = default_keys {
        print(&format_args!("   export ELEVENLABS_API_KEYS={default_keys}"));
    }
    print(&format_args!("   export KEYCHOIR_UPSTREAM__BASE_URL={base_url}"));
    print(&format_args!("   ledger: {base_url}/_simulator/ledger"));
    Signals::new().map_err(fail)?.wait_for_stop().await;
    simulator.stop().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_fault(text: &str, key: &str, route: Option<&str>, fault: &str) {
        let argument = parse_fault(text).unwrap();
        assert_eq!((&*argument.key, argument.route.as_deref()), (key, route));
        assert_eq!(argument.fault.to_string(), fault);
    }

    #[test]
    fn a_fault_has_a_key_and_an_optional_route() {
        check_fault("sk_one:invalid", "sk_one", None, "invalid");
        check_fault("sk@one:gzip:quota", "sk@one", None, "gzip:quota");
        check_fault("sk@/v1/dubbing:answer=402/{\"a\":1}", "sk", Some("/v1/dubbing"), "answer=402/{\"a\":1}");
        check_fault("*@POST /v1/voices:quota", "*", Some("POST /v1/voices"), "quota");
    }

    #[test]
    fn a_fault_without_a_key_or_for_all_keys_without_a_route_is_rejected() {
        for (text, message) in [
            ("invalid", "the key is missing: write KEY:FAULT, for example sk_one:invalid"),
            ("*:invalid", "`*` requires a route, for example *@/v1/dubbing:invalid"),
        ] {
            assert_eq!(parse_fault(text).unwrap_err().to_string(), message);
        }
    }
}
