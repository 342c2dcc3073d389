//! `bench agents`: conversations with tools that share a long system prompt. How much of what could be reused is, and
//! how much sooner the first token comes for it.

mod reuse;
pub mod world;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::answer::Answer;
use super::client::ClientError;
use super::serve::{Server, ServerArgs};
use super::{machine, median, progress, tell};
use crate::cli::resident::count;
use crate::cli::table::{self, bytes};
use reuse::Known;
use world::World;

const CHAT: &str = "/v1/chat/completions";
/// Answers to tool results within one turn; a model that calls for ever is stopped.
const ROUNDS: usize = 3;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferrotron bench agents\n  ferrotron bench agents --agents 8 --turns 10 --json\n  \
    ferrotron bench agents --base-url http://spark:8000 --system-tokens 8000"
)]
pub struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Conversations, which take turns
    #[arg(long, default_value_t = 4, value_parser = count::<1000>)]
    agents: usize,
    /// Questions per conversation
    #[arg(long, default_value_t = 6, value_parser = count::<1000>)]
    turns: usize,
    /// Tokens of the system prompt that all share, at least
    #[arg(long, default_value_t = 1000, value_parser = count::<1_000_000>)]
    system_tokens: usize,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 160, value_parser = count::<1_000_000>)]
    max_tokens: usize,
    /// Answer without thoughts
    #[arg(long)]
    no_thinking: bool,
    /// Keep earlier thoughts in the prompt; the template drops them otherwise
    #[arg(long, conflicts_with = "no_thinking")]
    keep_thoughts: bool,
    /// Of questions and tool results
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Flags of the server that is started, after `--`
    #[arg(last = true, value_name = "SERVE_FLAGS")]
    flags: Vec<String>,
}

/// One request.
#[derive(Debug, Clone)]
struct Exchange {
    turn: usize,
    body: Value,
    prompt: usize,
    /// Tokens at its head that were sent or generated before.
    reusable: usize,
    cached: usize,
    /// Milliseconds to the first token: in the conversation, and with nothing cached.
    warm: f64,
    cold: f64,
}

/// One turn of all conversations.
#[derive(Debug, Clone, Serialize)]
struct Row {
    /// From 1.
    turn: usize,
    requests: usize,
    /// Tokens of all requests together.
    prompt_tokens: usize,
    reusable_tokens: usize,
    cached_tokens: usize,
    hit_percent: f64,
    /// Medians.
    warm_ttft_ms: f64,
    cold_ttft_ms: f64,
    /// Median of each request's own.
    warm_to_cold_percent: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    machine: String,
    agents: usize,
    turns: usize,
    system_tokens: usize,
    rows: Vec<Row>,
    /// All turns; warm times only of requests that could reuse something.
    all: Row,
    /// None for a server that is not ours.
    memory: Option<Memory>,
}

/// What the prefix cache held after the conversations.
#[derive(Debug, Serialize)]
struct Memory {
    kv_blocks: u64,
    kv_bytes: u64,
    checkpoints: u64,
    checkpoint_bytes: u64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let report = super::runtime()?.block_on(measure(args))?;
    tell(&report, args.json, print)
}

