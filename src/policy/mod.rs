//! Every decision on plain values. No I/O, no clock, no chance, no logging: what comes out is data
//! with its reason, and the shell acts on it and tells of it.

pub mod allowance;
pub mod authority;
pub mod certificate;
pub mod client;
pub mod endpoint;
pub mod headers;
pub mod mend;
pub mod method;
pub mod origin;
pub mod owner;
pub mod path;

pub mod affinity;
pub mod asked;
pub mod budget;
pub mod charge;
pub mod cost;
pub mod estimate;
pub mod evidence;
pub mod features;
pub mod forecast;
pub mod lane;
pub mod min_rate;
pub mod models;
pub mod permission;
pub mod plan;
pub mod select;
pub mod standing;
pub mod strategy;
pub mod subscription;
pub mod watching;

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
