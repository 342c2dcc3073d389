use super::*;

fn params() -> SamplingParams {
    SamplingParams::plain(1.0, 0)
}

/// `change` makes the parameters wrong in `field`.
fn check(field: &str, change: impl FnOnce(&mut SamplingParams)) {
    let mut params = params();
    change(&mut params);
    assert_eq!(params.check(10).unwrap_err().field, field, "{params:?}");
}

#[test]
fn each_field_is_named_when_out_of_range() {
    assert_eq!(params().check(10), Ok(()));
    for bad in [-1.0, 0.001, 2.1, f32::NAN, f32::INFINITY] {
        check("temperature", |params| params.temperature = bad);
    }
    for bad in [0.0, -0.1, 1.1, f32::NAN] {
        check("top_p", |params| params.top_p = bad);
    }
    for bad in [-0.1, 1.1, f32::NAN] {
        check("min_p", |params| params.min_p = bad);
    }
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        check("repetition_penalty", |params| params.repetition_penalty = bad);
    }
    for bad in [-2.1, 2.1, f32::NAN] {
        check("presence_penalty", |params| params.presence_penalty = bad);
        check("frequency_penalty", |params| params.frequency_penalty = bad);
    }
    for bad in [vec![(10, 0.0)], vec![(1, 101.0)], vec![(1, f32::NAN)], vec![(2, 0.0), (1, 0.0)]] {
        check("logit_bias", |params| params.logit_bias = bad);
    }
    for bad in [vec![], vec![3, 10]] {
        check("allowed_token_ids", |params| params.allowed_ids = Some(bad));
    }
    check("top_logprobs", |params| params.logprobs = Some(11));
}

#[test]
fn the_error_says_what_was_expected_and_got() {
    let error = SamplingParams { top_p: 1.5, ..params() }.check(10).unwrap_err();
    assert_eq!(error.to_string(), "top_p: expected above 0 and at most 1, got 1.5");
}

#[test]
fn the_ends_of_the_ranges_are_inside() {
    let mut params = params();
    (params.temperature, params.top_p, params.min_p) = (0.01, 1.0, 1.0);
    (params.presence_penalty, params.frequency_penalty) = (-2.0, 2.0);
    (params.logit_bias, params.allowed_ids) = (vec![(0, -100.0), (9, 100.0)], Some(vec![9]));
    params.logprobs = Some(10);
    assert_eq!(params.check(10), Ok(()));
    assert_eq!(SamplingParams { temperature: 0.0, ..params }.check(10), Ok(()));
}
