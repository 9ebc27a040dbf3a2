//! Tests the whole proxy with real connections of clients and of a provider. The provider is the simulator, or a server
//! of the test that sends fixed, scripted or malformed responses. Each module contains the tests of one subject, and
//! `cargo test --test proxy retry::` runs those of `retry`. The module `hostile` contains the shared test cases of
//! `hostile_clients` and `hostile_providers`.

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

mod hostile;

mod access;
mod admin_api;
mod affinity;
mod buffers;
mod clients;
mod connections;
mod contract;
mod dashboard;
mod forwarding;
mod hostile_clients;
mod hostile_providers;
mod hostile_websockets;
mod metrics;
mod mirror;
mod month;
mod operator_listener;
mod pool;
mod quotas;
mod random_provider;
mod redaction;
mod refusal_matrix;
mod refusals;
mod reports;
mod restarts;
mod retry;
mod secrets;
mod slow_clients;
mod tls;
mod transparency;
mod uploads;
mod upstream;
mod users;
mod websocket;
mod websocket_refusals;
