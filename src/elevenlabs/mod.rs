//! Contains all facts about ElevenLabs and their sources, in tables and pure functions: endpoints, permissions, models,
//! prices, plans, limits, regions, refusals, WebSocket protocols, identifiers and personal data.
//!
//! To add an endpoint, add a row to `endpoint/table.rs`. To add the wording of a refusal, add a row to
//! `refusal/table.rs`. To add a resource whose identifiers belong to an account, add a row to
//! `affinity/table.rs`. The functions do no I/O, read no clock, use no random numbers and write no logs.

pub mod endpoint;
pub mod normalize_path;
pub mod permission;
pub mod segments;

pub mod concurrency;
pub mod cost;
pub mod estimate;
pub mod models;
pub mod plan;
pub mod region;
pub mod request_body;
pub mod subscription;

pub mod features;
pub mod refusal;

pub mod socket;

pub mod affinity;
pub mod user_data;
