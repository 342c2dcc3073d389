//! From a listener to a clean end.

use super::door::Door;
use super::state::App;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// After the drain time, what is left gets this long to say goodbye to its client.
const GOODBYE: Duration = Duration::from_secs(3);

/// How the server ends.
pub struct Drain<F> {
    /// Resolves when the server shall end.
    pub signal: F,
    /// `--shutdown-timeout`: how long running requests may go on.
    pub timeout: Duration,
}

/// Serves until `drain.signal`; then takes no more connections, lets requests finish for `drain.timeout`, fails the
/// rest (streams end with an error event, others get 503) and returns.
pub async fn serve<F>(door: impl Into<Door>, app: Arc<App>, drain: Drain<F>) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (stop, stopped) = watch::channel(false);
    let serving = door.into().serve(super::router(app.clone()), stopped);
    let end = async {
        drain.signal.await;
        tracing::info!("Shutting down: {} requests are running", app.metrics.in_flight());
        app.set_draining();
        stop.send_replace(true);
        app.shutdown(drain.timeout).await;
        tokio::time::sleep(GOODBYE).await;
    };
    let served = tokio::select! {
        served = serving => served,
        () = end => Ok(()),
    };
    app.batches.close();
    served
}
