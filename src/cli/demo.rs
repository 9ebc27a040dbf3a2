//! `keychoir demo`: the proxy before a simulated ElevenLabs with four small keys. Real requests go
//! through it until three of the keys are spent; every one of them is answered.

mod view;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{failed, wide_runtime};
use crate::app::{self, Parts, Running};
use crate::config::{BaseUrl, Config};
use crate::policy::standing::KeyStatus;
use crate::secret::ApiKey;
use crate::simulator::{Plan, Simulator};
use crate::telemetry::{self, Sink};
use crate::upstream::side_calls;
use view::View;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where the audio goes.
    #[arg(long, value_name = "FILE", default_value = "keychoir-demo.mp3")]
    output: PathBuf,
}

/// Made up; they open nothing. Long enough to be shown as real ones are.
const KEYS: [(&str, u64); 4] = [
    ("sk_demo50prano0000000000000000000000000000000000a1b2c", 400),
    ("sk_demoa1t00000000000000000000000000000000000000d3e4f", 300),
    ("sk_demotenor0000000000000000000000000000000000000a5b6c", 500),
    ("sk_demobass00000000000000000000000000000000000000d7e8f", 5_000),
];

/// What is spoken, a sentence a request. All of it costs more than the first three keys have.
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

/// Between two requests, so that a person can watch.
const PACE: Duration = Duration::from_millis(120);

const SPEECH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=mp3_44100_128";

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let view = View::of_stdout();
    if let Err(error) = telemetry::start(view.form(), "info", Sink::new(view.log())) {
        return failed(&error);
    }
    let played = wide_runtime()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(play(&view, arguments)));
    match played {
        Ok(code) => code,
        Err(error) => failed(&format_args!("{error:#}")),
    }
}

async fn play(view: &View, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    // Before the work: a place that cannot be written is better heard of now.
    let place = || format!("cannot write {}; name another file with --output", arguments.output.display());
    let mut output = File::create(&arguments.output).with_context(place)?;
    let plan = Plan::of(KEYS);
    let simulator = Simulator::start(TcpListener::bind("127.0.0.1:0").await?, plan).await?;
    let keys = KEYS.iter().map(|(key, _)| ApiKey::new(key)).collect::<Result<Vec<_>, _>>()?;
    let mut config = Config::with_defaults(keys, simulator.base_url().parse::<BaseUrl>()?);
    config.storage.is_ephemeral = true;
    let mut running = app::start(Parts::of(config)?, vec![TcpListener::bind("127.0.0.1:0").await?.into()])?;
    running.first_round(Duration::from_secs(5)).await;

    let url = format!("http://{}", running.address());
    view.title(&url);
    view.keys(&running.keys());
    let (audio, requests) = speak_all(view, &running, &url).await?;
    let answered = audio.len();
    let audio: Vec<u8> = audio.concat();
    tokio::task::block_in_place(|| output.write_all(&audio)).with_context(place)?;

    let keys = running.keys();
    let spent = keys.iter().filter(|key| key.standing.status() == KeyStatus::Exhausted).count();
    let booked: u64 = keys.iter().map(|key| key.quota.count).sum();
    running.drain(Duration::from_secs(5)).await;
    let charged = simulator.ledger().totals.charged;
    simulator.stop().await;
    let failures = requests - answered;
    view.result(&format!(
        "{requests} requests, {answered} answered, {spent} keys spent, {failures} failures"
    ))?;
    view.result(&format!("{booked} credits booked, {charged} charged by the simulated ElevenLabs"))?;
    view.result(&format!("audio: {} ({} KiB)", arguments.output.display(), audio.len() / 1_024))?;
    Ok(if failures == 0 && booked == charged { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Speaks every sentence as an app would: with its SDK's kind of request and a key that is none.
/// Returns the answers that came, and how many there should have been.
async fn speak_all(view: &View, running: &Running, url: &str) -> anyhow::Result<(Vec<Vec<u8>>, usize)> {
    let client = side_calls()?.build()?;
    let sentences: Vec<&str> = TEXT.iter().copied().cycle().take(TEXT.len() * ROUNDS).collect();
    let mut audio = Vec::new();
    for (index, sentence) in sentences.iter().enumerate() {
        let body = serde_json::json!({"text": sentence, "model_id": "eleven_multilingual_v2"});
        let request = client.post(format!("{url}{SPEECH}")).header("xi-api-key", "anything").json(&body);
        let answer = request.send().await?;
        let status = answer.status();
        view.request(index + 1, sentences.len(), status.as_u16(), sentence);
        let bytes = answer.bytes().await?;
        if status.is_success() {
            audio.push(bytes.to_vec());
        }
        view.keys(&running.keys());
        if view.is_live() {
            tokio::time::sleep(PACE).await;
        }
    }
    Ok((audio, sentences.len()))
}
