//! What the pure parts of a request's way allocate: as few pieces of memory as they need.

#[path = "../benches/parts/mod.rs"]
mod parts;

mod counting;

use counting::of_one_call;
use parts::PARTS;

/// The most allocations a call may take, part by part.
const MAXIMA: &[(&str, u64)] = &[
    ("origin", 1),
    ("identify, one of 10 clients", 2),
    ("look up, GET", 13),
    ("look up, TTS", 16),
    ("look up, any", 18),
    ("names, GET", 9),
    ("names, TTS", 18),
    ("names, any", 19),
    ("strip, GET", 3),
    ("strip, TTS", 7),
    ("estimate, TTS", 1),
    ("choose, 1 key", 0),
    ("choose, 100 keys", 0),
    ("choose, 1000 keys", 0),
    ("choose, 1000 keys of one workspace", 0),
    ("choose, 1000 keys, only the last can pay", 0),
    ("choose, 1000 keys, round-robin", 0),
    ("choose, 1000 keys, most-remaining", 0),
    ("choose, 1000 keys, least-busy", 0),
    ("choose, 1000 keys, soonest-reset", 0),
    ("classify, served", 0),
    ("classify, refused", 12),
    ("strip answer", 3),
    ("tee up, 16 KiB", 3),
    ("tee down, 16 KiB of sound", 0),
    ("tee down, 16 KiB of text", 0),
    ("way, GET", 31),
    ("way, TTS", 50),
];

#[test]
fn no_part_allocates_more_than_it_needs() {
    let mut complaints = Vec::new();
    for part in PARTS {
        let seen = of_one_call(part.prepare);
        let max = MAXIMA.iter().find(|(name, _)| *name == part.name).map(|(_, max)| *max);
        if max.is_none_or(|max| seen.count > max) {
            let (name, count, bytes) = (part.name, seen.count, seen.bytes);
            complaints.push(format!("{name}: {count} ({bytes} bytes), at most {max:?}"));
        }
    }
    assert!(complaints.is_empty(), "allocations a call:\n{}", complaints.join("\n"));
}
