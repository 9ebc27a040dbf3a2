//! Runs the `keychoir` binary in an empty environment, waits for lines of its output or log, sends it signals,
//! sets its resource limits, and reads the files of a directory.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

/// The maximum time until the next line or the exit.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns a command that runs Keychoir with the given `arguments` and an empty environment.
pub fn keychoir_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keychoir"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

/// Runs a command to its exit.
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// Returns the standard error of a command.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The running program. It is killed on drop.
pub struct Program {
    child: Child,
    line_receiver: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    /// The lines that were received so far.
    received: Vec<String>,
}

impl Program {
    /// Starts Keychoir. A thread reads its standard error, so that Keychoir never blocks on it.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        Self::read_lines(child, stderr)
    }

    /// Starts Keychoir like [`start`](Self::start), and reads its standard output instead of its standard error.
    pub fn start_and_read_output(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        Self::read_lines(child, stdout)
    }

    fn read_lines(child: Child, output: impl Read + Send + 'static) -> Self {
        let (sender, line_receiver) = channel();
        let output = BufReader::new(output);
        let read_lines = move || output.lines().for_each(|line| drop(sender.send(line.unwrap())));
        let reader = keychoir::tasks::spawn_thread("output", read_lines).unwrap();
        Self { child, line_receiver, reader: Some(reader), received: Vec::new() }
    }

    /// Waits for the next line for which `parse` returns a value. Returns this value.
    pub fn wait_for_line<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> T {
        loop {
            let Ok(line) = self.line_receiver.recv_timeout(OUTPUT_TIMEOUT) else {
                panic!("Keychoir must print the expected line: {:#?}", self.received);
            };
            let value = parse(&line);
            self.received.push(line);
            if let Some(value) = value {
                return value;
            }
        }
    }

    /// Waits until Keychoir listens. Returns its address. The log format must be JSON.
    pub fn wait_for_address(&mut self) -> String {
        self.wait_for_line(|line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == "server_started").then(|| event["address"].as_str().unwrap().to_owned())
        })
    }

    /// Waits for the next log event with the given `name`. The log format must be JSON.
    pub fn wait_for_event(&mut self, name: &str) -> Value {
        self.wait_for_line(|line| {
            serde_json::from_str(line).ok().filter(|event: &Value| event["event"] == name)
        })
    }

    /// Sends a signal, such as `HUP`.
    pub fn send_signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(status.success(), "the signal {name} must be sent");
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sets a resource limit, given as an option of `prlimit`. Returns whether `prlimit` succeeded.
    pub fn set_limit(&self, limit: &str) -> bool {
        let pid = self.child.id().to_string();
        Command::new("prlimit").args(["--pid", &pid, limit]).status().unwrap().success()
    }

    /// Sends `TERM` and waits for the exit. Returns the exit code and all lines that were read.
    pub fn terminate(self) -> (Option<i32>, String) {
        self.send_signal("TERM");
        self.wait_for_exit()
    }

    /// Waits for the exit. Returns the exit code and all lines that were read.
    pub fn wait_for_exit(mut self) -> (Option<i32>, String) {
        loop {
            match self.line_receiver.recv_timeout(OUTPUT_TIMEOUT) {
                Ok(line) => self.received.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("Keychoir must exit: {:#?}", self.received)
                }
            }
        }
        self.reader.take().unwrap().join().unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.received.join("\n"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the concatenated contents of all files below a directory.
pub fn read_all_files(directory: &std::path::Path) -> Vec<u8> {
    let mut contents = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            contents.extend(read_all_files(&path));
        } else {
            std::fs::File::open(path).unwrap().read_to_end(&mut contents).unwrap();
        }
    }
    contents
}
