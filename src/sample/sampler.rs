//! One sequence's way of drawing ids.

use super::select::{Candidate, better, nucleus, top};
use super::steer::{Helm, Rule, Steering};
use super::{SamplingParams, TokenLogprobs, math, philox};

/// Why no id could be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The fault is the model's, not the request's.
    #[error("the logits are not finite")]
    NotFinite,
    /// The request's rules exclude each other: for example, only stop ids are allowed before `min_tokens`.
    #[error("no id is allowed")]
    NothingAllowed,
    /// The grammar's parser gave up: its bounds were reached, or it has a fault.
    #[error("the grammar could not be followed")]
    Steering,
}

/// Scratch of one draw, shared by all sequences of an engine. Nothing in it outlives the draw.
#[derive(Debug)]
pub struct Workspace {
    /// [V] logits under the request's rules, then weights relative to the best.
    scores: Vec<f32>,
    /// At most V.
    candidates: Vec<Candidate>,
}

impl Workspace {
    /// For rows of `vocab` logits. The only allocation of this room, apart from the sequences' own counts.
    pub fn new(vocab: usize) -> Self {
        Self { scores: vec![0.0; vocab], candidates: Vec::with_capacity(vocab) }
    }
}

/// Draws the ids of one sequence. The rules apply in vLLM's order (v1/sample/sampler.py), for clients tune
/// their values against it:
///
/// 0. ids that the steering forbids are masked, and nothing below brings them back; ids that it forces, and the end
///    of a complete answer, obey no other rule;
/// 1. ids not in `allowed_ids` are masked, and those that would end one of `bad_words`; 2. stop ids too until `min_tokens` are drawn, 3. `logit_bias` is added
///    (a masked id stays masked), 4. repetition, frequency and presence penalties;
/// 5. with temperature 0 the greatest wins, of equals the lowest id; else 6. temperature, 7. `min_p` relative to
///    the best, 8. `top_k` (exactly k: of equals the lowest ids), 9. `top_p` of what is left, 10. the draw.
///
/// The draw inverts the distribution, ids ascending, at one uniform number that depends on the seed and the
/// position alone: not on the batch, the chunking, or how many numbers were drawn before.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    stop_ids: Vec<u32>,
    min_tokens: usize,
    generated: usize,
    /// Kept only if a penalty needs it.
    counts: Option<Counts>,
    /// The last ids of the output, as many as a bad word can begin with.
    recent: Recent,
    helm: Option<Box<Helm>>,
}

