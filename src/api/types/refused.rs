//! Fields that ask for something this server cannot do yet. A constraint is never ignored quietly:
//! a client that asked for JSON and got prose has been lied to.

use crate::api::error::ApiError;
use crate::api::fields::Fields;
use serde_json::Value;

/// Other fields without an implementation behind them, and what they would do.
const MISSING: [(&str, &str); 2] =
    [("logprob_token_ids", "log-probabilities of chosen ids"), ("prompt_embeds", "prompts as embeddings")];

/// Errors: 400 that names the first field which would have to be ignored.
pub fn refuse(fields: &Fields) -> Result<(), ApiError> {
    for (name, what) in MISSING {
        if fields.get(name).is_some_and(|value| !is_empty(value)) {
            return Err(fields.bad(name, format!("`{name}` is not supported: {what} is not implemented.")));
        }
    }
    if fields.bool("use_beam_search")? == Some(true) {
        return Err(fields.bad("use_beam_search", "`use_beam_search` is not supported: this server samples."));
    }
    Ok(())
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(body: Value, param: Option<&str>) {
        let Value::Object(map) = &body else { panic!("the test gives an object") };
        let refused = refuse(&Fields::top(map)).err().map(|error| error.body()["error"]["param"].clone());
        assert_eq!(refused, param.map(|name| json!(name)), "{body}");
    }

    #[test]
    fn empty_lists_ask_for_nothing() {
        check(json!({"logprob_token_ids": []}), None);
        check(json!({"logprob_token_ids": [1]}), Some("logprob_token_ids"));
    }
}
