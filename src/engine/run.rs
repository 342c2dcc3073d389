//! The engine thread.

use std::sync::Arc;
use std::sync::mpsc;

use super::handle::{Command, Handle, LoadProgress, Runner, Shared};
use super::{EngineConfig, Event, Failure, Info};
use crate::model::Network;

/// Starts the engine thread: it loads the model, then serves until it is shut down or dies.
///
/// Returns at once; the status is `Loading` until `load` returns, and `Dead` with its message if it fails.
pub fn start(
    config: EngineConfig,
    load: impl FnOnce(&LoadProgress) -> Result<Box<dyn Network>, String> + Send + 'static,
) -> (Handle, Runner) {
    let shared = Arc::new(Shared::new(config.queue_len));
    let (commands, inbox) = mpsc::channel();
    let handle = Handle { shared: shared.clone(), commands };
    let thread = std::thread::Builder::new().name(config.name.clone());
    let on_thread = {
        let shared = shared.clone();
        move || {
            match load(&LoadProgress { shared: shared.clone() }) {
                Ok(network) => {
                    let limits = *network.limits();
                    let context_len = config.context_len.min(limits.blocks * limits.block_len);
                    let max_sequences = config.max_sequences.min(limits.slots);
                    let vocab_size = network.vocab_size();
                    shared.ready(Info { vocab_size, limits, context_len, max_sequences });
                    for command in inbox {
                        match command {
                            Command::Submit(submission) => {
                                let _ = submission.events.send(Event::Failed(Failure::ShuttingDown));
                            }
                            Command::Cancel(_) => {}
                            Command::Drain | Command::Stop => break,
                        }
                    }
                }
                Err(reason) => shared.die(reason),
            }
            shared.end();
        }
    };
    let thread = match thread.spawn(on_thread) {
        Ok(thread) => Some(thread),
        Err(error) => {
            shared.die(format!("the engine thread could not be started: {error}"));
            shared.end();
            None
        }
    };
    (handle, Runner { thread, shared })
}
