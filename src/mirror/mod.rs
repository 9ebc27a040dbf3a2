//! The mirror: what the books are to tell Supabase, sent from the outbox in the background. Traffic
//! never waits for it: it reads what is written, and what does not arrive stays written.

mod push;
mod remote;
mod rows;

mod health;

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock;
use crate::policy::mirror::{Hint, wait};
use crate::secret::ServiceKey;
use crate::store::{Batch, Delivery, Outbox, RefusedRow, Unavailable};
use crate::upstream::TlsError;

pub use health::{Health, State};

use push::{Pushed, Stop, push, rename};
use remote::Remote;
use rows::{KeyUsage, UsageEvent};

/// Where and how is mirrored.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://PROJECT.supabase.co`, without a slash at its end.
    pub base_url: String,
    /// The key that may write.
    pub key: ServiceKey,
    /// From one push to the next.
    pub interval: Duration,
    /// Rows in a request.
    pub batch_rows_max: usize,
    /// Name lookup, TCP and TLS together.
    pub connect_max: Duration,
    /// From the begin of a request to the end of its answer.
    pub answer_max: Duration,
    /// The longest wait after failures in a row.
    pub retry_max: Duration,
    /// How long it rests when a person must do something.
    pub pause: Duration,
    /// How long the end of the program waits for the last push.
    pub final_push_max: Duration,
}

/// Why there is no mirror.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The HTTP client cannot be made.
    #[error("there is no way to Supabase: {0}")]
    Client(#[from] reqwest::Error),
    /// A header cannot carry the key.
    #[error("Supabase's key cannot be sent in a header")]
    Key,
}

/// A refused row is tried again after this: its table may have changed.
const REFUSED_REST: Duration = Duration::from_secs(3_600);

/// Sends what is due, round after round.
#[derive(Debug)]
pub struct Mirror {
    outbox: Outbox,
    remote: Remote,
    settings: Settings,
    health: Health,
    /// Failures in a row.
    failures: u32,
    /// What people were told last.
    told: Option<Hint>,
}

/// How a round ended.
#[derive(Debug)]
enum Round {
    /// Everything that was due was tried.
    Done,
    /// There was more than one batch.
    More,
    /// It must be asked again.
    Stopped(Stop),
    /// The books cannot be read or written now.
    NoBooks,
}

impl Mirror {
    /// A mirror of this outbox.
    ///
    /// # Errors
    ///
    /// When no client can be made.
    pub fn new(outbox: Outbox, settings: Settings, health: Health) -> Result<Self, StartError> {
        let remote = Remote::new(&settings)?;
        // What waits from before waits from now on: nobody wrote down since when.
        health.caught_up(clock::now());
        Ok(Self { outbox, remote, settings, health, failures: 0, told: None })
    }

