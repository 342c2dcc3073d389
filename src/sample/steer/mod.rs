//! What steers the ids themselves: grammars, and the budget of a thought.
//!
//! ```text
//! let compiler = Compiler::new(words, &eos)?;              // once per model, about a second
//! let grammar = compiler.compile(&source)?;                // milliseconds, in a blocking task
//! let steering = Steering { grammar: Some((grammar, Start::Answer)), ..Steering::default() };
//! let mut sampler = Sampler::new(params, …).steered(steering);
//! loop {
//!     sampler.prepare(&mut drafts);                        // cuts the drafts, starts the masks
//!     step(&drafts);                                       // the model runs meanwhile
//!     for row in rows { let id = sampler.sample(…)?; sampler.accept(id); if drafts.next() != Some(id) { break } }
//! }
//! ```
//!
//! A sequence is in one of these phases; `<tool_call>` counts only if [`Steering::call`] is given:
//!
//! ```text
//! Thought ──end, or <tool_call>──→ Active ──grammar complete──→ Done     (Start::Answer)
//!    │ └─budget→ Closing ──────────↗                                      only stop ids
//!    └─────────────────→ Free ⇄ Active                                    (Start::Call, or no grammar)
//!                   <tool_call>  call complete
//! ```

mod grammar;
mod lane;
mod schema;

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

pub use grammar::{Compiler, Grammar, GrammarError, Source, Word};
pub use schema::Spaces;

use lane::{Lane, Task, Verdict, Work};

/// The rules of one request; every choice has its own course under them.
#[derive(Debug, Clone, Default)]
pub struct Steering {
    /// Given if the prompt ends inside a thought.
    pub thought: Option<Thought>,
    /// Begins a tool call, and ends a thought where it appears inside one. With a grammar, the grammar knows calls.
    pub call: Option<u32>,
    pub grammar: Option<(Grammar, Start)>,
}

/// Where a grammar begins to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the first id after the thought; the whole answer is its text.
    Answer,
    /// With each [`Steering::call`], its first word, until it is complete; anything may stand between calls.
    Call,
}

/// The thought that a prompt has opened.
#[derive(Debug, Clone)]
pub struct Thought {
    /// `</think>`
    pub end: u32,
    pub budget: Option<Budget>,
}

/// How long a thought may be. It is cut exactly there, in mid-sentence if need be: a client that counts tokens has
/// said how many, and a thought that is let run to its next line break may have none.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Ids of thought; 0 ends it at once.
    pub len: usize,
    /// What ends it; never empty, [`Thought::end`] last.
    pub close: Arc<[u32]>,
    /// The same for a thought whose last id ends a line.
    pub close_line: Arc<[u32]>,
    /// The ids that end a line.
    pub line_ends: Arc<IdSet>,
    /// The prompt ends a line.
    pub starts_line: bool,
}

/// Some ids of a vocabulary.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct IdSet {
    words: Vec<u64>,
}

impl IdSet {
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }
}

impl FromIterator<u32> for IdSet {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut words = Vec::new();
        for id in ids {
            let index = id as usize / 64;
            if index >= words.len() {
                words.resize(index + 1, 0);
            }
            words[index] |= 1u64 << (id % 64);
        }
        Self { words }
    }
}

impl fmt::Debug for IdSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count: u32 = self.words.iter().map(|word| word.count_ones()).sum();
        write!(f, "IdSet({count})")
    }
}

/// What may follow, before anything else that a request says about its ids.
#[derive(Debug)]
pub(super) enum Rule<'a> {
    Free,
    /// Free, but the answer has not begun, so it cannot end.
    Unended,
    /// This id and no other.
    Forced(u32),
    /// These ids, and if `ends` the stop ids.
    Mask {
        ids: &'a SimpleVob,
        ends: bool,
    },
    /// Stop ids only.
    Complete,
    Nothing,
    Broken,
}

