//! From validated requests to a stream of updates: the one path that every route and both ways of answering
//! (streamed, collected) take.
//!
//! A request of `p` prompts and `n` answers each is `p * n` choices; every choice is a submission of its own,
//! and their updates interleave as they come. Dropping the [`Generation`] cancels all of them.

use super::error::ApiError;
use super::keeper::Lease;
use super::meter::{Ending, RequestMeter};
use super::state::{App, Resident};
use super::types::Common;
use super::usage::Usage;
use crate::engine::{Event, Failure, Finish, Request, RequestStream, SubmitError, Timings, TokenLogprobs};
use crate::sample::Steering;
use crate::text::{Decoder, DecoderOptions, Delta, Mode, Text};
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use serde_json::{Value, json};
use std::time::Instant;

/// What one choice is made from.
pub struct Input {
    /// Fits the context; see [`fit`].
    pub prompt: Vec<u32>,
    /// Where its turns end; see [`crate::text::Text::borders`].
    pub borders: Vec<u32>,
    pub mode: Mode,
    /// The answer ends after its first tool call.
    pub one_call: bool,
    /// The same for each of its answers.
    pub steering: Option<Steering>,
}

/// One step of one choice.
#[derive(Debug)]
pub struct Update {
    pub choice: usize,
    pub event: UpdateEvent,
}

#[derive(Debug)]
pub enum UpdateEvent {
    /// The prompt is read. Always first.
    Started { prompt_logprobs: Option<Vec<Option<TokenLogprobs>>> },
    /// One sampled id and what it added to the text, which may be nothing yet.
    Token { token: Token, deltas: Vec<Delta> },
    /// What was held back, and why it ended. Always last.
    /// `reasoning_became_content`: the content is the reasoning, said once more because there was none.
    Ended { deltas: Vec<Delta>, finish: Finished, reasoning_became_content: bool },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: u32,
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Finished {
    /// The checkpoint's own end.
    Eos,
    StopText(String),
    StopId(u32),
    Length,
    /// The one call that was allowed is complete.
    OneCall,
}

impl Finished {
    /// `length` or `stop`; a route may know better (`tool_calls`).
    pub fn reason(&self) -> &'static str {
        if *self == Self::Length { "length" } else { "stop" }
    }

    /// The string or id that ended the choice, if the request named it.
    pub fn stop_reason(&self) -> Value {
        match self {
            Self::StopText(text) => json!(text),
            Self::StopId(id) => json!(id),
            Self::Eos | Self::Length | Self::OneCall => Value::Null,
        }
    }
}

/// All choices of one HTTP request, under way.
pub struct Generation {
    choices: SelectAll<BoxStream<'static, Result<Counted, ApiError>>>,
    /// The model stays for as long as this is under way.
    lease: Lease,
    usage: Usage,
    /// Choices that have not ended.
    open: usize,
    failed: bool,
}

/// An update and what it adds to the usage.
struct Counted {
    update: Update,
    usage: Usage,
}

impl Generation {
    /// Submits `n` choices for each input. Errors: the engine refuses one; then none of them runs.
    pub fn start(
        app: &App,
        lease: &Lease,
        common: &Common,
        inputs: Vec<Input>,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let base_seed = common.seed.unwrap_or_else(|| app.ids.seed());
        let bad_words = spellings(&lease.text, &common.bad_words)?;
        let mut choices = SelectAll::new();
        let mut usage = Usage::default();
        for input in inputs {
            usage.prompt_tokens += input.prompt.len();
            let group = (common.n > 1).then(|| app.ids.group());
            for answer in 0..common.n {
                let index = choices.len();
                let mut sampling = common.sampling.clone();
                sampling.bad_words = bad_words.clone();
                sampling.seed = base_seed.wrapping_add(index as u64);
                let place = Place { index, group, counts_prompt: answer == 0, arrived };
                let choice = Choice::submit(app, lease, common, &input, place, sampling)?;
                choices.push(choice.into_stream().boxed());
            }
        }
        let open = choices.len();
        Ok(Self { choices, lease: lease.clone(), usage, open, failed: false })
    }

    /// The next update of any choice; `None` when all have ended. An error ends the whole request.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        if self.failed {
            return None;
        }
        match self.choices.next().await? {
            Ok(Counted { update, usage }) => {
                self.usage.add(usage);
                self.open -= usize::from(matches!(update.event, UpdateEvent::Ended { .. }));
                Some(Ok(update))
            }
            Err(error) => {
                self.failed = true;
                self.choices.clear();
                let unloaded = error == ApiError::ShuttingDown && self.lease.is_ending();
                Some(Err(if unloaded { ApiError::Unloaded } else { error }))
            }
        }
    }

    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Every choice has ended: the usage is final.
    pub fn is_complete(&self) -> bool {
        self.open == 0
    }
}

