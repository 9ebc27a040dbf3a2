//! Counts the instructions of each pure step of the request path, and compares the counts with those in `bounds.txt`
//! and the steps of a replica with those of a single Keychoir. The exit code is 1 if a step exceeds its bound, if a
//! step has no bound, if a bound has no step, or if valgrind fails. With `--record`, it writes the counts to the
//! file instead.
//!
//! Times vary on a shared machine, but numbers of instructions do not. Valgrind counts the instructions of N calls and
//! of 2 N calls. The difference divided by N is the cost of a call without setup and cleanup. The recorded cost is the
//! median of several such differences, because the allocator sometimes consolidates its memory.
//!
//! ```text
//! make test-cost      # compares
//! make record-cost    # records the measured values as the new bounds
//! ```
//!
//! Valgrind's virtual processor has no SHA-256 instructions. The steps that compute a hash, `authenticate` and
//! `identifiers`, therefore take several thousand instructions under valgrind, and only a hundred nanoseconds on a real
//! processor.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark prints its results, and panics if an expectation fails"
)]

#[path = "../request_steps/mod.rs"]
mod request_steps;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use request_steps::{GET_OF_REPLICA, GET_WITH_QUOTA, STEPS, TTS_OF_REPLICA, TTS_WITH_QUOTA};

/// The number N of calls. It is large enough to average rare events.
const CALLS: usize = 64;
/// Number of differences between the counts of N and of 2 N calls. Their median is the cost.
const SAMPLES: usize = 3;
/// Makes glibc keep freed memory for the next allocation of the same size. Without this setting, it merges and splits
/// chunks depending on their layout, and the counts differ by a tenth.
const GLIBC_CACHE_SETTING: &str = "glibc.malloc.tcache_count=60000";
/// The percentage by which a cost may exceed the recorded cost, because compilers and libraries differ slightly.
const TOLERANCE_PERCENT: u64 = 10;
/// The number of instructions by which a cost may exceed the recorded cost in addition.
const TOLERANCE_INSTRUCTIONS: u64 = 30;

/// Each step of a replica, with the same step without other replicas.
const REPLICA_STEPS: [(&str, &str); 2] = [(GET_OF_REPLICA, GET_WITH_QUOTA), (TTS_OF_REPLICA, TTS_WITH_QUOTA)];
/// The percentage by which a step of a replica may cost more than the same step without other replicas.
const MAX_REPLICA_PERCENT: u64 = 3;

