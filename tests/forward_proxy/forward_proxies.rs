//! The forward proxies of the tests: `tinyproxy` and `microsocks` as processes, and one in the test process, which sends a
//! given response and counts its connections.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use keychoir::tasks::{AbortOnDrop, Tasks};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

pub(super) const USER: &str = "aliceaccount";
pub(super) const PASSWORD: &str = "hunter2password";
/// The timeout of each awaited step of a test. It is much longer than any step, so only a step that hangs exceeds it.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) async fn within_timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(STEP_TIMEOUT, future).await.expect("the step must complete within its timeout")
}

/// A forward proxy in a separate process. Dropping it kills the process.
pub(super) struct ForwardProxyProcess {
    child: Child,
    pub(super) url: String,
    /// The log file, which only `tinyproxy` writes.
    pub(super) log: PathBuf,
    _directory: TempDir,
}

impl Drop for ForwardProxyProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ForwardProxyProcess {
    /// Starts `tinyproxy`, an HTTP proxy that opens tunnels by CONNECT.
    pub(super) async fn start_tinyproxy(requires_credentials: bool) -> Self {
        Self::start("tinyproxy", "http", requires_credentials, |directory, port| {
            let auth =
                if requires_credentials { format!("BasicAuth {USER} {PASSWORD}\n") } else { String::new() };
            let (log, config) = (directory.join("log"), directory.join("tinyproxy.conf"));
            let settings = format!(
                "Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 60\nMaxClients 100\nLogLevel Info\n\
                 LogFile \"{}\"\n{auth}",
                log.display()
            );
            std::fs::write(&config, settings).unwrap();
            vec!["-d".to_owned(), "-c".to_owned(), config.display().to_string()]
        })
        .await
    }

    /// Starts `microsocks`, a SOCKS5 proxy.
    pub(super) async fn start_microsocks(requires_credentials: bool) -> Self {
        Self::start("microsocks", "socks5h", requires_credentials, |_, port| {
            let auth = if requires_credentials { vec!["-u", USER, "-P", PASSWORD] } else { Vec::new() };
            let arguments = ["-i", "127.0.0.1", "-p"].map(str::to_owned).into_iter();
            arguments.chain([port.to_string()]).chain(auth.into_iter().map(str::to_owned)).collect()
        })
        .await
    }

    /// Starts a program on a free port, and waits until it accepts connections.
    async fn start(
        program: &str,
        scheme: &str,
        requires_credentials: bool,
        arguments: impl FnOnce(&std::path::Path, u16) -> Vec<String>,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The test chooses a free port, because these programs cannot report a port that the system has chosen.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = directory.path().join("log");
        let output = std::fs::File::create(directory.path().join("output")).unwrap();
        let child = Command::new(program)
            .args(arguments(directory.path(), port))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{program} cannot be started (apt-get install {program}): {error}")
            });
        let wait_for_port = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        within_timeout(wait_for_port).await;
        let userinfo = if requires_credentials { format!("{USER}:{PASSWORD}@") } else { String::new() };
        Self { child, url: format!("{scheme}://{userinfo}127.0.0.1:{port}"), log, _directory: directory }
    }

    /// Returns the URL with a password that the forward proxy refuses.
    pub(super) fn url_with_wrong_password(&self) -> String {
        self.url.replace(PASSWORD, "wrong")
    }

    pub(super) fn url_without_credentials(&self) -> String {
        self.url.replace(&format!("{USER}:{PASSWORD}@"), "")
    }
}

pub(super) async fn bind_loopback() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// A forward proxy in the test process. It sends the same response to each CONNECT. If it has a target, it then relays
/// the connection to this target and ignores the host that the CONNECT names.
pub(super) struct ScriptedForwardProxy {
    pub(super) url: String,
    pub(super) connections: Arc<AtomicUsize>,
    _task: AbortOnDrop,
}

/// Starts a forward proxy that relays to `target`, or closes the connection after `response` if `target` is `None`.
pub(super) async fn start_scripted_forward_proxy(
    response: &'static [u8],
    target: Option<SocketAddr>,
) -> ScriptedForwardProxy {
    let listener = bind_loopback().await;
    let url = format!("http://{USER}:{PASSWORD}@{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let task = Tasks::new().spawn_guarded(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            Tasks::new().spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let _ = stream.write_all(response).await;
                if let Some(target) = target {
                    let mut provider = TcpStream::connect(target).await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut provider).await;
                }
            });
        }
    });
    ScriptedForwardProxy { url, connections, _task: task }
}
