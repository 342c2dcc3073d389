//! A chat under way: one form that every dialect translates into and one stream of pieces that it writes out.
//!
//! ```text
//! body ─open→ Conversation ─┬─ Reader: Update → Chunk ─→ the dialect's own events
//!                           └─ collect: the same chunks → messages ─→ the dialect's plain answer
//! ```

use super::body::JsonBody;
use super::completions::encode;
use super::envelope::TokenView;
use super::error::ApiError;
use super::generate::{Finished, Generation, Input, Token, Update, UpdateEvent, fit};
use super::keeper::Lease;
use super::state::{App, Resident};
use super::steer;
use super::types::{ChatRequest, Common, CompletionRequest, Forced};
use super::usage::Usage;
use crate::text::{Chat, Delta, Mode};
use serde_json::{Map, Value};
use std::sync::Arc;

/// A chat that the engine has taken.
pub struct Conversation {
    pub resident: Lease,
    /// What was asked for, but for the chat and its tools, which are used up.
    pub common: Common,
    pub include_reasoning: bool,
    pub generation: Generation,
    pub reader: Reader,
}

impl Conversation {
    /// Reads a body in the form of `/v1/chat/completions` and starts its answers. Errors: 400 for what cannot be
    /// read or does not fit, 404 for another model, 503 while there is no engine to take it.
    pub async fn open(app: &Arc<App>, body: &JsonBody) -> Result<Self, ApiError> {
        Self::open_after(app, body, Vec::new()).await
    }

    /// The same behind `before`: ids of turns that the client no longer has as messages.
    pub async fn open_after(app: &Arc<App>, body: &JsonBody, before: Vec<u32>) -> Result<Self, ApiError> {
        let lease = app.ready(&body.map).await?;
        let resident = &*lease;
        let mut request = ChatRequest::read(&body.map, app.rules(resident))?;
        let chat = std::mem::take(&mut request.chat);
        let mut prompt = earlier(before, resident.model.vocab_size)?;
        prompt.extend(render(resident, chat).await?);
        let prompt = fit(prompt, &request.common, resident.model.max_model_len)?;
        let starts_in_reasoning = resident.text.starts_in_reasoning(&prompt);
        let steering = steer::chat(app, resident, &request, &prompt, starts_in_reasoning).await?;
        let ChatRequest { common, include_reasoning, .. } = request;
        let mode = Mode::Chat {
            starts_in_reasoning,
            thinking: request.thinking,
            force_nonempty_content: request.force_nonempty_content,
            tools: request.tools,
        };
        let borders = resident.text.borders(&prompt);
        let input = Input { prompt: prompt.clone(), borders, mode, one_call: request.one_call, steering };
        let generation = Generation::start(app, &lease, &common, vec![input], body.arrived)?;
        let named = matches!(request.forced, Some(Forced::Named(_)));
        let echo = request.echo.filter(|text| !text.is_empty());
        let reader = Reader::new(app, resident, &common, prompt);
        let reader = Reader { include_reasoning, named, echo, ..reader };
        Ok(Self { resident: lease, common, include_reasoning, generation, reader })
    }

    /// Reads a body in the form of `/v1/completions` and starts to continue the first of its prompts: what comes is
    /// content, nothing else. Errors: as [`Self::open`].
    pub async fn open_raw(app: &Arc<App>, body: &JsonBody) -> Result<Self, ApiError> {
        let lease = app.ready(&body.map).await?;
        let resident = &*lease;
        let request = CompletionRequest::read(&body.map, app.rules(resident))?;
        let common = request.common;
        let prompts =
            encode(resident, request.prompts, request.add_special_tokens, common.skip_special).await?;
        let prompt = prompts.into_iter().next().map(|(ids, _)| ids).unwrap_or_default();
        let prompt = fit(prompt, &common, resident.model.max_model_len)?;
        let steering = steer::completion(app, resident, request.constraint.as_ref()).await?;
        // Nobody knows where raw text has its turns.
        let borders = Vec::new();
        let input = Input { prompt: prompt.clone(), borders, mode: Mode::Raw, one_call: false, steering };
        let generation = Generation::start(app, &lease, &common, vec![input], body.arrived)?;
        let reader = Reader::new(app, resident, &common, prompt);
        Ok(Self { resident: lease, common, include_reasoning: true, generation, reader })
    }

