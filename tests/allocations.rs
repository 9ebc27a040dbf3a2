//! Counts the allocations of each step of the request path in `benches/request_steps`. The test fails if a step exceeds
//! its maximum number of allocations, or has no maximum. The steps run without sockets, so the numbers are the same on
//! every machine.

#[path = "../benches/request_steps/mod.rs"]
mod request_steps;

mod counting;

use counting::allocations_of_one_call;
use request_steps::STEPS;

/// The maximum number of allocations per call of each step.
const MAX_ALLOCATIONS: &[(&str, u64)] = &[
    ("origin", 0),
    ("authenticate, one of 10 clients", 0),
    ("authenticate, one of 10000 clients", 0),
    ("look up, GET", 0),
    ("look up, TTS", 1),
    ("look up, unknown path", 2),
    ("identifiers, GET", 0),
    ("identifiers, TTS", 1),
    ("identifiers, unknown path", 2),
    ("client quota, TTS", 0),
    ("sanitize, GET", 0),
    ("sanitize, TTS", 0),
    ("estimate, TTS", 1),
    ("owner, 1000 keys", 0),
    ("select, 1 key", 0),
    ("select, 100 keys", 0),
    ("select, 1000 keys", 0),
    ("select, 1000 keys of one workspace", 0),
    ("select, 1000 keys, only the last has credits", 0),
    ("select, 1000 keys, round-robin", 0),
    ("select, 1000 keys, most-remaining", 0),
    ("select, 1000 keys, least-requests", 0),
    ("select, 1000 keys, soonest-reset", 0),
    ("classify, served", 0),
    ("classify, refused", 12),
    ("sanitize response", 0),
    ("buffer 16 KiB of an upload", 3),
    ("relay 16 KiB of audio", 0),
    ("relay 16 KiB of text", 0),
    ("relay 16 KiB of text, 1000 keys", 0),
    ("request path, GET", 0),
    ("request path, TTS", 2),
    ("request path, GET, quota", 0),
    ("request path, TTS, quota", 2),
    // The future that may wait for the other replicas is boxed.
    ("request path, GET, quota, replica", 1),
    ("request path, TTS, quota, replica", 4),
];

#[test]
fn no_step_exceeds_its_maximum_number_of_allocations() {
    let mut violations = Vec::new();
    for step in STEPS {
        let allocations = allocations_of_one_call((step.set_up)());
        let max_allocations =
            MAX_ALLOCATIONS.iter().find(|(name, _)| *name == step.name).map(|(_, count)| *count);
        if max_allocations.is_none_or(|max_allocations| allocations.count > max_allocations) {
            let (name, count, bytes) = (step.name, allocations.count, allocations.bytes);
            violations.push(format!("{name}: {count} ({bytes} bytes), with the maximum {max_allocations:?}"));
        }
    }
    assert!(
        violations.is_empty(),
        "each step must have a maximum number of allocations and not exceed it:\n{}",
        violations.join("\n")
    );
}
