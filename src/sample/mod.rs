//! Logits to ids. Its randomness is an argument: the same seed, position and logits give the same id.
//!
//! ```text
//! params.check(vocab)?;                                    // a wrong value is the caller's error, with its name
//! let mut workspace = Workspace::new(vocab);               // one per engine
//! let mut sampler = Sampler::new(params, …);               // one per sequence
//! let id = sampler.sample(&mut workspace, logits, position)?;
//! let logprobs = logprobs(&mut workspace, logits, id, 5)?; // if wanted
//! sampler.accept(id);
//! ```

mod math;
mod philox;
mod sampler;
mod select;
pub mod steer;

pub use math::argmax;
pub use philox::{philox4x32, uniform};
pub use sampler::{Failure, Sampler, Workspace, logprobs};
pub use steer::Steering;

/// Log-probabilities from the raw logits, natural logarithm.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// Best first; of equals the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// How a request wants its ids drawn. Ranges as noted; [`Self::check`] holds them.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; else at least 0.01.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// (0, 1]
    pub top_p: f32,
    /// [0, 1]
    pub min_p: f32,
    /// > 0; over prompt and output ids. 1 is off.
    pub repetition_penalty: f32,
    /// [-2, 2]; over output ids.
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// (id, bias in [-100, 100]), sorted by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, every other id is masked.
    pub allowed_ids: Option<Vec<u32>>,
    /// Ids that must not follow one another in the output; none of the lists is empty.
    pub bad_words: Vec<Vec<u32>>,
    pub seed: u64,
    /// Top log-probabilities wanted per token; None = none, Some(0) = only the chosen id's.
    pub logprobs: Option<u32>,
}

/// A sampling value that cannot be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: expected {expected}, got {got}")]
pub struct Error {
    /// As the wire calls it.
    pub field: &'static str,
    pub expected: String,
    pub got: String,
}

impl SamplingParams {
    /// The model's own distribution at `temperature` (0: its likeliest id), and nothing else.
    pub fn plain(temperature: f32, seed: u64) -> Self {
        Self {
            temperature,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_ids: None,
            bad_words: Vec::new(),
            seed,
            logprobs: None,
        }
    }

    /// Checks every range against a vocabulary of `vocab` ids.
    pub fn check(&self, vocab: usize) -> Result<(), Error> {
        let refuse =
            |field, expected: &str, got: String| Err(Error { field, expected: expected.to_string(), got });
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        if temperature != 0.0 && !(0.01..=2.0).contains(&temperature) {
            return refuse("temperature", "0, or from 0.01 to 2", temperature.to_string());
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse("top_p", "above 0 and at most 1", top_p.to_string());
        }
        if !(0.0..=1.0).contains(&min_p) {
            return refuse("min_p", "from 0 to 1", min_p.to_string());
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", "above 0 and finite", repetition_penalty.to_string());
        }
        for (field, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return refuse(field, "from -2 to 2", value.to_string());
            }
        }
        for (index, &(id, bias)) in self.logit_bias.iter().enumerate() {
            if id as usize >= vocab {
                return refuse("logit_bias", &format!("ids below {vocab}"), id.to_string());
            }
            if !(-100.0..=100.0).contains(&bias) {
                return refuse("logit_bias", "from -100 to 100", bias.to_string());
            }
            if index > 0 && self.logit_bias[index - 1].0 >= id {
                return refuse("logit_bias", "ids ascending, each once", id.to_string());
            }
        }
        if let Some(allowed) = &self.allowed_ids {
            if allowed.is_empty() {
                return refuse("allowed_token_ids", "at least one id", "none".into());
            }
            if let Some(id) = allowed.iter().find(|&&id| id as usize >= vocab) {
                return refuse("allowed_token_ids", &format!("ids below {vocab}"), id.to_string());
            }
        }
        if self.bad_words.iter().any(Vec::is_empty) {
            return refuse("bad_words", "at least one id in each", "none".into());
        }
        if let Some(id) = self.bad_words.iter().flatten().find(|&&id| id as usize >= vocab) {
            return refuse("bad_words", &format!("ids below {vocab}"), id.to_string());
        }
        if let Some(count) = self.logprobs.filter(|&count| count as usize > vocab) {
            return refuse("top_logprobs", &format!("at most {vocab}"), count.to_string());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
