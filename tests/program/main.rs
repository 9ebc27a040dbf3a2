//! Tests the `keychoir` binary as a process: its commands, startup, reload, shutdown and log, and its behaviour under
//! systemd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test panics if an expectation fails"
)]

#[path = "../support/mod.rs"]
mod support;

mod environment;

mod canaries;
mod check;
mod config_show;
mod control;
mod database;
mod demo;
mod demo_replicas;
mod diagnosis;
mod healthcheck;
mod lifecycle;
mod log;
mod reading;
mod reload;
mod server_access;
mod shell;
mod startup;
mod status_watch;
mod systemd;
