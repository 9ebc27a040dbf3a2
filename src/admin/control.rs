//! Defines the changes that operators make at runtime, and the channel to the task that makes them.
//!
//! The admin API and the command line send the same changes. One task makes them one after the other, so that
//! two operators cannot overwrite each other's change: it writes the overlay, applies the new configuration to
//! the running server, and records the change in the usage database.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// A change of the keys, the clients or the configuration.
#[derive(Debug)]
pub enum Change {
    /// Adds a key to the pool.
    AddKey(NewKey),
    /// Removes a key that was added at runtime.
    RemoveKey {
        /// The id, the name or the short form of the key.
        key: String,
    },
    /// Lets a key finish its requests and assigns no new ones to it.
    PauseKey {
        /// The id, the name or the short form of the key.
        key: String,
        /// The time at which the key is resumed, or `None` if only an operator resumes it.
        until: Option<UnixMs>,
        /// The operator's reason, at most [`MAX_REASON_CHARS`] characters.
        reason: Option<String>,
    },
    /// Ends the pause of a key.
    ResumeKey {
        /// The id, the name or the short form of the key.
        key: String,
    },
    /// Adds a client with a new token.
    AddClient {
        /// The name of the client.
        name: String,
        /// The limits and access rules of the client.
        rules: ClientRules,
        /// The time at which its token expires, or `None` if it does not expire.
        expires_at: Option<UnixMs>,
    },
    /// Replaces the rules of a client that `rules` sets.
    SetClient {
        /// The name of the client.
        name: String,
        /// The rules to replace.
        rules: ClientRules,
        /// The new end of its current token, or `None` to keep the end.
        expiry: Option<TokenExpiry>,
    },
    /// Gives a client a new token.
    RotateClient {
        /// The name of the client.
        name: String,
        /// The time for which the previous token stays valid.
        grace: Duration,
        /// The time at which the new token expires, or `None` if it does not expire.
        expires_at: Option<UnixMs>,
    },
    /// Invalidates a client token.
    RevokeClient {
        /// The name of the client.
        name: String,
    },
    /// Reads the configuration files again.
    Reload,
}

/// The expiry of a client token, as an operator sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenExpiry {
    /// The token does not expire.
    Never,
    /// The token expires at this time.
    At(UnixMs),
}

/// Maximum number of characters in the reason for a pause.
pub const MAX_REASON_CHARS: usize = 200;

/// Returns whether a reason for a pause has at most [`MAX_REASON_CHARS`] characters and no control character.
#[must_use]
pub fn is_valid_reason(reason: &str) -> bool {
    reason.chars().count() <= MAX_REASON_CHARS && !reason.chars().any(char::is_control)
}

/// A key to be added.
#[derive(Debug)]
pub struct NewKey {
    /// The key name, which is unique in the pool.
    pub name: String,
    /// The key.
    pub key: ApiKey,
    /// The workspace name, if the key shares a workspace with other keys.
    pub workspace: Option<String>,
    /// The base URL of its host, if it is not `upstream.base_url`.
    pub base_url: Option<String>,
    /// The key's share of the requests in weighted strategies.
    pub weight: Option<u32>,
}

/// The rules of a client in the notation of `[[clients]]`. `None` leaves a rule as it is. An empty string
/// or list removes the rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClientRules {
    /// The client quota, such as `50 requests per day`.
    pub quota: Option<String>,
    /// The quota of each end user below the client, such as `3 requests`.
    pub user_quota: Option<String>,
    /// The rate limit of the client, such as `60 per minute`.
    pub rate_limit: Option<String>,
    /// The concurrency limit of the client. 0 removes the limit.
    pub max_concurrent: Option<u32>,
    /// Prefixes of the paths that it may use.
    pub paths: Option<Vec<String>>,
    /// Names of the keys that serve it.
    pub keys: Option<Vec<String>>,
    /// Names of the workspaces that serve it.
    pub workspaces: Option<Vec<String>>,
    /// Whether it may bring its own key.
    pub bring_your_own_key: Option<bool>,
    /// Whether it may request tokens of the provider although it has a quota.
    pub provider_tokens: Option<bool>,
}

impl ClientRules {
    /// Returns the rules that are set, in the notation of the admin API.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let mut document = serde_json::to_value(self).unwrap_or_default();
        if let Some(members) = document.as_object_mut() {
            members.retain(|_, rule| !rule.is_null());
        }
        document
    }
}

/// The credential and the address from which a change was made, for the record of changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeOrigin {
    /// The credential or program.
    pub actor: Actor,
    /// The address of the client of the admin API, or `None` for a Unix socket or the command line.
    pub address: Option<IpAddr>,
}

/// The credential or program of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A request with the admin token.
    AdminToken,
    /// A form of the dashboard.
    Dashboard,
    /// A command without a running server.
    CommandLine,
    /// A change of the configuration files, or a signal to reload them.
    Reload,
    /// Changes that were made at another replica.
    Replica,
}

