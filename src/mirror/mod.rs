//! Mirrors usage to Supabase: sends the rows of the outbox in the background. Traffic never waits
//! for it: the mirror reads rows that are already written, and rows that are not delivered stay in
//! the outbox.

mod push;
mod remote;
mod rows;

mod health;

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

/// The target and the timing of the mirror.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://PROJECT.supabase.co`, without a slash at its end.
    pub base_url: String,
    /// A key with write access.
    pub key: ServiceKey,
    /// Time between two pushes.
    pub interval: Duration,
    /// Maximum rows in a request.
    pub batch_rows_max: usize,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_max: Duration,
    /// Timeout from the begin of a request to the end of its response.
    pub answer_max: Duration,
    /// The longest delay after repeated failures.
    pub retry_max: Duration,
    /// The delay when an operator must fix the setup.
    pub pause: Duration,
    /// How long shutdown waits for the last push.
    pub final_push_max: Duration,
}

/// Why the mirror cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The HTTP client cannot be made.
    #[error("there is no way to Supabase: {0}")]
    Client(#[from] reqwest::Error),
    /// A header cannot carry the key.
    #[error("Supabase's key cannot be sent in a header")]
    Key,
}

/// Delay before a refused row is retried: its table may have changed.
const REFUSED_REST: Duration = Duration::from_secs(3_600);

/// The task that sends due rows, round after round.
#[derive(Debug)]
pub struct Mirror {
    outbox: Outbox,
    remote: Remote,
    settings: Settings,
    health: Health,
    /// Consecutive failures.
    failures: u32,
    /// The setup error that was logged last.
    told: Option<Hint>,
}

/// The result of a round.
#[derive(Debug)]
enum Round {
    /// Every due row was tried.
    Done,
    /// More than one batch was due.
    More,
    /// Supabase was unreachable or refused; the rows are to be sent again.
    Stopped(Stop),
    /// The database cannot be read or written now.
    NoBooks,
}

impl Mirror {
    /// Makes a mirror of this outbox.
    ///
    /// # Errors
    ///
    /// When the HTTP client cannot be made.
    pub fn new(outbox: Outbox, settings: Settings, health: Health) -> Result<Self, StartError> {
        let remote = Remote::new(&settings)?;
        // The age of rows from earlier runs is not recorded, so their lag counts from now.
        health.caught_up(clock::now());
        Ok(Self { outbox, remote, settings, health, failures: 0, told: None })
    }

    /// Sends round after round. After `end`, sends the remaining rows and returns. Dropping the
    /// future skips that: unconfirmed rows are sent after the next start.
    pub async fn run(mut self, end: CancellationToken) {
        info!(
            event = "mirror_started",
            url = self.settings.base_url,
            "Mirroring to {}",
            self.settings.base_url
        );
        // After a start the table may have been fixed, so refused rows are retried.
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
        // Renames go first: a new row of a key would conflict with its old one.
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
        // An error of one table does not keep the other from being sent.
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

    /// Records the result for each row; returns the error that stopped the others.
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

    /// Processes the result of a round: logs changes and returns the delay before the next one.
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
            // The store reports database errors itself.
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
                wait(self.failures, interval, retry_max, told, fastrand::f64())
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

/// Whether the error concerns one table, not the whole connection.
fn is_of_table(stop: &Stop) -> bool {
    match stop {
        Stop::Later { .. } => false,
        Stop::Person { hint, .. } => match hint {
            Hint::Forbidden | Hint::Table | Hint::Column | Hint::EveryRow => true,
            Hint::Key | Hint::Address | Hint::Asleep | Hint::Unexplained => false,
        },
    }
}
