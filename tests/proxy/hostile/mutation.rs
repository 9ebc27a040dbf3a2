//! Reproducible mutations of the raw bytes of a test case: the pseudorandom generator, the mutations, and the
//! seeds of a test run. A failing mutation reports the seed that reproduces it.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Reproducible pseudorandom numbers (xorshift64*, Vigna 2016).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // The SplitMix64 finalizer gives adjacent seeds unrelated sequences. The state must not be 0, because
        // xorshift would never leave 0.
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

    /// Returns an index below `bound`, or 0 if `bound` is 0.
    pub fn index_below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound.max(1)
    }

    pub fn choose<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.index_below(choices.len())]
    }

    /// Returns a random range of at most `max_length` bytes within `0..length`.
    fn range(&mut self, length: usize, max_length: usize) -> std::ops::Range<usize> {
        let start = self.index_below(length + 1);
        start..(start + self.index_below(max_length) + 1).min(length)
    }
}

/// HTTP delimiters, and other fragments that parsers may misinterpret.
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

/// The maximum length of a mutated test case, so that large test cases are fast to run.
const MAX_MUTATION_BYTES: usize = 256 * 1024;

/// Changes the bytes of a test case at a few positions, partly with bytes of other test cases. Returns the
/// result in chunks.
pub fn mutate_and_split(random: &mut Random, original: &[u8], all_cases: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut bytes = original.to_vec();
    for _ in 0..=random.index_below(4) {
        mutate(random, &mut bytes, all_cases);
    }
    bytes.truncate(MAX_MUTATION_BYTES);
    split_randomly(random, &bytes)
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>, all_cases: &[Vec<u8>]) {
    let position = random.index_below(bytes.len() + 1);
    match random.index_below(8) {
        // Flip one bit.
        0 if !bytes.is_empty() => {
            let position = random.index_below(bytes.len());
            bytes[position] ^= 1 << random.index_below(8);
        }
        // Insert a fragment.
        1 => {
            let separator = random.choose(&SEPARATORS).to_vec();
            bytes.splice(position..position, separator);
        }
        // Remove a range.
        2 => drop(bytes.drain(random.range(bytes.len(), 16))),
        // Duplicate a range elsewhere.
        3 => {
            let copied_range = bytes[random.range(bytes.len(), 64)].to_vec();
            bytes.splice(position..position, copied_range);
        }
        // Join the start of this case to the end of another case.
        4 => {
            let other_case = random.choose(all_cases);
            bytes.truncate(position);
            bytes.extend_from_slice(&other_case[random.index_below(other_case.len() + 1)..]);
        }
        // Insert a line of another case.
        5 => {
            let lines: Vec<&[u8]> = random.choose(all_cases).split_inclusive(|byte| *byte == b'\n').collect();
            let line = if lines.is_empty() { Vec::new() } else { random.choose(&lines).to_vec() };
            let line_starts = line_starts(bytes);
            let position = if line_starts.is_empty() { position } else { *random.choose(&line_starts) };
            bytes.splice(position..position, line);
        }
        // Remove a line of this case.
        6 => {
            let line_starts = line_starts(bytes);
            if line_starts.len() > 1 {
                let first = random.index_below(line_starts.len() - 1);
                bytes.drain(line_starts[first]..line_starts[first + 1]);
            }
        }
        // Truncate.
        _ => bytes.truncate(position),
    }
}

/// Returns the position after each line feed.
fn line_starts(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len()).filter(|position| bytes[*position] == b'\n').map(|position| position + 1).collect()
}

/// Splits bytes at a few random positions, after each of the first 63 bytes, or not at all.
fn split_randomly(random: &mut Random, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut cuts: Vec<usize> = match random.index_below(4) {
        0 => (1..bytes.len().min(64)).collect(),
        1 => Vec::new(),
        _ => (0..random.index_below(6)).map(|_| random.index_below(bytes.len() + 1)).collect(),
    };
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| bytes[pair[0]..pair[1]].to_vec()).filter(|chunk| !chunk.is_empty()).collect()
}

/// The number of mutations of a test run without `KEYCHOIR_MUTATIONS`.
const DEFAULT_MUTATION_COUNT: u64 = 100;
const DEFAULT_FIRST_SEED: u64 = 20_261_129;

/// The seeds of a test run. `KEYCHOIR_MUTATIONS` sets their number and `KEYCHOIR_MUTATION_SEED` the first
/// seed. With a number alone, the first seed is random. With neither, each run uses the same 100 seeds.
pub struct Seeds {
    first: u64,
    count: u64,
}

impl Seeds {
    pub fn from_environment() -> Self {
        let number = |name: &str| {
            std::env::var(name).ok().map(|text| text.parse().expect("the variable must be a number"))
        };
        let (count, first) = (number("KEYCHOIR_MUTATIONS"), number("KEYCHOIR_MUTATION_SEED"));
        // Each new `RandomState` has random keys, so that even the hash of no input is random.
        let random_seed = || RandomState::new().build_hasher().finish() >> 1;
        let first = first.unwrap_or_else(|| if count.is_some() { random_seed() } else { DEFAULT_FIRST_SEED });
        Self { first, count: count.unwrap_or(DEFAULT_MUTATION_COUNT) }
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> + use<> {
        self.first..self.first + self.count
    }

    /// Returns the environment variables that reproduce the mutation with the given `seed`: alone, and after all
    /// mutations that precede it, because these may have caused the failure.
    pub fn reproduction_hint(&self, seed: u64) -> String {
        format!(
            "KEYCHOIR_MUTATION_SEED={seed} KEYCHOIR_MUTATIONS=1 runs this mutation alone, and \
             KEYCHOIR_MUTATION_SEED={} KEYCHOIR_MUTATIONS={} also runs the earlier mutations",
            self.first,
            seed - self.first + 1
        )
    }
}
