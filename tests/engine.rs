//! The engine on a network without a model: what clients are promised, under load, cancels, faults and death.

mod null;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use ferrotron::engine::{
    self, EngineConfig, Event, Failure, Finish, Handle, Request, RequestStream, Runner, Speculation, Status,
    SubmitError,
};
use ferrotron::model::{Limits, StepError};
use ferrotron::sample::{self, SamplingParams, Workspace};
use null::{Null, mix, sampling};

const VOCAB: usize = 32;

fn limits() -> Limits {
    Limits { step_tokens: 16, logit_rows: 8, slots: 4, blocks: 64, block_len: 4, ..Limits::default() }
}

fn start_with(
    limits: Limits,
    config: EngineConfig,
    prepare: impl FnOnce(&mut Null) + Send + 'static,
) -> (Handle, Runner) {
    engine::start(config, move |_| {
        let mut network = Null::new(limits, VOCAB);
        prepare(&mut network);
        Ok(Box::new(network))
    })
}

async fn start(prepare: impl FnOnce(&mut Null) + Send + 'static) -> (Handle, Runner) {
    let (handle, runner) = start_with(limits(), EngineConfig::default(), prepare);
    handle.loaded().await;
    (handle, runner)
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request::new(prompt.to_vec(), sampling(0.0, 0), max_tokens)
}

async fn collect(mut stream: RequestStream) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

/// All but how long it took.
fn without_times(events: Vec<Event>) -> Vec<Event> {
    let strip = |event| match event {
        Event::Started { cached_tokens, prompt_logprobs, .. } => {
            Event::Started { cached_tokens, prompt_logprobs, timings: Default::default() }
        }
        Event::Finished { finish, .. } => Event::Finished { finish, timings: Default::default() },
        other => other,
    };
    events.into_iter().map(strip).collect()
}

fn ids(events: &[Event]) -> Vec<u32> {
    let id = |event: &Event| if let Event::Token { id, .. } = event { Some(*id) } else { None };
    events.iter().filter_map(id).collect()
}

fn finish(events: &[Event]) -> Option<Finish> {
    if let Some(Event::Finished { finish, .. }) = events.last() { Some(*finish) } else { None }
}

/// What greedy decoding must give, from the definition of the null network alone.
fn greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = null::logits(&tokens, VOCAB);
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

/// Asks until a later request is through, so that all earlier commands were taken; then nothing may be held.
async fn check_empty(handle: &Handle) {
    collect(handle.submit(request(&[1], 1)).unwrap()).await;
    let stats = handle.stats();
    for (gauge, name) in [
        (&stats.running, "running"),
        (&stats.waiting, "waiting"),
        (&stats.slots_used, "slots_used"),
        (&stats.kv_blocks_used, "kv_blocks_used"),
    ] {
        assert_eq!(gauge.load(Relaxed), 0, "{name}");
    }
    assert_eq!(stats.stalled(), None);
}

/// A network that stops before each step: it says that it is there, then waits for a permit.
struct Gate {
    entered: Receiver<usize>,
    permits: Sender<()>,
}

fn gate(network: &mut Null, entered: Sender<usize>, permits: Receiver<()>) {
    network.before = Box::new(move |inputs| {
        let _ = entered.send(inputs.sequences.len());
        let _ = permits.recv(); // A dropped sender opens the gate for good.
    });
}

async fn start_gated(config: EngineConfig) -> (Handle, Runner, Gate) {
    let (entered, entered_receiver) = channel();
    let (permits, permits_receiver) = channel();
    let (handle, runner) =
        start_with(limits(), config, move |network| gate(network, entered, permits_receiver));
    handle.loaded().await;
    (handle, runner, Gate { entered: entered_receiver, permits })
}

/// Twelve requests that differ in everything.
fn mixed_requests() -> Vec<Request> {
    (0..12u64)
        .map(|index| {
            let len = 1 + (mix(index) % 40) as usize;
            let prompt: Vec<u32> = (0..len).map(|i| (mix(index << 8 | i as u64) % 32) as u32).collect();
            let temperature = if index % 3 == 0 { 0.0 } else { 0.9 };
            let mut sampling = SamplingParams { top_p: 0.95, ..sampling(temperature, index) };
            if index % 4 == 1 {
                sampling.repetition_penalty = 1.3;
                sampling.frequency_penalty = 0.4;
            }
            if index % 4 == 2 {
                sampling.logprobs = Some(3);
                sampling.top_k = 5;
            }
            let prompt_logprobs = (index % 5 == 0).then_some(2);
            let max_tokens = 1 + (mix(!index) % 30) as usize;
            Request { sampling, stop_ids: vec![31], prompt_logprobs, ..request(&prompt, max_tokens) }
        })
        .collect()
}

