//! What a request wants of its ids becomes rules for the sampler: grammars, compiled once and kept, and the budget of
//! a thought.

use super::error::ApiError;
use super::state::{App, Resident};
use super::types::{ChatRequest, Constraint, Forced};
use crate::sample::Steering;
use crate::sample::steer::{
    Budget, Compiler, Grammar, GrammarError, IdSet, Source, Spaces, Start, Thought, Word,
};
use crate::text::{CallForm, Detail, Text, Tool};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Compiled grammars kept for each model: agents come back with the same tools at every turn.
const GRAMMARS_MAX: usize = 256;
/// Bytes of their sources; a compiled grammar is some tens of times its source.
const SOURCES_BYTES_MAX: usize = 4 << 20;

/// The rules for one prompt of a chat; `None` if there are none. Errors: 400 that names what cannot be held to.
pub async fn chat(
    app: &App,
    resident: &Resident,
    request: &ChatRequest,
    prompt: &[u32],
    starts_in_reasoning: bool,
) -> Result<Option<Steering>, ApiError> {
    let text = &resident.text;
    let grammars = app.grammars.of(text, &resident.model.stop_ids);
    let thought = thought(&grammars, request, prompt, starts_in_reasoning)?;
    let tools = request.tools.as_deref();
    let call = tools.and_then(|_| text.call_start());
    let grammar = match (tools, &request.forced, &request.constraint) {
        (Some(tools), Some(forced), _) => {
            let many = *forced == Forced::Any && !request.one_call;
            let form = CallForm::Answer { many };
            let tools = match forced {
                Forced::Any => tools.to_vec(),
                Forced::Named(name) => tools.iter().filter(|tool| tool.name == *name).cloned().collect(),
            };
            let made = grammars.calls(tools, form, None).await;
            Some((made.map_err(|error| error.at("tools"))?, Start::Answer))
        }
        (Some(tools), None, Some(constraint)) => {
            noted(&grammars, constraint);
            let form = CallForm::OrAnswer { many: !request.one_call };
            let answer = Some(constraint.source.clone());
            let made = grammars.calls(tools.to_vec(), form, answer).await;
            Some((made.map_err(|error| error.at(&constraint.param))?, Start::Answer))
        }
        (Some(tools), None, None) if call.is_some() => {
            match grammars.calls(tools.to_vec(), CallForm::One, None).await {
                Ok(grammar) => Some((grammar, Start::Call)),
                // Nobody asked for strictness; a call that is not held to its schema is what there was before.
                Err(error) => {
                    tracing::warn!(%error, "calls are not held to the tools' schemas");
                    None
                }
            }
        }
        (None, _, Some(constraint)) => Some((whole(&grammars, constraint).await?, Start::Answer)),
        _ => None,
    };
    if thought.is_none()
        && starts_in_reasoning
        && grammar.as_ref().is_some_and(|(_, start)| *start == Start::Answer)
    {
        return Err(ApiError::malformed(
            "This model's vocabulary has no id that ends a thought, so a grammar cannot begin after it; switch \
             thinking off.",
        ));
    }
    let call = call.filter(|_| grammar.is_some() || thought.is_some());
    let budgeted = thought.as_ref().is_some_and(|thought| thought.budget.is_some());
    Ok((grammar.is_some() || budgeted).then_some(Steering { thought, call, grammar }))
}

/// The rules of a completion, which has no thought.
pub async fn completion(
    app: &App,
    resident: &Resident,
    constraint: Option<&Constraint>,
) -> Result<Option<Steering>, ApiError> {
    let Some(constraint) = constraint else { return Ok(None) };
    let grammars = app.grammars.of(&resident.text, &resident.model.stop_ids);
    let grammar = Some((whole(&grammars, constraint).await?, Start::Answer));
    Ok(Some(Steering { grammar, ..Steering::default() }))
}

async fn whole(grammars: &Arc<ModelGrammars>, constraint: &Constraint) -> Result<Grammar, ApiError> {
    noted(grammars, constraint);
    let made = grammars.compiled(constraint.source.clone()).await;
    made.map_err(|error| Refusal::Grammar(error).at(&constraint.param))
}

fn noted(grammars: &ModelGrammars, constraint: &Constraint) {
    if constraint.deprecated {
        let count = grammars.deprecated.fetch_add(1, Ordering::Relaxed) + 1;
        let param = &constraint.param;
        tracing::warn!(param, count, "a deprecated field; structured_outputs is its name now");
    }
}

