//! Where the server listens, and who may come in.

use super::args::Args;
use crate::api::{Door, Limits, Tls, TlsFiles};
use anyhow::{Context as _, bail};
use std::io;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;

/// Flags about connections.
#[derive(Debug, Clone, clap::Args)]
pub struct DoorArgs {
    /// Socket file to listen on, in place of a port
    #[arg(long, value_name = "FILE")]
    pub uds: Option<PathBuf>,
    /// A file with further keys, one a line; lines that begin with # are passed over
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Certificate of the server and those up to its authority, in PEM form: speak HTTPS
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Its key, in PEM form [default: in the same file]
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Authorities of which clients must show a certificate, in PEM form
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub ssl_ca_certs: Option<PathBuf>,
    /// Whether they must: 0 not asked for, 1 may, 2 must [default: 2 with --ssl-ca-certs]
    #[arg(long, value_name = "N", requires = "ssl_ca_certs", value_parser = clap::value_parser!(u8).range(0..=2))]
    pub ssl_cert_reqs: Option<u8>,
    /// What a proxy in front puts before every path
    #[arg(long, value_name = "PREFIX")]
    pub root_path: Option<String>,
    /// Paths whose requests are not logged, with commas between them
    #[arg(long, value_name = "PATHS", value_delimiter = ',')]
    pub disable_access_log_for_endpoints: Vec<String>,
    /// Connections that may be open at once; one more is answered with 503
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = crate::cli::resident::count::<1_000_000>)]
    pub max_connections: usize,
}

/// Every key that opens the server: typed, of the environment, of the file. Errors: the file cannot be read, or has none.
pub fn keys(args: &Args) -> anyhow::Result<Vec<String>> {
    let mut keys: Vec<String> = args.api_key.iter().filter(|key| !key.is_empty()).cloned().collect();
    if let Some(path) = &args.door.api_key_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--api-key-file: {} cannot be read", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let before = keys.len();
        keys.extend(lines.map(str::to_owned));
        if keys.len() == before {
            // An open server is not what somebody meant who named a file of keys.
            bail!("--api-key-file: {} holds no key", path.display());
        }
    }
    Ok(keys)
}

/// A socket file that is ours: taken away when dropped.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whoever took it away before us did the same.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The door as the flags say, and its file if it has one. Says where it is. Errors: a certificate that is none, a port or socket in use.
pub async fn open(args: &Args) -> anyhow::Result<(Door, Option<SocketFile>)> {
    let flags = &args.door;
    let tls = tls(flags)?;
    allow_descriptors(flags.max_connections);
    let limits = Limits { connections: flags.max_connections, ..Limits::default() };
    let (door, file) = match &flags.uds {
        Some(path) => {
            let door = socket(path)?;
            tracing::info!("Listening on unix:{}", path.display());
            (door, Some(SocketFile(path.clone())))
        }
        None => {
            let listener = listen(args).await?;
            announce(&listener, tls.is_some())?;
            (Door::from(listener), None)
        }
    };
    let root = flags.root_path.as_deref().unwrap_or_default();
    let quiet = flags.disable_access_log_for_endpoints.clone();
    Ok((door.with_tls(tls).with_limits(limits).with_root(root).with_quiet(quiet), file))
}

/// Descriptors beside those of connections: models, the log, the runtime.
#[cfg(unix)]
const DESCRIPTORS_OWN: u64 = 256;

/// Systems start a process with few descriptors and let it ask for more; a pool of clients alone may want a thousand.
#[cfg(unix)]
fn allow_descriptors(connections: usize) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for what the call writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return;
    }
    let wanted = (connections as u64).saturating_add(DESCRIPTORS_OWN);
    if limit.rlim_cur >= wanted {
        return;
    }
    limit.rlim_cur = wanted.min(limit.rlim_max);
    // SAFETY: the call only reads `limit`.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0;
    if !raised || limit.rlim_cur < wanted {
        tracing::warn!(
            "The system allows {} descriptors, fewer than --max-connections may need",
            limit.rlim_cur
        );
    }
}

#[cfg(not(unix))]
fn allow_descriptors(_: usize) {}

fn tls(flags: &DoorArgs) -> anyhow::Result<Option<Tls>> {
    let Some(certificates) = flags.ssl_certfile.clone() else { return Ok(None) };
    let asked = flags.ssl_cert_reqs.unwrap_or(2);
    let files = TlsFiles {
        certificates,
        key: flags.ssl_keyfile.clone(),
        authorities: flags.ssl_ca_certs.clone().filter(|_| asked > 0),
        required: asked == 2,
    };
    Ok(Some(Tls::load(&files).context("--ssl-certfile, --ssl-keyfile, --ssl-ca-certs")?))
}

/// Errors: the port is taken, or the address is not ours; both name it.
pub async fn listen(args: &Args) -> anyhow::Result<TcpListener> {
    let default = if keys(args)?.is_empty() { "127.0.0.1" } else { "0.0.0.0" };
    // A variable that is set to nothing is one that is not set.
    let host = args.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(default);
    let port = args.port;
    TcpListener::bind((host, port)).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("port {port} on {host} is in use: stop who has it, or give another --port")
        }
        _ => anyhow::anyhow!("--host: cannot listen on port {port} of {host}: {error}"),
    })
}

fn announce(listener: &TcpListener, is_tls: bool) -> io::Result<()> {
    let address = listener.local_addr()?;
    tracing::info!("Listening on {}://{address}", if is_tls { "https" } else { "http" });
    if address.ip().is_loopback() {
        tracing::info!("Only this machine can connect; --host 0.0.0.0 opens it to others");
    }
    Ok(())
}

/// A socket file that nobody listens on was left by a server that was killed, and gives way.
#[cfg(unix)]
fn socket(path: &Path) -> anyhow::Result<Door> {
    use std::os::unix::fs::FileTypeExt;
    use std::os::unix::net::UnixStream;
    use tokio::net::UnixListener;

    let bind = || UnixListener::bind(path);
    let is_socket = std::fs::metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let is_left = || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    let listener = match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_socket && is_left() => {
            std::fs::remove_file(path).and_then(|()| bind())
        }
        other => other,
    };
    listener.map(Door::from).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("--uds: {} is in use: stop who has it, or give another file", path.display())
        }
        _ => anyhow::anyhow!("--uds: cannot listen on {}: {error}", path.display()),
    })
}

#[cfg(not(unix))]
fn socket(path: &Path) -> anyhow::Result<Door> {
    bail!("--uds: there are no socket files on this system, so not {}", path.display())
}
