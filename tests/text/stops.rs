//! Stop strings: http-api §2.5.

use ferrotron::text::{DecoderOptions, Delta};

use crate::world::{chat, chat_off, read, text, tools};

fn raw(stop: &[&str]) -> DecoderOptions {
    DecoderOptions { stop: stop.iter().map(|s| s.to_string()).collect(), ..DecoderOptions::default() }
}

fn check(output: &str, stop: &[&str], content: &str, matched: Option<&str>) {
    let reading = read(output, &raw(stop));
    assert_eq!(reading.answer.content.unwrap_or_default(), content, "{output:?} with {stop:?}");
    assert_eq!(reading.stop.as_deref(), matched, "{output:?} with {stop:?}");
}

#[test]
fn a_stop_string_across_tokens_does_not_leak() {
    check("one STOP two", &["STOP"], "one ", Some("STOP"));
    check("one STO two", &["STOP"], "one STO two", None);
    check("one STO", &["STOP"], "one STO", None);
    check("ééé", &["éé"], "", Some("éé"));
}

#[test]
fn the_match_that_is_complete_first_wins() {
    check("abcdef", &["abcde", "cd"], "ab", Some("cd"));
    check("abcdef", &["cd", "abcde"], "ab", Some("cd"));
}

#[test]
fn of_two_that_end_together_the_longer_wins() {
    check("abcd", &["cd", "bcd"], "a", Some("bcd"));
    check("abcd", &["bcd", "cd"], "a", Some("bcd"));
}

#[test]
fn a_false_start_is_not_a_match_lost() {
    check("aaab", &["aab"], "a", Some("aab"));
    check("abababc!", &["ababc"], "ab", Some("ababc"));
}

#[test]
fn empty_strings_stop_nothing() {
    check("abc", &[""], "abc", None);
}

#[test]
fn the_stop_string_can_be_kept() {
    let options = DecoderOptions { include_stop: true, ..raw(&["b"]) };
    let reading = read("abc", &options);
    assert_eq!(reading.answer.content.as_deref(), Some("ab"));
    assert_eq!(reading.stop.as_deref(), Some("b"));
}

#[test]
fn matching_runs_before_the_split() {
    let stop = |stop: &str| DecoderOptions { stop: vec![stop.into()], ..chat(tools()) };
    let reading = read("a thought END more</think>c", &stop("END"));
    assert_eq!(reading.answer.reasoning.as_deref(), Some("a thought"));
    assert_eq!(reading.answer.content, None);
    // Tags are part of the raw text: a match may hold one, end in one or begin in one. None of it is text then.
    for stop_string in ["ht</think>c", "ht</thi", "think>c", "</think>"] {
        let reading = read("a thought</think>c", &stop(stop_string));
        assert_eq!(reading.stop.as_deref(), Some(stop_string));
        let expected = if stop_string.starts_with("ht") { "a thoug" } else { "a thought" };
        assert_eq!(reading.answer.reasoning.as_deref(), Some(expected), "{stop_string}");
        assert_eq!(reading.answer.content, None, "{stop_string}");
    }
}

#[test]
fn a_call_cut_by_a_stop_string_is_left_out() {
    let options = DecoderOptions { stop: vec!["END".into()], ..chat_off(tools()) };
    let reading = read("<function=f><parameter=s>v END</parameter></function>", &options);
    assert!(reading.answer.calls.is_empty());
}

#[test]
fn min_tokens_suspends_matching() {
    let text = text(None);
    let ids = text.encode("xx xx", false).unwrap();
    let mut decoder = text.decoder(raw(&["xx"]));
    let mut out = Vec::new();
    decoder.suspend_stop(true);
    assert_eq!(decoder.push(ids[0], &mut out), None);
    decoder.suspend_stop(false);
    // The match must begin after the suspension: the first x was sent already.
    for &id in &ids[1..4] {
        assert_eq!(decoder.push(id, &mut out), None);
    }
    assert_eq!(decoder.push(ids[4], &mut out).as_deref(), Some("xx"));
    decoder.finish(&mut out);
    assert_eq!(out, [Delta::Content("xx ".into())]);
}

#[test]
fn nothing_is_held_longer_than_it_must() {
    let text = text(None);
    let mut decoder = text.decoder(raw(&["abc"]));
    let mut out = Vec::new();
    for id in text.encode("xabab", false).unwrap() {
        decoder.push(id, &mut out);
    }
    assert_eq!(out, [Delta::Content("xab".into())]);
}
