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
use crate::store::{Batch, Delivery, Outbox, RefusedRow, StoreClosed};
use crate::upstream::TlsError;

pub use health::{MirrorHealth, State};

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
    pub max_batch_rows: usize,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Timeout from the begin of a request to the end of its response.
    pub response_timeout: Duration,
    /// The longest delay after repeated failures.
    pub max_retry_delay: Duration,
    /// The delay when an operator must fix the setup.
    pub pause: Duration,
    /// How long shutdown waits for the last push.
    pub final_push_timeout: Duration,
}

/// Why the mirror cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MirrorStartError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The HTTP client cannot be made.
    #[error("the HTTP client for Supabase cannot be created: {0}")]
    Client(#[from] reqwest::Error),
    /// A header cannot carry the key.
    #[error("Supabase's key cannot be sent in a header")]
    Key,
}

/// Delay before a refused row is retried: its table may have changed.
const REFUSED_RETRY_DELAY: Duration = Duration::from_secs(3_600);

/// The task that sends due rows, round after round.
#[derive(Debug)]
pub struct Mirror {
    outbox: Outbox,
    remote: Remote,
    settings: Settings,
    health: MirrorHealth,
    /// Consecutive failures.
    failures: u32,
    /// The setup error that was logged last.
    last_hint: Option<Hint>,
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
    StoreUnavailable,
}

impl Mirror {
    /// Makes a mirror of this outbox.
    ///
    /// # Errors
    ///
    /// When the HTTP client cannot be made.
    pub fn new(outbox: Outbox, settings: Settings, health: MirrorHealth) -> Result<Self, MirrorStartError> {
        let remote = Remote::new(&settings)?;
        // The age of rows from earlier runs is not recorded, so their lag counts from now.
        health.caught_up(clock::now());
        Ok(Self { outbox, remote, settings, health, failures: 0, last_hint: None })
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
        let _ = self.outbox.clear_parked().await;
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
            Err(StoreClosed) => Round::StoreUnavailable,
        }
    }

    async fn try_round(&mut self) -> Result<Round, StoreClosed> {
        let max_rows = self.settings.max_batch_rows;
        let Batch { renames, keys, events, refused } = self.outbox.take(max_rows).await?;
        self.health.set_refused(refused);
        let is_renaming = renames.len() >= max_rows;
        // Renames go first: a new row of a key would conflict with its old one.
        if let Some(stop) = self.record(rename(&self.remote, renames).await).await? {
            return Ok(Round::Stopped(stop));
        }
        if is_renaming {
            return Ok(Round::More);
        }
        let is_full = keys.len() >= max_rows || events.len() >= max_rows;
        let keys: Vec<KeyUsage> = keys.into_iter().map(Into::into).collect();
        let events: Vec<UsageEvent> = events.into_iter().map(Into::into).collect();
        let keys_stop = self.record(push(&self.remote, &keys).await).await?;
        // An error of one table does not keep the other from being sent.
        let stop = match keys_stop {
            Some(stop) if !concerns_one_table(&stop) => Some(stop),
            stop => self.record(push(&self.remote, &events).await).await?.or(stop),
        };
        Ok(match stop {
            Some(stop) => Round::Stopped(stop),
            None if is_full => Round::More,
            None => Round::Done,
        })
    }

    /// Records the result for each row; returns the error that stopped the others.
    async fn record(&mut self, result: Pushed) -> Result<Option<Stop>, StoreClosed> {
        let Pushed { sent, refused, stop } = result;
        if sent.is_empty() && refused.is_empty() {
            return Ok(stop);
        }
        self.health.add_sent(sent.len());
        let until = clock::now().plus(REFUSED_RETRY_DELAY);
        let refusal_codes: Vec<String> = refused.iter().map(|(_, code)| code.clone()).collect();
        let refused = refused.into_iter().map(|(name, code)| RefusedRow { name, code, until }).collect();
        let newly_refused = self.outbox.record(Delivery { sent, refused }).await?;
        if newly_refused > 0 {
            let code = refusal_codes.first().map_or("", String::as_str);
            warn!(
                event = "mirror_rows_refused",
                rows = newly_refused,
                code,
                "Supabase refuses {newly_refused} rows because of their content ({code}); they stay in the outbox and are sent again later"
            );
        }
        Ok(stop)
    }

    /// Processes the result of a round: logs changes and returns the delay before the next one.
    fn after(&mut self, round: Round) -> Duration {
        let Settings { interval, max_retry_delay, pause, .. } = self.settings;
        match round {
            Round::Done | Round::More => {
                if self.health.state() != State::Working {
                    info!(event = "mirror_recovered", "Supabase accepts the mirrored rows again");
                }
                self.health.set_state(State::Working);
                if matches!(round, Round::Done) {
                    self.health.caught_up(clock::now());
                }
                (self.failures, self.last_hint) = (0, None);
                if matches!(round, Round::More) { Duration::ZERO } else { interval }
            }
            // The store reports database errors itself.
            Round::StoreUnavailable => interval,
            Round::Stopped(Stop::Later { reason, retry_after }) => {
                if self.health.state() == State::Working {
                    warn!(
                        event = "mirror_failing",
                        "Supabase does not accept the mirrored rows: {reason}. Requests are served as before, and the mirror retries"
                    );
                }
                self.health.set_state(State::Failing);
                self.health.add_failure();
                self.failures = self.failures.saturating_add(1);
                wait(self.failures, interval, max_retry_delay, retry_after, fastrand::f64())
            }
            Round::Stopped(Stop::Person { hint, reason }) => {
                if self.last_hint != Some(hint) {
                    warn!(event = "mirror_paused", "The mirror is paused: {} ({reason})", hint.text());
                }
                self.health.set_state(State::Paused);
                self.health.add_failure();
                (self.failures, self.last_hint) = (0, Some(hint));
                pause
            }
        }
    }
}

/// Whether the error concerns one table, not the whole connection.
fn concerns_one_table(stop: &Stop) -> bool {
    match stop {
        Stop::Later { .. } => false,
        Stop::Person { hint, .. } => match hint {
            Hint::Forbidden | Hint::Table | Hint::Column | Hint::EveryRow => true,
            Hint::Key | Hint::Address | Hint::Asleep | Hint::Unexplained => false,
        },
    }
}
