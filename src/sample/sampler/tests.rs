use super::*;

fn params() -> SamplingParams {
    SamplingParams::plain(1.0, 7)
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..params() }
}

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params, Vec::new(), 0, &[], 8, 1 << 17)
}

fn sample(sampler: &mut Sampler, logits: &[f32], position: u64) -> Result<u32, Failure> {
    sampler.sample(&mut Workspace::new(logits.len()), logits, position)
}

/// The ids that 400 draws give, ascending.
fn support(params: SamplingParams, logits: &[f32]) -> Vec<u32> {
    let mut sampler = sampler(params);
    let mut ids: Vec<_> = (0..400).map(|position| sample(&mut sampler, logits, position).unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Chi-square of 20,000 draws against softmax(logits / temperature) over `kept`, with a fixed seed.
fn check_distribution(params: SamplingParams, logits: &[f32], kept: &[u32], chi_square_max: f64) {
    const DRAWS: usize = 20_000;
    let weight = |id: u32| (f64::from(logits[id as usize]) / f64::from(params.temperature)).exp();
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    let mut sampler = sampler(params.clone());
    let mut workspace = Workspace::new(logits.len());
    let mut counts = vec![0usize; logits.len()];
    for position in 0..DRAWS {
        counts[sampler.sample(&mut workspace, logits, position as u64).unwrap() as usize] += 1;
    }
    assert_eq!(kept.iter().map(|&id| counts[id as usize]).sum::<usize>(), DRAWS, "{counts:?}");
    let chi_square: f64 = kept
        .iter()
        .map(|&id| {
            let expected = DRAWS as f64 * weight(id) / total;
            (counts[id as usize] as f64 - expected).powi(2) / expected
        })
        .sum();
    assert!(chi_square < chi_square_max, "chi-square {chi_square}, counts {counts:?}");
}

/// 1 in 1000 correct samplers would exceed these, at 15, 7 and 4 degrees of freedom.
const CHI_SQUARE_15: f64 = 37.70;
const CHI_SQUARE_7: f64 = 24.32;
const CHI_SQUARE_4: f64 = 18.47;

const LOGITS: [f32; 16] =
    [0.1, 2.0, -1.0, 1.5, 0.0, 0.7, -0.3, 1.1, 0.2, -2.0, 0.9, 1.9, -0.5, 0.4, 1.3, -1.5];

#[test]
fn draws_follow_the_softmax() {
    check_distribution(params(), &LOGITS, &(0..16).collect::<Vec<_>>(), CHI_SQUARE_15);
}

#[test]
fn temperature_divides_the_logits() {
    let hot = SamplingParams { temperature: 2.0, ..params() };
    check_distribution(hot, &LOGITS, &(0..16).collect::<Vec<_>>(), CHI_SQUARE_15);
}

#[test]
fn top_k_keeps_the_shape_of_the_best() {
    let best = [1, 3, 5, 7, 10, 11, 13, 14];
    check_distribution(SamplingParams { top_k: 8, ..params() }, &LOGITS, &best, CHI_SQUARE_7);
}

#[test]
fn top_p_keeps_the_shape_of_the_nucleus() {
    // Shares: 1: .194, 11: .176, 3: .118, 14: .096, 7: .079; five of them first reach 0.65.
    let nucleus = [1, 3, 7, 11, 14];
    check_distribution(SamplingParams { top_p: 0.65, ..params() }, &LOGITS, &nucleus, CHI_SQUARE_4);
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut sampler = sampler(greedy());
    assert_eq!(sample(&mut sampler, &[1.0, 3.0, 3.0, 2.0], 0), Ok(1));
}

#[test]
fn the_draw_depends_on_seed_and_position_alone() {
    let mut first = sampler(params());
    let ids: Vec<_> = (0..64).map(|position| sample(&mut first, &LOGITS, position)).collect();
    let mut second = sampler(params());
    second.accept(3);
    let backwards: Vec<_> = (0..64).rev().map(|position| sample(&mut second, &LOGITS, position)).collect();
    assert!(ids.iter().eq(backwards.iter().rev()));
    let mut other = sampler(SamplingParams { seed: 8, ..params() });
    assert_ne!(ids, (0..64).map(|position| sample(&mut other, &LOGITS, position)).collect::<Vec<_>>());
}

#[test]
fn top_k_of_one_is_greedy_and_of_equals_keeps_the_lowest_ids() {
    assert_eq!(support(SamplingParams { top_k: 1, ..params() }, &LOGITS), [1]);
    assert_eq!(support(SamplingParams { top_k: 3, ..params() }, &[0.0; 9]), [0, 1, 2]);
    let all = SamplingParams { top_k: 900, ..params() };
    assert_eq!(support(all, &[0.0; 9]), (0..9).collect::<Vec<_>>());
}

#[test]
fn top_p_keeps_at_least_the_best_and_at_most_what_it_needs() {
    let top_p = |top_p| SamplingParams { top_p, ..params() };
    assert_eq!(support(top_p(1e-6), &LOGITS), [1]);
    assert_eq!(support(top_p(0.5), &[0.0; 8]), [0, 1, 2, 3]);
    assert_eq!(support(top_p(0.51), &[0.0; 8]), [0, 1, 2, 3, 4]);
    assert_eq!(support(top_p(1.0), &[0.0; 8]), (0..8).collect::<Vec<_>>());
}

#[test]
fn top_p_is_of_what_top_k_left() {
    // Of four equals, half is two; of all eight it would be four.
    let both = SamplingParams { top_k: 4, top_p: 0.5, ..params() };
    assert_eq!(support(both, &[0.0; 8]), [0, 1]);
}

#[test]
fn min_p_is_relative_to_the_best() {
    let logits = [0.0, -0.6, -0.8, -20.0]; // weights 1, .55, .45, 2e-9
    assert_eq!(support(SamplingParams { min_p: 0.5, ..params() }, &logits), [0, 1]);
    assert_eq!(support(SamplingParams { min_p: 1.0, ..params() }, &logits), [0]);
}

#[test]
fn penalties_look_at_prompt_and_output() {
    let draw = |params, outputs: &[u32], logits: &[f32]| {
        let mut sampler = Sampler::new(params, Vec::new(), 0, &[0], 8, logits.len());
        outputs.iter().for_each(|&id| sampler.accept(id));
        sample(&mut sampler, logits, 0).unwrap()
    };
    let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    assert_eq!(draw(repetition.clone(), &[], &[1.9, 1.0, 0.0]), 1, "a positive logit is divided");
    assert_eq!(draw(repetition.clone(), &[], &[-1.0, -1.9, -9.0]), 1, "a negative one multiplied");
    assert_eq!(draw(repetition, &[1], &[1.9, 1.8, 0.96]), 2, "output counts too");
    let presence = SamplingParams { presence_penalty: 1.0, ..greedy() };
    assert_eq!(draw(presence.clone(), &[], &[1.5, 1.0, 0.0]), 0, "the prompt does not count");
    assert_eq!(draw(presence.clone(), &[0], &[1.5, 1.0, 0.0]), 1);
    assert_eq!(draw(presence, &[0, 0, 0], &[2.5, 1.0, 0.0]), 0, "presence counts once");
    let frequency = SamplingParams { frequency_penalty: 1.0, ..greedy() };
    assert_eq!(draw(frequency, &[0, 0, 0], &[2.5, 1.0, 0.0]), 1, "frequency each time");
}

#[test]
fn bias_moves_and_masks_stay() {
    let biased = SamplingParams { logit_bias: vec![(0, -5.0), (2, 100.0)], ..greedy() };
    assert_eq!(sample(&mut sampler(biased.clone()), &[3.0, 2.0, 0.0], 0), Ok(2));
    let masked = SamplingParams { allowed_ids: Some(vec![0, 1]), ..biased };
    assert_eq!(sample(&mut sampler(masked), &[3.0, 2.0, 0.0], 0), Ok(1));
}

#[test]
fn stop_ids_wait_for_min_tokens() {
    let biased = SamplingParams { logit_bias: vec![(0, 100.0)], ..greedy() };
    let mut sampler = Sampler::new(biased, vec![0], 2, &[], 8, 2);
    for expected in [1, 1, 0] {
        let id = sample(&mut sampler, &[1.0, 0.0], 0).unwrap();
        assert_eq!(id, expected);
        sampler.accept(id);
    }
    assert!(sampler.stops(0) && !sampler.stops(1));
}

#[test]
fn rules_that_exclude_each_other_are_a_value() {
    for params in [greedy(), params()] {
        let only_stop = SamplingParams { allowed_ids: Some(vec![0]), ..params };
        let mut sampler = Sampler::new(only_stop, vec![0], 1, &[], 8, 2);
        assert_eq!(sample(&mut sampler, &[1.0, 0.0], 0), Err(Failure::NothingAllowed));
    }
}

#[test]
fn logits_that_are_not_finite_are_a_value() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let logits = [0.0, bad, 1.0];
        for params in [greedy(), params()] {
            assert_eq!(sample(&mut sampler(params), &logits, 0), Err(Failure::NotFinite));
        }
        assert_eq!(logprobs(&mut Workspace::new(3), &logits, 0, 1), Err(Failure::NotFinite));
    }
}

