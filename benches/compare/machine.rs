//! Starts the proxies and stops them, measures their processor time and memory, measures the load by other programs,
//! pins programs to processors, finds installed programs, raises the limit of open files, and describes the machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

/// The unit of processor time in /proc, in seconds.
const TICK_SECONDS: f64 = 0.01;

/// Pins all threads of this process to `processor`. Later threads inherit the affinity.
pub fn pin_to_processor(processor: &str) {
    let process_id = std::process::id().to_string();
    let status = Command::new("taskset")
        .args(["-a", "-p", "-c", processor, &process_id])
        .stdout(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "`taskset` must pin this process");
}

/// Raises the limit of open files of this program and its child processes to the hard limit. Returns the limit.
pub fn raise_open_files_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // After an error, the old limit is returned.
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Returns a command that runs a program on `processors`.
pub fn pinned_command(processors: &str, program: &Path) -> Command {
    // The absolute path is also valid with an empty environment.
    let mut command = Command::new(find_program("taskset").expect("`taskset` must be installed"));
    command.args(["-c", processors]).arg(program).stdin(Stdio::null());
    command
}

/// Returns the path of a program in `PATH`.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Returns the first line of a program's output.
pub fn first_output_line(program: &Path, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
}

/// Describes the kernel and the processors.
pub fn describe_machine() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let names = processor_names();
    format!("Linux {}, {} of {}", release.trim(), names.len(), names.first().map_or("unknown", |name| name))
}

/// Returns the model name of each processor.
fn processor_names() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    names.map(|(_, name)| name.to_owned()).collect()
}

/// Processor times in seconds.
struct ProcessorSeconds {
    /// The time of all programs since the start of the machine.
    all_programs: f64,
    /// The time of this program since its start.
    this_program: f64,
}

fn processor_seconds() -> ProcessorSeconds {
    let text = fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<f64> =
        text.lines().next().unwrap().split_whitespace().skip(1).map(|field| field.parse().unwrap()).collect();
    // The fourth and fifth fields are idle time. The times from the ninth field on are included in other fields.
    let busy_ticks: f64 = fields[..8].iter().sum::<f64>() - fields[3] - fields[4];
    let this_program = parse_stat_seconds(&fs::read_to_string("/proc/self/stat").unwrap());
    ProcessorSeconds { all_programs: busy_ticks * TICK_SECONDS, this_program }
}

/// Parses the processor time in the file `stat` of a process, in seconds.
fn parse_stat_seconds(stat: &str) -> f64 {
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // The fields `utime` and `stime`.
    fields[11..13].iter().map(|field| field.parse::<f64>().unwrap() * TICK_SECONDS).sum()
}

/// Measures the processor time that other programs use.
pub struct OtherLoad {
    started_at: Instant,
    before: ProcessorSeconds,
}

impl OtherLoad {
    pub fn start() -> Self {
        Self { started_at: Instant::now(), before: processor_seconds() }
    }

    /// Returns the share of all processors that other programs have used since `start`, without the processor time of
    /// this program and `proxy_seconds`.
    pub fn share(&self, proxy_seconds: f64) -> f64 {
        let now = processor_seconds();
        let others = now.all_programs
            - self.before.all_programs
            - (now.this_program - self.before.this_program)
            - proxy_seconds;
        (others / self.started_at.elapsed().as_secs_f64() / processor_names().len() as f64).max(0.0)
    }
}

/// A running program with its child processes. Dropping it stops the program.
#[derive(Debug)]
pub struct PeerProcess {
    child: Child,
}

impl PeerProcess {
    pub fn start(command: &mut Command) -> Self {
        Self { child: command.spawn().unwrap() }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Returns the IDs of the process and its descendants.
    fn process_ids(&self) -> Vec<u32> {
        let mut processes = vec![self.child.id()];
        let mut index = 0;
        while let Some(process) = processes.get(index) {
            let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
            let children = children.unwrap_or_default();
            processes.extend(children.split_whitespace().map(|child| child.parse::<u32>().unwrap()));
            index += 1;
        }
        processes
    }

    /// Returns the processor time of all threads since startup.
    pub fn processor_time(&self) -> ProcessorTime {
        let mut time = ProcessorTime::default();
        for process in self.process_ids() {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
            time.tick_seconds += parse_stat_seconds(&stat);
            for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let thread = thread.unwrap().path();
                // The ticks of the process include threads that have ended.
                let Ok(schedule) = fs::read_to_string(thread.join("schedstat")) else { continue };
                let nanos = schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap();
                time.thread_seconds.insert(thread, nanos / 1e9);
            }
        }
        time
    }

    /// Returns the processor time of each worker thread of Keychoir since startup, in seconds.
    pub fn worker_times(&self) -> Vec<f64> {
        let mut workers = BTreeMap::new();
        for process in self.process_ids() {
            for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let thread = thread.unwrap().path();
                let read_thread_file = |file: &str| fs::read_to_string(thread.join(file));
                let (Ok(name), Ok(schedule)) = (read_thread_file("comm"), read_thread_file("schedstat"))
                else {
                    continue;
                };
                if let Some(number) = name.trim().strip_prefix("keychoir-") {
                    let nanos = schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap();
                    workers.insert(number.parse::<usize>().unwrap(), nanos / 1e9);
                }
            }
        }
        workers.into_values().collect()
    }

    /// Returns the memory of all processes in MiB, in which shared memory counts in proportion.
    pub fn memory_mib(&self) -> f64 {
        let process_memory = |process: u32| {
            let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
        };
        self.process_ids().into_iter().map(process_memory).sum()
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        // `kill` sends SIGTERM, because the workers of an nginx that was stopped by SIGKILL would continue to run.
        // SIGKILL follows after the timeout, because Keychoir drains its streams for a longer time.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let started_at = Instant::now();
        while self.is_running() {
            if started_at.elapsed() > Duration::from_millis(500) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A processor time in seconds: of all threads with the resolution of a tick, and of each running thread with the
/// resolution of a nanosecond.
#[derive(Debug, Default)]
pub struct ProcessorTime {
    tick_seconds: f64,
    thread_seconds: BTreeMap<PathBuf, f64>,
}

impl ProcessorTime {
    /// Returns the seconds since an earlier time.
    pub fn since(&self, before: &Self) -> f64 {
        let added =
            |(thread, seconds): (&PathBuf, &f64)| seconds - before.thread_seconds.get(thread).unwrap_or(&0.0);
        let thread_seconds: f64 = self.thread_seconds.iter().map(added).sum();
        let tick_seconds = self.tick_seconds - before.tick_seconds;
        // The sum of the threads lacks threads that have ended. The ticks of a process are the sum of two counters, and
        // both counters are rounded in both snapshots.
        let rounding = 4.0 * TICK_SECONDS;
        if tick_seconds > thread_seconds + rounding { tick_seconds } else { thread_seconds }
    }
}
