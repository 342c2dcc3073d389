//! `ferrotron serve` inside this process, on a port of its own: for benches without --base-url.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api::{App, Health};
use crate::cli::{flags, serve};

/// A server that is ready. It ends with the runtime it runs on, or by [`Local::stop`].
pub struct Local {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    pub app: Arc<App>,
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Local {
    /// Starts `serve --model model` with room for `sequences`, unless `own` flags say otherwise, and waits for its model.
    /// Errors: a flag that does not fit, a model that cannot be loaded.
    pub async fn start(model: &str, sequences: usize, own: &[String]) -> anyhow::Result<Self> {
        let sequences = sequences.to_string();
        let mut line = vec!["ferrotron serve", "--model", model, "--host", "127.0.0.1", "--port", "0"];
        line.push("--disable-log-stats");
        if !own.iter().any(|flag| flag.starts_with("--max-num-seqs") || flag.starts_with("--parallel")) {
            line.extend(["--max-num-seqs", &sequences]);
        }
        line.extend(own.iter().map(String::as_str));
        // Keys of the environment are for servers that others can reach.
        let mut args: serve::Args = flags(line).context("flags of the server")?;
        args.api_key.clear();
        args.door.api_key_file = None;
        let listener = serve::listen(&args).await?;
        let base = format!("http://{}", listener.local_addr()?);
        let models = serve::Models::find(&args)?;
        let app = App::new(serve::options(&args, &models)?);
        let stop = watch::Sender::new(false);
        let task = tokio::spawn(serve::serve_on(listener, args, models, app.clone(), None, stop.clone()));
        let mut local = Self { base, app, stop, task };
        local.ready().await?;
        Ok(local)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        const PAUSE: Duration = Duration::from_millis(5);
        while self.app.health() != Health::Ready {
            if self.task.is_finished() {
                (&mut self.task).await.context("the server's task failed")??;
                bail!("the server ended before it was ready");
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Asks it to end and waits until it has. Errors: why it ended otherwise.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.send_replace(true);
        self.task.await.context("the server's task failed")?
    }
}
