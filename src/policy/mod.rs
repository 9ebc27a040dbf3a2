//! Every decision on plain values. No I/O, no clock, no chance, no logging: what comes out is data
//! with its reason, and the shell acts on it and tells of it.

pub mod units;
