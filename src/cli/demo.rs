//! `keychoir demo`: runs the proxy in front of a simulated ElevenLabs with four keys of few
//! credits. Real requests exhaust three of the keys, and another key serves each refused request.

mod view;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{failure, multi_thread_runtime};
use crate::app::{self, AppConfig, Running};
use crate::config::{BaseUrl, Config};
use crate::policy::key_state::KeyStatus;
use crate::secret::ApiKey;
use crate::simulator::{Plan, Simulator};
use crate::telemetry::{self, Sink};
use crate::upstream::http_client;
use view::View;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The file for the audio.
    #[arg(long, value_name = "FILE", default_value = "keychoir-demo.mp3")]
    output: PathBuf,
}

/// Demo keys, which are valid nowhere. They have the length of real keys, so that their short forms
/// look the same.
const KEYS: [&str; 4] = [
    "sk_demo50prano0000000000000000000000000000000000a1b2c",
    "sk_demoa1t00000000000000000000000000000000000000d3e4f",
    "sk_demotenor0000000000000000000000000000000000000a5b6c",
    "sk_demobass00000000000000000000000000000000000000d7e8f",
];

/// The texts of the requests.
const TEXT: [&str; 8] = [
    "A choir is many voices that sound like one.",
    "Your app asks for speech and gives no thought to keys.",
    "Keychoir puts a key of its own into the request.",
    "When a key has nothing left, ElevenLabs says so.",
    "The same request then goes out with the next key.",
    "Your app hears nothing of that; it hears the answer.",
    "What each key has spent is written down, to the credit.",
    "And when the month is over, the first key sings again.",
];
const ROUNDS: usize = 4;

/// Delay between two requests, so that a viewer can follow the output.
const PACE: Duration = Duration::from_millis(120);

const SPEECH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_44100_128";

/// The cost of a range of sentences, numbered over all rounds: one credit per character.
fn cost(sentences: std::ops::Range<usize>) -> u64 {
    let texts = TEXT.iter().cycle().skip(sentences.start).take(sentences.len());
    texts.map(|text| text.len() as u64).sum()
}

/// Three keys are used up, and one is not. The workspace of the second key has enough credits, but
/// the key has a cap. ElevenLabs reports a cap only in a refusal, so the next key serves the
/// refused request.
fn plan() -> Plan {
    let credits = [cost(0..8), cost(0..32), cost(14..22), cost(0..32)];
    let mut plan = Plan::of(KEYS.into_iter().zip(credits));
    if let Some(key) = plan.keys.get_mut(1) {
        key.cap = Some(cost(8..14));
    }
    plan
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let view = View::of_stdout();
    if let Err(error) = telemetry::start(view.format(), "info", Sink::new(view.log())) {
        return failure(&error);
    }
    let result = multi_thread_runtime()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run_demo(&view, arguments)));
    match result {
        Ok(code) => code,
        Err(error) => failure(&format_args!("{error:#}")),
    }
}