#[tokio::test]
async fn together_is_the_same_as_alone() {
    let mut alone = Vec::new();
    for request in mixed_requests() {
        let (handle, _runner) = start(|_| {}).await;
        alone.push(without_times(collect(handle.submit(request).unwrap()).await));
    }
    let (handle, _runner) = start(|_| {}).await;
    let streams: Vec<_> = mixed_requests().into_iter().map(|r| handle.submit(r).unwrap()).collect();
    for (index, (stream, alone)) in streams.into_iter().zip(alone).enumerate() {
        assert_eq!(without_times(collect(stream).await), alone, "request {index}");
    }
    check_empty(&handle).await;
}

#[tokio::test]
async fn greedy_follows_the_logits() {
    let (handle, _runner) = start(|_| {}).await;
    let prompt: Vec<u32> = (0..30).collect(); // read in two chunks
    let events = collect(handle.submit(request(&prompt, 20)).unwrap()).await;
    assert!(
        matches!(&events[0], Event::Started { cached_tokens: 0, prompt_logprobs: None, .. }),
        "{events:?}"
    );
    assert_eq!(ids(&events), greedy(&prompt, 20));
    assert_eq!(finish(&events), Some(Finish::Length));
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens.load(Relaxed), stats.generation_tokens.load(Relaxed)), (30, 20));
    assert_eq!((stats.steps.load(Relaxed), stats.finished_length.load(Relaxed)), (21, 1));
    assert_eq!((stats.iteration_tokens.count(), stats.iteration_tokens.sum()), (21, 49));
}

#[tokio::test]
async fn stop_ids_end_a_sequence_but_not_before_min_tokens() {
    let (handle, _runner) = start(|_| {}).await;
    let expected = greedy(&[3, 4], 12);
    let stop = expected[4];
    let first = expected.iter().position(|&id| id == stop).unwrap();
    let stopping = Request { stop_ids: vec![stop], ..request(&[3, 4], 12) };
    let events = collect(handle.submit(stopping.clone()).unwrap()).await;
    assert_eq!(ids(&events), expected[..=first]);
    assert_eq!(finish(&events), Some(Finish::Stop { id: stop }));
    let late = collect(handle.submit(Request { min_tokens: 12, ..stopping }).unwrap()).await;
    assert!(ids(&late).len() == 12 && !ids(&late).contains(&stop));
}

#[tokio::test]
async fn the_prompt_has_log_probabilities_too() {
    let (handle, _runner) = start(|_| {}).await;
    let prompt: Vec<u32> = (5..25).collect(); // more rows than one step gives
    let asked = Request { prompt_logprobs: Some(2), ..request(&prompt, 1) };
    let events = collect(handle.submit(asked).unwrap()).await;
    let Event::Started { prompt_logprobs: Some(found), .. } = &events[0] else { panic!("{events:?}") };
    let mut workspace = Workspace::new(VOCAB);
    assert_eq!((found.len(), &found[0]), (prompt.len(), &None));
    for index in 1..prompt.len() {
        let logits = null::logits(&prompt[..index], VOCAB);
        let expected = sample::logprobs(&mut workspace, &logits, prompt[index], 2).unwrap();
        assert_eq!(found[index], Some(expected), "prompt id {index}");
    }
}

#[tokio::test]
async fn a_prompt_just_fits_or_is_refused() {
    let config = EngineConfig { context_len: 16, ..EngineConfig::default() };
    let (handle, _runner) = start_with(limits(), config, |_| {});
    handle.loaded().await;
    let events = collect(handle.submit(request(&[1; 15], 100)).unwrap()).await;
    assert_eq!((ids(&events).len(), finish(&events)), (1, Some(Finish::Length)));
    let refused = handle.submit(request(&[1; 16], 1)).err();
    assert_eq!(refused, Some(SubmitError::TooLong { prompt: 16, limit: 16 }));
}