#[test]
fn extreme_but_finite_logits_draw_the_best() {
    let cold = SamplingParams { temperature: 0.01, ..params() };
    assert_eq!(support(cold, &[f32::MAX, f32::MIN, 0.0]), [0]);
}

#[test]
fn logprobs_are_the_log_softmax_best_first_ties_by_id() {
    let mut workspace = Workspace::new(5);
    let found = logprobs(&mut workspace, &[1.0, 2.0, 0.0, 2.0, -50.0], 4, 3).unwrap();
    let sum: f64 = [1.0f64, 2.0, 0.0, 2.0, -50.0].iter().map(|logit| logit.exp()).sum();
    let expected = |logit: f64| (logit - sum.ln()) as f32;
    assert!((found.logprob - expected(-50.0)).abs() < 1e-5);
    assert_eq!(found.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 3, 0]);
    for (&(_, logprob), logit) in found.top.iter().zip([2.0, 2.0, 1.0]) {
        assert!((logprob - expected(logit)).abs() < 1e-6);
    }
    assert_eq!(logprobs(&mut workspace, &[0.0; 5], 0, 0).unwrap().top, []);
}

#[test]
fn logprobs_of_a_certain_id_are_not_above_zero() {
    let found = logprobs(&mut Workspace::new(2), &[1e30, -1e30], 0, 2).unwrap();
    assert_eq!((found.logprob, found.top[0]), (0.0, (0, 0.0)));
}

#[test]
fn a_bad_word_never_comes_whole() {
    let logits = [1.0, 3.0, 2.0, 0.0];
    let mut sampler = sampler(SamplingParams { bad_words: vec![vec![1], vec![2, 2, 0]], ..greedy() });
    let mut next = |accepted: &[u32], logits: &[f32]| {
        accepted.iter().for_each(|&id| sampler.accept(id));
        sample(&mut sampler, logits, 0)
    };
    assert_eq!(next(&[], &logits), Ok(2));
    let wants_0 = [9.0, 3.0, 2.0, 0.0];
    assert_eq!(next(&[2], &wants_0), Ok(0), "only a part of it was said");
    assert_eq!(next(&[2], &wants_0), Ok(2));
    assert_eq!(next(&[3], &wants_0), Ok(0));
    let all = SamplingParams { bad_words: vec![vec![0], vec![1]], ..greedy() };
    assert_eq!(sample(&mut self::sampler(all), &[1.0, 2.0], 0), Err(Failure::NothingAllowed));
}
