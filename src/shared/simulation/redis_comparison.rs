//! Compares the model of Redis with a Redis server, if one is installed: both must return the same replies to random
//! calls of `slots.lua`, `newest.lua` and `grants.lua`.

use std::process::{Child, Command, Stdio};

use redis::Value;

use super::super::credit_statement::CreditStatement;
use super::redis_model::SimulatedRedis;
use super::scripts::{FRESH, grants_call, newest_call};
use super::slot_scripts::slots_call;
use crate::clock;

/// A Redis server on a Unix socket.
struct RealRedis {
    process: Child,
    connection: redis::Connection,
    _folder: tempfile::TempDir,
}

impl RealRedis {
    /// Starts the server, or returns `None` if it is not installed.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("redis.sock");
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        let client = redis::Client::open(format!("redis+unix://{}", socket.display())).unwrap();
        let connection = loop {
            match client.get_connection() {
                Ok(connection) => break connection,
                Err(_) => std::thread::yield_now(),
            }
        };
        Some(Self { process, connection, _folder: folder })
    }
}

impl Drop for RealRedis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_model_of_redis_behaves_like_redis() {
    /// An epoch above the time of both servers, so that both use the same epoch.
    const EPOCH: u64 = 10_000_000_000_000;
    let Some(mut real) = RealRedis::start() else { return };
    let redis = SimulatedRedis::new();
    let mut has_credits = false;
    redis.set_time(clock::now().0 * 1_000);
    let mut rng = fastrand::Rng::with_seed(1);
    let expires = clock::now().0 + 3_600_000;
    let mut used = [0_u64; 3];
    for step in 0..300_u64 {
        let index = rng.usize(..3);
        let replica = index.to_string();
        used[index] += rng.u64(0..4);
        let call = match rng.u8(..4) {
            0 => slots_call(&replica, [rng.u64(0..4), rng.u64(0..5), rng.u64(0..9), step]),
            1 => newest_call(3, &[(&format!("name-{}", rng.u8(..6)), rng.u64(0..50), expires + step)]),
            _ => {
                let used = if rng.u8(..) < 20 { None } else { Some(used[index]) };
                let base = rng.bool().then(|| (rng.i64(-5..50), rng.u64(1..50)));
                let (queued, held) = (rng.u64(0..300), used.unwrap_or(0) + rng.u64(0..50));
                let (reserved, least) = (rng.u64(0..20), rng.u64(0..=queued));
                let epoch = if has_credits && rng.bool() { EPOCH + 1 } else { EPOCH };
                has_credits |= used.is_some();
                let statement = CreditStatement {
                    used,
                    reserved,
                    queued,
                    least,
                    held,
                    base,
                    is_idle: rng.bool(),
                    used_by_others: rng.u64(0..300),
                    epoch,
                    ..FRESH
                };
                grants_call(&replica, 3, &statement)
            }
        };
        let expected: Value = call.to_command().query(&mut real.connection).unwrap();
        let arguments = &call.arguments;
        assert_eq!(redis.run(&call), expected, "step {step} must have the reply of Redis: {arguments:?}");
    }
}