#[tokio::test]
async fn the_whole_pool_is_the_longest_context() {
    let (handle, _runner) = start(|_| {}).await;
    assert_eq!(handle.info().unwrap().context_len, 256);
    let events = collect(handle.submit(request(&[1; 250], 100)).unwrap()).await;
    assert_eq!(ids(&events).len(), 6);
    assert!(handle.submit(request(&[1; 256], 1)).is_err());
    check_empty(&handle).await;
}

#[tokio::test]
async fn wrong_values_are_named() {
    let (handle, _runner) = start(|_| {}).await;
    let check = |field: &str, request: Request| match handle.submit(request) {
        Err(SubmitError::Invalid(error)) => assert_eq!(error.field, field),
        other => panic!("{field}: {other:?}"),
    };
    check("prompt", request(&[], 1));
    check("prompt", request(&[32], 1));
    check("max_tokens", request(&[1], 0));
    check("min_tokens", Request { min_tokens: 3, ..request(&[1], 2) });
    check("stop_token_ids", Request { stop_ids: vec![32], ..request(&[1], 2) });
    check("prompt_logprobs", Request { prompt_logprobs: Some(33), ..request(&[1], 2) });
    check("temperature", Request { sampling: sampling(-1.0, 0), ..request(&[1], 2) });
}

#[tokio::test]
async fn a_dropped_stream_frees_everything_in_every_phase() {
    let config = EngineConfig { max_sequences: 2, ..EngineConfig::default() };
    let (handle, _runner, gate) = start_gated(config).await;
    let decoding = handle.submit(request(&[1, 2], 50)).unwrap();
    assert_eq!(gate.entered.recv(), Ok(1));
    let reading = handle.submit(request(&[3; 60], 50)).unwrap();
    let queued = handle.submit(request(&[4; 10], 50)).unwrap();
    for _ in 0..2 {
        gate.permits.send(()).unwrap();
        assert_eq!(gate.entered.recv(), Ok(2)); // one decodes, one reads its prompt
    }
    let stats = handle.stats();
    assert_eq!((stats.running.load(Relaxed), stats.waiting.load(Relaxed)), (2, 1));
    assert!(stats.kv_usage() > 0.0 && stats.stalled().is_some());
    drop((decoding, reading, queued));
    drop(gate);
    check_empty(&handle).await;
    assert_eq!(handle.stats().finished_abort.load(Relaxed), 3);
}

#[tokio::test]
async fn a_storm_of_cancels_leaks_nothing() {
    let (handle, _runner) = start(|_| {}).await;
    for index in 0..10_000u64 {
        let prompt = vec![1; 1 + (mix(index) % 30) as usize];
        match handle.submit(request(&prompt, 20)) {
            Ok(mut stream) if index % 3 == 0 => drop(stream.next().await),
            Ok(stream) => drop(stream),
            Err(error) => assert!(matches!(error, SubmitError::Overloaded { .. }), "{error}"),
        }
    }
    let fill = loop {
        match handle.submit(request(&[1; 250], 6)) {
            Ok(stream) => break stream,
            Err(_) => tokio::task::yield_now().await, // The engine is still busy with the cancels.
        }
    };
    assert_eq!(ids(&collect(fill).await).len(), 6); // needs every block there is
    check_empty(&handle).await;
}

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let config = EngineConfig { queue_len: 2, max_sequences: 1, ..EngineConfig::default() };
    let (handle, _runner, gate) = start_gated(config).await;
    let running = handle.submit(request(&[1], 3)).unwrap();
    gate.entered.recv().unwrap();
    let waiting: Vec<_> = (0..2).map(|_| handle.submit(request(&[2], 3)).unwrap()).collect();
    let refused = handle.submit(request(&[3], 3)).err();
    assert_eq!(refused, Some(SubmitError::Overloaded { waiting: 2, limit: 2 }));
    assert_eq!(handle.stats().rejected.load(Relaxed), 1);
    drop(gate);
    assert_eq!(ids(&collect(running).await), greedy(&[1], 3));
    for stream in waiting {
        assert_eq!(ids(&collect(stream).await), greedy(&[2], 3));
    }
    assert_eq!(ids(&collect(handle.submit(request(&[3], 3)).unwrap()).await), greedy(&[3], 3));
}

#[tokio::test]
async fn a_reader_that_never_reads_stalls_nobody() {
    let (handle, _runner) = start(|_| {}).await;
    let lazy = handle.submit(request(&[1], 200)).unwrap();
    for _ in 0..8 {
        assert_eq!(ids(&collect(handle.submit(request(&[2], 7)).unwrap()).await), greedy(&[2], 7));
    }
    assert_eq!(ids(&collect(lazy).await), greedy(&[1], 200));
}

