//! Tests the scripts directly.
