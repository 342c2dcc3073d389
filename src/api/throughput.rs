//! The line that tells every ten seconds how busy the engine is. Scripts read it, so its words are vLLM's.

use super::state::App;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(10);

/// Logs for ever while the engine is busy; drop the future to stop.
pub async fn log_throughput(app: Arc<App>) {
    let mut before = (0, 0);
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let Some(stats) = app.resident().map(|resident| resident.engine.stats()) else { continue };
        let now = (stats.prompt_tokens.load(Relaxed), stats.generation_tokens.load(Relaxed));
        let (running, waiting) = (stats.running.load(Relaxed), stats.waiting.load(Relaxed));
        if now != before || running + waiting > 0 {
            let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / EVERY.as_secs_f64();
            let rates = (rate(now.0, before.0), rate(now.1, before.1));
            tracing::info!("{}", line(rates, running, waiting, stats.kv_usage()));
        }
        before = now;
    }
}

fn line((prompt, generation): (f64, f64), running: u64, waiting: u64, kv_usage: f64) -> String {
    format!(
        "Engine 000: Avg prompt throughput: {prompt:.1} tokens/s, Avg generation throughput: {generation:.1} \
         tokens/s, Running: {running} reqs, Waiting: {waiting} reqs, GPU KV cache usage: {:.1}%, Prefix cache hit \
         rate: 0.0%",
        kv_usage * 100.0
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_line_has_the_words_that_scripts_look_for() {
        assert_eq!(
            super::line((512.0, 71.25), 1, 0, 0.031),
            "Engine 000: Avg prompt throughput: 512.0 tokens/s, Avg generation throughput: 71.2 tokens/s, \
             Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 3.1%, Prefix cache hit rate: 0.0%"
        );
    }
}
