//! A load: requests sent at seeded times, at most so many at once, each with what came of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::answer::Answer;
use super::chance::Chance;
use super::client::{ClientError, Target};

/// What came of one request. Times in seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// From the start of the load to the sending.
    pub sent: f64,
    /// From the sending to the first text, and to the last of the stream.
    pub ttft: f64,
    pub latency: f64,
    /// Between chunks that carry text.
    pub gaps: Vec<f64>,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub cached_tokens: usize,
    pub text: String,
    /// Empty when all went well.
    pub error: String,
}

impl Outcome {
    /// Seconds per token after the first; None for one token.
    pub fn tpot(&self) -> Option<f64> {
        (self.output_tokens > 1).then(|| (self.latency - self.ttft) / (self.output_tokens - 1) as f64)
    }
}

/// When each of `count` requests is sent: gaps of a gamma distribution with shape `burstiness` (1: Poisson), stretched
/// so that the last one comes at `count` / `rate`. An infinite rate sends all at once.
pub fn arrivals(count: usize, rate: f64, burstiness: f64, chance: &mut Chance) -> Vec<Duration> {
    if rate.is_infinite() {
        return vec![Duration::ZERO; count];
    }
    let mut at = 0.0;
    let times: Vec<f64> = (0..count)
        .map(|_| {
            at += chance.gamma(burstiness);
            at
        })
        .collect();
    let stretch = if at > 0.0 { count as f64 / rate / at } else { 0.0 };
    times.into_iter().map(|time| Duration::from_secs_f64(time * stretch)).collect()
}

/// Sends `bodies` at `arrivals`; the outcomes in that order, and how long it all took.
pub async fn run(
    target: &Target,
    path: &str,
    bodies: &[Value],
    arrivals: &[Duration],
    concurrency: Option<usize>,
    progress: &ProgressBar,
) -> (Vec<Outcome>, Duration) {
    let places = Arc::new(Semaphore::new(concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for (index, (body, &arrival)) in bodies.iter().zip(arrivals).enumerate() {
        tokio::time::sleep_until((began + arrival).into()).await;
        let (target, path, body) = (target.clone(), path.to_owned(), body.clone());
        let (places, progress) = (places.clone(), progress.clone());
        tasks.spawn(async move {
            // Nobody closes it.
            let _place = places.acquire_owned().await;
            let outcome = send(&target, &path, &body, began).await;
            progress.inc(1);
            (index, outcome)
        });
    }
    let mut outcomes = vec![Outcome::default(); bodies.len()];
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok((index, outcome)) => outcomes[index] = outcome,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
    (outcomes, began.elapsed())
}

async fn send(target: &Target, path: &str, body: &Value, began: Instant) -> Outcome {
    let sent = Instant::now();
    let mut answer = Answer::default();
    let result = target.stream(path, body, |event, now| answer.push(&event, now)).await;
    outcome(began, sent, answer, result)
}

fn outcome(began: Instant, sent: Instant, answer: Answer, result: Result<(), ClientError>) -> Outcome {
    let seconds = |time: Instant| time.saturating_duration_since(sent).as_secs_f64();
    // An answer without text has its end as its first sign.
    let first = answer.times.first().copied().or(answer.last);
    Outcome {
        sent: sent.saturating_duration_since(began).as_secs_f64(),
        ttft: first.map_or(0.0, seconds),
        latency: answer.last.map_or(0.0, seconds),
        gaps: answer.times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(),
        prompt_tokens: answer.usage.prompt,
        output_tokens: answer.usage.output,
        cached_tokens: answer.usage.cached,
        text: answer.content,
        error: result.err().map(|error| error.to_string()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arrivals_ascend_and_end_when_the_rate_says() {
        for burstiness in [0.5, 1.0, 4.0] {
            let times = arrivals(50, 10.0, burstiness, &mut Chance::new(1));
            assert!(times.is_sorted());
            assert!((times[49].as_secs_f64() - 5.0).abs() < 1e-6, "{:?}", times[49]);
        }
        assert_eq!(arrivals(3, f64::INFINITY, 1.0, &mut Chance::new(1)), [Duration::ZERO; 3]);
        let draw = |seed| arrivals(5, 1.0, 1.0, &mut Chance::new(seed));
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn times_are_counted_from_the_sending() {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let text = |text: &str| json!({"choices": [{"text": text}]});
        let mut answer = Answer::default();
        answer.push(&text("a"), at(130));
        answer.push(&text(""), at(140));
        answer.push(&text("b"), at(160));
        answer.push(&json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}), at(170));
        let outcome = outcome(began, at(100), answer, Ok(()));
        let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-9, "{got} and {expected}");
        near(outcome.sent, 0.1);
        near(outcome.ttft, 0.03);
        near(outcome.latency, 0.07);
        near(outcome.gaps[0], 0.03);
        near(outcome.tpot().unwrap_or(0.0), 0.02);
        assert_eq!((outcome.gaps.len(), outcome.prompt_tokens, outcome.text.as_str()), (1, 7, "ab"));
    }
}
