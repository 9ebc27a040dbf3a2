//! Sends GET requests with a key of the pool to the provider, and parses the responses: quotas, workspaces, models and
//! costs of conversations. The requests cost no credits. All pollers and the check of a key use this client.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::Empty;

use crate::body::decode::decode_body;
use crate::body::peek::PeekedBody;
use crate::body::replay::Replay;
use crate::elevenlabs::models::Models;
use crate::elevenlabs::refusal::{ErrorBody, classify};
use crate::elevenlabs::socket::conversation_cost;
use crate::elevenlabs::subscription::{Subscription, parse_workspace_id};
use crate::policy::authority::Authority;
use crate::policy::evidence::RefusalSource;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Observation};
use crate::upstream::{Connect, SendError, Upstream, UpstreamRequestHead};

/// Maximum size of the body of a response. The longest body, the list of models, has less than 100 kilobytes.
const MAX_RESPONSE_BYTES: usize = 1024 * 1024;

/// A client of the provider for one or more requests.
#[derive(Debug)]
pub(super) struct ProviderClient<'a, C> {
    pub(super) upstream: &'a Upstream<C>,
    /// Timeout from the start of a request to the end of its response.
    pub(super) response_timeout: Duration,
}

impl<C: Connect> ProviderClient<'_, C> {
    /// Requests the quota of the key's workspace. Returns `None` after an error that does not concern the key.
    pub(super) async fn request_quota(&self, key: &Key) -> Option<Observation> {
        self.request_quota_at(key.destination(), key).await
    }

    /// Requests the quota of the key's workspace from `host`, or from the default host if `host` is `None`.
    pub(super) async fn request_quota_at(
        &self,
        host: Option<&Arc<Authority>>,
        key: &Key,
    ) -> Option<Observation> {
        self.request_subscription_at(host, key).await.ok()?.observation()
    }

    /// Requests the subscription of the key's workspace.
    pub(super) async fn request_subscription(
        &self,
        key: &Key,
    ) -> Result<ProviderResponse, NoProviderResponse> {
        self.request_subscription_at(key.destination(), key).await
    }

    async fn request_subscription_at(
        &self,
        host: Option<&Arc<Authority>>,
        key: &Key,
    ) -> Result<ProviderResponse, NoProviderResponse> {
        self.send(host, key, Uri::from_static("/v1/user/subscription")).await
    }

    /// Requests the user of the key, whose document contains the identifier of the key's workspace.
    pub(super) async fn request_user(&self, key: &Key) -> Result<ProviderResponse, NoProviderResponse> {
        self.send(key.destination(), key, Uri::from_static("/v1/user")).await
    }

    /// Requests the provider's models. Returns `None` without a successful response, for example if the key lacks
    /// the permission to read the models.
    pub(super) async fn request_models(&self, key: &Key) -> Option<Models> {
        Models::parse(&self.request_body(key, Uri::from_static("/v1/models")).await?)
    }

    /// Requests the cost of a conversation in credits. Returns `None` until the provider has published the cost.
    pub(super) async fn request_conversation_cost(&self, key: &Key, conversation_id: &str) -> Option<u64> {
        let path = format!("/v1/convai/conversations/{conversation_id}");
        conversation_cost(&self.request_body(key, Uri::try_from(path).ok()?).await?)
    }

    /// Sends a request to the host of the key. Returns the body of a successful response.
    async fn request_body(&self, key: &Key, target: Uri) -> Option<Vec<u8>> {
        let response = self.send(key.destination(), key, target).await.ok()?;
        (response.verdict == Verdict::Served).then_some(response.body)
    }

    /// Requests the models, and returns the response without parsing its body. Its verdict shows whether the key
    /// may read the models.
    pub(super) async fn request_models_response(
        &self,
        key: &Key,
    ) -> Result<ProviderResponse, NoProviderResponse> {
        self.send(key.destination(), key, Uri::from_static("/v1/models")).await
    }

    async fn send(
        &self,
        host: Option<&Arc<Authority>>,
        key: &Key,
        target: Uri,
    ) -> Result<ProviderResponse, NoProviderResponse> {
        let exchange = async {
            let head = UpstreamRequestHead { method: Method::GET, target, headers: HeaderMap::new() };
            let body = Replay::<Empty<Bytes>>::empty().start_attempt();
            let response = self.upstream.send(host, key.api_key(), &head, body).await?;
            let (response_head, body) = response.into_parts();
            let (_, bytes) = PeekedBody::read(body, MAX_RESPONSE_BYTES, self.response_timeout, None).await;
            let encoding =
                response_head.headers.get("content-encoding").and_then(|value| value.to_str().ok());
            let bytes = bytes.ok_or(NoProviderResponse::IncompleteBody)?;
            let body = decode_body(&bytes, encoding, MAX_RESPONSE_BYTES)
                .ok_or(NoProviderResponse::UndecodableBody)?;
            let verdict = classify(response_head.status, Some(&ErrorBody::parse(&body)), None);
            Ok(ProviderResponse { status: response_head.status, verdict, body })
        };
        match tokio::time::timeout(self.response_timeout, exchange).await {
            Ok(response) => response,
            Err(_) => Err(NoProviderResponse::Timeout(self.response_timeout)),
        }
    }
}