/// One sequence's course under its rules.
pub(super) struct Helm {
    steering: Steering,
    /// If there is a grammar.
    lane: Option<Arc<Lane>>,
    phase: Phase,
    /// What the lane's matcher has read since its start, to read it again should it break.
    read: Vec<u32>,
    /// Accepted and not looked at yet.
    accepted: Vec<u32>,
    /// As prepared; row i follows the first i of them.
    drafts: Vec<u32>,
    rows: Vec<Row>,
    /// The prepared row that the sequence is at; `None` once it has left the drafts.
    row: Option<usize>,
    /// The verdict of the row at hand.
    verdict: Option<(usize, Verdict)>,
    broken: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// `len` ids of it so far.
    Thought {
        len: usize,
        on_line: bool,
    },
    /// The budget is spent; `at` of the closing ids are out.
    Closing {
        at: usize,
        on_line: bool,
    },
    Free,
    Active,
    Done,
}

/// A prepared row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Free,
    Unended,
    Forced(u32),
    /// The lane's verdict of this index.
    Judged(usize),
    Complete,
    Broken,
}

/// What an id does to a phase.
enum Move {
    To(Phase),
    /// The same, and the matcher has read the id.
    Read(Phase),
    /// The rules forbid it here.
    Refused,
    /// A call begins, but the matcher must first be set back.
    Again,
}

impl Helm {
    pub fn new(steering: Steering) -> Self {
        let lane = steering.grammar.as_ref().map(|(grammar, _)| Lane::new(grammar.clone()));
        let mut helm = Self {
            phase: Phase::Free,
            steering,
            lane,
            read: Vec::new(),
            accepted: Vec::new(),
            drafts: Vec::new(),
            rows: Vec::new(),
            row: None,
            verdict: None,
            broken: false,
        };
        helm.phase = match &helm.steering.thought {
            None => helm.answering(),
            Some(Thought { budget, .. }) => {
                helm.thinking(0, budget.as_ref().is_some_and(|budget| budget.starts_line))
            }
        };
        helm
    }

    /// Before a step: cuts `drafts` where the rules forbid them or the answer ends, and has masks made for the row
    /// after the last accepted id and after each draft that is left.
    pub fn prepare(&mut self, drafts: &mut Vec<u32>, stop_ids: &[u32]) {
        self.catch_up(stop_ids);
        self.rows.clear();
        self.verdict = None;
        self.row = Some(0);
        match self.lane.clone() {
            None => self.plan(drafts, stop_ids, None),
            Some(lane) => {
                let mut work = lane.rest();
                self.plan(drafts, stop_ids, Some(&mut work));
                if work.tasks.contains(&Task::Judge) {
                    lane.start(work);
                }
            }
        }
        self.drafts.clear();
        self.drafts.extend_from_slice(drafts);
    }