async fn run_demo(view: &View, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    // The file is created first, so that an error of the path is reported before the requests.
    let cannot_write =
        || format!("cannot write {}; name another file with --output", arguments.output.display());
    let mut output = File::create(&arguments.output).with_context(cannot_write)?;
    let plan = plan();
    let simulator = Simulator::start(TcpListener::bind("127.0.0.1:0").await?, plan).await?;
    let keys = KEYS.iter().map(|key| ApiKey::new(key)).collect::<Result<Vec<_>, _>>()?;
    let mut config = Config::with_defaults(keys, simulator.base_url().parse::<BaseUrl>()?);
    config.storage.ephemeral = true;
    let mut running =
        app::start(AppConfig::of(config)?, vec![TcpListener::bind("127.0.0.1:0").await?.into()])?;
    running.first_round(Duration::from_secs(5)).await;

    let url = format!("http://{}", running.address());
    view.title(&url);
    view.keys(&running.keys());
    let SpeechResults { audio, requests, replayed } = send_all(view, &running, &simulator, &url).await?;
    let served = audio.len();
    let audio: Vec<u8> = audio.concat();
    tokio::task::block_in_place(|| output.write_all(&audio)).with_context(cannot_write)?;

    let keys = running.keys();
    let exhausted = keys.iter().filter(|key| key.state.status() == KeyStatus::Exhausted).count();
    let recorded: u64 = keys.iter().map(|key| key.quota.count).sum();
    running.drain(Duration::from_secs(5)).await;
    let charged = simulator.ledger().totals.charged;
    simulator.stop().await;
    let failures = requests - served;
    view.result(&format!(
        "{requests} requests, {served} answered, {exhausted} keys spent, {failures} failures"
    ))?;
    let plural = if replayed == 1 { "request was" } else { "requests were" };
    view.result(&format!("{replayed} {plural} refused by one key and served by the next"))?;
    view.result(&format!("{recorded} credits recorded, {charged} charged by the simulated ElevenLabs"))?;
    view.result(&format!("audio: {} ({} KiB)", arguments.output.display(), audio.len() / 1_024))?;
    Ok(if failures == 0 && recorded == charged { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The results of all requests.
struct SpeechResults {
    /// The audio of the responses.
    audio: Vec<Vec<u8>>,
    /// The number of requests.
    requests: usize,
    /// The number of requests that the simulator refused with the first key.
    replayed: usize,
}

/// Sends every sentence like an app with the SDK and without a valid key.
async fn send_all(
    view: &View,
    running: &Running,
    simulator: &Simulator,
    url: &str,
) -> anyhow::Result<SpeechResults> {
    let client = http_client()?.build()?;
    let sentences: Vec<&str> = TEXT.iter().copied().cycle().take(TEXT.len() * ROUNDS).collect();
    let (mut audio, mut replayed, mut seen_requests) = (Vec::new(), 0, 0);
    for (index, sentence) in sentences.iter().enumerate() {
        let body = serde_json::json!({"text": sentence, "model_id": "eleven_multilingual_v2"});
        let request = client.post(format!("{url}{SPEECH}")).header("xi-api-key", "anything").json(&body);
        let response = request.send().await?;
        let status = response.status();
        view.request(index + 1, sentences.len(), status.as_u16(), sentence);
        let attempts = attempts(simulator, &mut seen_requests);
        if let Some(replay_path) = replay_path(&attempts) {
            replayed += 1;
            view.replay(&replay_path);
        }
        let bytes = response.bytes().await?;
        if status.is_success() {
            audio.push(bytes.to_vec());
        }
        view.keys(&running.keys());
        if view.is_live() {
            tokio::time::sleep(PACE).await;
        }
    }
    Ok(SpeechResults { audio, requests: sentences.len(), replayed })
}

/// The speech attempts that the simulator recorded after the first `seen_requests` requests: the
/// number of the key, and the status.
fn attempts(simulator: &Simulator, seen_requests: &mut usize) -> Vec<(usize, u16)> {
    let requests = simulator.ledger().requests;
    let new = requests.iter().skip(*seen_requests).filter(|request| request.path_and_query == SPEECH);
    let attempts = new.filter_map(|request| {
        let key = KEYS.iter().position(|key| request.key.as_deref() == Some(*key))?;
        Some((key + 1, request.status?))
    });
    let attempts = attempts.collect();
    *seen_requests = requests.len();
    attempts
}

/// Describes the keys that refused a request and the key that served it; `None` without a refusal.
fn replay_path(attempts: &[(usize, u16)]) -> Option<String> {
    let (last, refused) = attempts.split_last().filter(|(_, refused)| !refused.is_empty())?;
    let refused: Vec<String> = refused.iter().map(|(key, status)| format!("key {key} ({status})")).collect();
    Some(format!("refused by {}, served by key {}", refused.join(", "), last.0))
}
