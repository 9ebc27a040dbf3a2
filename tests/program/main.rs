//! The program as a process: its start, its life under signals and reloads, its log, and its demo.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test ends at its first surprise"
)]

#[path = "../support/mod.rs"]
mod support;

mod control;
mod demo;
mod lifecycle;
mod log;
mod startup;
