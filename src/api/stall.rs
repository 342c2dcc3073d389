//! A step that does not end cannot be interrupted; at least it does not go unnoticed.

use super::state::App;
use std::sync::Arc;
use std::time::Duration;

/// Health and the gauge look for themselves; only the log needs somebody who looks.
const EVERY: Duration = Duration::from_secs(1);

/// Writes one line when an engine stalls and one when it goes on. Runs for ever; drop the future to stop.
pub async fn watch_stalls(app: Arc<App>) {
    let mut stalled = Vec::new();
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        stalled.resize(app.keeper.len(), false);
        for resident in app.residents() {
            let now = app.stalled(&resident);
            let before = std::mem::replace(&mut stalled[resident.index], now.is_some());
            let name = resident.model.canonical();
            match now {
                Some(time) if !before => {
                    tracing::error!("The engine of {name} has finished no step for {} s", time.as_secs());
                }
                None if before => tracing::info!("The engine of {name} goes on"),
                _ => {}
            }
        }
    }
}
