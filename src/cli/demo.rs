//! `keychoir demo`: runs Keychoir in front of a simulated ElevenLabs with four keys, and sends requests that exhaust
//! three of the keys. The next key serves each refused request. The demo fails if a request was not served or the
//! recorded credits differ from those that the simulator charged.

mod view;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{CommandResult, build_multi_thread_runtime, fail};
use crate::app::{self, AppConfig, RunningApp};
use crate::config::{BaseUrl, Config};
use crate::policy::key_state::KeyStatus;
use crate::secret::ApiKey;
use crate::simulator::{Plan, Simulator};
use crate::telemetry::{self, LogSink};
use crate::upstream::http_client;
use view::View;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Write the audio to this file.
    #[arg(long, value_name = "FILE", default_value = "keychoir-demo.mp3")]
    output: PathBuf,
}

/// The keys of the demo. They begin with `sk_` and are about as long as real keys, so that their short forms look like
/// those of real keys.
const KEYS: [&str; 4] = [
    "sk_demo50prano0000000000000000000000000000000000a1b2c",
    "sk_demoa1t00000000000000000000000000000000000000d3e4f",
    "sk_demotenor0000000000000000000000000000000000000a5b6c",
    "sk_demobass00000000000000000000000000000000000000d7e8f",
];

/// The texts of the requests. A character is one byte in each.
const SENTENCES: [&str; 8] = [
    "A choir is many voices that sound like one.",
    "Your app requests speech and needs no key.",
    "Keychoir adds one of its own keys to the request.",
    "When a key has no credits left, ElevenLabs refuses it.",
    "Keychoir then sends the same request with the next key.",
    "Your app does not notice, and receives the response.",
    "The usage of each key is recorded, to the credit.",
    "And when the month is over, the first key sings again.",
];
/// Number of requests for each sentence.
const ROUNDS: usize = 4;

/// Pause between two requests, so that a viewer can follow the output.
const REQUEST_INTERVAL: Duration = Duration::from_millis(120);

const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_44100_128";

/// Maximum wait for the first polls of the quotas.
const FIRST_POLL_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time in which Keychoir ends its requests after the demo.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the cost of the requests with these numbers, counted from 0 over all rounds. A character costs one credit.
fn speech_cost(requests: std::ops::Range<usize>) -> u64 {
    let sentences = SENTENCES.iter().cycle().skip(requests.start).take(requests.len());
    sentences.map(|sentence| sentence.len() as u64).sum()
}

/// Returns a plan whose keys can serve all requests. The requests exhaust three of the keys. The workspace of the
/// second key has enough credits, but the key has a cap. ElevenLabs reports a cap only in a refusal, so that one
/// request is refused and Keychoir sends it again with the next key.
fn provider_plan() -> Plan {
    let credits = [speech_cost(0..8), speech_cost(0..32), speech_cost(14..22), speech_cost(0..32)];
    let mut plan = Plan::with_keys(KEYS.into_iter().zip(credits));
    if let Some(key) = plan.keys.get_mut(1) {
        key.cap = Some(speech_cost(8..14));
    }
    plan
}

pub(super) fn run(arguments: &Arguments) -> CommandResult {
    let view = View::for_stdout();
    telemetry::start(view.format(), "info", LogSink::new(view.log_writer())).map_err(fail)?;
    match build_multi_thread_runtime()?.block_on(run_demo(&view, arguments)) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ExitCode::FAILURE),
        Err(error) => Err(fail(format_args!("{error:#}"))),
    }
}

