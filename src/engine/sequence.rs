//! A request being served, as the engine sees it: its sampler, its reader, its times.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::handle::{Shared, Submission};
use super::{Event, Failure, Finish, Request, Timings, TokenLogprobs};
use crate::sample::{self, Sampler, Workspace};
use crate::schedule::Share;

pub(super) struct Sequence {
    shared: Arc<Shared>,
    events: UnboundedSender<Event>,
    sampler: Sampler,
    prompt_len: usize,
    max_tokens: usize,
    prompt_logprobs: Option<PromptLogprobs>,
    submitted: Instant,
    scheduled: Instant,
    /// When the first id was drawn; `Started` was sent then.
    first: Option<Instant>,
    /// When the last id so far was drawn.
    last: Instant,
}

/// What is wanted about the prompt, and found so far.
struct PromptLogprobs {
    count: usize,
    entries: Vec<Option<TokenLogprobs>>,
}

/// What a step meant for one sequence.
pub(super) enum Digest {
    /// A part of the prompt was read.
    Read,
    Drew(u32),
    Ended(Finish),
}

impl Sequence {
    pub fn new(
        submission: Submission,
        prompt: &[u32],
        vocab: usize,
        now: Instant,
        shared: Arc<Shared>,
    ) -> Self {
        let Submission { request, events, submitted, .. } = submission;
        let Request { sampling, steering, max_tokens, min_tokens, stop_ids, prompt_logprobs, .. } = request;
        let prompt_logprobs = prompt_logprobs
            .map(|count| PromptLogprobs { count: count as usize, entries: Vec::with_capacity(prompt.len()) });
        Self {
            shared,
            events,
            sampler: Sampler::new(sampling, stop_ids, min_tokens, prompt, max_tokens, vocab)
                .steered(steering),
            prompt_len: prompt.len(),
            max_tokens,
            prompt_logprobs,
            submitted,
            scheduled: now,
            first: None,
            last: now,
        }
    }

    pub fn events(&self) -> &UnboundedSender<Event> {
        &self.events
    }

    /// Before a step that draws for it: `drafts` are cut to what its steering allows, masks are on their way.
    pub fn prepare(&mut self, drafts: &mut Vec<u32>) {
        self.sampler.prepare(drafts);
    }

    /// Takes in the logits of its share, draws, and tells the reader. `tokens` are all its tokens before the
    /// draw, `rows` `[share.rows, V]`. A send to a reader that has left fails; its cancel is on the way.
    pub fn digest(
        &mut self,
        share: &Share,
        tokens: &[u32],
        rows: &[f32],
        workspace: &mut Workspace,
        now: Instant,
    ) -> Result<Digest, Failure> {
        self.read_prompt(share, tokens, rows, workspace)?;
        if !share.samples {
            return Ok(Digest::Read);
        }
        let vocab = rows.len() / share.rows.max(1);
        let logits = &rows[rows.len() - vocab..];
        let id = self.sampler.sample(workspace, logits, tokens.len() as u64)?;
        let logprobs = match self.sampler.logprobs() {
            None => None,
            Some(count) => Some(sample::logprobs(workspace, logits, id, count)?),
        };
        self.sampler.accept(id);
        let stats = &self.shared.stats;
        self.last = now;
        if self.first.is_none() {
            self.first = Some(now);
            stats.prompt_tokens.fetch_add(self.prompt_len as u64, Relaxed);
            let prompt_logprobs = self.prompt_logprobs.take().map(|found| found.entries);
            let timings = self.timings();
            let _ = self.events.send(Event::Started { cached_tokens: 0, prompt_logprobs, timings });
        }
        stats.generation_tokens.fetch_add(1, Relaxed);
        let _ = self.events.send(Event::Token { id, logprobs });
        Ok(if self.sampler.stops(id) || self.sampler.is_complete() {
            Digest::Ended(Finish::Stop { id })
        } else if self.sampler.generated() == self.max_tokens {
            Digest::Ended(Finish::Length)
        } else {
            Digest::Drew(id)
        })
    }

    /// The last event.
    pub fn end(self, end: Result<Finish, Failure>) {
        let event = match end {
            Ok(finish) => Event::Finished { finish, timings: self.timings() },
            Err(failure) => Event::Failed(failure),
        };
        let _ = self.events.send(event);
    }

    /// Each row of the prompt judges the token after it; the last one judges the first id drawn, not the prompt.
    fn read_prompt(
        &mut self,
        share: &Share,
        tokens: &[u32],
        rows: &[f32],
        workspace: &mut Workspace,
    ) -> Result<(), Failure> {
        let Some(found) = &mut self.prompt_logprobs else { return Ok(()) };
        if share.past == 0 {
            // From the start, or from the start once more.
            found.entries.clear();
            found.entries.push(None);
        }
        if share.rows == 0 {
            return Ok(());
        }
        let first = share.past + share.count - share.rows;
        for (index, logits) in rows.chunks_exact(rows.len() / share.rows).enumerate() {
            let next = first + index + 1;
            if next < self.prompt_len {
                let entry = sample::logprobs(workspace, logits, tokens[next], found.count)?;
                found.entries.push(Some(entry));
            }
        }
        Ok(())
    }

    fn timings(&self) -> Timings {
        let first = self.first.unwrap_or(self.last);
        Timings {
            queue: self.scheduled.saturating_duration_since(self.submitted),
            prefill: first.saturating_duration_since(self.scheduled),
            decode: self.last.saturating_duration_since(first),
        }
    }
}

impl From<sample::Failure> for Failure {
    fn from(failure: sample::Failure) -> Self {
        match failure {
            sample::Failure::NotFinite => Self::NotFinite,
            sample::Failure::NothingAllowed => Self::NothingAllowed,
            sample::Failure::Steering => Self::Steering,
        }
    }
}
