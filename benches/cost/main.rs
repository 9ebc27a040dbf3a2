//! The number of instructions of each pure step of the request path, compared with the limits in `bounds.txt`.
//!
//! Time is noisy on a shared machine; a count of instructions is not. Valgrind counts those of N
//! calls and of 2 N calls: the difference divided by N is the cost of a call, without the setup
//! before and the cleanup after them. The median of several such differences counts, because the
//! allocator sometimes consolidates its memory.
//!
//! ```text
//! make test-cost      # compares
//! make record-cost    # records the measured values as the new bounds
//! ```
//!
//! Valgrind's processor has no SHA-256 instructions, so the parts that hash (`authenticate`, `names`)
//! cost several thousand here and a hundred nanoseconds on real processors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark prints its results, and ends at a failed expectation"
)]

#[path = "../parts/mod.rs"]
mod parts;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use parts::PARTS;

/// N: few enough to be quick, and enough to average rare events.
const CALLS: usize = 64;
/// Number of differences, of which the median counts.
const SAMPLES: usize = 3;
/// Freed memory is kept for the next allocation of its size. Without this glibc joins and splits
/// chunks depending on their layout, and runs differ by a tenth.
const GLIBC_CACHE_SETTING: &str = "glibc.malloc.tcache_count=60000";
/// Tolerance above the recorded cost, in percent and in instructions: compilers and libraries
/// differ a little.
const SLACK_PERCENT: u64 = 10;
const SLACK_INSTRUCTIONS: u64 = 30;

fn main() -> ExitCode {
    let has = |word: &str| env::args().any(|argument| argument == word);
    if has("--counted") {
        run_all();
        return ExitCode::SUCCESS;
    }
    let Some(measured) = measure() else { return ExitCode::FAILURE };
    if has("--record") {
        fs::write(bounds_path(), format_table(&measured)).unwrap();
        println!("recorded in {}", bounds_path().display());
        return ExitCode::SUCCESS;
    }
    if compare(&measured, &recorded()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The code under valgrind: each part N times, then 2 N times, in turns with the same start.
fn run_all() {
    for part in PARTS {
        for _ in 0..SAMPLES {
            let stage = (part.set_up)();
            stage(CALLS)();
            for count in [CALLS, 2 * CALLS] {
                run_counted(stage(count));
                dump_counts(count);
            }
        }
    }
}

/// Valgrind counts the instructions of this function.
#[inline(never)]
fn run_counted(work: Box<dyn FnOnce()>) {
    work();
}

/// Valgrind writes a dump before this function runs.
#[inline(never)]
fn dump_counts(count: usize) {
    black_box(count);
}

/// Instructions per call, part by part. `None`, with a message, when nothing can be measured.
fn measure() -> Option<Vec<(&'static str, u64)>> {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .args(["--toggle-collect=cost::run_counted*", "--dump-before=cost::dump_counts*"])
        .arg(format!("--callgrind-out-file={}", folder.path().join("out").display()))
        .env("GLIBC_TUNABLES", GLIBC_CACHE_SETTING)
        .arg(env::current_exe().unwrap())
        .arg("--counted")
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("valgrind cannot be started ({error}): apt-get install valgrind");
            return None;
        }
    };
    if !output.status.success() {
        println!("valgrind failed: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        return None;
    }
    let sum = |dump: usize| total(&folder.path().join(format!("out.{dump}")));
    let costs = PARTS.iter().enumerate().map(|(at, part)| {
        let mut costs: [u64; SAMPLES] = std::array::from_fn(|turn| {
            let before = 2 * (at * SAMPLES + turn);
            sum(before + 2).saturating_sub(sum(before + 1)) / CALLS as u64
        });
        costs.sort_unstable();
        (part.name, costs[SAMPLES / 2])
    });
    Some(costs.collect())
}

/// The sum in a dump.
fn total(dump: &Path) -> u64 {
    let text = fs::read_to_string(dump).expect("valgrind writes a dump for each run");
    let line = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a dump has a sum");
    line.trim().parse().unwrap()
}

fn bounds_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/cost/bounds.txt")
}

const HEADER: &str = "\
# Instructions of each pure step of the request path, as recorded by `make record-cost`.
# `make test-cost` fails when a part takes a tenth more.
";

fn format_table(measured: &[(&str, u64)]) -> String {
    let mut text = HEADER.to_owned();
    for (name, cost) in measured {
        writeln!(text, "{name:<48}{cost:>8}").unwrap();
    }
    text
}

fn recorded() -> BTreeMap<String, u64> {
    let text = fs::read_to_string(bounds_path()).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, cost) = line.rsplit_once(' ').unwrap();
        (name.trim().to_owned(), cost.parse().unwrap())
    };
    lines.map(pair).collect()
}

/// Prints the comparison of each step. Returns whether all steps are within their limits.
fn compare(measured: &[(&str, u64)], recorded: &BTreeMap<String, u64>) -> bool {
    println!("{:<48}{:>10}{:>10}{:>10}", "instructions a call", "recorded", "bound", "measured");
    let mut violations = String::new();
    for (name, cost) in measured {
        let Some(before) = recorded.get(*name) else {
            writeln!(violations, "`{name}` has no bound: `make record-cost`").unwrap();
            continue;
        };
        let bound = before + before * SLACK_PERCENT / 100 + SLACK_INSTRUCTIONS;
        println!("{name:<48}{before:>10}{bound:>10}{cost:>10}");
        if *cost > bound {
            writeln!(
                violations,
                "`{name}` takes {cost} instructions, {bound} are its bound ({before} were recorded)"
            )
            .unwrap();
        }
    }
    for name in
        recorded.keys().filter(|name| measured.iter().all(|(measured_name, _)| measured_name != *name))
    {
        writeln!(violations, "`{name}` has a bound and is measured no more: `make record-cost`").unwrap();
    }
    if violations.is_empty() {
        return true;
    }
    println!(
        "\n{violations}If the change is intended: run `make record-cost`, and state the reason in the commit."
    );
    false
}
