//! The admin API below `/api/keychoir/v1/`: what an operator reads and changes, as JSON. `docs/openapi.json`
//! describes it, and a test compares both.
//!
//! Reads take their data from the running program and from the usage database. Changes go to one task through
//! [`ControlSender`](super::control::ControlSender). Every response has the `ETag` of the current generation.

mod auth;
mod changes;
mod documents;
mod error;
mod json_members;
mod request;
mod router;

use std::net::IpAddr;

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_NONE_MATCH, X_CONTENT_TYPE_OPTIONS,
};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Body;
use serde::Serialize;

use super::Admin;
use crate::clock;
use crate::policy::headers::USER_HEADER;
use crate::policy::units::UnixMs;
use crate::policy::user::identify_user;
use crate::pool::KeySnapshot;
use crate::proxy::AttemptRecord;
pub use auth::AuthFailureTable;
use documents::{attempts, check, client, config, key, me, overview, record, usage};
use error::ApiError;
use request::Query;
use router::{KeyAction, Resource};

/// The prefix of all paths of the API.
const PREFIX: &str = "/api/keychoir/v1/";

/// The successful response to a request.
struct Answer {
    status: StatusCode,
    body: Vec<u8>,
    /// Whether the document changes only with the generation, so that `If-None-Match` may be answered with 304.
    is_versioned: bool,
    /// The generation in the `ETag`; `None` for the current one.
    generation: Option<u64>,
}

impl Answer {
    fn ok(document: &impl Serialize) -> Self {
        Self::new(StatusCode::OK, document)
    }

    fn new(status: StatusCode, document: &impl Serialize) -> Self {
        // Serializing these documents cannot fail, because they consist of numbers, strings and lists.
        let body = serde_json::to_vec(document).unwrap_or_default();
        Self { status, body, is_versioned: false, generation: None }
    }

    fn versioned(self) -> Self {
        Self { is_versioned: true, ..self }
    }
}

impl Admin {
    /// Whether a path belongs to the admin API.
    #[must_use]
    pub fn is_api_path(path: &str) -> bool {
        path.starts_with(PREFIX) || path == PREFIX.trim_end_matches('/')
    }