/// `break_step` makes the network fail in its third step, while one request runs and others wait.
async fn check_death(reason: &str, break_step: impl FnOnce(&mut Null) + Send + 'static) {
    let config = EngineConfig { max_sequences: 1, ..EngineConfig::default() };
    let (all_submitted, wait) = channel::<()>();
    let (handle, runner) = start_with(limits(), config, |network| {
        break_step(network);
        let mut before = std::mem::replace(&mut network.before, Box::new(|_| {}));
        network.before = Box::new(move |inputs| {
            let _ = wait.recv();
            before(inputs);
        });
    });
    handle.loaded().await;
    let streams: Vec<_> = (0..3).map(|_| handle.submit(request(&[1], 50)).unwrap()).collect();
    drop(all_submitted);
    for (index, stream) in streams.into_iter().enumerate() {
        let events = collect(stream).await;
        let Some(Event::Failed(Failure::Dead(why))) = events.last() else { panic!("{index}: {events:?}") };
        assert!(why.contains(reason), "{why}");
        assert_eq!(ids(&events).len(), if index == 0 { 2 } else { 0 });
    }
    handle.ended().await;
    assert!(matches!(handle.status(), Status::Dead(why) if why.contains(reason)));
    assert!(matches!(handle.submit(request(&[1], 1)), Err(SubmitError::Dead(_))));
    assert_eq!(handle.stats().finished_error.load(Relaxed), 3);
    assert!(runner.join().unwrap_err().contains(reason));
}

fn third_step(mut then: impl FnMut() + Send) -> impl FnMut() + Send {
    let mut steps = 0;
    move || {
        steps += 1;
        if steps == 3 {
            then();
        }
    }
}

#[tokio::test]
async fn a_panic_in_a_step_answers_everyone() {
    check_death("the roof fell in", |network| {
        let mut trip = third_step(|| panic!("the roof fell in"));
        network.before = Box::new(move |_| trip());
    })
    .await;
}

#[tokio::test]
async fn a_device_error_answers_everyone() {
    check_death("bus fell off", |network| {
        let mut steps = 0;
        network.fault = Box::new(move |_, _| {
            steps += 1;
            if steps == 3 { Err(StepError::Device("bus fell off".into())) } else { Ok(()) }
        });
    })
    .await;
}

/// Three requests at once; in the fourth step the logits of the middle one break, as `fault` does it.
async fn check_one_fails(
    mut fault: impl FnMut(&mut [f32], usize) -> Result<(), StepError> + Send + 'static,
    recomputed: u64,
) {
    let (entered, entered_receiver) = channel();
    let (permits, permits_receiver) = channel();
    let (handle, _runner) = start_with(limits(), EngineConfig::default(), move |network| {
        gate(network, entered, permits_receiver);
        network.fault = Box::new(move |inputs, logits| {
            let second = inputs.sequences.iter().position(|sequence| sequence.slot == 1);
            match second {
                Some(row) if inputs.sequences[row].past == 6 => fault(logits, row),
                _ => Ok(()),
            }
        });
    });
    handle.loaded().await;
    let gate = Gate { entered: entered_receiver, permits };
    let first = handle.submit(request(&[1; 4], 20)).unwrap();
    gate.entered.recv().unwrap();
    let second = handle.submit(request(&[2; 4], 20)).unwrap();
    let third = handle.submit(Request { sampling: sampling(1.0, 5), ..request(&[3; 4], 20) }).unwrap();
    drop(gate);
    assert_eq!(ids(&collect(first).await), greedy(&[1; 4], 20));
    let failed = collect(second).await;
    assert_eq!(failed.last(), Some(&Event::Failed(Failure::NotFinite)));
    assert_eq!(ids(&failed), greedy(&[2; 4], 3));
    let (alone, _alone_runner) = start(|_| {}).await;
    let same = Request { sampling: sampling(1.0, 5), ..request(&[3; 4], 20) };
    assert_eq!(ids(&collect(third).await), ids(&collect(alone.submit(same).unwrap()).await));
    let stats = handle.stats();
    assert_eq!((stats.corrupted.load(Relaxed), stats.finished_error.load(Relaxed)), (1, 1));
    assert_eq!(stats.recomputed.load(Relaxed), recomputed);
    check_empty(&handle).await;
}

