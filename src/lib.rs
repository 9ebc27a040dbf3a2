//! Keychoir is a transparent reverse proxy that serves one base URL with a pool of ElevenLabs API keys.
//!
//! It removes the client's credentials from a request, sets `xi-api-key` to a key from a lock-free pool, retries
//! a refused request with the next key, streams both bodies and records the usage. `ARCHITECTURE.md` describes the
//! modules. `proxy/exchange.rs`, which serves one request, is the best file to read first.

pub mod app;
pub mod cli;
pub mod control;

pub mod admin;
pub mod dashboard;
pub mod mirror;
pub mod poller;
pub mod server;
pub mod shared;
pub mod store;

pub mod proxy;

pub mod body;
pub mod certificate;
pub mod pool;
pub mod upstream;

pub mod elevenlabs;
pub mod policy;

pub mod clock;
mod platform;
pub mod private_file;
pub mod secret;
pub mod tasks;

pub mod config;
pub mod telemetry;

pub mod simulator;