    /// Hands every chunk of the stream to `take`. Errors: what ended it early.
    pub async fn each(&mut self, mut take: impl FnMut(Chunk)) -> Result<Usage, ApiError> {
        while let Some(update) = self.generation.next().await {
            self.reader.chunks(update?).into_iter().for_each(&mut take);
        }
        Ok(self.generation.usage())
    }

    /// The stream, collected. Errors: what ended it early.
    pub async fn collect(mut self) -> Result<Collected, ApiError> {
        let mut messages: Vec<Message> = (0..self.common.n).map(|_| Message::default()).collect();
        let mut prompt_logprobs = Value::Null;
        let take = |chunk: Chunk| {
            if let Piece::Role { prompt_logprobs: Some(scores) } = &chunk.piece {
                prompt_logprobs = scores.clone();
            }
            if let Some(message) = messages.get_mut(chunk.choice) {
                message.push(chunk);
            }
        };
        let usage = self.each(take).await?;
        Ok(Collected { messages, prompt: self.reader.prompt, prompt_logprobs, usage })
    }
}

/// `ids` of earlier turns, as a client gave them. Errors: one is outside the vocabulary.
fn earlier(ids: Vec<u32>, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        None => Ok(ids),
        Some(id) => Err(ApiError::malformed(format!(
            "The token id {id} of an earlier turn is outside the vocabulary of {vocab_size}."
        ))),
    }
}

/// A piece of an answer as a client sees it.
pub struct Chunk {
    pub choice: usize,
    pub piece: Piece,
    /// Entries of `logprobs.content` for the ids since the last chunk.
    pub logprobs: Vec<Value>,
    pub ids: Vec<u32>,
}

pub enum Piece {
    Role {
        prompt_logprobs: Option<Value>,
    },
    Reasoning(String),
    Content(String),
    CallStart {
        index: usize,
        id: String,
        name: String,
    },
    CallArguments {
        index: usize,
        json: String,
    },
    /// Not on the wire: the call before it is whole.
    CallEnd,
    End(End),
}

/// How a choice ended.
pub struct End {
    pub finish_reason: &'static str,
    pub stop_reason: Value,
    pub reasoning_became_content: bool,
    /// Some of the answer was thought, shown or not.
    pub reasoned: bool,
}

/// Updates become chunks; remembers what chunks must not forget.
pub struct Reader {
    app: Arc<App>,
    tokens: TokenView,
    pub return_ids: bool,
    include_reasoning: bool,
    /// The client has chosen what is called: that it is called is then no news, and the reason is `stop`.
    named: bool,
    /// The beginning of each answer's content.
    echo: Option<String>,
    choices: Vec<ChoiceState>,
    pub prompt: Vec<u32>,
}

#[derive(Default)]
struct ChoiceState {
    /// Of ids whose text is still held back.
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    reasoned: bool,
    /// A whole call was seen.
    called: bool,
}

impl Reader {
    fn new(app: &Arc<App>, resident: &Resident, common: &Common, prompt: Vec<u32>) -> Self {
        Self {
            app: app.clone(),
            tokens: TokenView::new(resident, common),
            return_ids: common.return_ids,
            include_reasoning: true,
            named: false,
            echo: None,
            choices: (0..common.n).map(|_| ChoiceState::default()).collect(),
            prompt,
        }
    }

    pub fn chunks(&mut self, update: Update) -> Vec<Chunk> {
        let choice = update.choice;
        let pieces = match update.event {
            UpdateEvent::Started { prompt_logprobs } => {
                let scores = prompt_logprobs.map(|scores| self.tokens.prompt_scores(&self.prompt, &scores));
                let echo = self.echo.clone().map(Piece::Content);
                [Piece::Role { prompt_logprobs: scores }].into_iter().chain(echo).collect()
            }
            UpdateEvent::Token { token, deltas } => {
                self.note(choice, token);
                self.pieces(choice, deltas)
            }
            UpdateEvent::Ended { deltas, finish, reasoning_became_content } => {
                let mut pieces = self.pieces(choice, deltas);
                let Some(state) = self.choices.get(choice) else { return Vec::new() };
                pieces.push(Piece::End(End {
                    finish_reason: match finish {
                        Finished::Length => "length",
                        _ if state.called && !self.named => "tool_calls",
                        _ => finish.reason(),
                    },
                    stop_reason: finish.stop_reason(),
                    reasoning_became_content,
                    reasoned: state.reasoned,
                }));
                pieces
            }
        };
        pieces.into_iter().map(|piece| self.chunk(choice, piece)).collect()
    }