impl Sampler {
    /// `params` must have passed [`SamplingParams::check`] against `vocab`, and all ids be below it.
    /// Allocates what `max_tokens` accepted ids can need.
    pub fn new(
        params: SamplingParams,
        stop_ids: Vec<u32>,
        min_tokens: usize,
        prompt: &[u32],
        max_tokens: usize,
        vocab: usize,
    ) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let counts = penalised.then(|| Counts::new(prompt, max_tokens, vocab));
        let recent = Recent::new(params.bad_words.iter().map(|word| word.len() - 1).max().unwrap_or(0));
        Self { params, stop_ids, min_tokens, generated: 0, counts, recent, helm: None }
    }

    /// Under the rules of `steering`, from the first id on.
    pub fn steered(self, steering: Option<Steering>) -> Self {
        Self { helm: steering.map(|steering| Box::new(Helm::new(steering))), ..self }
    }

    pub fn is_steered(&self) -> bool {
        self.helm.is_some()
    }

    /// Before each step: cuts `drafts`, the ids proposed to follow the last accepted one, at the first that the
    /// steering forbids, and has masks made for the rows of that step while it runs. It may be left out; then
    /// [`Self::sample`] makes its mask itself.
    pub fn prepare(&mut self, drafts: &mut Vec<u32>) {
        if let Some(helm) = &mut self.helm {
            helm.prepare(drafts, &self.stop_ids);
        }
    }

    /// The steering wants nothing more and no stop id can say so: the sequence ends here by itself.
    pub fn is_complete(&mut self) -> bool {
        self.stop_ids.is_empty() && self.helm.as_mut().is_some_and(|helm| helm.is_complete(&[]))
    }

    /// The id at `position` of the sequence, from the logits [V] that its predecessor gave. Rows of one step are drawn
    /// in order, each after its predecessor was accepted.
    pub fn sample(
        &mut self,
        workspace: &mut Workspace,
        logits: &[f32],
        position: u64,
    ) -> Result<u32, Failure> {
        let best = math::finite_max(logits).ok_or(Failure::NotFinite)?;
        let mut helm = self.helm.take();
        let rule = helm.as_mut().map_or(Rule::Free, |helm| helm.rule(&self.stop_ids));
        let drawn = self.draw(workspace, (logits, best), position, &rule);
        self.helm = helm;
        drawn
    }

    /// `best` is the greatest of the logits.
    fn draw(
        &self,
        workspace: &mut Workspace,
        (logits, best): (&[f32], f32),
        position: u64,
        rule: &Rule<'_>,
    ) -> Result<u32, Failure> {
        let greedy = self.params.temperature == 0.0;
        match rule {
            Rule::Forced(id) => return Ok(*id),
            Rule::Nothing => return Err(Failure::NothingAllowed),
            Rule::Broken => return Err(Failure::Steering),
            Rule::Free if greedy && !self.has_rules() => {
                return math::index_of(logits, best).ok_or(Failure::NothingAllowed);
            }
            Rule::Free | Rule::Unended | Rule::Mask { .. } | Rule::Complete => {}
        }
        self.apply_rules(workspace, logits, rule);
        if greedy {
            return math::argmax(&workspace.scores).ok_or(Failure::NothingAllowed);
        }
        let best = math::max(&workspace.scores);
        if best == f32::NEG_INFINITY {
            return Err(Failure::NothingAllowed);
        }
        self.weigh(workspace, best);
        self.cut(workspace);
        draw(&workspace.scores, philox::uniform(self.params.seed, position)).ok_or(Failure::NothingAllowed)
    }

    /// Notes that `id` became part of the sequence.
    pub fn accept(&mut self, id: u32) {
        self.generated += 1;
        if let Some(counts) = &mut self.counts {
            counts.add_output(id);
        }
        self.recent.add(id);
        if let Some(helm) = &mut self.helm {
            helm.accept(id);
        }
    }

    /// Ids accepted so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// The id ends the sequence.
    pub fn stops(&self, id: u32) -> bool {
        self.stop_ids.contains(&id)
    }

    /// Alternatives wanted with each id; `None` if no log-probabilities are wanted at all.
    pub fn logprobs(&self) -> Option<usize> {
        self.params.logprobs.map(|count| count as usize)
    }

    fn holds_stop_ids_back(&self) -> bool {
        self.generated < self.min_tokens && !self.stop_ids.is_empty()
    }

    fn has_rules(&self) -> bool {
        let SamplingParams { allowed_ids, bad_words, logit_bias, .. } = &self.params;
        let masks = allowed_ids.is_some() || !bad_words.is_empty() || self.holds_stop_ids_back();
        masks || !logit_bias.is_empty() || self.counts.is_some()
    }

    /// Steps 0 to 4: `scores` become the logits as the request wants them, masked ids −∞.
    fn apply_rules(&self, workspace: &mut Workspace, logits: &[f32], rule: &Rule<'_>) {
        let scores = &mut workspace.scores;
        let SamplingParams { allowed_ids, bad_words, logit_bias, .. } = &self.params;
        let complete = matches!(rule, Rule::Complete);
        match allowed_ids {
            None => scores.copy_from_slice(logits),
            Some(allowed) => {
                scores.fill(f32::NEG_INFINITY);
                for &id in allowed {
                    scores[id as usize] = logits[id as usize];
                }
            }
        }
        match rule {
            Rule::Mask { ids, ends } => {
                mask(scores, ids.as_slice());
                let permitted = |id: &u32| allowed_ids.as_ref().is_none_or(|allowed| allowed.contains(id));
                for &id in self.stop_ids.iter().filter(|id| *ends && permitted(id)) {
                    scores[id as usize] = logits[id as usize];
                }
            }
            Rule::Complete => {
                scores.fill(f32::NEG_INFINITY);
                for &id in &self.stop_ids {
                    scores[id as usize] = logits[id as usize];
                }
            }
            _ => {}
        }
        // A complete answer ends, however short it is.
        if self.holds_stop_ids_back() && !complete || matches!(rule, Rule::Unended) {
            for &id in &self.stop_ids {
                scores[id as usize] = f32::NEG_INFINITY;
            }
        }
        if !complete {
            for word in bad_words {
                let Some((&last, before)) = word.split_last() else { continue };
                if self.recent.ids.ends_with(before) {
                    scores[last as usize] = f32::NEG_INFINITY;
                }
            }
        }
        for &(id, bias) in logit_bias {
            scores[id as usize] += bias;
        }
        if let Some(counts) = &self.counts {
            let repetition = self.params.repetition_penalty;
            for &id in &counts.seen {
                let score = &mut scores[id as usize];
                *score = if *score > 0.0 { *score / repetition } else { *score * repetition };
                let count = counts.outputs[id as usize];
                if count > 0 {
                    *score -= self.params.frequency_penalty * count as f32 + self.params.presence_penalty;
                }
            }
        }
    }

    /// Steps 6 and 7: `scores` become weights, 1 for the best, 0 for what is masked or below `min_p`.
    fn weigh(&self, workspace: &mut Workspace, best: f32) {
        let sharpness = 1.0 / self.params.temperature;
        for score in &mut workspace.scores {
            *score = math::exp((*score - best) * sharpness);
        }
        let min_p = self.params.min_p;
        if min_p > 0.0 {
            for weight in &mut workspace.scores {
                *weight = if *weight < min_p { 0.0 } else { *weight };
            }
        }
    }

    /// Steps 8 and 9: weights outside the best k, then outside the nucleus, become 0.
    fn cut(&self, workspace: &mut Workspace) {
        let Workspace { scores: weights, candidates } = workspace;
        let (top_k, top_p) = (self.params.top_k as usize, f64::from(self.params.top_p));
        let by_count = top_k > 0 && top_k < weights.len();
        if !by_count && top_p >= 1.0 {
            return;
        }
        let mass = if by_count {
            top(weights, top_k, 0.0, candidates);
            math::sum(candidates.iter().map(|candidate| candidate.value))
        } else {
            let mass = math::sum(weights.iter().copied());
            // All V weights below (1 - p) · mass / V together weigh less than what the nucleus leaves out, so
            // none of them is in it. Half of that keeps rounding on the safe side.
            let floor = (0.5 * (1.0 - top_p) * mass / weights.len() as f64) as f32;
            candidates.clear();
            let ids = weights.iter().enumerate().filter(|&(_, &weight)| weight > floor);
            candidates.extend(ids.map(|(id, &value)| Candidate { value, id: id as u32 }));
            mass
        };
        if top_p < 1.0 {
            nucleus(candidates, top_p * mass);
        }
        let Some(worst) = candidates.iter().copied().max_by(better) else { return };
        for (id, weight) in weights.iter_mut().enumerate() {
            let kept = *weight > worst.value || (*weight == worst.value && id as u32 <= worst.id);
            *weight = if kept { *weight } else { 0.0 };
        }
    }
}

