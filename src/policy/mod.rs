//! Makes the decisions of Keychoir in pure functions: key selection, key state, retries, limits, and the handling of
//! headers, origins and paths. Also parses and formats the values that these decisions need, such as durations, times
//! and WebSocket frames. Facts about the provider are in [`elevenlabs`](crate::elevenlabs).
//!
//! The functions do no I/O and read no clock, so that every decision can be tested with plain values. They return a
//! decision with its reason. The caller executes and logs the decision.

pub mod auth_failures;
pub mod authority;
pub mod certificate;
pub mod client;
pub mod client_quota;
pub mod forward_proxy;
pub mod headers;
pub mod method;
pub mod origin;
pub mod page_access;
pub mod path;
pub mod redis_url;
pub mod sessions;
pub mod user;

pub mod charge;
pub mod concurrency_group;
pub mod evidence;
pub mod forecast;
pub mod key_state;
pub mod min_rate;
pub mod permission;
pub mod poll_schedule;
pub mod quota;
pub mod select;
pub mod shared_id;
pub mod shared_pool_name;
pub mod strategy;

pub mod outcome;
pub mod replay;
pub mod retry_after;
pub mod retry_budget;
pub mod verdict;

pub mod file_limit;
pub mod websocket_frame;

pub mod commit_schedule;
pub mod mirror;
pub mod plain_text;
pub mod quantity;
pub mod report_start;
pub mod retention;
pub mod rfc3339;
pub mod similar;
pub mod wall_clock;

pub mod units;
