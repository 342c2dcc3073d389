//! Flags that start scripts of vLLM and llama-server pass and that have nothing to change here, each with its reason.

/// What a flag takes along.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Takes {
    Nothing,
    Value,
    /// Everything up to the next flag.
    Values,
}

/// A flag by its canonical spelling, and why nothing comes of it.
#[derive(Debug)]
pub struct Ignored {
    pub name: &'static str,
    pub takes: Takes,
    /// The values that say what is so anyway; any other asks for something else, and that is an error. Empty: all.
    pub only: &'static [&'static str],
    pub why: &'static str,
}

const fn switch(name: &'static str, why: &'static str) -> Ignored {
    Ignored { name, takes: Takes::Nothing, only: &[], why }
}

const fn value(name: &'static str, why: &'static str) -> Ignored {
    Ignored { name, takes: Takes::Value, only: &[], why }
}

const fn only(name: &'static str, only: &'static [&'static str], why: &'static str) -> Ignored {
    Ignored { name, takes: Takes::Value, only, why }
}

const GRAPHS: &str = "there are no graphs to capture on the CPU";
const PLUGIN: &str = "no plug-in is loaded: the parser of this family is built in";
const NO_PYTHON: &str = "no Python runs in this server";
const PICTURES: &str = "the models of this family read text alone";
const WHOLE: &str = "the whole server is one process";

#[rustfmt::skip]
const IGNORED: [Ignored; 73] = [
    switch("--trust-remote-code", "no code of a checkpoint is ever run; its chat template runs in a sandbox"),
    value("--reasoning-parser-plugin", PLUGIN),
    value("--tool-parser-plugin", PLUGIN),
    value("--middleware", NO_PYTHON),
    value("--worker-cls", NO_PYTHON),
    switch("--enforce-eager", GRAPHS),
    Ignored { name: "--cudagraph-capture-sizes", takes: Takes::Values, only: &[], why: GRAPHS },
    value("--max-cudagraph-capture-size", GRAPHS),
    value("--max-seq-len-to-capture", GRAPHS),
    value("--compilation-config", "nothing is compiled at start"),
    switch("--enable-auto-tool-choice", "calls are always parsed where a request brings tools"),
    switch("--enable-reasoning", "thoughts are always told from answers"),
    switch("--enable-chunked-prefill", "prompts are always read in chunks, of --max-num-batched-tokens at most"),
    value("--long-prefill-token-threshold", "long prompts take turns by --max-num-batched-tokens"),
    switch("--async-scheduling", "the next step is always prepared while one runs"),
    switch("--use-v2-block-manager", "there is one block manager"),
    value("--scheduling-policy", "the `priority` of requests always counts, and within a class who came first is first"),
    value("--block-size", "a block of keys and values holds 16 tokens"),
    value("--mamba-block-size", "states are kept where turns end, wherever that is"),
    value("--mamba-cache-dtype", "the inputs of convolutions are kept as wide as --dtype; for states see --mamba-ssm-cache-dtype"),
    value("--swap-space", "nothing is swapped: what has no room is computed again"),
    only("--cpu-offload-gb", &["0", "0.0"], "weights are in the CPU's memory anyway"),
    value("--moe-backend", "kernels are chosen for the CPU at start"),
    value("--attention-backend", "kernels are chosen for the CPU at start"),
    value("--guided-decoding-backend", "grammars are llguidance's"),
    value("--structured-outputs-config", "grammars are llguidance's and begin after the thought"),
    value("--reasoning-config", "the marks of a thought are the template's"),
    only("--reasoning-effort-map", &["{}"], "efforts are read as they are written"),
    only("--tool-strict-level", &["parameter"], "every call is held to the schemas of its tool's parameters"),
    only("--reasoning-format", &["auto", "deepseek"], "thoughts always stand apart from the answer"),
    only("--reasoning-field", &["both"], "thoughts are sent as `reasoning` and as `reasoning_content`"),
    only("--named-tool-finish-reason", &["stop"], "a call that was asked for by name ends with `stop`, as OpenAI's do"),
    only("--chat-template-content-format", &["auto", "string"], "templates of this family take content as a string"),
    only("--response-role", &["assistant"], "answers are the assistant's"),
    only("--logprobs-mode", &["raw_logprobs"], "log-probabilities are those before temperature and penalties"),
    only("--hf-overrides", &["{}"], "the checkpoint's configuration is taken as it is: edit its config.json"),
    value("--tokenizer-mode", "there is one tokenizer, in Rust"),
    value("--hf-token", "serving downloads nothing; `ferrotron pull` reads HF_TOKEN"),
    value("--stream-interval", "every token is sent as soon as it is there"),
    value("--max-num-queued-tokens", "the queue is counted in requests: --max-num-queued-reqs"),
    switch("--enable-prompt-tokens-details", "usage always says how many tokens came from the cache"),
    switch("--enable-per-request-metrics", "answers always carry `timings`"),
    switch("--enable-request-id-headers", "`x-request-id` is always sent"),
    switch("--enable-server-load-tracking", "GET /load always counts"),
    switch("--enable-tokenizer-info-endpoint", "GET /tokenizer_info is not served"),
    switch("--disable-log-requests", "requests are logged in one line each, without their text"),
    switch("--enable-log-requests", "requests are logged in one line each, without their text"),
    switch("--enable-log-outputs", "answers are never logged"),
    value("--max-log-len", "no text is logged that could be cut"),
    value("--otlp-traces-endpoint", "no traces are sent; --trace-file writes one"),
    switch("--disable-fastapi-docs", "there is no FastAPI"),
    switch("--metrics", "GET /metrics is always served"),
    switch("--jinja", "templates are always rendered"),
    switch("--strict-vllm", "where releases of vLLM differ there is one behaviour, and it is the documented one"),
    value("--fingerprint-mode", "the fingerprint is this build's"),
    value("--h11-max-incomplete-event-size", "a head may have 64 KiB"),
    value("--h11-max-header-count", "a head may have 256 fields"),
    value("--ssl-ciphers", "TLS 1.2 and 1.3 are spoken with the ciphers that are held safe"),
    switch("--enable-ssl-refresh", "certificates are read at start: restart to read them again"),
    value("--api-server-count", WHOLE),
    value("--distributed-executor-backend", WHOLE),
    switch("--disable-frontend-multiprocessing", WHOLE),
    switch("--enable-expert-parallel", "all experts are on one device"),
    value("--kv-transfer-config", "keys and values stay where they are"),
    value("--limit-mm-per-prompt", PICTURES),
    switch("--language-model-only", PICTURES),
    value("--mm-processor-cache-gb", PICTURES),
    value("--max-parallel-loading-workers", "a checkpoint is mapped, and read by all threads"),
    value("--model-loader-extra-config", "a checkpoint is mapped, and read by all threads"),
    value("--tokenizer-revision", "the tokenizer is the checkpoint's; for another see --tokenizer"),
    value("--code-revision", "no code of a checkpoint is ever run"),
    value("--config-format", "config.json and GGUF are told apart by themselves"),
    switch("--disable-custom-all-reduce", WHOLE),
];

/// What we know of a flag by its canonical spelling, or by its denial.
pub fn find(name: &str) -> Option<&'static Ignored> {
    let exact = |name: &str| IGNORED.iter().find(|ignored| ignored.name == name);
    let denied =
        || exact(&format!("--{}", name.strip_prefix("--no-")?)).filter(|i| i.takes == Takes::Nothing);
    exact(name).or_else(denied)
}

/// The one line that a flag without effect gets.
pub fn told(name: &str) -> String {
    match find(name) {
        Some(ignored) => format!("{name} is ignored: {}", ignored.why),
        None => format!("{name} is ignored: it is not known here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_there_once_with_a_reason() {
        for (index, ignored) in IGNORED.iter().enumerate() {
            assert!(ignored.name.starts_with("--") && !ignored.why.is_empty(), "{}", ignored.name);
            assert!(!IGNORED[..index].iter().any(|before| before.name == ignored.name), "{}", ignored.name);
        }
    }

    #[test]
    fn a_switch_may_be_denied_and_a_value_may_not() {
        assert!(find("--no-async-scheduling").is_some());
        assert!(find("--no-swap-space").is_none());
        assert_eq!(told("--no-such"), "--no-such is ignored: it is not known here");
    }
}