fn thought(
    grammars: &ModelGrammars,
    request: &ChatRequest,
    prompt: &[u32],
    starts_in_reasoning: bool,
) -> Result<Option<Thought>, ApiError> {
    if !starts_in_reasoning {
        return Ok(None);
    }
    let low = request.low_effort && !grammars.text.template_knows("low_effort");
    let len = request.thinking_budget.or(low.then_some(LOW_EFFORT_TOKENS));
    let Some(end) = grammars.text.thought_end() else {
        return match request.thinking_budget {
            None => Ok(None),
            Some(_) => Err(ApiError::bad(
                "thinking_token_budget",
                "This model's vocabulary has no id that ends a thought.",
            )),
        };
    };
    let budget = match len {
        None => None,
        Some(len) => Some(grammars.budget(len, end, prompt)?),
    };
    Ok(Some(Thought { end, budget }))
}

/// What little effort means to a template that does not know the word.
const LOW_EFFORT_TOKENS: usize = 1024;

/// The grammars of every model that is served, each made when it is first asked for.
#[derive(Default)]
pub struct Grammars {
    /// By the address of the model's text, which the value keeps alive.
    models: Mutex<HashMap<usize, Arc<ModelGrammars>>>,
}

impl Grammars {
    fn of(&self, text: &Arc<Text>, stop_ids: &[u32]) -> Arc<ModelGrammars> {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let made = models.entry(Arc::as_ptr(text) as usize);
        let make = || Arc::new(ModelGrammars::new(Arc::clone(text), stop_ids.to_vec()));
        Arc::clone(made.or_insert_with(make))
    }

    /// Drops those of a model that is gone, and with them its text.
    pub fn forget(&self, text: &Arc<Text>) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.remove(&(Arc::as_ptr(text) as usize));
    }
}

/// Makes a model's compiler in the background, so that the first request that needs it does not wait a second.
pub fn warm(grammars: &Grammars, resident: &Resident) {
    let grammars = grammars.of(&resident.text, &resident.model.stop_ids);
    // A failure is told to whoever asks for a grammar.
    tokio::task::spawn_blocking(move || grammars.compiler().is_ok());
}

/// One model's compiler and what it has made.
struct ModelGrammars {
    text: Arc<Text>,
    eos: Vec<u32>,
    /// Made in about a second, so not before somebody needs it.
    compiler: OnceLock<Result<Compiler, GrammarError>>,
    closing: OnceLock<Result<Closing, String>>,
    kept: Mutex<Kept>,
    /// Requests that used a field vLLM has dropped.
    deprecated: AtomicU64,
}

/// The ids that end a thought at its budget.
struct Closing {
    close: Arc<[u32]>,
    close_line: Arc<[u32]>,
    line_ends: Arc<IdSet>,
}

/// Why calls cannot be held to their tools.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Text(#[from] crate::text::Error),
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

impl Refusal {
    fn at(self, param: &str) -> ApiError {
        match self {
            Self::Grammar(GrammarError::Busy) => ApiError::Internal(self.to_string()),
            Self::Text(_) => ApiError::bad("tools", format!("{self}.")),
            _ => ApiError::bad(param, format!("`{param}`: {self}.")),
        }
    }
}

impl ModelGrammars {
    fn new(text: Arc<Text>, eos: Vec<u32>) -> Self {
        Self {
            text,
            eos,
            compiler: OnceLock::new(),
            closing: OnceLock::new(),
            kept: Mutex::default(),
            deprecated: AtomicU64::new(0),
        }
    }

    /// The grammar of calls; to their types only if their schemas are more than a grammar can hold.
    async fn calls(
        self: &Arc<Self>,
        tools: Vec<Tool>,
        form: CallForm,
        answer: Option<Source>,
    ) -> Result<Grammar, Refusal> {
        let source = |detail| -> Result<Source, Refusal> {
            let made = self.text.call_grammar(&tools, form, detail)?;
            let part = |(name, schema)| (name, Source::Schema { schema, spaces: Spaces::default() });
            let mut parts: Vec<(String, Source)> = made.schemas.into_iter().map(part).collect();
            parts.extend(answer.clone().map(|answer| ("answer".to_owned(), answer)));
            Ok(Source::Parts { lark: made.lark, parts })
        };
        let first = match self.compiled(source(Detail::Full)?).await {
            Ok(grammar) => return Ok(grammar),
            Err(error) => error,
        };
        let grammar = self.compiled(source(Detail::Types)?).await.map_err(|_| first.clone())?;
        tracing::warn!(error = %first, "calls are held to the types of their parameters only");
        Ok(grammar)
    }

