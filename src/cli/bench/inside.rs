//! An engine inside this process, without HTTP: starting it, and running prompts through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::task::JoinSet;

use crate::cli::resident::{Compute, Resident};
use crate::engine::{self, EngineConfig, Event, Handle, LoadProgress, Request, Runner, Status};
use crate::model::{Limits, Network, plan};
use crate::sample::SamplingParams;

/// An engine that is ready.
pub struct Inside {
    pub handle: Handle,
    runner: Runner,
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Run {
    /// Of each request, in their order, stop ids included.
    pub ids: Vec<Vec<u32>>,
    /// From the first submission to the last end.
    pub wall: Duration,
    /// From each request's first id to its last, all together.
    pub decode: Duration,
    pub steps: u64,
    /// Tokens that were drafted, and those of them that stayed.
    pub drafted: u64,
    pub accepted: u64,
}

impl Run {
    pub fn tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }

    /// Tokens per second of all requests together, prompts included in the time.
    pub fn rate(&self) -> f64 {
        self.tokens() as f64 / self.wall.as_secs_f64().max(1e-9)
    }

    /// Tokens per second of one request while it is decoded.
    pub fn decode_rate(&self) -> f64 {
        let decoded: usize = self.ids.iter().map(|ids| ids.len().saturating_sub(1)).sum();
        decoded as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

impl Inside {
    /// Around the model of `resident` with these `limits`, at the prices that they give to its states and blocks.
    /// Errors: the model cannot be loaded.
    pub async fn load(
        config: EngineConfig,
        resident: Resident,
        compute: &Compute,
        limits: Limits,
    ) -> anyhow::Result<Self> {
        let config = EngineConfig {
            state_bytes: plan::state_bytes(&resident.config, &limits) as usize,
            block_bytes: plan::block_bytes(&resident.config, &limits, compute.precision()) as usize,
            ..config
        };
        let compute = compute.clone();
        Self::start(config, move |progress| resident.load(&compute, limits, progress)).await
    }

    /// Errors: the model cannot be loaded.
    pub async fn start(
        config: EngineConfig,
        load: impl FnOnce(&LoadProgress) -> Result<Box<dyn Network>, String> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (handle, runner) = engine::start(config, load);
        handle.loaded().await;
        if let Status::Dead(reason) = handle.status() {
            bail!("{reason}");
        }
        Ok(Self { handle, runner })
    }

    /// Runs the requests, `concurrency` at a time. Errors: one is refused or fails.
    pub async fn run(&self, requests: &Arc<Vec<Request>>, concurrency: usize) -> anyhow::Result<Run> {
        let before = self.counts();
        let next = Arc::new(AtomicUsize::new(0));
        let mut readers = JoinSet::new();
        let began = Instant::now();
        for _ in 0..concurrency.min(requests.len()) {
            let (handle, requests, next) = (self.handle.clone(), requests.clone(), next.clone());
            readers.spawn(async move {
                let mut answers = Vec::new();
                while let Some((index, request)) = take(&requests, &next) {
                    answers.push((index, read(&handle, request).await?));
                }
                anyhow::Ok(answers)
            });
        }
        let (mut ids, mut decode) = (vec![Vec::new(); requests.len()], Duration::ZERO);
        while let Some(answers) = readers.join_next().await {
            for (index, (answer, time)) in answers.context("a reader panicked")?? {
                ids[index] = answer;
                decode += time;
            }
        }
        let wall = began.elapsed();
        let [steps, drafted, accepted] = self.counts();
        Ok(Run {
            ids,
            wall,
            decode,
            steps: steps - before[0],
            drafted: drafted - before[1],
            accepted: accepted - before[2],
        })
    }

    /// Steps, drafted tokens and accepted ones so far.
    fn counts(&self) -> [u64; 3] {
        let stats = self.handle.stats();
        [&stats.steps, &stats.drafted_tokens, &stats.accepted_tokens].map(|count| count.load(Relaxed))
    }

    /// Errors: the engine had died.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.handle.shutdown(Duration::ZERO).await;
        self.runner.join().map_err(anyhow::Error::msg)
    }
}

/// The first request that nobody has taken.
fn take(requests: &[Request], next: &AtomicUsize) -> Option<(usize, Request)> {
    let index = next.fetch_add(1, Relaxed);
    Some((index, requests.get(index)?.clone()))
}

async fn read(handle: &Handle, request: Request) -> anyhow::Result<(Vec<u32>, Duration)> {
    let mut stream = handle.submit(request)?;
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Started { .. } => {}
            Event::Token { id, .. } => ids.push(id),
            Event::Finished { timings, .. } => return Ok((ids, timings.decode)),
            Event::Failed(failure) => return Err(failure.into()),
        }
    }
    bail!("the engine's events ended without an end")
}

/// Always the likeliest id.
pub fn greedy() -> SamplingParams {
    SamplingParams::plain(0.0, 0)
}
