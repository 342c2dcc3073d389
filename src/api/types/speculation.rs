//! How much may be drafted ahead, in the words of a request's `speculation` and of the server's
//! `--speculative-config`.

use crate::api::error::ApiError;
use crate::api::fields::{Fields, whole, wrong};
use crate::engine::Speculation;
use serde_json::Value;

/// What a client may write.
const EXPECTED: &str = "\"off\", \"auto\", a number of tokens, or an object with `method`, `num_speculative_tokens` and `adaptive`";

/// `value`, standing at `path`: a word, a depth, or vLLM's object. Errors: 400 that names what does not fit.
pub fn speculation(value: &Value, path: &str) -> Result<Speculation, ApiError> {
    match value {
        Value::String(word) => method(word).ok_or_else(|| wrong(path, EXPECTED, value)),
        Value::Number(_) => match whole(value).and_then(|depth| u64::try_from(depth).ok()) {
            Some(depth) => Ok(limited(Speculation::default(), depth)),
            None => Err(wrong(path, EXPECTED, value)),
        },
        Value::Object(_) => object(&Fields::object_at(value, path.to_owned())?),
        _ => Err(wrong(path, EXPECTED, value)),
    }
}

fn object(fields: &Fields) -> Result<Speculation, ApiError> {
    let who = match fields.string("method")? {
        None => Speculation::default(),
        Some(word) => method(word).ok_or_else(|| {
            let expected = format!("`{}` must be mtp, ngram, auto or off.", fields.path("method"));
            fields.bad("method", expected)
        })?,
    };
    let depth = fields.integer("num_speculative_tokens", 0..=i64::MAX)?;
    let who = Speculation { adaptive: fields.bool("adaptive")?.unwrap_or(true), ..who };
    Ok(depth.map_or(who, |depth| limited(who, depth.unsigned_abs())))
}

fn method(word: &str) -> Option<Speculation> {
    let all = Speculation::default();
    match word {
        "off" | "none" => Some(Speculation::OFF),
        "auto" => Some(all),
        // vLLM's older name of the same drafter.
        "mtp" | "nemotron_h_mtp" => Some(Speculation { ngram: false, ..all }),
        "ngram" => Some(Speculation { mtp: false, ..all }),
        _ => None,
    }
}

fn limited(who: Speculation, depth: u64) -> Speculation {
    match depth {
        0 => Speculation::OFF,
        depth => {
            Speculation { depth_max: who.depth_max.min(u32::try_from(depth).unwrap_or(u32::MAX)), ..who }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(value: Value, expected: (u32, bool, bool)) {
        let read = speculation(&value, "speculation").map(|s| (s.depth_max, s.mtp, s.ngram));
        assert_eq!(read, Ok(expected), "{value}");
    }

    #[test]
    fn words_depths_and_objects_mean_the_same() {
        check(json!("auto"), (u32::MAX, true, true));
        check(json!("off"), (0, false, false));
        check(json!(0), (0, false, false));
        check(json!(3), (3, true, true));
        check(json!(3.0), (3, true, true));
        check(json!({}), (u32::MAX, true, true));
        check(json!({"method": "mtp", "num_speculative_tokens": 2}), (2, true, false));
        check(json!({"method": "ngram", "prompt_lookup_max": 4}), (u32::MAX, false, true));
        check(json!({"method": "none", "num_speculative_tokens": 2}), (0, false, false));
        check(json!({"method": "mtp", "num_speculative_tokens": 0}), (0, false, false));
    }

    #[test]
    fn a_fixed_depth_is_asked_for_by_name() {
        let fixed = speculation(&json!({"num_speculative_tokens": 2, "adaptive": false}), "speculation");
        assert_eq!(fixed.map(|s| (s.depth_max, s.adaptive)), Ok((2, false)));
        assert_eq!(speculation(&json!(2), "speculation").map(|s| s.adaptive), Ok(true));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let check = |value: Value, param: &str| {
            let error = speculation(&value, "speculation").expect_err("the test gives what cannot be");
            assert_eq!(error.body()["error"]["param"], param, "{value}");
        };
        check(json!("maybe"), "speculation");
        check(json!(-1), "speculation");
        check(json!(1.5), "speculation");
        check(json!(true), "speculation");
        check(json!({"method": "eagle"}), "speculation.method");
        check(json!({"adaptive": 1}), "speculation.adaptive");
        check(json!({"num_speculative_tokens": -1}), "speculation.num_speculative_tokens");
    }
}