impl Actor {
    /// Returns the identifier in the record of changes.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AdminToken => "admin_token",
            Self::Dashboard => "dashboard",
            Self::CommandLine => "command_line",
            Self::Reload => "reload",
            Self::Replica => "replica",
        }
    }
}

/// The result of a change.
#[derive(Debug)]
pub struct ChangeReceipt {
    /// The generation after the change.
    pub generation: u64,
    /// The id of the key that was changed.
    pub key_id: Option<String>,
    /// The new token of a client, which is shown only once.
    pub token: Option<ClientToken>,
    /// Advice for the operator, such as a setting that needs a restart.
    pub warnings: Vec<String>,
}

/// A new token of a client. It cannot be printed by mistake.
pub struct ClientToken(String);

impl ClientToken {
    /// Wraps a generated token.
    #[must_use]
    pub fn new(token: String) -> Self {
        Self(token)
    }

    /// Returns the token, which is shown once to the operator who made the change.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ClientToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientToken(…)")
    }
}

/// The reason that a change was not made. The state is unchanged, except after [`ControlError::Unavailable`], when it
/// is unknown whether the change was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Another change was made since the caller read the state.
    #[error("the generation is {current}: read the state again and repeat the change")]
    Stale {
        /// The current generation.
        current: u64,
    },
    /// The key or client does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A key or client of that name exists, or the key is in the pool already.
    #[error("{0}")]
    AlreadyExists(String),
    /// Without its only client, Keychoir would serve every request without a token.
    #[error(
        "this is the only client, and without clients every request is served without a token: give it a new token \
         with `keychoir clients rotate`, or add another client first"
    )]
    LastClient,
    /// A second rotation would end the grace period that the first one has promised.
    #[error(
        "the grace period of the last rotation has not ended: wait, or rotate without a grace period, which makes both \
         earlier tokens invalid"
    )]
    GraceNotEnded,
    /// A value of the change is invalid, or the configuration would be.
    #[error("{0}")]
    Invalid(String),
    /// The key or client is configured elsewhere and cannot be changed here.
    #[error("{0}")]
    NotManaged(String),
    /// The key is not paused.
    #[error("{0}")]
    NotPaused(String),
    /// The system provides no random numbers for a token.
    #[error("the system provides no random numbers")]
    NoRandomNumbers,
    /// The overlay cannot be read.
    #[error("{path} cannot be read: {reason}")]
    UnreadableOverlay {
        /// The file.
        path: String,
        /// The error of the file system, or the mistake in the file.
        reason: String,
    },
    /// The overlay cannot be written.
    #[error("the change cannot be saved in {directory}: {reason}")]
    Unwritable {
        /// The state directory.
        directory: String,
        /// The error of the file system.
        reason: String,
    },
    /// Without a state directory, changes cannot be saved.
    #[error("changes cannot be saved, because Keychoir keeps its state only in memory (storage.ephemeral)")]
    NoStateDirectory,
    /// The task that makes changes has ended or does not respond.
    #[error("Keychoir is shutting down or does not respond: try again")]
    Unavailable,
}

/// A change on its way to the task that makes it.
#[derive(Debug)]
pub struct ControlRequest {
    /// The change.
    pub change: Change,
    /// The generation that the caller has read. The change is refused if a different one is current.
    pub expected_generation: Option<u64>,
    /// The origin of the change.
    pub origin: ChangeOrigin,
    /// Receives the result.
    pub respond: oneshot::Sender<Result<ChangeReceipt, ControlError>>,
}

/// Sends changes to the task that makes them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ControlSender {
    requests: mpsc::Sender<ControlRequest>,
    generation: Arc<AtomicU64>,
}

/// Maximum number of changes that wait for the task.
const MAX_QUEUED_CHANGES: usize = 16;

/// Maximum time for a change, which writes a few small files.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

impl ControlSender {
    /// Creates the channel. The receiving task stores the current generation in the returned counter.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<ControlRequest>, Arc<AtomicU64>) {
        let (requests, receiver) = mpsc::channel(MAX_QUEUED_CHANGES);
        let generation = Arc::new(AtomicU64::new(0));
        (Self { requests, generation: Arc::clone(&generation) }, receiver, generation)
    }

    /// Returns the current generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Makes a change and returns its result.
    ///
    /// # Errors
    ///
    /// Fails when the change is not made. The state is then unchanged, except after [`ControlError::Unavailable`],
    /// when it is unknown whether the change was made.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not cancel a change that the task has received.
    pub async fn make(
        &self,
        change: Change,
        expected_generation: Option<u64>,
        origin: ChangeOrigin,
    ) -> Result<ChangeReceipt, ControlError> {
        let (respond, receipt) = oneshot::channel();
        let request = ControlRequest { change, expected_generation, origin, respond };
        let exchange = async {
            self.requests.send(request).await.ok()?;
            receipt.await.ok()
        };
        match tokio::time::timeout(CHANGE_TIMEOUT, exchange).await {
            Ok(Some(result)) => result,
            Ok(None) | Err(_) => Err(ControlError::Unavailable),
        }
    }
}