    /// Sends round after round. After `end`, sends what is still due, and ends; whoever does not want
    /// to wait for that drops it: what was not confirmed is sent after the next start.
    pub async fn run(mut self, end: CancellationToken) {
        info!(
            event = "mirror_started",
            url = self.settings.base_url,
            "Mirroring to {}",
            self.settings.base_url
        );
        // A new start, and perhaps a table that was mended: everything is tried again.
        let _ = self.outbox.forgive().await;
        loop {
            let round = self.round().await;
            let wait = self.after(round);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = end.cancelled() => break,
            }
        }
        while matches!(self.round().await, Round::More) {}
    }

    async fn round(&mut self) -> Round {
        match self.try_round().await {
            Ok(round) => round,
            Err(Unavailable) => Round::NoBooks,
        }
    }

    async fn try_round(&mut self) -> Result<Round, Unavailable> {
        let rows_max = self.settings.batch_rows_max;
        let Batch { renames, keys, events, refused } = self.outbox.take(rows_max).await?;
        self.health.set_refused(refused);
        let is_renaming = renames.len() >= rows_max;
        // Sent before it, a new row of a key would be in the way of its old one.
        if let Some(stop) = self.settle(rename(&self.remote, renames).await).await? {
            return Ok(Round::Stopped(stop));
        }
        if is_renaming {
            return Ok(Round::More);
        }
        let is_full = keys.len() >= rows_max || events.len() >= rows_max;
        let keys: Vec<KeyUsage> = keys.into_iter().map(Into::into).collect();
        let events: Vec<UsageEvent> = events.into_iter().map(Into::into).collect();
        let keys_stop = self.settle(push(&self.remote, &keys).await).await?;
        // What stands in the way of a table alone leaves the other one its way.
        let stop = match keys_stop {
            Some(stop) if !is_of_table(&stop) => Some(stop),
            stop => self.settle(push(&self.remote, &events).await).await?.or(stop),
        };
        Ok(match stop {
            Some(stop) => Round::Stopped(stop),
            None if is_full => Round::More,
            None => Round::Done,
        })
    }

    /// Writes down what has become of rows; what stopped the others.
    async fn settle(&mut self, pushed: Pushed) -> Result<Option<Stop>, Unavailable> {
        let Pushed { sent, refused, stop } = pushed;
        if sent.is_empty() && refused.is_empty() {
            return Ok(stop);
        }
        self.health.sent_more(sent.len());
        let until = clock::now().plus(REFUSED_REST);
        let codes: Vec<String> = refused.iter().map(|(_, code)| code.clone()).collect();
        let refused = refused.into_iter().map(|(name, code)| RefusedRow { name, code, until }).collect();
        let first_times = self.outbox.settle(Delivery { sent, refused }).await?;
        if first_times > 0 {
            let code = codes.first().map_or("", String::as_str);
            warn!(
                event = "mirror_rows_refused",
                rows = first_times,
                code,
                "Supabase refuses {first_times} rows for what is in them ({code}); they are kept and tried again later"
            );
        }
        Ok(stop)
    }

    /// Takes in how a round ended, tells what is new, and returns how long to wait.
    fn after(&mut self, round: Round) -> Duration {
        let Settings { interval, retry_max, pause, .. } = self.settings;
        match round {
            Round::Done | Round::More => {
                if self.health.state() != State::Working {
                    info!(event = "mirror_recovered", "Supabase takes what is mirrored again");
                }
                self.health.set_state(State::Working);
                if matches!(round, Round::Done) {
                    self.health.caught_up(clock::now());
                }
                (self.failures, self.told) = (0, None);
                if matches!(round, Round::More) { Duration::ZERO } else { interval }
            }
            // Of their own trouble the books tell themselves.
            Round::NoBooks => interval,
            Round::Stopped(Stop::Later { reason, told }) => {
                if self.health.state() == State::Working {
                    warn!(
                        event = "mirror_failing",
                        "Supabase does not take what is mirrored: {reason}; requests go on, and it is tried again"
                    );
                }
                self.health.set_state(State::Failing);
                self.health.failed_once_more();
                self.failures = self.failures.saturating_add(1);
                wait(self.failures, interval, retry_max, told, chance())
            }
            Round::Stopped(Stop::Person { hint, reason }) => {
                if self.told != Some(hint) {
                    warn!(event = "mirror_paused", "Mirroring rests: {} ({reason})", hint.text());
                }
                self.health.set_state(State::Paused);
                self.health.failed_once_more();
                (self.failures, self.told) = (0, Some(hint));
                pause
            }
        }
    }
}

/// Whether it concerns one table and not the whole way.
fn is_of_table(stop: &Stop) -> bool {
    match stop {
        Stop::Later { .. } => false,
        Stop::Person { hint, .. } => match hint {
            Hint::Forbidden | Hint::Table | Hint::Column | Hint::EveryRow => true,
            Hint::Key | Hint::Address | Hint::Asleep | Hint::Unexplained => false,
        },
    }
}

/// A number from 0.0 to 1.0.
fn chance() -> f64 {
    let draw = u32::try_from(RandomState::new().hash_one(0) >> 32).unwrap_or(0);
    f64::from(draw) / f64::from(u32::MAX)
}