/// The reason why a request of a poller or of a check has no readable response. Its message contains no secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoProviderResponse {
    /// No response head was received.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The response was not complete before the timeout.
    #[error("no response within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The body of the response ended early, stopped arriving, or is too long.
    #[error("the body of the response is incomplete or longer than {MAX_RESPONSE_BYTES} bytes")]
    IncompleteBody,
    /// The encoding of the body is unknown, or its data is invalid.
    #[error("the body of the response cannot be decoded")]
    UndecodableBody,
}

/// A complete response of the provider, with its classification.
pub(super) struct ProviderResponse {
    pub(super) status: StatusCode,
    /// The meaning of the status and the body.
    pub(super) verdict: Verdict,
    /// The decoded body.
    body: Vec<u8>,
}

impl ProviderResponse {
    /// Returns whether a later request would get the same response, because the key decides about it and not the load
    /// of the provider.
    pub(super) fn is_final(&self) -> bool {
        !self.status.is_server_error()
            && !matches!(
                self.verdict,
                Verdict::RateLimited(_) | Verdict::Concurrency { .. } | Verdict::Busy | Verdict::Unreadable
            )
    }

    /// Returns the identifier of the workspace from the user of a key, or `None` if the key may not read the user.
    pub(super) fn workspace_id(&self) -> Option<String> {
        if self.verdict == Verdict::Served { parse_workspace_id(&self.body) } else { None }
    }

    /// Interprets the response to a request for the subscription as an observation of the key. Returns `None` for
    /// an error that does not concern the key.
    pub(super) fn observation(&self) -> Option<Observation> {
        match self.verdict {
            Verdict::Served => Subscription::parse(&self.body).map(|subscription| Observation::Quota {
                quota: subscription.quota,
                tier: subscription.tier,
                is_paid: subscription.is_paid,
                capabilities: subscription.capabilities,
            }),
            verdict @ (Verdict::InvalidKey | Verdict::WrongHost) => {
                let source = RefusalSource {
                    message: verdict.as_str().into(),
                    route: "/v1/user/subscription".into(),
                    ..RefusalSource::default()
                };
                Some(Observation::Invalid { verdict, source })
            }
            // A key that is restricted to speech cannot read its quota, but can serve speech.
            Verdict::MissingPermission(_) => Some(Observation::Unreadable),
            Verdict::WorkspaceQuota(_)
            | Verdict::KeyQuota(_)
            | Verdict::PlanFeature(_)
            | Verdict::Slots
            | Verdict::Billing
            | Verdict::Abuse
            | Verdict::RateLimited(_)
            | Verdict::Concurrency { .. }
            | Verdict::Busy
            | Verdict::Unexplained(_)
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => None,
        }
    }
}
