//! The decisions of a key pool, independent of the provider, as pure functions on plain values. Facts
//! about the provider are in [`elevenlabs`](crate::elevenlabs).
//!
//! No I/O, no clock, no randomness and no logging: a function returns its decision with the reason, and
//! its caller acts on it and logs it.

pub mod authority;
pub mod certificate;
pub mod client;
pub mod client_quota;
pub mod headers;
pub mod method;
pub mod origin;
pub mod path;

pub mod budget;
pub mod charge;
pub mod concurrency_group;
pub mod evidence;
pub mod forecast;
pub mod key_state;
pub mod min_rate;
pub mod permission;
pub mod poll_schedule;
pub mod select;
pub mod strategy;

pub mod outcome;
pub mod replay;
pub mod retry_after;
pub mod retry_budget;
pub mod verdict;

pub mod files;
pub mod frame;

pub mod mirror;
pub mod pace;
pub mod plain_text;
pub mod quantity;
pub mod retention;
pub mod since;
pub mod wall_clock;

pub mod units;