/// The prompt as it will be submitted: cut from the left if the request asked for it, and known to fit.
/// Errors: nothing in it, or no room for an answer.
pub fn fit(mut prompt: Vec<u32>, common: &Common, max_model_len: usize) -> Result<Vec<u32>, ApiError> {
    if let Some(keep) = common.truncate_prompt.filter(|keep| *keep < prompt.len()) {
        prompt.drain(..prompt.len() - keep);
    }
    if prompt.is_empty() {
        return Err(ApiError::bad("prompt", "The prompt is empty: it has no tokens."));
    }
    if prompt.len() >= max_model_len {
        return Err(too_long(prompt.len(), max_model_len));
    }
    Ok(prompt)
}

/// The ids of each word, where it stands alone and where a space goes before it. Errors: the tokenizer's.
fn spellings(text: &Text, words: &[String]) -> Result<Vec<Vec<u32>>, ApiError> {
    let mut all = Vec::new();
    for word in words {
        let bare = Some(word.trim_start()).filter(|bare| !bare.is_empty()).unwrap_or(word);
        for spelled in [bare.to_owned(), format!(" {bare}")] {
            let ids = text.encode(&spelled, false).map_err(|error| {
                ApiError::bad("bad_words", format!("A word of `bad_words` cannot be encoded: {error}."))
            })?;
            if !ids.is_empty() && !all.contains(&ids) {
                all.push(ids);
            }
        }
    }
    Ok(all)
}

/// Agents look for the words "maximum context length" to compact their history.
fn too_long(prompt: usize, limit: usize) -> ApiError {
    ApiError::bad(
        "input_tokens",
        format!(
            "This model's maximum context length is {limit} tokens. However, your prompt contains {prompt} input \
             tokens, which leaves no room for an answer. Please shorten the prompt."
        ),
    )
}

/// Where a choice stands in its request.
struct Place {
    index: usize,
    /// Of all answers to its prompt, if there are several.
    group: Option<u64>,
    /// The first answer to a prompt counts what the cache held of it.
    counts_prompt: bool,
    /// When the request had arrived.
    arrived: Instant,
}

/// One answer being generated.
struct Choice {
    index: usize,
    /// `None` once the answer has ended; dropping it cancels the sequence.
    stream: Option<RequestStream>,
    decoder: Decoder,
    /// The checkpoint's (unless ignored) and the request's own.
    stop_ids: Vec<u32>,
    own_stop_ids: Vec<u32>,
    /// The text of a stop id is shown too.
    include_stop: bool,
    one_call: bool,
    /// 0 if only the prompt's log-probabilities are wanted.
    max_tokens: usize,
    min_tokens: usize,
    generated: usize,
    reasoning_tokens: usize,
    counts_prompt: bool,
    meter: RequestMeter,
    /// Found by us rather than by the engine: the next update says so.
    stopped: Option<Finished>,
    ended: bool,
}

impl Choice {
    fn submit(
        app: &App,
        resident: &Resident,
        common: &Common,
        input: &Input,
        place: Place,
        sampling: crate::sample::SamplingParams,
    ) -> Result<Self, ApiError> {
        let Place { index, counts_prompt, arrived, .. } = place;
        let room = resident.model.max_model_len.saturating_sub(input.prompt.len());
        let max_tokens = common.max_tokens.unwrap_or(room).min(room);
        let min_tokens = common.min_tokens.min(max_tokens);
        let own = &common.stop_ids;
        let checkpoint = if common.ignore_eos { &[][..] } else { &resident.model.stop_ids };
        let mut stop_ids: Vec<u32> = checkpoint.iter().chain(own).copied().collect();
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let metrics = app.metrics.model(resident.index);
        let meter = RequestMeter::new(metrics, arrived, input.prompt.len(), common.max_tokens, common.n);
        let request = Request {
            min_tokens,
            stop_ids: stop_ids.clone(),
            prompt_logprobs: common.prompt_logprobs,
            steering: input.steering.clone(),
            ..Request::new(input.prompt.clone(), sampling, max_tokens.max(1))
        };
        let stream = match resident.engine.submit(scheduled(request, common, input, &place)) {
            Ok(stream) => stream,
            Err(error) => {
                meter.refused();
                return Err(refused(error));
            }
        };
        let mut decoder = resident.text.decoder(DecoderOptions {
            mode: input.mode.clone(),
            stop: common.stop.clone(),
            include_stop: common.include_stop,
            skip_special: common.skip_special,
        });
        decoder.suspend_stop(min_tokens > 0);
        Ok(Self {
            index,
            stream: Some(stream),
            decoder,
            stop_ids,
            own_stop_ids: own.clone(),
            include_stop: common.include_stop,
            one_call: input.one_call,
            max_tokens,
            min_tokens,
            generated: 0,
            reasoning_tokens: 0,
            counts_prompt,
            meter,
            stopped: None,
            ended: false,
        })
    }

