//! From a listener to a clean end.

use super::state::App;
use axum::serve::ListenerExt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

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
pub async fn serve<F>(listener: TcpListener, app: Arc<App>, drain: Drain<F>) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    // Streams are many small writes, which must not wait for each other.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("nodelay: {error}");
        }
    });
    let (closed, closing) = oneshot::channel();
    let stop = {
        let app = app.clone();
        async move {
            drain.signal.await;
            tracing::info!("Shutting down: {} requests are running", app.metrics.in_flight());
            app.set_draining();
            // The receiver is gone only when serving has failed, and then nobody needs to know.
            let _ = closed.send(());
        }
    };
    let serving = axum::serve(listener, super::router(app.clone())).with_graceful_shutdown(stop);
    let end = async {
        if closing.await.is_err() {
            return std::future::pending().await;
        }
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
