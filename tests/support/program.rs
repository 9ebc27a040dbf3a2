//! Runs the binary in an empty environment.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

const WAIT_MAX: Duration = Duration::from_secs(30);

/// The program with these arguments and an empty environment.
pub fn keychoir(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keychoir"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// Its standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A running program.
pub struct Program {
    child: Child,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    said: Vec<String>,
}

impl Program {
    /// Starts it. Its standard error is read continuously, so that it never blocks.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let read = move || stderr.lines().for_each(|line| drop(sender.send(line.unwrap())));
        let reader = keychoir::tasks::thread("standard error", read).unwrap();
        Self { child, lines, reader: Some(reader), said: Vec::new() }
    }

    /// The next line in which `wanted` finds a value.
    pub fn line<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> T {
        loop {
            let line =
                self.lines.recv_timeout(WAIT_MAX).unwrap_or_else(|_| panic!("it only said {:#?}", self.said));
            let found = wanted(&line);
            self.said.push(line);
            if let Some(found) = found {
                return found;
            }
        }
    }

    /// The address of its listener, from its log in JSON.
    pub fn address(&mut self) -> String {
        self.line(|line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == "server_started").then(|| event["address"].as_str().unwrap().to_owned())
        })
    }

    /// The next event of this name in its log in JSON.
    pub fn event(&mut self, name: &str) -> Value {
        self.line(|line| serde_json::from_str(line).ok().filter(|event: &Value| event["event"] == name))
    }

    /// Sends it a signal, such as `HUP`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Changes one of its limits, in the notation of `prlimit`; returns whether that worked.
    pub fn prlimit(&self, limit: &str) -> bool {
        let pid = self.child.id().to_string();
        Command::new("prlimit").args(["--pid", &pid, limit]).status().unwrap().success()
    }

    /// Stops it; returns its exit code and its standard error.
    pub fn end(self) -> (Option<i32>, String) {
        self.signal("TERM");
        self.ended()
    }

    /// Waits for its end; returns its exit code and its standard error.
    pub fn ended(mut self) -> (Option<i32>, String) {
        loop {
            match self.lines.recv_timeout(WAIT_MAX) {
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; it said {:#?}", self.said),
            }
        }
        self.reader.take().unwrap().join().unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.said.join("\n"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The contents of all files below a folder, concatenated.
pub fn contents(folder: &std::path::Path) -> Vec<u8> {
    let mut heap = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            heap.extend(contents(&path));
        } else {
            std::fs::File::open(path).unwrap().read_to_end(&mut heap).unwrap();
        }
    }
    heap
}
