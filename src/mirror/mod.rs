//! Mirrors usage to Supabase: a background task reads due rows from the outbox of the local database, sends them in
//! rounds of one batch each, and records the results. Rows that are not delivered stay in the outbox and are sent
//! again. Requests of clients never wait for the mirror. [`check_settings`] and [`check_tables`] check the setup for
//! commands.

mod client;
mod health;
mod push;
mod rows;
mod table_check;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock;
use crate::policy::forward_proxy::ForwardProxy;
use crate::policy::mirror::{MirrorProblem, retry_delay};
use crate::secret::SupabaseKey;
use crate::store::{DeliveryReport, Outbox, OutboxBatch, RefusedRow, StoreUnavailable};
use crate::upstream::HttpClientError;

pub use health::{MirrorHealth, MirrorState};
pub use table_check::{TableCheck, check_settings, check_tables};

use client::SupabaseClient;
use push::{PushError, PushResult, push, rename};

/// The target and the timing of the mirror.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The URL of the Supabase project, such as `https://PROJECT.supabase.co`, without a trailing slash.
    pub base_url: String,
    /// A Supabase key with write access.
    pub key: SupabaseKey,
    /// The forward proxy for connections to Supabase, or `None` for direct connections.
    pub proxy: Option<Arc<ForwardProxy>>,
    /// A file of certificate authorities that are trusted in addition to the certificate authorities of the public web,
    /// or `None` if there are no additional ones.
    pub ca_file: Option<PathBuf>,
    /// Time between two rounds, unless further rows are due or Supabase caused an error.
    pub interval: Duration,
    /// Maximum number of rows per request.
    pub max_batch_rows: usize,
    /// Timeout of the DNS lookup and the TCP and TLS handshakes together.
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
    /// TLS or the forward proxy of the HTTP client cannot be configured.
    #[error(transparent)]
    Configuration(#[from] HttpClientError),
    /// The HTTP client cannot be created.
    #[error("the HTTP client for Supabase cannot be created: {0}")]
    Client(#[from] reqwest::Error),
    /// The key contains characters that are invalid in a header.
    #[error("Supabase's key cannot be sent in a header")]
    Key,
}

/// Delay before a refused row is sent again, in which an operator may change the table.
const REFUSED_RETRY_DELAY: Duration = Duration::from_secs(3_600);

/// The task that sends due rows in rounds.
#[derive(Debug)]
pub struct Mirror {
    outbox: Outbox,
    client: SupabaseClient,
    settings: Settings,
    health: MirrorHealth,
    /// Number of consecutive temporary failures.
    failures: u32,
    /// The setup problem that was logged last, or `None` at the start and after a successful round.
    last_problem: Option<MirrorProblem>,
}

/// The result of a round.
#[derive(Debug)]
enum RoundResult {
    /// All due rows were sent, or refused for their content.
    Done,
    /// Further rows may be due, because the batch was full.
    MoreDue,
    /// A push ended with an error: Supabase was unreachable, refused the request, or is not set up. The unsent rows
    /// stay in the outbox.
    Failed(PushError),
    /// The database cannot be read or written now.
    StoreUnavailable,
}

impl Mirror {
    /// Creates the mirror of `outbox`.
    ///
    /// # Errors
    ///
    /// Fails when the HTTP client cannot be created.
    pub fn new(outbox: Outbox, settings: Settings, health: MirrorHealth) -> Result<Self, MirrorStartError> {
        let client = SupabaseClient::new(&settings)?;
        // The age of rows from earlier runs is unknown, so the lag is measured from this time.
        health.record_empty_outbox(clock::now());
        Ok(Self { outbox, client, settings, health, failures: 0, last_problem: None })
    }

    /// Sends due rows in rounds until `shutdown` is cancelled, then sends the remaining rows and returns.
    ///
    /// # Cancel safety
    ///
    /// Rows whose delivery is not yet recorded are sent again after the next startup.
    pub async fn run(mut self, shutdown: CancellationToken) {
        info!(
            event = "mirror_started",
            url = self.settings.base_url,
            "Mirroring to {}",
            self.settings.base_url
        );
        // Refused rows are retried, because an operator may have fixed the table before this start.
        let _ = self.outbox.release_refused().await;
        loop {
            let round = self.run_round().await;
            let wait = self.delay_after(round);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shutdown.cancelled() => break,
            }
        }
        while matches!(self.run_round().await, RoundResult::MoreDue) {}
    }

    async fn run_round(&mut self) -> RoundResult {
        self.try_round().await.unwrap_or(RoundResult::StoreUnavailable)
    }

    /// Sends one batch: renames first, then the states of keys, then events.
    async fn try_round(&mut self) -> Result<RoundResult, StoreUnavailable> {
        let max_rows = self.settings.max_batch_rows;
        let OutboxBatch { renames, keys, events, refused } = self.outbox.next_batch(max_rows).await?;
        self.health.set_refused(refused);
        let has_more_renames = renames.len() >= max_rows;
        // Renames are sent first, because a new row of a key would conflict with its old row.
        if let Some(error) = self.record_push(rename(&self.client, renames).await).await? {
            return Ok(RoundResult::Failed(error));
        }
        if has_more_renames {
            return Ok(RoundResult::MoreDue);
        }
        let is_full = keys.len() >= max_rows || events.len() >= max_rows;
        let key_error = self.record_push(push(&self.client, &keys).await).await?;
        // After an error of one table, the rows of the other table are still sent.
        let error = match key_error {
            Some(error) if !concerns_one_table(&error) => Some(error),
            error => self.record_push(push(&self.client, &events).await).await?.or(error),
        };
        Ok(match error {
            Some(error) => RoundResult::Failed(error),
            None if is_full => RoundResult::MoreDue,
            None => RoundResult::Done,
        })
    }

    /// Records the result of a push for each row. Returns the error that ended the push.
    async fn record_push(
        &mut self,
        PushResult { sent, refused, error }: PushResult,
    ) -> Result<Option<PushError>, StoreUnavailable> {
        if sent.is_empty() && refused.is_empty() {
            return Ok(error);
        }
        self.health.add_sent(sent.len());
        let retry_at = clock::now().plus(REFUSED_RETRY_DELAY);
        let first_code = refused.first().map(|(_, code)| code.clone()).unwrap_or_default();
        let refused = refused.into_iter().map(|(row, code)| RefusedRow { row, code, retry_at }).collect();
        let newly_refused = self.outbox.record_delivery(DeliveryReport { sent, refused }).await?;
        if newly_refused > 0 {
            warn!(
                event = "mirror_rows_refused",
                rows = newly_refused,
                code = first_code,
                "Supabase refuses {newly_refused} rows because of their content ({first_code}); they stay in the \
                 outbox and are sent again later"
            );
        }
        Ok(error)
    }

    /// Updates the health and logs changes after a round. Returns the delay of the next round.
    fn delay_after(&mut self, round: RoundResult) -> Duration {
        let Settings { interval, max_retry_delay, pause, .. } = self.settings;
        match round {
            RoundResult::Done | RoundResult::MoreDue => {
                if self.health.state() != MirrorState::Working {
                    info!(event = "mirror_recovered", "Supabase accepts the mirrored rows again");
                }
                self.health.set_state(MirrorState::Working);
                if matches!(round, RoundResult::Done) {
                    self.health.record_empty_outbox(clock::now());
                }
                (self.failures, self.last_problem) = (0, None);
                if matches!(round, RoundResult::MoreDue) { Duration::ZERO } else { interval }
            }
            // The store logs database errors.
            RoundResult::StoreUnavailable => interval,
            RoundResult::Failed(PushError::Temporary { reason, retry_after }) => {
                if self.health.state() == MirrorState::Working {
                    warn!(
                        event = "mirror_failing",
                        "Supabase does not accept the mirrored rows: {reason}. The mirror retries, and requests are \
                         not affected"
                    );
                }
                self.health.set_state(MirrorState::Failing);
                self.health.add_failure();
                self.failures = self.failures.saturating_add(1);
                retry_delay(self.failures, interval, max_retry_delay, retry_after, fastrand::f64())
            }
            RoundResult::Failed(PushError::Setup { problem, reason }) => {
                if self.last_problem != Some(problem) {
                    warn!(event = "mirror_paused", "The mirror is paused: {} ({reason})", problem.message());
                }
                self.health.set_state(MirrorState::Paused);
                self.health.add_failure();
                (self.failures, self.last_problem) = (0, Some(problem));
                pause
            }
        }
    }
}

/// Returns whether the error concerns one table, so that the other table may still accept rows.
fn concerns_one_table(error: &PushError) -> bool {
    match error {
        PushError::Temporary { .. } => false,
        PushError::Setup { problem, .. } => match problem {
            MirrorProblem::Forbidden
            | MirrorProblem::Table
            | MirrorProblem::Column
            | MirrorProblem::EveryRow => true,
            MirrorProblem::Key
            | MirrorProblem::Address
            | MirrorProblem::Paused
            | MirrorProblem::Unexplained => false,
        },
    }
}
