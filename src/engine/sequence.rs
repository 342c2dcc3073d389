//! A request being served, as the engine sees it: its sampler, its reader, its times.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::handle::{Shared, Submission};
use super::speculate::SequenceDrafter;
use super::stats::ACCEPTED_POSITIONS;
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
    /// What is drafted for it, and how that went.
    pub drafter: SequenceDrafter,
    drafted: usize,
    accepted: usize,
    deadline: Option<Instant>,
    submitted: Instant,
    scheduled: Instant,
    /// When the first id was drawn; `Started` was sent then.
    first: Option<Instant>,
    /// When the last id so far was drawn.
    last: Instant,
    /// Events of the step that is being sampled.
    unsent: Vec<Event>,
}

/// What is wanted about the prompt, and found so far.
struct PromptLogprobs {
    count: usize,
    entries: Vec<Option<TokenLogprobs>>,
}

/// What a step gave one sequence.
pub(super) struct View<'a> {
    pub share: &'a Share,
    /// All its tokens before the step's draws.
    pub tokens: &'a [u32],
    /// What its last rows are to confirm.
    pub drafts: &'a [u32],
    /// `[share.rows, V]`
    pub logits: &'a [f32],
}

/// What that meant.
pub(super) enum Digest {
    /// A part of the prompt was read.
    Read,
    Drew,
    Ended(Finish),
}

/// Events of a step that there is room for from the start: its tokens with the usual drafts, and the prompt's end.
const EVENTS: usize = 16;

impl Sequence {
    pub fn new(
        submission: Submission,
        prompt: &[u32],
        vocab: usize,
        now: Instant,
        shared: Arc<Shared>,
    ) -> Self {
        let Submission { request, events, submitted, .. } = submission;
        let Request {
            sampling, steering, max_tokens, min_tokens, stop_ids, prompt_logprobs, deadline, ..
        } = request;
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
            drafter: SequenceDrafter::new(request.speculation),
            drafted: 0,
            accepted: 0,
            deadline,
            submitted,
            scheduled: now,
            first: None,
            last: now,
            unsent: Vec::with_capacity(EVENTS),
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn events(&self) -> &UnboundedSender<Event> {
        &self.events
    }

    /// Rules beyond its sampling parameters say which ids may come.
    pub fn is_steered(&self) -> bool {
        self.sampler.is_steered()
    }

    /// Before a step that draws for it: `drafts` are cut to what its steering allows, masks are on their way.
    pub fn prepare(&mut self, drafts: &mut Vec<u32>) {
        self.sampler.prepare(drafts);
    }

    /// Takes in the logits of its share, draws until a draft is not what it draws, adds what it drew to `sampled`, and
    /// tells the reader.
    ///
    /// Each row is drawn from as if there were no drafts: the id depends on the seed, the position and the logits
    /// alone, and these are the same however they came about. So drafts change nothing but the speed.
    pub fn digest(
        &mut self,
        view: View<'_>,
        workspace: &mut Workspace,
        now: Instant,
        sampled: &mut Vec<u32>,
    ) -> Result<Digest, Failure> {
        self.read_prompt(&view, workspace)?;
        let View { share, tokens, drafts, logits } = view;
        if !share.samples {
            return Ok(Digest::Read);
        }
        let vocab = logits.len() / share.rows.max(1);
        let rows = logits.chunks_exact(vocab.max(1)).skip(share.rows - 1 - drafts.len());
        let proposals = drafts.iter().map(|&draft| Some(draft)).chain([None]);
        self.last = now;
        let mut drawn = 0;
        let mut digest = Digest::Drew;
        for (logits, proposal) in rows.zip(proposals) {
            let (id, logprobs) = self.draw(logits, (tokens.len() + drawn) as u64, workspace)?;
            self.begin(share);
            self.unsent.push(Event::Token { id, logprobs });
            sampled.push(id);
            drawn += 1;
            if self.sampler.stops(id) || self.sampler.is_complete() {
                digest = Digest::Ended(Finish::Stop { id });
                break;
            }
            if self.sampler.generated() == self.max_tokens {
                digest = Digest::Ended(Finish::Length);
                break;
            }
            if proposal != Some(id) {
                break;
            }
        }
        self.shared.stats.generation_tokens.fetch_add(drawn as u64, Relaxed);
        self.drafter.note(drawn, drafts.len());
        if !drafts.is_empty() {
            self.count_drafts(drafts.len(), drawn - 1);
        }
        self.tell();
        Ok(digest)
    }

    /// Says once that the prompt is read.
    fn begin(&mut self, share: &Share) {
        if self.first.is_some() {
            return;
        }
        self.first = Some(self.last);
        self.shared.stats.prompt_tokens.fetch_add(self.prompt_len as u64, Relaxed);
        let prompt_logprobs = self.prompt_logprobs.take().map(|found| found.entries);
        let (cached_tokens, timings) = (share.cached, self.timings());
        self.unsent.push(Event::Started { cached_tokens, prompt_logprobs, timings });
    }

    fn draw(
        &mut self,
        logits: &[f32],
        position: u64,
        workspace: &mut Workspace,
    ) -> Result<(u32, Option<TokenLogprobs>), Failure> {
        let id = self.sampler.sample(workspace, logits, position)?;
        let logprobs = match self.sampler.logprobs() {
            None => None,
            Some(count) => Some(sample::logprobs(workspace, logits, id, count)?),
        };
        self.sampler.accept(id);
        Ok((id, logprobs))
    }

    fn count_drafts(&mut self, drafted: usize, accepted: usize) {
        self.drafted += drafted;
        self.accepted += accepted;
        let stats = &self.shared.stats;
        stats.drafts.fetch_add(1, Relaxed);
        stats.drafted_tokens.fetch_add(drafted as u64, Relaxed);
        stats.accepted_tokens.fetch_add(accepted as u64, Relaxed);
        for counter in stats.accepted_at.iter().take(accepted) {
            counter.fetch_add(1, Relaxed);
        }
        if let Some(last) = stats.accepted_at.last() {
            last.fetch_add(accepted.saturating_sub(ACCEPTED_POSITIONS) as u64, Relaxed);
        }
    }

    /// Sends the reader all that the step brought in one go, for each time a reader wakes it takes a core from somebody. A
    /// send to a reader that has left fails; its cancel is on the way.
    fn tell(&mut self) {
        for event in self.unsent.drain(..) {
            let _ = self.events.send(event);
        }
    }

    /// The last event.
    pub fn end(mut self, end: Result<Finish, Failure>) {
        self.tell();
        let event = match end {
            Ok(finish) => Event::Finished { finish, timings: self.timings() },
            Err(failure) => Event::Failed(failure),
        };
        let _ = self.events.send(event);
    }

    /// Each row of the prompt judges the token after it; the last one judges the first id drawn, not the prompt.
    fn read_prompt(&mut self, view: &View<'_>, workspace: &mut Workspace) -> Result<(), Failure> {
        let View { share, tokens, logits: rows, .. } = *view;
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
            drafted: self.drafted,
            accepted: self.accepted,
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
