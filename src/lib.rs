//! Keychoir: one base URL for all your ElevenLabs keys.
//!
//! A transparent reverse proxy. It strips the client's credentials, sets `xi-api-key` from a lock-free pool,
//! replays a refused request with the next key, streams both ways and records the usage. `ARCHITECTURE.md`
//! describes the modules; `proxy/exchange.rs` is the file to read first.

pub mod app;
pub mod cli;

pub mod admin;
pub mod mirror;
pub mod poller;
pub mod server;
pub mod store;

pub mod proxy;

pub mod body;
pub mod certificate;
pub mod pool;
pub mod upstream;

pub mod elevenlabs;
pub mod policy;

pub mod clock;
pub mod secret;
pub mod tasks;

pub mod config;
pub mod telemetry;

pub mod simulator;
