//! Defines the changes that operators make at runtime, and the channel to the task that makes them.
//!
//! The admin API, the dashboard and the command line make the same changes. In a running server, the task of
//! `control::Controller` makes them one after the other, so that two operators cannot overwrite each other's change. It
//! writes the overlay, applies the new configuration, and records the change in the usage database.

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
    /// Replaces the rules of a client that are `Some` in `rules`, and the expiry of its token.
    SetClient {
        /// The name of the client.
        name: String,
        /// The new rules. `None` leaves a rule as it is.
        rules: ClientRules,
        /// The new expiry of its current token, or `None` to keep the expiry.
        expiry: Option<TokenExpiry>,
    },
    /// Gives a client a new token.
    RotateClient {
        /// The name of the client.
        name: String,
        /// The time for which the previous token stays valid.
        grace: Duration,
        /// The time at which the new token expires. If it is `None`, the expiry of the current token stays in force.
        expires_at: Option<UnixMs>,
    },
    /// Removes a client and thereby invalidates its tokens.
    RevokeClient {
        /// The name of the client.
        name: String,
    },
    /// Reads the configuration files again and applies them.
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

/// A key that an operator adds to the pool.
#[derive(Debug)]
pub struct NewKey {
    /// The key name, which is unique in the pool.
    pub name: String,
    /// The secret that is sent to the provider.
    pub key: ApiKey,
    /// The workspace name, if the key shares a workspace with other keys.
    pub workspace: Option<String>,
    /// The base URL of its host, if it is not `upstream.base_url`.
    pub base_url: Option<String>,
    /// The key's share of the requests in weighted strategies.
    pub weight: Option<u32>,
}

/// The rules of a client in the notation of `[[clients]]`. `None` leaves a rule as it is. An empty string or list, 0 or
/// `false` removes the rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ClientRules {
    /// The client quota, such as `50 requests per day`.
    pub quota: Option<String>,
    /// The quota of each end user below the client, such as `3 requests`.
    pub user_quota: Option<String>,
    /// The rate limit of the client, such as `60 per minute`.
    pub rate_limit: Option<String>,
    /// The concurrency limit of the client.
    pub max_concurrent: Option<u32>,
    /// Prefixes of the paths that the client may use.
    pub paths: Option<Vec<String>>,
    /// Names of the keys that may serve the client.
    pub keys: Option<Vec<String>>,
    /// Names of the workspaces whose keys may serve the client.
    pub workspaces: Option<Vec<String>>,
    /// Whether the client may send its own key.
    pub bring_your_own_key: Option<bool>,
    /// Whether the client may request tokens of the provider although it has a quota.
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

/// The actor and the address of a change, for the record of changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeOrigin {
    /// The credential or program that made the change.
    pub actor: Actor,
    /// The address of the client of the admin API or of the browser. It is `None` for a connection through a Unix
    /// socket, and for a command, a reload or another replica.
    pub address: Option<IpAddr>,
}

/// The credential or program that made a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A request with the admin token.
    AdminToken,
    /// A form of the dashboard, in a session of an operator.
    Dashboard,
    /// A command without a running server.
    CommandLine,
    /// A change of the configuration files, or a signal to reload them.
    Reload,
    /// Another replica, from which this replica takes over the overlay.
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

/// The effects of a change that was made.
#[derive(Debug)]
pub struct ChangeReceipt {
    /// The generation after the change. The generation is a number that increases with each change.
    pub generation: u64,
    /// The id of the changed key. It is `None` for a change of a client and for a reload.
    pub key_id: Option<String>,
    /// The new token of an added client or of a rotation. It is shown only once.
    pub token: Option<ClientToken>,
    /// Advice for the operator, such as a setting that needs a restart.
    pub warnings: Vec<String>,
}

/// A new token of a client. Its `Debug` output does not contain it.
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

/// The reason why a change was not made. The state is unchanged, except after [`ControlError::Unavailable`], when it
/// is unknown whether the change was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Another change was made since the caller read the state, or the caller named a generation that never existed.
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
    /// The token before the last rotation is still valid. Another rotation would invalidate it before the end of its
    /// grace period.
    #[error(
        "the grace period of the last rotation has not ended: wait, or rotate without a grace period, which makes both \
         earlier tokens invalid"
    )]
    GraceNotEnded,
    /// A value of the change is invalid, its reference is ambiguous, or the configuration before or after the change is
    /// invalid.
    #[error("{0}")]
    Invalid(String),
    /// The key is configured in a file or the environment, or the entry of this name is left out on this machine.
    #[error("{0}")]
    NotManaged(String),
    /// The key is not paused.
    #[error("{0}")]
    NotPaused(String),
    /// The system provides no random numbers for a token. Every change except a reload generates a token, even if it
    /// does not need one.
    #[error("the system provides no random numbers")]
    NoRandomNumbers,
    /// The overlay or a key file cannot be read.
    #[error("{path} cannot be read: {reason}")]
    UnreadableOverlay {
        /// The path of the file.
        path: String,
        /// The error of the file system, or the mistake in the file.
        reason: String,
    },
    /// The state directory cannot be locked, or a file in it cannot be written.
    #[error("the change cannot be saved in {directory}: {reason}")]
    Unwritable {
        /// The path of the state directory.
        directory: String,
        /// The error of the file system, or the message that another process holds the lock.
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
    /// The generation that the caller has read. The change is refused if another generation is current. If it is
    /// `None`, the change is made at every generation.
    pub expected_generation: Option<u64>,
    /// The actor and the address of the change, which are recorded.
    pub origin: ChangeOrigin,
    /// Receives the receipt or the error after the change.
    pub respond: oneshot::Sender<Result<ChangeReceipt, ControlError>>,
}

/// Sends changes to the task that makes them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ControlSender {
    requests: mpsc::Sender<ControlRequest>,
    generation: Arc<AtomicU64>,
}

/// Maximum number of changes that are queued for the task.
const MAX_QUEUED_CHANGES: usize = 16;

/// Maximum time until a change is made, including its time in the queue. A change writes a few small files.
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

    /// Sends a change to the task that makes changes. Returns the receipt after the change is made.
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
            Ok(Some(outcome)) => outcome,
            Ok(None) | Err(_) => Err(ControlError::Unavailable),
        }
    }
}