/// Leaves only the scores whose bit is set; ids without a bit are masked.
fn mask(scores: &mut [f32], words: &[u32]) {
    let known = scores.len().min(words.len() * 32);
    for (scores, &word) in scores[..known].chunks_mut(32).zip(words) {
        if word == u32::MAX {
            continue;
        }
        for (bit, score) in scores.iter_mut().enumerate() {
            *score = if word >> bit & 1 == 1 { *score } else { f32::NEG_INFINITY };
        }
    }
    scores[known..].fill(f32::NEG_INFINITY);
}

/// The id under `uniform` in [0, 1) when the weights are laid side by side, ids ascending.
fn draw(weights: &[f32], uniform: f64) -> Option<u32> {
    let target = uniform * math::sum(weights.iter().copied());
    let mut reached = 0.0;
    for (id, &weight) in weights.iter().enumerate() {
        reached += f64::from(weight);
        if weight > 0.0 && reached > target {
            return Some(id as u32);
        }
    }
    // The two sums are rounded differently, so the walk may end a hair short of the target.
    weights.iter().rposition(|&weight| weight > 0.0).map(|id| id as u32)
}

/// Log-probability of `id` and the best `count` ids, from the raw logits [V]: the same numbers whatever the
/// request's rules are. The only allocation is the list itself.
pub fn logprobs(
    workspace: &mut Workspace,
    logits: &[f32],
    id: u32,
    count: usize,
) -> Result<TokenLogprobs, Failure> {
    let best = math::finite_max(logits).ok_or(Failure::NotFinite)?;
    let log_sum = math::sum(logits.iter().map(|&logit| math::exp(logit - best))).ln();
    let logprob = |logit: f32| (f64::from(logit) - f64::from(best) - log_sum).min(0.0) as f32;
    top(logits, count, f32::NEG_INFINITY, &mut workspace.candidates);
    workspace.candidates.sort_unstable_by(better);
    let top = workspace.candidates.iter().map(|candidate| (candidate.id, logprob(candidate.value)));
    Ok(TokenLogprobs { logprob: logprob(logits[id as usize]), top: top.collect() })
}

/// The end of a sequence's output.
#[derive(Debug)]
struct Recent {
    /// Never grows beyond what it was made for.
    ids: Vec<u32>,
    len_max: usize,
}

impl Recent {
    fn new(len_max: usize) -> Self {
        Self { ids: Vec::with_capacity(len_max), len_max }
    }

    fn add(&mut self, id: u32) {
        if self.len_max == 0 {
            return;
        }
        if self.ids.len() == self.len_max {
            self.ids.remove(0);
        }
        self.ids.push(id);
    }
}

/// Which ids a sequence has, and how often in its output.
#[derive(Debug)]
struct Counts {
    /// [V]; ids of the prompt alone have 0.
    outputs: Vec<u32>,
    /// Each id of prompt or output, once.
    seen: Vec<u32>,
    /// [V]
    is_seen: Vec<bool>,
}

impl Counts {
    fn new(prompt: &[u32], max_tokens: usize, vocab: usize) -> Self {
        let distinct = prompt.len().saturating_add(max_tokens).min(vocab);
        let mut counts =
            Self { outputs: vec![0; vocab], seen: Vec::with_capacity(distinct), is_seen: vec![false; vocab] };
        for &id in prompt {
            counts.see(id);
        }
        counts
    }

    fn see(&mut self, id: u32) {
        if !std::mem::replace(&mut self.is_seen[id as usize], true) {
            self.seen.push(id);
        }
    }

    fn add_output(&mut self, id: u32) {
        self.see(id);
        self.outputs[id as usize] += 1;
    }
}

#[cfg(test)]
mod tests;
