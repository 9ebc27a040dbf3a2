//! All facts about ElevenLabs, as pure functions and tables, each with its source.
//!
//! A new endpoint is a row of `endpoint`, a new wording of a refusal a row of `refusal`, a new resource
//! with identifiers a row of `affinity`. No I/O, no clock, no randomness and no logging.

pub mod endpoint;
pub mod normalize_path;
pub mod permission;
pub mod segments;

pub mod concurrency;
pub mod cost;
pub mod estimate;
pub mod models;
pub mod plan;
pub mod request_body;
pub mod subscription;

pub mod features;
pub mod refusal;

pub mod socket;

pub mod affinity;
pub mod user_data;
