//! Starts Keychoir and the simulator for a benchmark, reads their processor time, memory and metrics, and reduces the
//! measured numbers to medians and ranges. Also reads the parameters of a benchmark from the environment.

#![allow(dead_code, unreachable_pub, reason = "each benchmark uses a part of this module")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The number of units of processor time per second in `/proc`.
const TICKS_PER_SECOND: f64 = 100.0;

/// Returns the number in an environment variable, or `default` if the variable is not set.
pub fn env_number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("the value must be a whole number"))
}

/// Returns the median, which is the higher one of the two middle values if their number is even.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Formats the median, the minimum and the maximum.
pub fn format_median_and_range(values: impl Iterator<Item = f64> + Clone, decimals: usize) -> String {
    let minimum = values.clone().fold(f64::INFINITY, f64::min);
    let maximum = values.clone().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.decimals$} ({minimum:.decimals$} to {maximum:.decimals$})", median(values))
}

/// Returns a command that runs the given `command` of Keychoir on a free port, with an empty environment.
pub fn keychoir_command(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_keychoir"));
    program.args([command, "--listen", "127.0.0.1:0"]).env_clear().stdin(Stdio::null());
    program.stdout(Stdio::null()).stderr(Stdio::null());
    program
}

/// Starts the simulator with the given `keys`.
pub fn start_simulator(keys: &[String]) -> RunningProgram {
    let mut simulator = keychoir_command("simulate");
    for key in keys {
        simulator.args(["--key", &format!("{key}=100000000000")]);
    }
    RunningProgram::start(simulator.stdout(Stdio::piped()), |child| child.stdout.take().map(box_reader))
}

/// Starts Keychoir with the settings of `command` and without quota polling. It logs only its address and errors.
pub fn start_proxy(command: &mut Command) -> RunningProgram {
    // Requests are not logged, because the cost of logging would hide the measured cost.
    command
        .env("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info")
        .env("KEYCHOIR_LOG__FORMAT", "ascii")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false");
    RunningProgram::start(command.stderr(Stdio::piped()), |child| child.stderr.take().map(box_reader))
}

fn box_reader(stream: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(stream)
}

/// A program that listens on a port. Dropping it kills the program.
pub struct RunningProgram {
    child: Child,
    pub address: SocketAddr,
}

impl RunningProgram {
    /// Starts a program and waits for the output line with its address.
    fn start(command: &mut Command, take_output: fn(&mut Child) -> Option<Box<dyn Read + Send>>) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(take_output(&mut child).unwrap()).lines();
        let address = lines
            .find_map(|line| {
                let address = line.unwrap().split_once(" at http://")?.1.to_owned();
                address.split_whitespace().next()?.trim_end_matches('/').parse().ok()
            })
            .expect("the program must print its address");
        // A thread reads the rest of the output, so that the program does not block on a full pipe.
        keychoir::tasks::spawn_thread("log reader", move || lines.for_each(drop)).unwrap();
        Self { child, address }
    }

    /// Waits until the metrics of Keychoir contain this line.
    pub fn wait_for_metric(&self, line: &str) {
        let has_line = || {
            let mut stream = TcpStream::connect(self.address).unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            stream.write_all(request).unwrap();
            let mut page = String::new();
            stream.read_to_string(&mut page).unwrap();
            page.lines().any(|metric| metric == line)
        };
        let started_at = Instant::now();
        while !has_line() {
            assert!(started_at.elapsed() < Duration::from_secs(60), "the metrics must contain: {line}");
        }
    }

    /// Waits until all usage records are written.
    pub fn wait_until_records_are_written(&self) {
        self.wait_for_metric("keychoir_usage_records_queued 0");
    }

    /// Reads a file of the process in /proc.
    pub fn read_proc_file(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }

    /// Returns the directory of the process in /proc.
    pub fn proc_directory(&self) -> String {
        format!("/proc/{}", self.child.id())
    }

    /// Returns the processor time of all threads since startup, in seconds.
    pub fn processor_seconds(&self) -> f64 {
        let stat = self.read_proc_file("stat");
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
        // The fields `utime` and `stime`.
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }

    /// Returns the memory of the process in bytes, in which shared memory counts in proportion.
    pub fn memory_bytes(&self) -> f64 {
        let rollup = self.read_proc_file("smaps_rollup");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
    }
}

impl Drop for RunningProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
