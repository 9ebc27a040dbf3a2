//! The cost of the pure parts of a request's path in instructions, compared with the limits of
//! `bounds.txt`.
//!
//! Time is noisy on a shared machine; a count of instructions is not. Valgrind counts those of N
//! calls and of 2 N calls: the difference divided by N is the cost of a call, without the setup
//! before and the cleanup after them. The median of several such differences counts, because the
//! allocator sometimes consolidates its memory.
//!
//! ```text
//! make test-cost      # compares
//! make record-cost    # takes what is measured for the new bounds
//! ```
//!
//! Valgrind's processor has no SHA-256 instructions, so the parts that hash (`authenticate`, `names`)
//! cost several thousand here and a hundred nanoseconds on real processors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a measurement prints, and ends at its first surprise"
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
const TURNS: usize = 3;
/// Freed memory is kept for the next allocation of its size. Without this glibc joins and splits
/// chunks depending on their layout, and runs differ by a tenth.
const KEPT_FREE: &str = "glibc.malloc.tcache_count=60000";
/// Tolerance above the recorded cost, in percent and in instructions: compilers and libraries
/// differ a little.
const SLACK_PERCENT: u64 = 10;
const SLACK: u64 = 30;

fn main() -> ExitCode {
    let has = |word: &str| env::args().any(|argument| argument == word);
    if has("--counted") {
        run_all();
        return ExitCode::SUCCESS;
    }
    let Some(measured) = measure() else { return ExitCode::FAILURE };
    if has("--record") {
        fs::write(table(), written(&measured)).unwrap();
        println!("recorded in {}", table().display());
        return ExitCode::SUCCESS;
    }
    if judge(&measured, &recorded()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The code under valgrind: each part N times, then 2 N times, in turns with the same start.
fn run_all() {
    for part in PARTS {
        for _ in 0..TURNS {
            let stage = (part.set_up)();
            stage(CALLS)();
            for count in [CALLS, 2 * CALLS] {
                counted(stage(count));
                write_down(count);
            }
        }
    }
}

/// Valgrind counts the instructions of this function.
#[inline(never)]
fn counted(work: Box<dyn FnOnce()>) {
    work();
}

/// Valgrind writes a dump before this function runs.
#[inline(never)]
fn write_down(count: usize) {
    black_box(count);
}

/// Instructions per call, part by part. `None`, with a message, when nothing can be measured.
fn measure() -> Option<Vec<(&'static str, u64)>> {
    let folder = tempfile::tempdir().unwrap();
    let done = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .args(["--toggle-collect=cost::counted*", "--dump-before=cost::write_down*"])
        .arg(format!("--callgrind-out-file={}", folder.path().join("out").display()))
        .env("GLIBC_TUNABLES", KEPT_FREE)
        .arg(env::current_exe().unwrap())
        .arg("--counted")
        .output();
    let done = match done {
        Ok(done) => done,
        Err(error) => {
            println!("valgrind cannot be started ({error}): apt-get install valgrind");
            return None;
        }
    };
    if !done.status.success() {
        println!("valgrind failed: {}\n{}", done.status, String::from_utf8_lossy(&done.stderr));
        return None;
    }
    let sum = |dump: usize| total(&folder.path().join(format!("out.{dump}")));
    let costs = PARTS.iter().enumerate().map(|(at, part)| {
        let mut costs: [u64; TURNS] = std::array::from_fn(|turn| {
            let before = 2 * (at * TURNS + turn);
            sum(before + 2).saturating_sub(sum(before + 1)) / CALLS as u64
        });
        costs.sort_unstable();
        (part.name, costs[TURNS / 2])
    });
    Some(costs.collect())
}

/// The sum in a dump.
fn total(dump: &Path) -> u64 {
    let text = fs::read_to_string(dump).expect("valgrind writes a dump for each run");
    let line = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a dump has a sum");
    line.trim().parse().unwrap()
}

fn table() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/cost/bounds.txt")
}

const HEADER: &str = "\
# Instructions that each pure part of a request's way takes, as recorded by `make record-cost`.
# `make test-cost` fails when a part takes a tenth more.
";

fn written(measured: &[(&str, u64)]) -> String {
    let mut text = HEADER.to_owned();
    for (name, cost) in measured {
        writeln!(text, "{name:<48}{cost:>8}").unwrap();
    }
    text
}

fn recorded() -> BTreeMap<String, u64> {
    let text = fs::read_to_string(table()).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, cost) = line.rsplit_once(' ').unwrap();
        (name.trim().to_owned(), cost.parse().unwrap())
    };
    lines.map(pair).collect()
}

/// Prints the comparison of each part; returns whether none exceeds its limit.
fn judge(measured: &[(&str, u64)], recorded: &BTreeMap<String, u64>) -> bool {
    println!("{:<48}{:>10}{:>10}{:>10}", "instructions a call", "recorded", "bound", "measured");
    let mut complaints = String::new();
    for (name, cost) in measured {
        let Some(before) = recorded.get(*name) else {
            writeln!(complaints, "`{name}` has no bound: `make record-cost`").unwrap();
            continue;
        };
        let bound = before + before * SLACK_PERCENT / 100 + SLACK;
        println!("{name:<48}{before:>10}{bound:>10}{cost:>10}");
        if *cost > bound {
            writeln!(
                complaints,
                "`{name}` takes {cost} instructions, {bound} are its bound ({before} were recorded)"
            )
            .unwrap();
        }
    }
    for name in recorded.keys().filter(|name| measured.iter().all(|(one, _)| one != *name)) {
        writeln!(complaints, "`{name}` has a bound and is measured no more: `make record-cost`").unwrap();
    }
    if complaints.is_empty() {
        return true;
    }
    println!("\n{complaints}If it is meant: `make record-cost`, and say why in the commit.");
    false
}