    fn into_stream(self) -> impl stream::Stream<Item = Result<Counted, ApiError>> + Send {
        stream::unfold(self, |mut choice| async move {
            let next = choice.next().await?;
            Some((next, choice))
        })
    }

    async fn next(&mut self) -> Option<Result<Counted, ApiError>> {
        if self.ended {
            return None;
        }
        if let Some(finish) = self.stopped.take() {
            // The engine's last word was at the start; what came after is known here.
            let timings = self.meter.timings();
            return Some(Ok(self.end(finish, timings)));
        }
        let event = self.stream.as_mut()?.next().await?;
        Some(self.take(event))
    }

    fn take(&mut self, event: Event) -> Result<Counted, ApiError> {
        match event {
            Event::Started { cached_tokens, prompt_logprobs, timings } => {
                self.meter.started(cached_tokens, timings);
                if self.max_tokens == 0 {
                    self.stop(Finished::Length);
                }
                let cached_tokens = if self.counts_prompt { cached_tokens } else { 0 };
                let usage = Usage { cached_tokens, ..Usage::default() };
                Ok(self.counted(UpdateEvent::Started { prompt_logprobs }, usage))
            }
            Event::Token { id, logprobs } => Ok(self.token(Token { id, logprobs })),
            Event::Finished { finish, timings } => {
                let finish = match finish {
                    Finish::Length => Finished::Length,
                    Finish::Stop { id } if self.own_stop_ids.contains(&id) => Finished::StopId(id),
                    Finish::Stop { .. } => Finished::Eos,
                };
                Ok(self.end(finish, timings))
            }
            Event::Failed(failure) => {
                self.ended = true;
                self.stream = None;
                self.meter.ended(Ending::Error);
                Err(failed(failure))
            }
        }
    }

    fn token(&mut self, token: Token) -> Counted {
        self.generated += 1;
        self.meter.token();
        self.decoder.suspend_stop(self.generated < self.min_tokens);
        let mut deltas = Vec::new();
        let mut finish = None;
        if self.include_stop || !self.stop_ids.contains(&token.id) {
            finish = self.decoder.push(token.id, &mut deltas).map(Finished::StopText);
        }
        if self.one_call
            && let Some(end) = deltas.iter().position(|delta| matches!(delta, Delta::CallEnd { .. }))
        {
            deltas.truncate(end + 1);
            finish = Some(Finished::OneCall);
        }
        let thought = self.decoder.reasoning_tokens();
        let usage = Usage {
            completion_tokens: 1,
            reasoning_tokens: thought.saturating_sub(self.reasoning_tokens),
            ..Usage::default()
        };
        self.reasoning_tokens = self.reasoning_tokens.max(thought);
        if let Some(finish) = finish {
            self.stop(finish);
        }
        self.counted(UpdateEvent::Token { token, deltas }, usage)
    }

    /// Nothing more is wanted of the engine.
    fn stop(&mut self, finish: Finished) {
        self.stopped = Some(finish);
        self.stream = None;
    }

    fn end(&mut self, finish: Finished, timings: Timings) -> Counted {
        self.ended = true;
        self.stream = None;
        let mut deltas = Vec::new();
        if finish == Finished::Eos {
            self.decoder.end_of_turn();
        }
        // After the one call that was allowed, whatever is held back belongs to what was not.
        if finish != Finished::OneCall {
            self.decoder.finish(&mut deltas);
        }
        self.meter.ended(if finish == Finished::Length { Ending::Length } else { Ending::Stop });
        let reasoning_became_content = self.decoder.reasoning_became_content();
        let usage = Usage { timings, ..Usage::default() };
        self.counted(UpdateEvent::Ended { deltas, finish, reasoning_became_content }, usage)
    }

    fn counted(&self, event: UpdateEvent, usage: Usage) -> Counted {
        Counted { update: Update { choice: self.index, event }, usage }
    }
}

/// `request` with what the scheduler and the cache must know of it.
fn scheduled(request: Request, common: &Common, input: &Input, place: &Place) -> Request {
    Request {
        priority: common.priority,
        cache_salt: common.cache_salt.clone(),
        borders: input.borders.clone(),
        group: place.group,
        speculation: common.speculation,
        deadline: common.timeout.and_then(|timeout| place.arrived.checked_add(timeout)),
        ..request
    }
}