#[tokio::test]
async fn logits_that_are_not_finite_fail_their_sequence_alone() {
    let poison = |logits: &mut [f32], row: usize| {
        logits[row * VOCAB + 7] = f32::NAN;
        Ok(())
    };
    check_one_fails(poison, 0).await;
}

#[tokio::test]
async fn a_failed_step_is_computed_again_for_the_others() {
    check_one_fails(|_, row| Err(StepError::NotFinite { row }), 2).await;
}

#[tokio::test]
async fn rules_that_exclude_each_other_fail_their_request_alone() {
    let (handle, _runner) = start(|_| {}).await;
    let sampling = SamplingParams { allowed_ids: Some(vec![9]), ..sampling(0.0, 0) };
    let contradiction = Request { sampling, stop_ids: vec![9], min_tokens: 1, ..request(&[1], 5) };
    let events = collect(handle.submit(contradiction).unwrap()).await;
    assert_eq!(events, [Event::Failed(Failure::NothingAllowed)]);
    assert_eq!(handle.status(), Status::Ready);
    check_empty(&handle).await;
}

#[tokio::test]
async fn loading_is_a_status_with_progress() {
    let (go_on, wait) = channel::<()>();
    let (reported, reports) = channel();
    let (handle, _runner) = engine::start(EngineConfig::default(), move |progress| {
        progress.set(3, 4);
        let _ = reported.send(());
        let _ = wait.recv();
        Ok(Box::new(Null::new(limits(), VOCAB)))
    });
    reports.recv().unwrap();
    assert_eq!(handle.status(), Status::Loading { progress: 0.75 });
    assert_eq!(handle.submit(request(&[1], 1)).err(), Some(SubmitError::Loading));
    assert_eq!(handle.info(), None);
    drop(go_on);
    handle.loaded().await;
    assert_eq!(handle.status(), Status::Ready);
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_says_why() {
    let check = async |reason: &str, start: (Handle, Runner)| {
        let (handle, runner) = start;
        handle.loaded().await;
        handle.ended().await;
        assert!(matches!(handle.status(), Status::Dead(why) if why.contains(reason)));
        assert!(runner.join().unwrap_err().contains(reason));
    };
    check("no such file", engine::start(EngineConfig::default(), |_| Err("no such file".into()))).await;
    check("shard 3", engine::start(EngineConfig::default(), |_| panic!("shard 3"))).await;
    let none = EngineConfig { max_sequences: 0, ..EngineConfig::default() };
    check("max_sequences", start_with(limits(), none, |_| {})).await;
}

#[tokio::test]
async fn shutdown_lets_everyone_finish() {
    let (handle, runner, gate) = start_gated(EngineConfig::default()).await;
    let streams: Vec<_> = (0..6).map(|_| handle.submit(request(&[1], 9)).unwrap()).collect();
    gate.entered.recv().unwrap();
    let door = handle.clone();
    let shutdown = tokio::spawn(async move { door.shutdown(Duration::from_secs(60)).await });
    while handle.status() != Status::Draining {
        tokio::task::yield_now().await;
    }
    assert_eq!(handle.submit(request(&[1], 1)).err(), Some(SubmitError::Draining));
    drop(gate);
    shutdown.await.unwrap();
    for stream in streams {
        assert_eq!(ids(&collect(stream).await), greedy(&[1], 9));
    }
    assert_eq!(runner.join(), Ok(()));
}

#[tokio::test]
async fn shutdown_fails_who_does_not_finish_in_time() {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let (handle, runner) = start(|network| {
        network.before = Box::new(|_| {
            STEPS.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        });
    })
    .await;
    let streams: Vec<_> = (0..9).map(|_| handle.submit(request(&[1], 200)).unwrap()).collect();
    handle.shutdown(Duration::ZERO).await;
    handle.ended().await;
    for stream in streams {
        assert_eq!(collect(stream).await.last(), Some(&Event::Failed(Failure::ShuttingDown)));
    }
    assert_eq!(runner.join(), Ok(()));
    assert!(STEPS.load(Relaxed) < 150, "the engine went on after it was told to stop");
}

#[tokio::test]
async fn an_engine_without_callers_ends() {
    let (handle, runner) = start(|_| {}).await;
    let stream = handle.submit(request(&[1], 100)).unwrap();
    drop(handle);
    assert_eq!(ids(&collect(stream).await).len(), 100);
    assert_eq!(tokio::task::spawn_blocking(|| runner.join()).await.unwrap(), Ok(()));
}

/// With lanes for drafts and a draft head of which so many in a hundred are right.
async fn start_drafting(right: usize) -> (Handle, Runner) {
    let limits = Limits { lanes: 4, drafts: 3, logit_rows: 16, step_tokens: 32, ..limits() };
    let config = EngineConfig { checkpoints_max: 0, ..EngineConfig::default() };
    let (handle, runner) = engine::start(config, move |_| {
        Ok(Box::new(Null::new(limits, VOCAB).with_drafter(right as u64, right)))
    });
    handle.loaded().await;
    (handle, runner)
}

/// Always as many drafts as fit.
const FIXED: Speculation = Speculation { depth_max: 3, mtp: true, ngram: true, adaptive: false };

#[tokio::test]
async fn drafts_right_or_wrong_change_no_id_and_no_probability() {
    let mut plain = Vec::new();
    for request in mixed_requests() {
        let (handle, _runner) = start(|_| {}).await;
        let request = Request { speculation: Speculation::OFF, ..request };
        plain.push(without_times(collect(handle.submit(request).unwrap()).await));
    }
    let mut shares = Vec::new();
    for right in [0, 50, 100] {
        let (handle, _runner) = start_drafting(right).await;
        let requests = mixed_requests().into_iter().map(|r| Request { speculation: FIXED, ..r });
        let streams: Vec<_> = requests.map(|r| handle.submit(r).unwrap()).collect();
        for (index, (stream, plain)) in streams.into_iter().zip(&plain).enumerate() {
            assert_eq!(&without_times(collect(stream).await), plain, "request {index}, {right} % right");
        }
        let stats = handle.stats();
        let (drafted, accepted) = (stats.drafted_tokens.load(Relaxed), stats.accepted_tokens.load(Relaxed));
        assert!(drafted > 50, "only {drafted} drafts");
        // Who samples takes a likely id now and then all the same, so none is not to be expected.
        shares.push(accepted as f64 / drafted as f64);
        check_empty(&handle).await;
    }
    assert!(shares.is_sorted() && shares[2] > 2.0 * shares[0], "accepted: {shares:?}");
}

/// The second and the third id behind one prompt, drawn under many seeds, against their probabilities. The second confirms
/// a draft or does not; where it does, the third is drawn from the row behind it in the same step.
#[tokio::test]
async fn with_drafts_ids_are_drawn_from_the_models_own_distribution() {
    const DRAWS: usize = 6000;
    let softmax = |tokens: &[u32]| {
        let weights: Vec<f64> = null::logits(tokens, VOCAB).iter().map(|&l| f64::from(l).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / total).collect::<Vec<_>>()
    };
    let (handle, _runner) = start_drafting(100).await;
    let mut seen = vec![0f64; VOCAB * VOCAB];
    let mut streams = std::collections::VecDeque::new();
    for seed in 0..DRAWS as u64 {
        let sampling = sampling(1.0, seed);
        let request = Request { sampling, speculation: FIXED, ..request(&[7, 8], 3) };
        streams.push_back(handle.submit(request).unwrap());
        if streams.len() == 64 || seed + 1 == DRAWS as u64 {
            for stream in streams.drain(..) {
                let ids = ids(&collect(stream).await);
                seen[ids[1] as usize * VOCAB + ids[2] as usize] += 1.0;
            }
        }
    }
    assert!(handle.stats().accepted_tokens.load(Relaxed) > DRAWS as u64 / 20, "the drafts were never taken");
    let mut expected = vec![0f64; VOCAB * VOCAB];
    for (a, p) in (0..).zip(softmax(&[7, 8])) {
        for (b, q) in (0..).zip(softmax(&[7, 8, a])) {
            for (c, r) in softmax(&[7, 8, a, b]).into_iter().enumerate() {
                expected[b as usize * VOCAB + c] += p * q * r * DRAWS as f64;
            }
        }
    }
    let (mut statistic, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    for (expected, seen) in expected.into_iter().zip(seen) {
        if expected < 5.0 {
            // Too rare for a cell of its own.
            rest = (rest.0 + expected, rest.1 + seen);
            continue;
        }
        statistic += (seen - expected).powi(2) / expected;
        cells += 1.0;
    }
    statistic += (rest.1 - rest.0).powi(2) / rest.0;
    // Chi-squared of as many degrees of freedom, as a normal: five deviations. The seeds are fixed, so it never flickers.
    let deviations = (statistic - cells) / (2.0f64 * cells).sqrt();
    assert!(cells > 20.0 && deviations < 5.0, "chi-squared {statistic} in {cells} cells");
}

#[tokio::test]
async fn a_higher_class_goes_first_and_the_lower_one_goes_on_where_it_was() {
    let config = EngineConfig { max_sequences: 1, ..EngineConfig::default() };
    let (handle, _runner, gate) = start_gated(config).await;
    let background = Request { priority: 10, ..request(&[1; 8], 12) };
    let background = handle.submit(background).unwrap();
    for _ in 0..4 {
        gate.entered.recv().unwrap();
        gate.permits.send(()).unwrap();
    }
    gate.entered.recv().unwrap();
    let mut voice = handle.submit(request(&[2; 3], 4)).unwrap();
    let later = handle.submit(Request { priority: 10, ..request(&[3; 3], 2) }).unwrap();
    drop(gate);
    while voice.next().await.is_some() {}
    assert_eq!(ids(&collect(background).await), greedy(&[1; 8], 12));
    assert_eq!(ids(&collect(later).await), greedy(&[3; 3], 2));
    let stats = handle.stats();
    assert_eq!((stats.paused.load(Relaxed), stats.preemptions.load(Relaxed)), (1, 0));
    check_empty(&handle).await;
}

#[tokio::test]
async fn a_deadline_ends_who_waits_and_who_runs_and_nobody_else() {
    let config = EngineConfig { max_sequences: 1, ..EngineConfig::default() };
    let (handle, _runner, gate) = start_gated(config).await;
    let soon = std::time::Instant::now() + Duration::from_millis(20);
    let running = handle.submit(Request { deadline: Some(soon), ..request(&[1], 200) }).unwrap();
    gate.entered.recv().unwrap();
    let waiting = handle.submit(Request { deadline: Some(soon), ..request(&[2], 5) }).unwrap();
    let patient = handle.submit(request(&[3], 5)).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    drop(gate);
    assert_eq!(collect(running).await.last(), Some(&Event::Failed(Failure::TimedOut)));
    assert_eq!(collect(waiting).await, [Event::Failed(Failure::TimedOut)]);
    assert_eq!(ids(&collect(patient).await), greedy(&[3], 5));
    assert_eq!(handle.stats().timed_out.load(Relaxed), 2);
    check_empty(&handle).await;
}

#[tokio::test]
async fn the_second_turn_resumes_where_the_first_prompt_ended() {
    let (handle, _runner) = start(|_| {}).await;
    let first = Request { borders: vec![20], ..request(&[5; 22], 9) };
    let answer = ids(&collect(handle.submit(first).unwrap()).await);
    let again = [&[5; 22][..], &answer, &[9; 4]].concat();
    let events = collect(handle.submit(request(&again, 6)).unwrap()).await;
    let Event::Started { cached_tokens, .. } = events[0] else { panic!("{events:?}") };
    // The last id of the answer was never read.
    assert_eq!(cached_tokens, 30);
    assert_eq!(ids(&events), greedy(&again, 6));
    let other = Request { cache_salt: Some("other".into()), ..request(&again, 6) };
    let events = collect(handle.submit(other).unwrap()).await;
    assert!(matches!(events[0], Event::Started { cached_tokens: 0, .. }));
    check_empty(&handle).await;
}

#[tokio::test]
async fn choices_of_one_prompt_read_it_once() {
    let (handle, _runner) = start(|_| {}).await;
    let choice = |seed| Request { group: Some(1), sampling: sampling(1.0, seed), ..request(&[4; 30], 5) };
    let streams: Vec<_> = (0..4).map(|seed| handle.submit(choice(seed)).unwrap()).collect();
    for (seed, stream) in (0..).zip(streams) {
        let together = collect(stream).await;
        let (alone, _alone_runner) = start(|_| {}).await;
        assert_eq!(ids(&together), ids(&collect(alone.submit(choice(seed)).unwrap()).await), "choice {seed}");
    }
    let stats = handle.stats();
    assert_eq!(stats.prefix_hits.load(Relaxed), 3 * 29);
    check_empty(&handle).await;
}