    /// The rule of the row at hand.
    pub fn rule(&mut self, stop_ids: &[u32]) -> Rule<'_> {
        let row = match self.row {
            Some(row) => row,
            None => {
                self.prepare(&mut Vec::new(), stop_ids);
                0
            }
        };
        match self.rows.get(row).copied().unwrap_or(Row::Broken) {
            Row::Free => Rule::Free,
            Row::Unended => Rule::Unended,
            Row::Forced(id) => Rule::Forced(id),
            Row::Complete => Rule::Complete,
            Row::Broken => Rule::Broken,
            Row::Judged(index) => self.judged(index),
        }
    }

    /// `id` became part of the sequence.
    pub fn accept(&mut self, id: u32) {
        self.accepted.push(id);
        self.row = self.row.filter(|&row| self.drafts.get(row) == Some(&id)).map(|row| row + 1);
    }

    /// The answer is whole and nothing may follow but its end.
    pub fn is_complete(&mut self, stop_ids: &[u32]) -> bool {
        self.catch_up(stop_ids);
        self.phase == Phase::Done
    }

    fn judged(&mut self, index: usize) -> Rule<'_> {
        if self.verdict.as_ref().is_none_or(|(of, _)| *of != index) {
            let verdict = self.lane.as_ref().map_or(Verdict::Broken, |lane| lane.verdict(index));
            self.verdict = Some((index, verdict));
        }
        match &self.verdict {
            Some((_, Verdict::Mask { ids, ends })) => Rule::Mask { ids, ends: *ends },
            Some((_, Verdict::Complete)) => Rule::Complete,
            Some((_, Verdict::Nothing)) => Rule::Nothing,
            Some((_, Verdict::Broken)) | None => Rule::Broken,
        }
    }

    /// Fills the rows, and the lane's tasks for them.
    fn plan(&mut self, drafts: &mut Vec<u32>, stop_ids: &[u32], mut work: Option<&mut Work>) {
        let (mut phase, mut read, mut judged) = (self.phase, 0, 0);
        for index in 0..=drafts.len() {
            let row = self.row_in(phase, judged);
            if row == Row::Judged(judged) {
                judged += 1;
                if let Some(work) = &mut work {
                    work.tasks.push(Task::Judge);
                }
            }
            self.rows.push(row);
            let Some(&id) = drafts.get(index) else { break };
            let matcher = work.as_mut().map(|work| work.matcher());
            if stop_ids.contains(&id) {
                // Nothing is drawn after the end, so nothing is asked of its row.
                let ends = self.may_end(phase, matcher);
                drafts.truncate(index + usize::from(ends));
                self.rows.push(Row::Free);
                break;
            }
            match self.step(phase, id, matcher) {
                Move::To(next) => phase = next,
                Move::Read(next) => {
                    phase = next;
                    read += 1;
                    if let Some(work) = &mut work {
                        work.tasks.push(Task::Feed(id));
                    }
                }
                Move::Refused | Move::Again => {
                    drafts.truncate(index);
                    break;
                }
            }
        }
        if let Some(work) = work {
            // A matcher that fails here says so at its next use.
            let _ = work.matcher().rollback(read);
            if judged == 0 {
                work.tasks.clear();
            }
        }
    }

    /// Looks at what was accepted, with the matcher where the sequence really is.
    fn catch_up(&mut self, stop_ids: &[u32]) {
        if self.accepted.is_empty() {
            return;
        }
        let lane = self.lane.clone();
        let mut work = lane.as_ref().map(|lane| lane.rest());
        if let (Some(lane), Some(work)) = (&lane, &mut work) {
            self.mend(lane, work.matcher());
        }
        for index in 0..self.accepted.len() {
            let id = self.accepted[index];
            if stop_ids.contains(&id) {
                self.phase = Phase::Done;
                break;
            }
            let mut step = self.step(self.phase, id, work.as_mut().map(|work| work.matcher()));
            if let (Move::Again, Some(lane), Some(work)) = (&step, &lane, &mut work) {
                self.read.clear();
                if work.matcher().reset().is_err() {
                    *work.matcher() = lane.grammar().matcher();
                }
                step = self.step(self.phase, id, Some(work.matcher()));
            }
            match step {
                Move::To(next) => self.phase = next,
                Move::Read(next) => {
                    self.phase = next;
                    self.read.push(id);
                }
                Move::Refused | Move::Again => self.broken = true,
            }
        }
        self.accepted.clear();
        self.row = None;
    }

    /// A draft that was not accepted may have broken the matcher for good: a fresh one reads what was.
    fn mend(&mut self, lane: &Lane, matcher: &mut Matcher) {
        if matcher.is_error() {
            *matcher = lane.grammar().matcher();
            self.broken |= matcher.consume_tokens(&self.read).is_err();
        }
    }

    fn row_in(&self, phase: Phase, judged: usize) -> Row {
        if self.broken {
            return Row::Broken;
        }
        match phase {
            Phase::Thought { .. } if self.start() == Some(Start::Answer) => Row::Unended,
            Phase::Thought { .. } | Phase::Free => Row::Free,
            Phase::Closing { at, on_line } => {
                self.closing(on_line).get(at).map_or(Row::Broken, |&id| Row::Forced(id))
            }
            Phase::Active => Row::Judged(judged),
            Phase::Done => Row::Complete,
        }
    }

    fn may_end(&self, phase: Phase, matcher: Option<&mut Matcher>) -> bool {
        match phase {
            Phase::Thought { .. } => self.start() != Some(Start::Answer),
            Phase::Free | Phase::Done => true,
            Phase::Closing { .. } => false,
            Phase::Active => matcher.is_some_and(|matcher| matcher.is_accepting().unwrap_or(false)),
        }
    }

    /// `id`, which ends nothing, in `phase`.
    fn step(&self, phase: Phase, id: u32, matcher: Option<&mut Matcher>) -> Move {
        let calls = self.steering.call == Some(id);
        match phase {
            Phase::Thought { .. } if self.ends_thought(id) => Move::To(self.answering()),
            Phase::Thought { .. } | Phase::Free if calls && self.steering.grammar.is_some() => {
                self.read(id, matcher, true)
            }
            Phase::Thought { .. } if calls => Move::To(Phase::Free),
            Phase::Thought { len, .. } => Move::To(self.thinking(len + 1, self.ends_line(id))),
            Phase::Closing { at, on_line } => match self.closing(on_line) {
                [.., last] if *last == id && at + 1 == self.closing(on_line).len() => {
                    Move::To(self.answering())
                }
                ids if ids.get(at) == Some(&id) => Move::To(Phase::Closing { at: at + 1, on_line }),
                _ => Move::Refused,
            },
            Phase::Free => Move::To(Phase::Free),
            Phase::Active => self.read(id, matcher, false),
            Phase::Done => Move::Refused,
        }
    }

    /// The grammar reads `id`; `first`: from its own beginning.
    fn read(&self, id: u32, matcher: Option<&mut Matcher>, first: bool) -> Move {
        let (Some(matcher), Some((grammar, start))) = (matcher, &self.steering.grammar) else {
            return Move::Refused;
        };
        // Whatever it has read so far was another call, or comes from drafts.
        if first && (matcher.is_stopped() || !self.read.is_empty()) {
            return Move::Again;
        }
        if grammar.is_eos(id) || !matches!(matcher.try_consume_tokens(&[id]), Ok(1)) {
            return Move::Refused;
        }
        Move::Read(match (matcher.is_stopped(), start) {
            (false, _) => Phase::Active,
            (true, Start::Answer) => Phase::Done,
            (true, Start::Call) => Phase::Free,
        })
    }

    fn start(&self) -> Option<Start> {
        self.steering.grammar.as_ref().map(|(_, start)| *start)
    }

    /// The phase after the thought.
    fn answering(&self) -> Phase {
        match self.start() {
            Some(Start::Answer) => Phase::Active,
            Some(Start::Call) | None => Phase::Free,
        }
    }

    /// The phase with `len` ids of thought.
    fn thinking(&self, len: usize, on_line: bool) -> Phase {
        match self.budget() {
            Some(budget) if len >= budget.len => Phase::Closing { at: 0, on_line },
            _ => Phase::Thought { len, on_line },
        }
    }

    fn budget(&self) -> Option<&Budget> {
        self.steering.thought.as_ref()?.budget.as_ref()
    }

    fn closing(&self, on_line: bool) -> &[u32] {
        match self.budget() {
            None => &[],
            Some(budget) if on_line => &budget.close_line,
            Some(budget) => &budget.close,
        }
    }

    fn ends_thought(&self, id: u32) -> bool {
        self.steering.thought.as_ref().is_some_and(|thought| thought.end == id)
    }

    fn ends_line(&self, id: u32) -> bool {
        self.budget().is_some_and(|budget| budget.line_ends.contains(id))
    }
}

impl fmt::Debug for Helm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helm").field("phase", &self.phase).field("row", &self.row).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