    /// A grammar that was made before, or is made now beside the other requests.
    async fn compiled(self: &Arc<Self>, source: Source) -> Result<Grammar, GrammarError> {
        let spelled = format!("{source:?}");
        let key: [u8; 32] = Sha256::digest(spelled.as_bytes()).into();
        if let Some(grammar) = self.lock().get(&key) {
            return Ok(grammar);
        }
        let this = Arc::clone(self);
        let made = tokio::task::spawn_blocking(move || this.compiler()?.compile(&source)).await;
        let grammar = made.unwrap_or_else(|error| Err(GrammarError::Invalid(error.to_string())))?;
        for warning in grammar.warnings() {
            tracing::warn!(warning, "a part of a schema is not held to");
        }
        self.lock().insert(key, grammar.clone(), spelled.len());
        Ok(grammar)
    }

    fn compiler(&self) -> Result<&Compiler, GrammarError> {
        let made = self.compiler.get_or_init(|| {
            let words = (0..self.text.vocab_size() as u32).map(|id| match self.text.token_bytes(id) {
                None => Word::Unused,
                Some(bytes) if self.text.is_added(id) || self.text.is_special(id) => {
                    Word::Control(String::from_utf8_lossy(bytes).into_owned())
                }
                Some(bytes) => Word::Text(bytes.to_vec()),
            });
            Compiler::new(words, &self.eos)
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn budget(&self, len: usize, end: u32, prompt: &[u32]) -> Result<Budget, ApiError> {
        let made = self.closing.get_or_init(|| {
            let mut close = self.text.line_break().map_err(|error| error.to_string())?;
            close.push(end);
            let ids = 0..self.text.vocab_size() as u32;
            let ends = |id: &u32| self.text.token_bytes(*id).is_some_and(|bytes| bytes.ends_with(b"\n"));
            let line_ends = Arc::new(ids.filter(ends).collect());
            Ok(Closing { close: close.into(), close_line: [end].into(), line_ends })
        });
        let closing = made.as_ref().map_err(|error| ApiError::Internal(error.clone()))?;
        Ok(Budget {
            len,
            close: closing.close.clone(),
            close_line: closing.close_line.clone(),
            line_ends: closing.line_ends.clone(),
            starts_line: prompt.last().is_some_and(|&id| closing.line_ends.contains(id)),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Grammars by the hash of their source; the one that was not asked for the longest goes first.
#[derive(Default)]
struct Kept {
    entries: HashMap<[u8; 32], Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    grammar: Grammar,
    bytes: usize,
    used: u64,
}

impl Kept {
    fn get(&mut self, key: &[u8; 32]) -> Option<Grammar> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(entry.grammar.clone())
    }

    fn insert(&mut self, key: [u8; 32], grammar: Grammar, bytes: usize) {
        self.clock += 1;
        let entry = Entry { grammar, bytes, used: self.clock };
        self.bytes += bytes;
        if let Some(before) = self.entries.insert(key, entry) {
            self.bytes -= before.bytes;
        }
        while self.entries.len() > GRAMMARS_MAX || self.bytes > SOURCES_BYTES_MAX && self.entries.len() > 1 {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            let Some(gone) = oldest.and_then(|key| self.entries.remove(&key)) else { break };
            self.bytes -= gone.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar() -> Grammar {
        let words = (0..=255u8).map(|byte| Word::Text(vec![byte]));
        Compiler::new(words, &[]).unwrap().compile(&Source::Choice(vec!["a".into()])).unwrap()
    }

    #[test]
    fn what_is_kept_is_bounded_in_count_and_bytes() {
        let (mut kept, grammar) = (Kept::default(), grammar());
        let key = |index: usize| std::array::from_fn(|at| (index >> (8 * at.min(7))) as u8);
        for index in 0..GRAMMARS_MAX + 50 {
            kept.insert(key(index), grammar.clone(), 10);
            assert!(kept.get(&key(0)).is_some(), "what is used stays");
        }
        assert_eq!((kept.entries.len(), kept.bytes), (GRAMMARS_MAX, GRAMMARS_MAX * 10));
        assert!(kept.get(&key(1)).is_none());
        kept.insert(key(7000), grammar.clone(), SOURCES_BYTES_MAX);
        assert_eq!((kept.entries.len(), kept.bytes), (1, SOURCES_BYTES_MAX));
        kept.insert(key(7000), grammar, 5);
        assert_eq!(kept.bytes, 5);
    }
}
