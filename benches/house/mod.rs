//! Starts the programs of a measurement, and formats its results.

#![allow(dead_code, unreachable_pub, reason = "every measurement uses its own part of this one")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The unit of processor time in /proc.
const TICKS_PER_SECOND: f64 = 100.0;

/// A number that an environment variable may override.
pub fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
}

pub fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median, and the minimum and maximum.
pub fn spread(values: impl Iterator<Item = f64> + Clone, places: usize) -> String {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.clone().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.places$} ({least:.places$} to {most:.places$})", middle(values))
}

/// A command of Keychoir on a port of its own, in an empty environment.
pub fn program(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_keychoir"));
    program.args([command, "--listen", "127.0.0.1:0"]).env_clear().stdin(Stdio::null());
    program.stdout(Stdio::null()).stderr(Stdio::null());
    program
}

/// The simulator, with these keys.
pub fn simulator(keys: &[String]) -> Running {
    let mut simulator = program("simulate");
    for key in keys {
        simulator.args(["--key", &format!("{key}=100000000000")]);
    }
    Running::start(simulator.stdout(Stdio::piped()), |child| child.stdout.take().map(boxed))
}

/// A proxy that logs only its address.
pub fn proxy(command: &mut Command) -> Running {
    // No line per request: without other work the measured one is most visible.
    command
        .env("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info")
        .env("KEYCHOIR_LOG__FORMAT", "ascii")
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false");
    Running::start(command.stderr(Stdio::piped()), |child| child.stderr.take().map(boxed))
}

fn boxed(stream: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(stream)
}

/// A program with a listener, until it is dropped.
pub struct Running {
    child: Child,
    pub address: SocketAddr,
}

impl Running {
    /// Starts a program and waits for the log line with its address.
    fn start(command: &mut Command, says: fn(&mut Child) -> Option<Box<dyn Read + Send>>) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(says(&mut child).unwrap()).lines();
        let address = lines
            .find_map(|line| {
                let rest = line.unwrap().split_once(" at http://")?.1.to_owned();
                rest.split_whitespace().next()?.trim_end_matches('/').parse().ok()
            })
            .expect("it starts");
        // The rest of its log is read, so that it never blocks.
        keychoir::tasks::spawn_thread("what it says", move || lines.for_each(drop)).unwrap();
        Self { child, address }
    }

    /// Waits until its metrics contain this line.
    pub fn says(&self, line: &str) {
        let has_line = || {
            let mut stream = TcpStream::connect(self.address).unwrap();
            let ask = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
            stream.write_all(ask).unwrap();
            let mut page = String::new();
            stream.read_to_string(&mut page).unwrap();
            page.lines().any(|found| found == line)
        };
        let began = Instant::now();
        while !has_line() {
            assert!(began.elapsed() < Duration::from_secs(60), "it never says: {line}");
        }
    }

    /// Waits until every record is written.
    pub fn settled(&self) {
        self.says("keychoir_usage_records_queued 0");
    }

    /// The content of a file of /proc about it.
    pub fn about(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }

    /// Its folder in /proc.
    pub fn process(&self) -> String {
        format!("/proc/{}", self.child.id())
    }

    /// Processor time of all its threads in seconds since its start.
    pub fn processor_seconds(&self) -> f64 {
        let stat = self.about("stat");
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }

    /// Its memory in bytes, with shared pages counted proportionally.
    pub fn memory(&self) -> f64 {
        let rollup = self.about("smaps_rollup");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
