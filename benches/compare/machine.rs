//! Processor time, memory and processor affinity of programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

/// The unit of processor time in /proc, in seconds.
const TICK: f64 = 0.01;

/// Pins all threads of this process, including later ones, to this processor.
pub fn pin_to_processor(processor: &str) {
    let own = std::process::id().to_string();
    let status =
        Command::new("taskset").args(["-a", "-p", "-c", processor, &own]).stdout(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()), "`taskset` keeps programs on their processors");
}

/// Raises the limit of open files of this program and its child processes to the hard limit. Returns the limit.
pub fn raise_open_files_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If that fails, the old limit is returned.
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A command pinned to these processors.
pub fn program_on(processors: &str, program: &Path) -> Command {
    // The absolute path is also valid with an empty environment.
    let mut command = Command::new(find_program("taskset").expect("`taskset`"));
    command.args(["-c", processors]).arg(program).stdin(Stdio::null());
    command
}

/// The path of a program, searched like a shell does.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// The first line of a program's output.
pub fn first_line(program: &Path, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
}

/// The kernel and the processors.
pub fn describe() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let names = processors();
    format!("Linux {}, {} of {}", release.trim(), names.len(), names.first().map_or("unknown", |name| name))
}

/// The names of the processors.
fn processors() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    names.map(|(_, name)| name.to_owned()).collect()
}

/// Processor time of all programs so far, and of this one, in seconds.
fn all_and_own() -> (f64, f64) {
    let text = fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<f64> =
        text.lines().next().unwrap().split_whitespace().skip(1).map(|field| field.parse().unwrap()).collect();
    // The fourth and fifth fields are idle time, and those from the ninth on are included in
    // others.
    let busy: f64 = fields[..8].iter().sum::<f64>() - fields[3] - fields[4];
    (busy * TICK, ticks_of(&fs::read_to_string("/proc/self/stat").unwrap()))
}

/// Processor time in the `stat` of a process, in seconds.
fn ticks_of(stat: &str) -> f64 {
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<f64>().unwrap() * TICK).sum()
}

/// Measures the load of other programs.
pub struct OtherLoad {
    started_at: Instant,
    before: (f64, f64),
}

impl OtherLoad {
    pub fn start() -> Self {
        Self { started_at: Instant::now(), before: all_and_own() }
    }

    /// The share of all processors that other programs have used since then, given the proxy's
    /// seconds.
    pub fn share(&self, proxy: f64) -> f64 {
        let (all, own) = all_and_own();
        let others = all - self.before.0 - (own - self.before.1) - proxy;
        (others / self.started_at.elapsed().as_secs_f64() / processors().len() as f64).max(0.0)
    }
}

/// A program with its child processes, until it is dropped.
#[derive(Debug)]
pub struct PeerProcess {
    child: Child,
}

impl PeerProcess {
    pub fn start(command: &mut Command) -> Self {
        Self { child: command.spawn().unwrap() }
    }

    /// Whether it is still running.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its processes: itself and its children.
    fn processes(&self) -> Vec<u32> {
        let mut processes = vec![self.child.id()];
        let mut next = 0;
        while let Some(process) = processes.get(next) {
            let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
            let children = children.unwrap_or_default();
            processes.extend(children.split_whitespace().map(|child| child.parse::<u32>().unwrap()));
            next += 1;
        }
        processes
    }

    /// Processor time of all its threads so far.
    pub fn used(&self) -> Used {
        let mut used = Used::default();
        for process in self.processes() {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            used.ticks +=
                fields[11..13].iter().map(|field| field.parse::<f64>().unwrap() * TICK).sum::<f64>();
            for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let thread = thread.unwrap().path();
                // A thread that has ended meanwhile is included in the ticks of its process.
                let Ok(schedule) = fs::read_to_string(thread.join("schedstat")) else { continue };
                let nanos = schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap();
                used.threads.insert(thread, nanos / 1e9);
            }
        }
        used
    }

    /// Processor time of each worker of Keychoir so far, in seconds.
    pub fn workers(&self) -> Vec<f64> {
        let mut workers = BTreeMap::new();
        for process in self.processes() {
            for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let thread = thread.unwrap().path();
                let read = |file: &str| fs::read_to_string(thread.join(file));
                let (Ok(name), Ok(schedule)) = (read("comm"), read("schedstat")) else { continue };
                if let Some(number) = name.trim().strip_prefix("keychoir-") {
                    let nanos = schedule.split_whitespace().next().unwrap().parse::<f64>().unwrap();
                    workers.insert(number.parse::<usize>().unwrap(), nanos / 1e9);
                }
            }
        }
        workers.into_values().collect()
    }

    /// Its memory in MiB, with shared pages counted proportionally.
    pub fn memory(&self) -> f64 {
        let of = |process: u32| {
            let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
        };
        self.processes().into_iter().map(of).sum()
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        // A killed nginx would leave its worker behind; Keychoir would drain its streams on a
        // graceful stop.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let started_at = Instant::now();
        while self.is_alive() {
            if started_at.elapsed() > Duration::from_millis(500) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Processor time in seconds: in hundredths for everything, in nanoseconds for running threads.
#[derive(Debug, Default)]
pub struct Used {
    ticks: f64,
    threads: BTreeMap<PathBuf, f64>,
}

impl Used {
    pub fn since(&self, before: &Self) -> f64 {
        let new = |(thread, seconds): (&PathBuf, &f64)| seconds - before.threads.get(thread).unwrap_or(&0.0);
        let fine: f64 = self.threads.iter().map(new).sum();
        let coarse = self.ticks - before.ticks;
        // The sum of the threads lacks those that have ended. The ticks of a process are the sum of two counters, which
        // are both rounded at each end.
        let rounding = 4.0 * TICK;
        if coarse > fine + rounding { coarse } else { fine }
    }
}
