//! The standard process metrics of Prometheus client libraries, which Linux reports in `/proc/self`.

use std::fs;

use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use rustix::process::{Resource, getrlimit};

/// Units per second of the processor times in `/proc` (`USER_HZ`), which is the same on all architectures that Rust's
/// standard library supports on Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Registers the metrics. Values that the system does not report are omitted.
pub(super) fn register(registry: &mut Registry) {
    if let Some(ticks) = fs::read_to_string("/proc/self/stat").ok().and_then(|stat| processor_ticks(&stat)) {
        #[expect(clippy::cast_precision_loss, reason = "exact for centuries of CPU time")]
        let seconds = ticks as f64 / TICKS_PER_SECOND;
        registry.register("process_cpu_seconds", "CPU time of the process", ConstCounter::new(seconds));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (name, help, value) in [
        ("process_resident_memory_bytes", "Memory of the process in RAM", status_bytes(&status, "VmRSS")),
        ("process_virtual_memory_bytes", "Address space of the process", status_bytes(&status, "VmSize")),
        ("process_open_fds", "Open files and sockets of the process", open_files()),
        ("process_max_fds", "Maximum open files and sockets", getrlimit(Resource::Nofile).current),
    ] {
        if let Some(value) = value {
            registry.register(name, help, ConstGauge::new(value));
        }
    }
}

/// Returns the processor time of a line of `/proc/PID/stat`, in user mode and in the kernel (proc(5)).
fn processor_ticks(stat: &str) -> Option<u64> {
    // The name of the program is in parentheses, and may contain spaces and parentheses.
    let (_, after_name) = stat.rsplit_once(')')?;
    // Fields 14 and 15; the first one after the name is field 3.
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let (user, kernel): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + kernel)
}

/// Returns a size of `/proc/PID/status` in bytes.
fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn open_files() -> Option<u64> {
    Some(fs::read_dir("/proc/self/fd").ok()?.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_time_is_read_after_any_program_name() {
        let rest = "S 1 2 3 0 -1 4194560 2637 0 0 0 151 49 7 8 20 0 5 0 100 37449728 2048";
        for name in ["keychoir", "a) b (c", ""] {
            assert_eq!(processor_ticks(&format!("42 ({name}) {rest}")), Some(200));
        }
        for malformed in ["", "42 keychoir", "42 (keychoir) S 1 2", "42 (k) S 1 2 3 0 -1 5 6 0 0 0 x 49"] {
            assert_eq!(processor_ticks(malformed), None, "{malformed}");
        }
    }

    #[test]
    fn a_size_of_the_status_is_in_bytes() {
        let status = "VmSizes:\t1 kB\nVmSize:\t   36572 kB\nVmRSS:\t8192 pages\n";
        assert_eq!(status_bytes(status, "VmSize"), Some(36572 * 1024));
        assert_eq!(status_bytes(status, "VmRSS"), None);
        assert_eq!(status_bytes(status, "VmHWM"), None);
    }
}
