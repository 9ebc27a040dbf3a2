//! What the provider hands out to be used instead of a key.

use serde_json::json;

use crate::clock;

use super::accounts::Refused;
use super::answer::{Answer, trace_id};
use super::shape::Shape;
use super::tokens::Door;
use super::work::{Job, known};

/// `POST /v1/single-use-token/{token_type}`.
pub(super) fn token(job: Job<'_>, kind: &str) -> Result<Answer, Refused> {
    let key = known(job.presented)?;
    let door = Door::named(kind).ok_or(Shape::NotAString("token_type".into()))?;
    let token = format!("sutkn_{}", trace_id());
    job.world.state().tokens.add(&token, door, key, clock::now());
    Ok(Answer::document(&json!({ "token": token })))
}
