//! Every decision of the proxy, as pure functions on plain values.
//!
//! No I/O, no clock, no chance and no logging: a function returns its decision with the reason, and
//! its caller acts on it and logs it.

pub mod authority;
pub mod certificate;
pub mod client;
pub mod client_quota;
pub mod endpoint;
pub mod headers;
pub mod method;
pub mod normalize_path;
pub mod origin;
pub mod owner;
pub mod path;

pub mod affinity;
pub mod budget;
pub mod charge;
pub mod concurrency_group;
pub mod cost;
pub mod estimate;
pub mod evidence;
pub mod features;
pub mod forecast;
pub mod key_state;
pub mod min_rate;
pub mod models;
pub mod permission;
pub mod plan;
pub mod poll_schedule;
pub mod request_body;
pub mod select;
pub mod strategy;
pub mod subscription;

pub mod classify;
pub mod replay;
pub mod retry_after;
pub mod retry_budget;

pub mod files;
pub mod frame;
pub mod socket;

pub mod mirror;
pub mod pace;
pub mod quantity;
pub mod retention;
pub mod since;
pub mod wall_clock;

pub mod units;