async fn measure(args: &Args) -> anyhow::Result<Report> {
    let server = Server::open(&args.server, args.agents.clamp(8, 64), &args.flags).await?;
    let mut world = World::new(args.seed);
    let (system, system_tokens) = system(args, &server, &mut world).await?;
    // Runs with one seed ask the same; none is to profit from what another left.
    let salt = format!("agents-{}", jiff::Timestamp::now().as_nanosecond());
    let mut talk =
        Talk { args, server: &server, world, salt, known: Known::default(), exchanges: Vec::new() };
    let mut histories = vec![vec![json!({"role": "system", "content": system})]; args.agents];
    let bar = progress("conversing", args.agents * args.turns, args.json)?;
    for turn in 1..=args.turns {
        for history in &mut histories {
            talk.turn(turn, history).await?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let memory = memory(&server);
    let mut exchanges = talk.exchanges;
    measure_cold(args, &server, &mut exchanges).await?;
    let model = server.model.clone();
    server.close().await?;
    Ok(Report {
        model,
        machine: machine(),
        agents: args.agents,
        turns: args.turns,
        system_tokens,
        rows: (1..=args.turns)
            .filter_map(|turn| row(turn, exchanges.iter().filter(|e| e.turn == turn)))
            .collect(),
        all: row(0, exchanges.iter()).context("there was no request")?,
        memory,
    })
}

/// Facts until there are tokens enough, and how many there are.
async fn system(args: &Args, server: &Server, world: &mut World) -> anyhow::Result<(String, usize)> {
    const AT_ONCE: usize = 8;
    let mut text = world::OPENING.to_owned();
    loop {
        let body = json!({"model": server.model, "prompt": text, "add_special_tokens": false});
        let counted = server.target.post("/tokenize", &body).await?;
        let count = counted["count"].as_u64().context("/tokenize: no `count` in the answer")? as usize;
        if count >= args.system_tokens {
            return Ok((text, count));
        }
        for _ in 0..AT_ONCE {
            text.push(' ');
            text += &world.fact();
        }
    }
}

/// What goes on while the agents talk.
struct Talk<'a> {
    args: &'a Args,
    server: &'a Server,
    world: World,
    salt: String,
    known: Known,
    exchanges: Vec<Exchange>,
}

impl Talk<'_> {
    /// A question, the answer, and what its tools make of it.
    async fn turn(&mut self, turn: usize, history: &mut Vec<Value>) -> anyhow::Result<()> {
        history.push(json!({"role": "user", "content": self.world.question()}));
        for _ in 0..ROUNDS {
            let answer = self.ask(turn, history).await?;
            history.push(answer.message());
            for call in &answer.calls {
                let arguments = serde_json::from_str(&call.arguments).unwrap_or_default();
                let result = self.world.tool_result(&call.name, &arguments);
                history.push(json!({"role": "tool", "tool_call_id": call.id, "content": result}));
            }
            if answer.calls.is_empty() {
                break;
            }
        }
        Ok(())
    }

    async fn ask(&mut self, turn: usize, history: &[Value]) -> anyhow::Result<Answer> {
        let body = body(self.args, &self.server.model, history, &self.salt);
        let (answer, warm) = first_token(self.server, &body).await?;
        ensure!(
            !answer.prompt_ids.is_empty(),
            "the server does not say which ids it read (`return_token_ids`), so what could be reused is not known"
        );
        let prompt = answer.prompt_ids.len();
        // The last token is computed in any case: its logits are the answer's first.
        let reusable = self.known.shared(&answer.prompt_ids).min(prompt - 1);
        let cached = answer.usage.cached;
        ensure!(
            self.server.local.is_none() || cached <= reusable,
            "the server says that {cached} tokens were cached, but only {reusable} were ever seen"
        );
        self.known.add(answer.prompt_ids.iter().chain(&answer.ids).copied().collect());
        self.exchanges.push(Exchange { turn, body, prompt, reusable, cached, warm, cold: 0.0 });
        Ok(answer)
    }
}

fn body(args: &Args, model: &str, history: &[Value], salt: &str) -> Value {
    let mut kwargs = json!({});
    if args.no_thinking {
        kwargs["enable_thinking"] = json!(false);
    }
    if args.keep_thoughts {
        kwargs["truncate_history_thinking"] = json!(false);
    }
    json!({
        "model": model, "messages": history, "tools": world::tools(), "chat_template_kwargs": kwargs,
        "temperature": 0, "max_tokens": args.max_tokens, "stream": true, "return_token_ids": true,
        "stream_options": {"include_usage": true}, "cache_salt": salt,
    })
}

/// The answer, and milliseconds to its first token.
async fn first_token(server: &Server, body: &Value) -> Result<(Answer, f64), ClientError> {
    let (mut answer, sent) = (Answer::default(), Instant::now());
    server.target.stream(CHAT, body, |event, now| answer.push(&event, now)).await?;
    let first = answer.first.map_or(0.0, |first| first.saturating_duration_since(sent).as_secs_f64() * 1e3);
    Ok((answer, first))
}

