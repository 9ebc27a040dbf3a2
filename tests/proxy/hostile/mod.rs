//! Shared by the suites of hostile clients and hostile providers: tables of inputs, reproducible
//! mutations of them, and strict parsers of both sides of the wire, independent of the program's
//! own.

#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this one")]

pub mod clients;
pub mod providers;
pub mod tap;
pub mod wire;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Timeout of any exchange in these suites.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Reproducible pseudorandom numbers (xorshift64*, Vigna 2016).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give similar sequences (the finalizer of SplitMix64), and 0
        // would stay 0.
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((state ^ (state >> 31)).max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound.max(1)
    }

    pub fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// A range of at most `longest` within `length`.
    fn range(&mut self, length: usize, longest: usize) -> std::ops::Range<usize> {
        let begin = self.below(length + 1);
        begin..(begin + self.below(longest) + 1).min(length)
    }
}

/// Separators in HTTP, and bytes that a lenient parser treats as such.
const SEPARATORS: [&[u8]; 24] = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\n\n",
    b"\0",
    b" ",
    b"\t",
    b"\x0b",
    b":",
    b",",
    b";",
    b"%",
    b"/",
    b"..",
    b"#",
    b"?",
    b"\xff",
    b"\xc3\xa9",
    b"0\r\n\r\n",
    b"chunked",
    b"99999999999999999999",
    b"-1",
    b"\x80",
];

/// Maximum bytes that a mutation copies from its rows, so that large rows stay quick.
const LONGEST_MUTATION: usize = 256 * 1024;

/// The bytes of `row` with a few changes, some of them taken from `others`, cut into pieces.
pub fn mutated(random: &mut Random, row: &[u8], others: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut bytes = row.to_vec();
    for _ in 0..=random.below(4) {
        mutate(random, &mut bytes, others);
    }
    bytes.truncate(LONGEST_MUTATION);
    in_pieces(random, &bytes)
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let at = random.below(bytes.len() + 1);
    match random.below(8) {
        0 if !bytes.is_empty() => {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        1 => {
            let separator = random.one_of(&SEPARATORS).to_vec();
            bytes.splice(at..at, separator);
        }
        2 => drop(bytes.drain(random.range(bytes.len(), 16))),
        3 => {
            let copied = bytes[random.range(bytes.len(), 64)].to_vec();
            bytes.splice(at..at, copied);
        }
        // The beginning of one row and the end of another.
        4 => {
            let other = random.one_of(others);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        // A line of another row.
        5 => {
            let lines: Vec<&[u8]> = random.one_of(others).split_inclusive(|byte| *byte == b'\n').collect();
            let line = if lines.is_empty() { Vec::new() } else { random.one_of(&lines).to_vec() };
            let begins: Vec<usize> =
                (0..bytes.len()).filter(|at| bytes[*at] == b'\n').map(|at| at + 1).collect();
            let at = if begins.is_empty() { at } else { *random.one_of(&begins) };
            bytes.splice(at..at, line);
        }
        // One of its own lines is removed.
        6 => {
            let begins: Vec<usize> =
                (0..bytes.len()).filter(|at| bytes[*at] == b'\n').map(|at| at + 1).collect();
            if begins.len() > 1 {
                let first = random.below(begins.len() - 1);
                bytes.drain(begins[first]..begins[first + 1]);
            }
        }
        _ => bytes.truncate(at),
    }
}

/// Cuts bytes at a few places, or sends each of the first ones alone.
fn in_pieces(random: &mut Random, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut cuts: Vec<usize> = match random.below(4) {
        0 => (1..bytes.len().min(64)).collect(),
        1 => Vec::new(),
        _ => (0..random.below(6)).map(|_| random.below(bytes.len() + 1)).collect(),
    };
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| bytes[pair[0]..pair[1]].to_vec()).filter(|piece| !piece.is_empty()).collect()
}

/// Mutations in a run of the tests.
const MUTATIONS: u64 = 100;
const FIRST_SEED: u64 = 20_261_129;

/// The seeds of a run: the same 100 each time, or the number in `KEYCHOIR_MUTATIONS`, beginning
/// with the seed `KEYCHOIR_MUTATION_SEED`, or with a random one.
pub struct Seeds {
    first: u64,
    count: u64,
}

impl Seeds {
    pub fn of_run() -> Self {
        let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
        let (count, first) = (number("KEYCHOIR_MUTATIONS"), number("KEYCHOIR_MUTATION_SEED"));
        // The keys of a new hasher are random.
        let fresh = || RandomState::new().build_hasher().finish() >> 1;
        let first = first.unwrap_or_else(|| if count.is_some() { fresh() } else { FIRST_SEED });
        Self { first, count: count.unwrap_or(MUTATIONS) }
    }

    pub fn each(&self) -> impl Iterator<Item = u64> + use<> {
        self.first..self.first + self.count
    }

    /// How to repeat a mutation; earlier ones may matter.
    pub fn again(&self, seed: u64) -> String {
        format!(
            "KEYCHOIR_MUTATION_SEED={seed} KEYCHOIR_MUTATIONS=1 runs this mutation again, and \
             KEYCHOIR_MUTATION_SEED={} KEYCHOIR_MUTATIONS={} those before it as well",
            self.first,
            seed - self.first + 1
        )
    }
}

/// Bytes in readable form for a report.
pub fn shown(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(2_000)];
    let rest = bytes.len() - start.len();
    let more = if rest > 0 { format!(" and {rest} bytes") } else { String::new() };
    format!("\"{}\"{more}", start.escape_ascii())
}

/// Whether `text` is anywhere in `bytes`.
pub fn contains(bytes: &[u8], text: &str) -> bool {
    memchr::memmem::find(bytes, text.as_bytes()).is_some()
}
