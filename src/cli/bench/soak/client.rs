//! One client: asks for one thing after the other until the time is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::mix::{Kind, Mix, fits};
use super::tally::{Ending, Fault, Tally};
use crate::cli::bench::agents::world;
use crate::cli::bench::answer::Answer;
use crate::cli::bench::client::{ClientError, Target};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// After a failure, so that a server that refuses all is not asked a million times.
const RECOVER: Duration = Duration::from_millis(100);

pub struct Client {
    target: Target,
    tally: Arc<Tally>,
    mix: Mix,
}

impl Client {
    pub fn new(target: Target, model: String, tally: Arc<Tally>, seed: u64) -> Self {
        Self { target, tally, mix: Mix::new(model, seed) }
    }

    /// What is under way at `end` is brought to its own end.
    pub async fn until(mut self, end: Instant) {
        while Instant::now() < end {
            let kind = self.mix.kind();
            if !self.ask(kind, end).await {
                tokio::time::sleep(RECOVER).await;
            }
        }
    }

    /// Whether all went as it should.
    async fn ask(&mut self, kind: Kind, end: Instant) -> bool {
        match kind {
            Kind::Chat => return self.converse(end).await,
            Kind::Tools => return self.call_tools().await,
            _ => {}
        }
        let result = match kind {
            Kind::Completion => self.complete().await,
            Kind::Several => self.several().await,
            Kind::Dropped => self.leave().await,
            Kind::Slow => self.read_slowly().await,
            Kind::Schema => self.schema().await,
            Kind::Budget => self.think_briefly().await,
            Kind::Timeout => self.hurry().await,
            Kind::Refused => self.be_refused().await,
            Kind::Chat | Kind::Tools => unreachable!("answered above"),
        };
        self.count(kind, result)
    }

    fn count(&self, kind: Kind, result: Result<Ending, Fault>) -> bool {
        self.tally.add(kind.name(), &result);
        result.is_ok()
    }

    /// Each turn is a request.
    async fn converse(&mut self, end: Instant) -> bool {
        let mut messages = self.mix.opening();
        for _ in 0..2 + self.mix.chance.below(3) {
            let body = self.mix.chat(&messages, true);
            let Some(answer) = self.turn(Kind::Chat, &body).await else { return false };
            messages.extend([answer.message(), self.mix.question()]);
            if Instant::now() >= end {
                break;
            }
        }
        true
    }

    /// A request that calls, and one with what the calls brought.
    async fn call_tools(&mut self) -> bool {
        let mut messages = self.mix.opening();
        let mut body = self.mix.chat(&messages, true);
        body["tools"] = world::tools();
        body["max_tokens"] = json!(120);
        if self.mix.chance.below(2) == 0 {
            body["tool_choice"] = json!("required");
        }
        let Some(answer) = self.turn(Kind::Tools, &body).await else { return false };
        messages.push(answer.message());
        for call in &answer.calls {
            let arguments = serde_json::from_str(&call.arguments).unwrap_or_default();
            let result = self.mix.world.tool_result(&call.name, &arguments);
            messages.push(json!({"role": "tool", "tool_call_id": call.id, "content": result}));
        }
        if answer.calls.is_empty() {
            messages.push(self.mix.question());
        }
        let mut body = self.mix.chat(&messages, true);
        body["tools"] = world::tools();
        self.turn(Kind::Tools, &body).await.is_some()
    }

    async fn turn(&self, kind: Kind, body: &Value) -> Option<Answer> {
        let mut answer = Answer::default();
        let result = self.target.stream(CHAT, body, |event, now| answer.push(&event, now)).await;
        self.count(kind, result.map(|()| Ending::Done).map_err(Fault::from)).then_some(answer)
    }

    async fn complete(&mut self) -> Result<Ending, Fault> {
        let stream = self.mix.chance.below(2) == 0;
        let body = self.mix.completion(stream);
        if stream {
            self.target.stream(COMPLETIONS, &body, |_, _| {}).await?;
        } else {
            self.target.post(COMPLETIONS, &body).await?;
        }
        Ok(Ending::Done)
    }