/// Every request again, each with a salt that nobody used, and for one token only.
async fn measure_cold(args: &Args, server: &Server, exchanges: &mut [Exchange]) -> anyhow::Result<()> {
    let bar = progress("cold", exchanges.len(), args.json)?;
    let stamp = jiff::Timestamp::now().as_nanosecond();
    for (index, exchange) in exchanges.iter_mut().enumerate() {
        let mut body = exchange.body.clone();
        body["cache_salt"] = json!(format!("cold-{stamp}-{index}"));
        body["max_tokens"] = json!(1);
        exchange.cold = first_token(server, &body).await?.1;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// None of no requests. Times are those of requests that could reuse something, if any could.
fn row<'a>(turn: usize, exchanges: impl Iterator<Item = &'a Exchange>) -> Option<Row> {
    let all: Vec<&Exchange> = exchanges.collect();
    let sum = |of: fn(&Exchange) -> usize| all.iter().map(|exchange| of(exchange)).sum::<usize>();
    let mut timed: Vec<&Exchange> = all.iter().copied().filter(|exchange| exchange.reusable > 0).collect();
    if timed.is_empty() {
        timed.clone_from(&all);
    }
    if timed.is_empty() {
        return None;
    }
    let middle = |of: fn(&Exchange) -> f64| median(timed.iter().map(|exchange| of(exchange)).collect());
    let (reusable_tokens, cached_tokens) =
        (sum(|exchange| exchange.reusable), sum(|exchange| exchange.cached));
    Some(Row {
        turn,
        requests: all.len(),
        prompt_tokens: sum(|exchange| exchange.prompt),
        reusable_tokens,
        cached_tokens,
        hit_percent: 100.0 * cached_tokens as f64 / reusable_tokens.max(1) as f64,
        warm_ttft_ms: middle(|exchange| exchange.warm),
        cold_ttft_ms: middle(|exchange| exchange.cold),
        warm_to_cold_percent: middle(|exchange| 100.0 * exchange.warm / exchange.cold.max(1e-9)),
    })
}

fn memory(server: &Server) -> Option<Memory> {
    let engine = server.local.as_ref()?.app.resident(0)?.engine;
    let stats = engine.stats();
    let (kv_blocks, checkpoints) = (stats.cache_blocks.load(Relaxed), stats.cache_checkpoints.load(Relaxed));
    Some(Memory {
        kv_blocks,
        kv_bytes: kv_blocks * stats.block_bytes.load(Relaxed),
        checkpoints,
        checkpoint_bytes: checkpoints * stats.state_bytes.load(Relaxed),
    })
}

fn print(report: &Report) {
    let Report { model, machine, agents, turns, system_tokens, .. } = report;
    println!("{model}: {agents} agents, {turns} turns, a system prompt of {system_tokens} tokens; {machine}");
    let header = [
        "turn",
        "requests",
        "prompt tokens",
        "reusable",
        "cached",
        "hit %",
        "warm ms",
        "cold ms",
        "warm/cold %",
    ];
    let cells = report.rows.iter().chain([&report.all]).map(|row| {
        [
            if row.turn == 0 { "all".to_owned() } else { row.turn.to_string() },
            row.requests.to_string(),
            row.prompt_tokens.to_string(),
            row.reusable_tokens.to_string(),
            row.cached_tokens.to_string(),
            format!("{:.1}", row.hit_percent),
            format!("{:.2}", row.warm_ttft_ms),
            format!("{:.2}", row.cold_ttft_ms),
            format!("{:.1}", row.warm_to_cold_percent),
        ]
    });
    table::print(header, &[0, 1, 2, 3, 4, 5, 6, 7, 8], cells);
    if let Some(memory) = &report.memory {
        let Memory { kv_blocks, kv_bytes, checkpoints, checkpoint_bytes } = *memory;
        let (keys, states) = (bytes(kv_bytes), bytes(checkpoint_bytes));
        println!("The prefix cache held {kv_blocks} KV blocks ({keys}) and {checkpoints} states ({states}).");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(turn: usize, reusable: usize, cached: usize, warm: f64) -> Exchange {
        Exchange { turn, body: Value::Null, prompt: 100, reusable, cached, warm, cold: 100.0 }
    }

    #[test]
    fn a_row_counts_all_and_times_those_that_could_be_warm() {
        let exchanges = [exchange(1, 0, 0, 100.0), exchange(1, 80, 60, 20.0), exchange(1, 20, 20, 10.0)];
        let row = row(1, exchanges.iter()).expect("there are some");
        assert_eq!(
            (row.requests, row.prompt_tokens, row.reusable_tokens, row.cached_tokens),
            (3, 300, 100, 80)
        );
        assert_eq!((row.hit_percent, row.warm_ttft_ms, row.warm_to_cold_percent), (80.0, 20.0, 20.0));
    }

    #[test]
    fn a_first_request_has_nothing_to_reuse_and_is_timed_all_the_same() {
        let row = row(1, [exchange(1, 0, 0, 100.0)].iter()).expect("there is one");
        assert_eq!((row.hit_percent, row.warm_ttft_ms), (0.0, 100.0));
        assert!(super::row(1, [].iter()).is_none());
    }
}