fn main() -> ExitCode {
    let has_flag = |flag: &str| env::args().any(|argument| argument == flag);
    if has_flag("--counted") {
        run_all_steps();
        return ExitCode::SUCCESS;
    }
    let Some(measured) = measure_steps() else { return ExitCode::FAILURE };
    if has_flag("--record") {
        fs::write(bounds_path(), format_table(&measured)).unwrap();
        println!("recorded in {}", bounds_path().display());
        return ExitCode::SUCCESS;
    }
    if compare(&measured, &read_bounds()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs each step N times and then 2 N times with the same initial state, in a child process under valgrind.
fn run_all_steps() {
    for step in STEPS {
        for _ in 0..SAMPLES {
            let prepare = (step.set_up)();
            prepare(CALLS)();
            for count in [CALLS, 2 * CALLS] {
                run_counted(prepare(count));
                dump_counts(count);
            }
        }
    }
}

/// Runs the prepared calls. Valgrind counts the instructions of this function.
#[inline(never)]
fn run_counted(calls: Box<dyn FnOnce()>) {
    calls();
}

/// Makes valgrind write a dump of its counts, because `--dump-before` names this function.
#[inline(never)]
fn dump_counts(count: usize) {
    black_box(count);
}

/// Returns the number of instructions per call of each step. Prints an error and returns `None` if valgrind fails.
fn measure_steps() -> Option<Vec<(&'static str, u64)>> {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .args(["--toggle-collect=cost::run_counted*", "--dump-before=cost::dump_counts*"])
        .arg(format!("--callgrind-out-file={}", directory.path().join("out").display()))
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
    let read_total = |dump: usize| read_total(&directory.path().join(format!("out.{dump}")));
    let costs = STEPS.iter().enumerate().map(|(index, step)| {
        let mut samples: [u64; SAMPLES] = std::array::from_fn(|sample| {
            let previous_dumps = 2 * (index * SAMPLES + sample);
            read_total(previous_dumps + 2).saturating_sub(read_total(previous_dumps + 1)) / CALLS as u64
        });
        samples.sort_unstable();
        (step.name, samples[SAMPLES / 2])
    });
    Some(costs.collect())
}

/// Returns the total number of instructions in a dump.
fn read_total(dump: &Path) -> u64 {
    let text = fs::read_to_string(dump).expect("valgrind must write a dump for each run");
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    total.expect("the dump must contain the total").trim().parse().unwrap()
}

fn bounds_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/cost/bounds.txt")
}

const HEADER: &str = "\
# Instructions of each pure step of the request path, as recorded by `make record-cost`.
# `make test-cost` fails if a step takes more than its number here plus a tenth of it and 30 instructions.
";

fn format_table(measured: &[(&str, u64)]) -> String {
    let mut table = HEADER.to_owned();
    for (name, cost) in measured {
        writeln!(table, "{name:<48}{cost:>8}").unwrap();
    }
    table
}

fn read_bounds() -> BTreeMap<String, u64> {
    let text = fs::read_to_string(bounds_path()).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, cost) = line.rsplit_once(' ').unwrap();
        (name.trim().to_owned(), cost.parse().unwrap())
    };
    lines.map(pair).collect()
}

/// Prints the comparison of each step. Returns whether all steps are within their bounds, and each bound has a step.
fn compare(measured: &[(&str, u64)], recorded: &BTreeMap<String, u64>) -> bool {
    println!("{:<48}{:>10}{:>10}{:>10}", "instructions per call", "recorded", "bound", "measured");
    let mut violations = String::new();
    for (name, cost) in measured {
        let Some(recorded_cost) = recorded.get(*name) else {
            writeln!(violations, "`{name}` has no bound: `make record-cost`").unwrap();
            continue;
        };
        let bound = recorded_cost + recorded_cost * TOLERANCE_PERCENT / 100 + TOLERANCE_INSTRUCTIONS;
        println!("{name:<48}{recorded_cost:>10}{bound:>10}{cost:>10}");
        if *cost > bound {
            writeln!(
                violations,
                "`{name}` takes {cost} instructions, more than its bound of {bound} ({recorded_cost} were recorded)"
            )
            .unwrap();
        }
    }
    for name in
        recorded.keys().filter(|name| measured.iter().all(|(measured_name, _)| measured_name != *name))
    {
        writeln!(violations, "`{name}` has a bound and is not measured: `make record-cost`").unwrap();
    }
    check_replica_steps(measured, &mut violations);
    if violations.is_empty() {
        return true;
    }
    println!(
        "\n{violations}If the change is intended, run `make record-cost`, and explain the reason in the commit."
    );
    false
}

/// Adds the steps of a replica that cost more than permitted to `violations`.
fn check_replica_steps(measured: &[(&str, u64)], violations: &mut String) {
    let cost = |step: &str| measured.iter().find(|(name, _)| *name == step).unwrap().1;
    for (replica_step, single_step) in REPLICA_STEPS {
        let (cost, bound) =
            (cost(replica_step), cost(single_step) + cost(single_step) * MAX_REPLICA_PERCENT / 100);
        println!("{replica_step:<48}{:>10}{bound:>10}{cost:>10}", "");
        if cost > bound {
            writeln!(
                violations,
                "`{replica_step}` takes {cost} instructions, more than its bound of {bound}"
            )
            .unwrap();
        }
    }
}