/// Runs the demo. Returns whether every request was served and the recorded usage is correct.
async fn run_demo(view: &View, arguments: &Arguments) -> anyhow::Result<bool> {
    // The file is created first, so that an invalid path is reported before the requests.
    let cannot_write =
        || format!("cannot write {}; name another file with --output", arguments.output.display());
    let mut output = File::create(&arguments.output).with_context(cannot_write)?;
    let simulator = Simulator::start(TcpListener::bind("127.0.0.1:0").await?, provider_plan()).await?;
    let keys = KEYS.iter().map(|key| ApiKey::new(key)).collect::<Result<Vec<_>, _>>()?;
    let config = Config::with_defaults(keys, simulator.base_url().parse::<BaseUrl>()?);
    let mut running =
        app::start(AppConfig::from_config(config)?, vec![TcpListener::bind("127.0.0.1:0").await?.into()])?;
    running.wait_for_first_poll(FIRST_POLL_TIMEOUT).await;

    let url = format!("http://{}", running.address());
    view.print_title(&url);
    view.update_keys(&running.keys());
    let SpeechResults { audio, requests, retried } = send_all(view, &running, &simulator, &url).await?;
    let served = audio.len();
    let joined_audio = audio.concat();
    tokio::task::block_in_place(|| output.write_all(&joined_audio)).with_context(cannot_write)?;

    let keys = running.keys();
    let exhausted = keys.iter().filter(|key| key.state.status() == KeyStatus::Exhausted).count();
    let recorded: u64 = keys.iter().map(|key| key.quota.count).sum();
    running.drain(DRAIN_TIMEOUT).await;
    let charged_credits = simulator.ledger().totals.charged;
    simulator.stop().await;
    let failures = requests - served;
    view.print_result(&format!(
        "{requests} requests, {served} served, {exhausted} keys exhausted, {failures} failures"
    ))?;
    let request_phrase = if retried == 1 { "request was" } else { "requests were" };
    view.print_result(&format!("{retried} {request_phrase} refused by one key and served by the next"))?;
    view.print_result(&format!(
        "{recorded} credits recorded, {charged_credits} charged by the simulated ElevenLabs"
    ))?;
    view.print_result(&format!(
        "audio: {} ({} KiB)",
        arguments.output.display(),
        joined_audio.len() / 1_024
    ))?;
    Ok(failures == 0 && recorded == charged_credits)
}

/// The results of all requests.
struct SpeechResults {
    /// The audio of each request that was served.
    audio: Vec<Vec<u8>>,
    /// The number of requests.
    requests: usize,
    /// The number of requests that were refused with one key and sent again with another key.
    retried: usize,
}

/// Sends all requests, one after the other, as an app does that uses the SDK without a valid key.
async fn send_all(
    view: &View,
    running: &RunningApp,
    simulator: &Simulator,
    url: &str,
) -> anyhow::Result<SpeechResults> {
    let client = http_client()?.build()?;
    let sentences: Vec<&str> = SENTENCES.iter().copied().cycle().take(SENTENCES.len() * ROUNDS).collect();
    let (mut audio, mut retried, mut request_count) = (Vec::new(), 0, 0);
    for (index, sentence) in sentences.iter().enumerate() {
        let body = serde_json::json!({"text": sentence, "model_id": "eleven_multilingual_v2"});
        let request = client.post(format!("{url}{SPEECH_PATH}")).header("xi-api-key", "anything").json(&body);
        let response = request.send().await?;
        let status = response.status();
        view.show_request(index + 1, sentences.len(), status.as_u16(), sentence);
        let attempts = new_attempts(simulator, &mut request_count);
        if let Some(retry) = describe_retry(&attempts) {
            retried += 1;
            view.print_retry(&retry);
        }
        let bytes = response.bytes().await?;
        if status.is_success() {
            audio.push(bytes.to_vec());
        }
        view.update_keys(&running.keys());
        if view.is_terminal() {
            tokio::time::sleep(REQUEST_INTERVAL).await;
        }
    }
    Ok(SpeechResults { audio, requests: sentences.len(), retried })
}

/// Returns the speech attempts that the simulator recorded after the first `request_count` requests, and
/// updates this count. Each attempt is the number of its key and its status.
fn new_attempts(simulator: &Simulator, request_count: &mut usize) -> Vec<(usize, u16)> {
    let requests = simulator.ledger().requests;
    let speech_requests =
        requests.iter().skip(*request_count).filter(|request| request.path_and_query == SPEECH_PATH);
    let attempts = speech_requests
        .filter_map(|request| {
            let key_index = KEYS.iter().position(|key| request.key.as_deref() == Some(*key))?;
            Some((key_index + 1, request.status?))
        })
        .collect();
    *request_count = requests.len();
    attempts
}

/// Describes the keys with which a request was refused and the key with which it was served. Returns `None`
/// if the request was not refused.
fn describe_retry(attempts: &[(usize, u16)]) -> Option<String> {
    let ((serving_key, _), refusals) = attempts.split_last().filter(|(_, refusals)| !refusals.is_empty())?;
    let refusing_keys: Vec<String> =
        refusals.iter().map(|(key, status)| format!("key {key} ({status})")).collect();
    Some(format!("refused by {}, served by key {serving_key}", refusing_keys.join(", ")))
}