    /// Answers a request to the admin API. `is_foreign_page` tells whether a web page of another origin sent it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not cancel a change that has been sent to its task.
    pub async fn api<B>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        is_foreign_page: bool,
    ) -> Response<Bytes>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let request_id = AttemptRecord::new_id(clock::now()).to_string();
        let if_none_match = request.headers().get(IF_NONE_MATCH).cloned();
        // Read before the document: a change in between makes the tag too old, which a later `If-Match` notices.
        let generation = self.generation();
        let answer = if is_foreign_page {
            Err(ApiError::foreign_page())
        } else {
            self.answer(request, peer, generation).await
        };
        let mut response = match answer {
            Ok(answer) => {
                let tag = etag(answer.generation.unwrap_or(generation));
                let is_unchanged = answer.is_versioned
                    && if_none_match.is_some_and(|known| request::contains_tag(&known, &tag));
                let (status, body) = if is_unchanged {
                    (StatusCode::NOT_MODIFIED, Vec::new())
                } else {
                    (answer.status, answer.body)
                };
                let mut response = Response::new(Bytes::from(body));
                *response.status_mut() = status;
                if !is_unchanged {
                    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                }
                response.headers_mut().insert(ETAG, tag);
                response
            }
            Err(error) => error.response(&request_id),
        };
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Ok(id) = HeaderValue::from_str(&request_id) {
            headers.insert(HeaderName::from_static("x-request-id"), id);
        }
        response
    }

    async fn answer<B>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        generation: u64,
    ) -> Result<Answer, ApiError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        let resource = Resource::parse(head.uri.path());
        if resource == Some(Resource::Me) {
            // The only resource for clients; their tokens do not open any other one.
            router::check_method(Resource::Me, &head.method)?;
            return self.me(&head, clock::now()).await;
        }
        // Before the path and the method, so that a request without the token does not find out which paths exist.
        self.authorize(&head, peer, clock::now())?;
        let resource = resource.ok_or_else(ApiError::unknown_path)?;
        router::check_method(resource, &head.method)?;
        let query = Query::parse(head.uri.query());
        if head.method == Method::GET || head.method == Method::HEAD {
            return self.read(resource, query, generation, clock::now()).await;
        }
        query.check(&[])?;
        let origin = changes::origin(peer);
        let members = request::read_members(&head, body, self.request_body_timeout()).await?;
        let now = clock::now();
        if let Resource::KeyAction(id, KeyAction::Check) = resource {
            members.check(&[])?;
            return self.check_key(id, now).await;
        }
        let change = changes::parse(resource, &head.method, members, &self.pool, now)?;
        let expected = request::expected_generation(&head.headers, generation)?;
        self.change(change, expected, origin).await
    }

    async fn read(
        &self,
        resource: Resource<'_>,
        query: Query,
        generation: u64,
        now: UnixMs,
    ) -> Result<Answer, ApiError> {
        match resource {
            Resource::Overview => {
                query.check(&[])?;
                Ok(Answer::ok(&overview(self, generation, now)))
            }
            Resource::Keys => {
                query.check(&[])?;
                let keys: Vec<_> =
                    self.pool.snapshot(now).iter().map(|snapshot| key(&self.pool, snapshot, now)).collect();
                Ok(Answer::ok(&serde_json::json!({"generation": generation, "keys": keys})))
            }
            Resource::Key(id) => {
                query.check(&[])?;
                Ok(Answer::ok(&key(&self.pool, &self.find_key(id, now)?, now)))
            }
            Resource::Clients => {
                query.check(&[])?;
                let config = self.config.load();
                let clients = documents::clients_by_name(&config.clients);
                let usage = &config.client_usage;
                let clients: Vec<_> = clients
                    .into_iter()
                    .map(|known| client(known, &usage.used(&known.name, now), now))
                    .collect();
                Ok(Answer::ok(&serde_json::json!({"generation": generation, "clients": clients})))
            }
            Resource::Client(name) => {
                query.check(&[])?;
                let config = self.config.load();
                let known = config.clients.with_token().find(|client| client.name.as_str() == name);
                let known = known.ok_or_else(ApiError::client_not_found)?;
                Ok(Answer::ok(&client(known, &config.client_usage.used(&known.name, now), now)))
            }
            Resource::Usage => usage(&self.history, &query, now).await.map(|document| Answer::ok(&document)),
            Resource::Attempts => attempts(&self.history, &query).await.map(|document| Answer::ok(&document)),
            Resource::Changes => {
                record(&self.history, &query).await.map(|document| Answer::ok(&document).versioned())
            }
            Resource::Config => {
                query.check(&[])?;
                Ok(Answer::ok(&config(&self.settings.load(), generation)).versioned())
            }
            Resource::Me | Resource::KeyAction(..) | Resource::ClientRotation(_) | Resource::Reload => {
                Err(ApiError::unknown_path())
            }
        }
    }

    /// The usage and the limits of the client that sent the request, also when they are used up. If the request
    /// names an end user, also those of the user.
    async fn me(&self, head: &http::request::Parts, now: UnixMs) -> Result<Answer, ApiError> {
        let query = head.uri.query();
        Query::parse(query).check(&["xi-api-key", "xi_api_key", "authorization", USER_HEADER.as_str()])?;
        let known =
            self.authenticate_client(&head.uri, &head.headers, now).map_err(ApiError::unauthenticated)?;
        let config = self.config.load_full();
        let user = match identify_user(&known.name, &head.headers, query)? {
            None => None,
            Some(user) => {
                let max_cached_users = config.limits.max_cached_users;
                let used = config.client_usage.used_by_user(&known, user, max_cached_users, now).await?;
                Some((user, used))
            }
        };
        Ok(Answer::ok(&me(&known, &config.client_usage.used(&known.name, now), user, now)))
    }

    async fn check_key(&self, id: &str, now: UnixMs) -> Result<Answer, ApiError> {
        let snapshot = self.find_key(id, now)?;
        let result = self.key_checker.check(&snapshot.key).await;
        let result = result.map_err(|_| ApiError::check_in_progress())?;
        Ok(Answer::ok(&check(&snapshot.key, &result)))
    }

    /// The key whose fingerprint starts with these 12 digits.
    fn find_key(&self, id: &str, now: UnixMs) -> Result<KeySnapshot, ApiError> {
        let mut found = self.pool.snapshot_of(now, |key| documents::key_id(key) == id);
        found.pop().ok_or_else(ApiError::key_not_found)
    }

    /// The current generation; 0 if no task makes changes.
    fn generation(&self) -> u64 {
        self.control.as_ref().map_or(0, super::control::ControlSender::generation)
    }

    fn request_body_timeout(&self) -> std::time::Duration {
        self.config.load().limits.request_body_timeout
    }
}

/// The entity tag of a generation.
fn etag(generation: u64) -> HeaderValue {
    let text = format!("\"{generation}\"");
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("\"0\""))
}
