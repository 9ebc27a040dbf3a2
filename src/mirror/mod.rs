//! Mirrors usage to Supabase: a background task sends the rows of the outbox. The mirror reads rows
//! that the database already contains, so requests never wait for it. Rows that are not delivered
//! stay in the outbox.

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

use push::{PushResult, Stop, push, rename};
use remote::Remote;
use rows::{KeyUsage, UsageEvent};

/// The target and the timing of the mirror.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://PROJECT.supabase.co`, without a trailing slash.
    pub base_url: String,
    /// A Supabase key with write access.
    pub key: ServiceKey,
    /// Time between two pushes.
    pub interval: Duration,
    /// Maximum rows per request.
    pub max_batch_rows: usize,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Timeout from the start of a request to the end of its response.
    pub response_timeout: Duration,
    /// Maximum delay after repeated failures.
    pub max_retry_delay: Duration,
    /// Delay after an error that an operator must fix.
    pub pause: Duration,
    /// Timeout of the last push at shutdown.
    pub final_push_timeout: Duration,
}

/// The errors that prevent the mirror from starting.
#[derive(Debug, thiserror::Error)]
pub enum MirrorStartError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The HTTP client cannot be created.
    #[error("the HTTP client for Supabase cannot be created: {0}")]
    Client(#[from] reqwest::Error),
    /// The key contains characters that are invalid in a header.
    #[error("Supabase's key cannot be sent in a header")]
    Key,
}

/// Delay before a refused row is retried. An operator may have changed its table meanwhile.
const REFUSED_RETRY_DELAY: Duration = Duration::from_secs(3_600);

/// The task that sends the due rows in rounds.
#[derive(Debug)]
pub struct Mirror {
    outbox: Outbox,
    remote: Remote,
    settings: Settings,
    health: MirrorHealth,
    /// Consecutive failures.
    failures: u32,
    /// The last logged setup error.
    last_hint: Option<Hint>,
}

/// The result of a round.
#[derive(Debug)]
enum RoundResult {
    /// Every due row was sent or refused.
    Done,
    /// More than one batch was due.
    MoreDue,
    /// Supabase was unreachable or refused the request. The rows stay in the outbox.
    Stopped(Stop),
    /// The database cannot be read or written at present.
    StoreUnavailable,
}

impl Mirror {
    /// Creates the mirror of `outbox`.
    ///
    /// # Errors
    ///
    /// When the HTTP client cannot be created.
    pub fn new(outbox: Outbox, settings: Settings, health: MirrorHealth) -> Result<Self, MirrorStartError> {
        let remote = Remote::new(&settings)?;
        // The age of rows from earlier runs is not recorded, so their lag counts from now.
        health.caught_up(clock::now());
        Ok(Self { outbox, remote, settings, health, failures: 0, last_hint: None })
    }

    /// Sends rounds until `end` is cancelled, then sends the remaining rows and returns. If the
    /// future is dropped, unconfirmed rows are sent after the next start.
    pub async fn run(mut self, end: CancellationToken) {
        info!(
            event = "mirror_started",
            url = self.settings.base_url,
            "Mirroring to {}",
            self.settings.base_url
        );
        // An operator may have fixed the table before this start, so refused rows are retried.
        let _ = self.outbox.clear_parked().await;
        loop {
            let round = self.round().await;
            let wait = self.delay_after(round);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = end.cancelled() => break,
            }
        }
        while matches!(self.round().await, RoundResult::MoreDue) {}
    }

    async fn round(&mut self) -> RoundResult {
        match self.try_round().await {
            Ok(round) => round,
            Err(StoreClosed) => RoundResult::StoreUnavailable,
        }
    }

    async fn try_round(&mut self) -> Result<RoundResult, StoreClosed> {
        let max_rows = self.settings.max_batch_rows;
        let Batch { renames, keys, events, refused } = self.outbox.take(max_rows).await?;
        self.health.set_refused(refused);
        let is_renaming = renames.len() >= max_rows;
        // Renames are sent first: a new row of a key would conflict with its old row.
        if let Some(stop) = self.record(rename(&self.remote, renames).await).await? {
            return Ok(RoundResult::Stopped(stop));
        }
        if is_renaming {
            return Ok(RoundResult::MoreDue);
        }
        let is_full = keys.len() >= max_rows || events.len() >= max_rows;
        let keys: Vec<KeyUsage> = keys.into_iter().map(Into::into).collect();
        let events: Vec<UsageEvent> = events.into_iter().map(Into::into).collect();
        let keys_stop = self.record(push(&self.remote, &keys).await).await?;
        // After an error of one table, the rows of the other table are still sent.
        let stop = match keys_stop {
            Some(stop) if !concerns_one_table(&stop) => Some(stop),
            stop => self.record(push(&self.remote, &events).await).await?.or(stop),
        };
        Ok(match stop {
            Some(stop) => RoundResult::Stopped(stop),
            None if is_full => RoundResult::MoreDue,
            None => RoundResult::Done,
        })
    }

    /// Records the result for each row. Returns the error that stopped the push.
    async fn record(&mut self, result: PushResult) -> Result<Option<Stop>, StoreClosed> {
        let PushResult { sent, refused, stop } = result;
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
    fn delay_after(&mut self, round: RoundResult) -> Duration {
        let Settings { interval, max_retry_delay, pause, .. } = self.settings;
        match round {
            RoundResult::Done | RoundResult::MoreDue => {
                if self.health.state() != State::Working {
                    info!(event = "mirror_recovered", "Supabase accepts the mirrored rows again");
                }
                self.health.set_state(State::Working);
                if matches!(round, RoundResult::Done) {
                    self.health.caught_up(clock::now());
                }
                (self.failures, self.last_hint) = (0, None);
                if matches!(round, RoundResult::MoreDue) { Duration::ZERO } else { interval }
            }
            // The store logs database errors itself.
            RoundResult::StoreUnavailable => interval,
            RoundResult::Stopped(Stop::Temporary { reason, retry_after }) => {
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
            RoundResult::Stopped(Stop::Setup { hint, reason }) => {
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
        Stop::Temporary { .. } => false,
        Stop::Setup { hint, .. } => match hint {
            Hint::Forbidden | Hint::Table | Hint::Column | Hint::EveryRow => true,
            Hint::Key | Hint::Address | Hint::Asleep | Hint::Unexplained => false,
        },
    }
}
