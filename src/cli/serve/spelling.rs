//! vLLM's ways to spell a flag, and the flags that mean nothing here: put right before clap reads them.

use std::ffi::OsString;

/// What an ignored flag takes along.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    Value,
    /// Everything up to the next flag.
    Values,
}

/// Flags that start scripts of vLLM pass and that have nothing to change here, by their canonical spelling.
const IGNORED: [(&str, Takes); 45] = [
    ("--disable-log-requests", Takes::Nothing),
    ("--swap-space", Takes::Value),
    ("--compilation-config", Takes::Value),
    ("--async-scheduling", Takes::Nothing),
    ("--no-async-scheduling", Takes::Nothing),
    ("--api-server-count", Takes::Value),
    ("--distributed-executor-backend", Takes::Value),
    ("--enable-expert-parallel", Takes::Nothing),
    ("--guided-decoding-backend", Takes::Value),
    ("--tokenizer-mode", Takes::Value),
    ("--hf-token", Takes::Value),
    ("--middleware", Takes::Value),
    ("--disable-fastapi-docs", Takes::Nothing),
    ("--kv-transfer-config", Takes::Value),
    ("--limit-mm-per-prompt", Takes::Value),
    ("--language-model-only", Takes::Nothing),
    ("--mm-processor-cache-gb", Takes::Value),
    ("--disable-frontend-multiprocessing", Takes::Nothing),
    ("--fingerprint-mode", Takes::Value),
    ("--long-prefill-token-threshold", Takes::Value),
    ("--max-seq-len-to-capture", Takes::Value),
    ("--use-v2-block-manager", Takes::Nothing),
    ("--enable-reasoning", Takes::Nothing),
    ("--worker-cls", Takes::Value),
    ("--h11-max-incomplete-event-size", Takes::Value),
    ("--h11-max-header-count", Takes::Value),
    ("--reasoning-parser-plugin", Takes::Value),
    ("--tool-parser-plugin", Takes::Value),
    ("--trust-remote-code", Takes::Nothing),
    ("--enforce-eager", Takes::Nothing),
    ("--enable-auto-tool-choice", Takes::Nothing),
    ("--gpu-memory-utilization", Takes::Value),
    ("--enable-chunked-prefill", Takes::Nothing),
    ("--block-size", Takes::Value),
    ("--enable-prompt-tokens-details", Takes::Nothing),
    ("--enable-request-id-headers", Takes::Nothing),
    ("--enable-server-load-tracking", Takes::Nothing),
    ("--cudagraph-capture-sizes", Takes::Values),
    ("--max-cudagraph-capture-size", Takes::Value),
    ("--moe-backend", Takes::Value),
    ("--attention-backend", Takes::Value),
    ("--mamba-cache-dtype", Takes::Value),
    ("--load-format", Takes::Value),
    ("--jinja", Takes::Nothing),
    ("--metrics", Takes::Nothing),
];

/// Short spellings of more than one letter, which clap does not know.
const SHORT: [(&str, &str); 5] = [
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-np", "--max-num-seqs"),
    ("-cc", "--compilation-config"),
    ("-sc", "--speculative-config"),
];

/// The command line of `serve` as clap shall read it: underscores in names are dashes, ignored flags become
/// `--ignored NAME`, which [`super::run`] warns about. Other commands pass through untouched.
pub fn spell(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments = arguments.into_iter().peekable();
    let mut spelled: Vec<OsString> = arguments.next().into_iter().collect();
    let command = arguments.next();
    let serves = command.as_ref().is_some_and(|command| command == "serve");
    spelled.extend(command);
    if !serves {
        spelled.extend(arguments);
        return spelled;
    }
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            spelled.push(argument);
            spelled.extend(arguments);
            return spelled;
        }
        let (name, value) = split(&argument);
        let Some(name) = name.map(canonical) else {
            spelled.push(argument);
            continue;
        };
        match IGNORED.iter().find(|(ignored, _)| *ignored == name) {
            Some((ignored, takes)) => {
                if value.is_none() {
                    skip(&mut arguments, *takes);
                }
                spelled.push("--ignored".into());
                // With `=`, because the name begins like a flag.
                let last = spelled.len() - 1;
                spelled[last].push("=");
                spelled[last].push(ignored);
            }
            None => spelled.push(match value {
                Some(value) => format!("{name}={value}").into(),
                None => name.into(),
            }),
        }
    }
    spelled
}

/// The name of a flag and the value behind its `=`; no name if the argument is none.
fn split(argument: &OsString) -> (Option<&str>, Option<&str>) {
    match argument.to_str() {
        // `-O3`: the only one whose value is glued to it.
        Some(flag) if flag.starts_with("-O") && flag.len() > 2 => (Some("-O"), flag.get(2..)),
        Some(flag) if flag.starts_with('-') && flag.len() > 1 => match flag.split_once('=') {
            Some((name, value)) => (Some(name), Some(value)),
            None => (Some(flag), None),
        },
        _ => (None, None),
    }
}

fn canonical(name: &str) -> String {
    match SHORT.iter().find(|(short, _)| *short == name) {
        Some((_, long)) => (*long).to_owned(),
        None if name.starts_with("--") => name.replace('_', "-"),
        None if name == "-O" => "--compilation-config".to_owned(),
        None => name.to_owned(),
    }
}

fn skip(arguments: &mut std::iter::Peekable<impl Iterator<Item = OsString>>, takes: Takes) {
    let is_value = |next: &OsString| !next.to_string_lossy().starts_with("--");
    match takes {
        Takes::Nothing => {}
        Takes::Value => {
            arguments.next_if(is_value);
        }
        Takes::Values => while arguments.next_if(is_value).is_some() {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(typed: &str, expected: &str) {
        let words = typed.split(' ').map(OsString::from);
        let spelled: Vec<String> =
            spell(words).into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(spelled.join(" "), expected);
    }

    #[test]
    fn underscores_are_dashes_in_names_only() {
        check("f serve --max_model_len 9", "f serve --max-model-len 9");
        check("f serve --served_model_name=a_b", "f serve --served-model-name=a_b");
        check("f serve my_model", "f serve my_model");
        check("f serve -- --max_model_len", "f serve -- --max_model_len");
        check("f chat --max_model_len 9", "f chat --max_model_len 9");
        check("f serve -tp 1 --port 0", "f serve --tensor-parallel-size 1 --port 0");
    }

    #[test]
    fn what_means_nothing_here_is_told_and_its_value_skipped() {
        check("f serve --swap-space 4 tiny", "f serve --ignored=--swap-space tiny");
        check("f serve --swap_space=4 tiny", "f serve --ignored=--swap-space tiny");
        check("f serve --enforce-eager tiny", "f serve --ignored=--enforce-eager tiny");
        check(
            "f serve --cudagraph-capture-sizes 1 2 4 --port 1",
            "f serve --ignored=--cudagraph-capture-sizes --port 1",
        );
        check("f serve -O3 tiny", "f serve --ignored=--compilation-config tiny");
    }
}