fn refused(error: SubmitError) -> ApiError {
    match error {
        SubmitError::Loading => ApiError::Loading { percent: 100.0 },
        SubmitError::Overloaded { limit, .. } => ApiError::Busy { limit },
        SubmitError::Draining => ApiError::ShuttingDown,
        SubmitError::Dead(reason) => ApiError::EngineDead(reason),
        SubmitError::TooLong { prompt, limit } => too_long(prompt, limit),
        SubmitError::Invalid(error) => {
            let message = format!("`{}` must be {}, got {}.", error.field, error.expected, error.got);
            ApiError::bad(error.field, message)
        }
    }
}

fn failed(failure: Failure) -> ApiError {
    match failure {
        Failure::NotFinite | Failure::Steering | Failure::Dead(_) => {
            ApiError::Internal(format!("The generation failed: {failure}."))
        }
        Failure::NothingAllowed => ApiError::malformed(format!("The generation ended: {failure}.")),
        Failure::ShuttingDown => ApiError::ShuttingDown,
        Failure::Aborted => ApiError::Aborted,
        Failure::TimedOut => ApiError::TimedOut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::metrics::Metrics;
    use crate::text::TextFiles;

    fn choice(index: usize, counts_prompt: bool) -> Choice {
        let text = Text::load(TextFiles {
            tokenizer_json: include_bytes!("../../models/tiny/tokenizer.json"),
            tokenizer_config: None,
            chat_template: None,
        });
        let decoder = text.expect("the tiny model's own file").decoder(DecoderOptions {
            mode: Mode::Raw,
            stop: Vec::new(),
            include_stop: false,
            skip_special: true,
        });
        Choice {
            index,
            stream: None,
            decoder,
            stop_ids: Vec::new(),
            own_stop_ids: Vec::new(),
            include_stop: false,
            one_call: false,
            max_tokens: 9,
            min_tokens: 0,
            generated: 0,
            reasoning_tokens: 0,
            counts_prompt,
            meter: RequestMeter::new(Metrics::new(&["tiny"]).model(0).clone(), Instant::now(), 100, None, 1),
            stopped: None,
            ended: false,
        }
    }

    #[test]
    fn the_scheduler_hears_what_the_request_said() {
        let app = App::new(crate::api::Options::new(vec!["tiny".into()]));
        let model = crate::api::ModelInfo {
            served_names: vec!["tiny".into()],
            root: "tiny".into(),
            created: 0,
            max_model_len: 64,
            vocab_size: 64,
            stop_ids: vec![],
            defaults: crate::api::SamplingDefaults::default(),
            facts: crate::api::Facts::default(),
        };
        let rules = crate::api::Rules { model: &model, options: &app.options.request };
        let body = json!({"priority": 7, "cache_salt": "mine", "speculation": 2, "timeout": 3});
        let fields = crate::api::fields::Fields::top(body.as_object().expect("an object"));
        let common = Common::read(&fields, rules, None, None).expect("valid");
        let input = Input {
            prompt: vec![1, 2, 3],
            borders: vec![2],
            mode: Mode::Raw,
            one_call: false,
            steering: None,
        };
        let place = Place { index: 0, group: Some(5), counts_prompt: true, arrived: Instant::now() };
        let plain = Request::new(input.prompt.clone(), common.sampling.clone(), 1);
        let request = scheduled(plain, &common, &input, &place);
        assert_eq!((request.priority, request.cache_salt.as_deref()), (7, Some("mine")));
        assert_eq!((request.borders, request.group, request.speculation.depth_max), (vec![2], Some(5), 2));
        assert_eq!(request.deadline, Some(place.arrived + std::time::Duration::from_secs(3)));
    }

    /// The usage of two prompts with two answers each, when the engine found so much of each.
    fn cached(found: [usize; 4]) -> usize {
        let mut usage = Usage::default();
        for (index, cached_tokens) in found.into_iter().enumerate() {
            let mut choice = choice(index, index % 2 == 0);
            let timings = Timings::default();
            let started = Event::Started { cached_tokens, prompt_logprobs: None, timings };
            let finished = Event::Finished { finish: Finish::Length, timings };
            for event in [started, Event::Token { id: 20, logprobs: None }, finished] {
                usage.add(choice.take(event).expect("no event is a failure").usage);
            }
        }
        assert_eq!(usage.completion_tokens, 4);
        usage.cached_tokens
    }

    #[test]
    fn what_was_cached_of_a_prompt_counts_once_however_many_answers_it_gets() {
        // The second answer of each pair finds what the first has just computed.
        assert_eq!(cached([0, 100, 0, 100]), 0);
        assert_eq!(cached([64, 100, 32, 100]), 96);
    }
}