    async fn several(&mut self) -> Result<Ending, Fault> {
        let messages = self.mix.opening();
        let (mut body, expected) = (self.mix.chat(&messages, false), 2 + self.mix.chance.below(3));
        body["n"] = json!(expected);
        body["temperature"] = json!(0.8);
        let answer = self.target.post(CHAT, &body).await?;
        let got = answer["choices"].as_array().map_or(0, Vec::len);
        if got == expected { Ok(Ending::Done) } else { Err(Fault::Choices { expected, got }) }
    }

    /// Leaves after some events, or after a moment in which the prompt may not even be read.
    async fn leave(&mut self) -> Result<Ending, Fault> {
        let messages = self.mix.opening();
        let mut body = self.mix.chat(&messages, true);
        body["max_tokens"] = json!(400);
        body["ignore_eos"] = json!(true);
        let (after, patience) = if self.mix.chance.below(2) == 0 {
            (1 + self.mix.chance.below(40), Duration::MAX)
        } else {
            (usize::MAX, Duration::from_millis(1 + self.mix.chance.below(200) as u64))
        };
        let (enough, mut seen) = (Notify::new(), 0);
        let count = |_: Value, _: Instant| {
            seen += 1;
            if seen == after {
                enough.notify_one();
            }
        };
        tokio::select! {
            ended = self.target.stream(CHAT, &body, count) => ended?,
            () = enough.notified() => return Ok(Ending::Cancelled),
            () = tokio::time::sleep(patience) => return Ok(Ending::Cancelled),
        }
        Ok(Ending::Done)
    }

    async fn read_slowly(&mut self) -> Result<Ending, Fault> {
        let messages = self.mix.opening();
        let body = self.mix.chat(&messages, true);
        let pause = Duration::from_millis(5 + self.mix.chance.below(60) as u64);
        self.target.stream_slowly(CHAT, &body, pause, |_, _| {}).await?;
        Ok(Ending::Done)
    }

    async fn schema(&mut self) -> Result<Ending, Fault> {
        let body = self.mix.schema();
        let answer = self.target.post(CHAT, &body).await?;
        let content = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
        if fits(content) { Ok(Ending::Done) } else { Err(Fault::Form(content.to_owned())) }
    }

    async fn think_briefly(&mut self) -> Result<Ending, Fault> {
        let messages = self.mix.opening();
        let mut body = self.mix.chat(&messages, true);
        body["thinking_token_budget"] = json!(self.mix.chance.below(12));
        body["chat_template_kwargs"] = json!({"enable_thinking": true});
        self.target.stream(CHAT, &body, |_, _| {}).await?;
        Ok(Ending::Done)
    }

    async fn hurry(&mut self) -> Result<Ending, Fault> {
        let (messages, stream) = (self.mix.opening(), self.mix.chance.below(2) == 0);
        let mut body = self.mix.chat(&messages, stream);
        body["timeout"] = json!(0.005 * (1 + self.mix.chance.below(60)) as f64);
        body["max_tokens"] = json!(600);
        body["ignore_eos"] = json!(true);
        let result = if stream {
            self.target.stream(CHAT, &body, |_, _| {}).await
        } else {
            self.target.post(CHAT, &body).await.map(drop)
        };
        match result {
            Ok(()) => Ok(Ending::Done),
            Err(ClientError::Status { status: 504, .. }) => Ok(Ending::TimedOut),
            Err(ClientError::Stream(error)) if error.contains("TimeoutError") => Ok(Ending::TimedOut),
            Err(error) => Err(error.into()),
        }
    }

    async fn be_refused(&mut self) -> Result<Ending, Fault> {
        let body = self.mix.refused();
        match self.target.post(CHAT, &body).await {
            Ok(_) => Err(Fault::Accepted(body.to_string())),
            Err(ClientError::Status { status: 400, .. }) => Ok(Ending::Refused),
            Err(error) => Err(error.into()),
        }
    }
}