    fn note(&mut self, choice: usize, token: Token) {
        let Some(state) = self.choices.get_mut(choice) else { return };
        if let Some(logprobs) = &token.logprobs {
            state.logprobs.push(self.tokens.chat_entry(token.id, logprobs));
        }
        if self.return_ids {
            state.ids.push(token.id);
        }
    }

    fn pieces(&mut self, choice: usize, deltas: Vec<Delta>) -> Vec<Piece> {
        let Some(state) = self.choices.get_mut(choice) else { return Vec::new() };
        let mut pieces = Vec::with_capacity(deltas.len());
        for delta in deltas {
            pieces.push(match delta {
                Delta::Reasoning(text) => {
                    state.reasoned = true;
                    if !self.include_reasoning {
                        continue;
                    }
                    Piece::Reasoning(text)
                }
                Delta::Content(text) => Piece::Content(text),
                Delta::CallStart { index, name } => Piece::CallStart { index, id: self.app.ids.call(), name },
                Delta::CallArguments { index, json } => Piece::CallArguments { index, json },
                Delta::CallEnd { .. } => {
                    state.called = true;
                    Piece::CallEnd
                }
            });
        }
        pieces
    }

    /// The first chunk that goes out takes along all that waited.
    fn chunk(&mut self, choice: usize, piece: Piece) -> Chunk {
        let (mut logprobs, mut ids) = (Vec::new(), Vec::new());
        if let Some(state) = self.choices.get_mut(choice).filter(|_| !matches!(piece, Piece::CallEnd)) {
            logprobs = std::mem::take(&mut state.logprobs);
            ids = std::mem::take(&mut state.ids);
        }
        Chunk { choice, piece, logprobs, ids }
    }
}

/// All answers of a request.
pub struct Collected {
    pub messages: Vec<Message>,
    pub prompt: Vec<u32>,
    pub prompt_logprobs: Value,
    pub usage: Usage,
}

/// One answer, whole.
#[derive(Default)]
pub struct Message {
    pub reasoning: Option<String>,
    pub content: Option<String>,
    pub calls: Vec<Call>,
    /// Begun and not ended: left out if it never is.
    open: Option<Call>,
    pub logprobs: Vec<Value>,
    pub ids: Vec<u32>,
    pub end: Option<End>,
}

/// A call that was closed; `arguments` are a JSON object.
pub struct Call {
    pub id: String,
    pub name: String,
    pub arguments: String,
}

impl Message {
    fn push(&mut self, chunk: Chunk) {
        self.logprobs.extend(chunk.logprobs);
        self.ids.extend(chunk.ids);
        match chunk.piece {
            Piece::Role { .. } => {}
            Piece::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            Piece::Content(text) => self.content.get_or_insert_default().push_str(&text),
            Piece::CallStart { id, name, .. } => {
                self.open = Some(Call { id, name, arguments: String::new() })
            }
            Piece::CallArguments { json, .. } => {
                if let Some(call) = &mut self.open {
                    call.arguments.push_str(&json);
                }
            }
            Piece::CallEnd => self.calls.extend(self.open.take()),
            Piece::End(end) => self.end = Some(end),
        }
    }
}

/// The prompt that a body in the form of `/v1/chat/completions` makes, whether it fits or not.
pub struct Extent {
    /// In tokens.
    pub len: usize,
    /// Tokens of prompt and answer together.
    pub context_len: usize,
}

impl Extent {
    /// Errors: as [`Conversation::open`].
    pub async fn of(app: &App, body: &Map<String, Value>) -> Result<Self, ApiError> {
        let resident = app.described(body).await?;
        let request = ChatRequest::read(body, app.rules(&resident))?;
        let len = render(&resident, request.chat).await?.len();
        Ok(Self { len, context_len: resident.model.max_model_len })
    }
}

/// Chat to ids. Errors: the template refuses the conversation, or it is no template for it.
pub async fn render(resident: &Resident, chat: Chat) -> Result<Vec<u32>, ApiError> {
    let text = resident.text.clone();
    // A long history takes milliseconds, in which other streams would stand still.
    let rendered = tokio::task::spawn_blocking(move || text.prompt(&chat)).await;
    rendered
        .map_err(|error| ApiError::Internal(format!("The template's task failed: {error}")))?
        .map_err(|error| ApiError::bad("messages", format!("The messages cannot be rendered: {error}.")))
}
