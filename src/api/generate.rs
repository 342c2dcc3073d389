//! From validated requests to a stream of updates: the one path that every route and both ways of answering
//! (streamed, collected) take.
//!
//! A request of `p` prompts and `n` answers each is `p * n` choices; every choice is a submission of its own,
//! and their updates interleave as they come. Dropping the [`Generation`] cancels all of them.

use super::error::ApiError;
use super::metrics::{Ending, RequestMeter};
use super::state::{App, Resident};
use super::types::Common;
use crate::engine::{Event, Failure, Finish, Request, RequestStream, SubmitError, TokenLogprobs};
use crate::sample::Steering;
use crate::text::{Decoder, DecoderOptions, Delta, Mode};
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use serde_json::{Value, json};
use std::time::Instant;

/// What one choice is made from.
pub struct Input {
    /// Fits the context; see [`fit`].
    pub prompt: Vec<u32>,
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

/// Tokens spent, over all choices so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Each prompt once, however many answers it gets.
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    pub reasoning_tokens: usize,
}

impl Usage {
    pub fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        })
    }
}

/// All choices of one HTTP request, under way.
pub struct Generation {
    choices: SelectAll<BoxStream<'static, Result<Counted, ApiError>>>,
    usage: Usage,
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
        resident: &Resident,
        common: &Common,
        inputs: Vec<Input>,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let base_seed = common.seed.unwrap_or_else(|| app.ids.seed());
        let mut choices = SelectAll::new();
        let mut usage = Usage::default();
        for input in inputs {
            usage.prompt_tokens += input.prompt.len();
            for answer in 0..common.n {
                let index = choices.len();
                let mut sampling = common.sampling.clone();
                sampling.seed = base_seed.wrapping_add(index as u64);
                let choice =
                    Choice::submit(app, resident, common, &input, index, answer == 0, sampling, arrived)?;
                choices.push(choice.into_stream().boxed());
            }
        }
        Ok(Self { choices, usage, failed: false })
    }

    /// The next update of any choice; `None` when all have ended. An error ends the whole request.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        if self.failed {
            return None;
        }
        match self.choices.next().await? {
            Ok(Counted { update, usage }) => {
                self.usage.cached_tokens += usage.cached_tokens;
                self.usage.completion_tokens += usage.completion_tokens;
                self.usage.reasoning_tokens += usage.reasoning_tokens;
                Some(Ok(update))
            }
            Err(error) => {
                self.failed = true;
                self.choices.clear();
                Some(Err(error))
            }
        }
    }

    pub fn usage(&self) -> Usage {
        self.usage
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
    /// The first answer to a prompt counts what the cache held of it.
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
        index: usize,
        counts_prompt: bool,
        sampling: crate::sample::SamplingParams,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let room = resident.model.max_model_len.saturating_sub(input.prompt.len());
        let max_tokens = common.max_tokens.unwrap_or(room).min(room);
        let min_tokens = common.min_tokens.min(max_tokens);
        let own = &common.stop_ids;
        let checkpoint = if common.ignore_eos { &[][..] } else { &resident.model.stop_ids };
        let mut stop_ids: Vec<u32> = checkpoint.iter().chain(own).copied().collect();
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let meter =
            RequestMeter::new(app.metrics.clone(), arrived, input.prompt.len(), common.max_tokens, common.n);
        let request = Request {
            min_tokens,
            stop_ids: stop_ids.clone(),
            prompt_logprobs: common.prompt_logprobs,
            steering: input.steering.clone(),
            ..Request::new(input.prompt.clone(), sampling, max_tokens.max(1))
        };
        let stream = match resident.engine.submit(request) {
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
            return Some(Ok(self.end(finish)));
        }
        let stream = self.stream.as_mut()?;
        match stream.next().await? {
            Event::Started { cached_tokens, prompt_logprobs, timings } => {
                self.meter.started(cached_tokens, timings);
                if self.max_tokens == 0 {
                    self.stop(Finished::Length);
                }
                let cached_tokens = if self.counts_prompt { cached_tokens } else { 0 };
                let usage = Usage { cached_tokens, ..Usage::default() };
                Some(Ok(self.counted(UpdateEvent::Started { prompt_logprobs }, usage)))
            }
            Event::Token { id, logprobs } => Some(Ok(self.token(Token { id, logprobs }))),
            Event::Finished { finish, .. } => {
                let finish = match finish {
                    Finish::Length => Finished::Length,
                    Finish::Stop { id } if self.own_stop_ids.contains(&id) => Finished::StopId(id),
                    Finish::Stop { .. } => Finished::Eos,
                };
                Some(Ok(self.end(finish)))
            }
            Event::Failed(failure) => {
                self.ended = true;
                self.stream = None;
                self.meter.ended(Ending::Error);
                Some(Err(failed(failure)))
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

    fn end(&mut self, finish: Finished) -> Counted {
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
        self.counted(UpdateEvent::Ended { deltas, finish, reasoning_became_content }, Usage::default())
    }

    fn counted(&self, event: UpdateEvent, usage: Usage) -> Counted {
        Counted { update: Update { choice: self.index, event }, usage }
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
        Failure::TimedOut => ApiError::Internal(format!("The generation ended: {failure}.")),
    }
}
