//! `chat`: a conversation in the terminal. Streams; thoughts are dimmed; statistics after each answer under the
//! names of `ollama run --verbose`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use console::style;
use serde_json::{Map, Value};

use super::resident::{Compute, Resident, chat_mode, limits};
use crate::engine::{self, EngineConfig, Event, Finish, Handle, Status};
use crate::sample::SamplingParams;
use crate::text::{Chat, DecoderOptions, Delta, Fold, Message, Text};

const HELP: &str = "\
/think on|off     think before answering, or not
/system TEXT      set the system message and start over
/clear            forget the conversation
/stats on|off     statistics after each answer
/bye              leave (or Ctrl-D); Ctrl-C stops an answer";

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferrotron chat\n  ferrotron chat --model tiny --think off \
    --temperature 0\n  echo 'What is 17 + 25?' | ferrotron chat")]
pub struct Args {
    /// Preset, folder, .gguf file or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    #[command(flatten)]
    compute: Compute,
    /// Think before answering
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = on_off)]
    think: bool,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// 0 always takes the likeliest token [default: the checkpoint's]
    #[arg(long)]
    temperature: Option<f32>,
    /// Seed of the first answer; each answer adds one
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens per answer at most
    #[arg(long, default_value_t = 2048)]
    max_tokens: usize,
    /// Tokens of the whole conversation at most [default: the model's, up to 8192]
    #[arg(long, value_name = "N")]
    max_model_len: Option<usize>,
}

fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("expected `on` or `off`, got `{text}`")),
    }
}

/// Everything one conversation needs.
struct Session {
    text: Text,
    engine: Handle,
    stop_ids: Vec<u32>,
    sampling: SamplingParams,
    context_len: usize,
    max_tokens: usize,
    think: bool,
    stats: bool,
    system: Option<String>,
    turns: Vec<Message>,
    load: Duration,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let resident = Resident::open(&args.model)?;
    let text = resident.text()?;
    let native = resident.config.max_position_embeddings;
    let context_len = args.max_model_len.unwrap_or(native.min(8192));
    if context_len > native {
        bail!("--max-model-len {context_len} exceeds the model's {native} tokens");
    }
    let generation = &resident.generation;
    let sampling = SamplingParams {
        temperature: args.temperature.or(generation.temperature).unwrap_or(1.0),
        top_k: generation.top_k.unwrap_or(0),
        top_p: generation.top_p.unwrap_or(1.0),
        min_p: generation.min_p.unwrap_or(0.0),
        repetition_penalty: generation.repetition_penalty.unwrap_or(1.0),
        ..SamplingParams::plain(1.0, args.seed)
    };
    sampling.check(resident.config.vocab_size)?;
    let stop_ids = resident.stop_ids();
    let limits = limits(1, context_len, context_len.min(256));
    let config = EngineConfig { name: args.model.clone(), context_len, ..EngineConfig::default() };
    let compute = args.compute.clone();
    let (engine, runner) = engine::start(config, move |progress| {
        let total = resident.bytes();
        let network = resident.network(&compute, limits, &|done| progress.set(done, total));
        network.map_err(|error| format!("{error:#}"))
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(engine.loaded());
    if let Status::Dead(reason) = engine.status() {
        bail!("{reason}");
    }
    let mut session = Session {
        text,
        engine,
        stop_ids,
        sampling,
        context_len,
        max_tokens: args.max_tokens,
        think: args.think,
        stats: true,
        system: args.system,
        turns: Vec::new(),
        load: start.elapsed(),
    };
    let result = converse(&mut session, &runtime, &args.model);
    runtime.block_on(session.engine.shutdown(Duration::ZERO));
    runner.join().map_err(anyhow::Error::msg)?;
    result
}

/// Reads lines and answers them until the end.
fn converse(session: &mut Session, runtime: &tokio::runtime::Runtime, model: &str) -> anyhow::Result<()> {
    let interactive = std::io::stdin().is_terminal();
    if !interactive {
        for line in std::io::stdin().lines() {
            if session.line(&line.context("standard input")?, runtime)? {
                break;
            }
        }
        return Ok(());
    }
    println!("{model}. /help lists the commands.");
    let mut editor = rustyline::DefaultEditor::new()?;
    loop {
        match editor.readline(">>> ") {
            Ok(line) => {
                // A line that the history refuses (a repeat) is still a line.
                let _ = editor.add_history_entry(&line);
                if session.line(&line, runtime)? {
                    return Ok(());
                }
            }
            Err(rustyline::error::ReadlineError::Interrupted) => println!("/bye or Ctrl-D leaves."),
            Err(rustyline::error::ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Session {
    /// Does what a line asks; true means leave.
    fn line(&mut self, line: &str, runtime: &tokio::runtime::Runtime) -> anyhow::Result<bool> {
        let line = line.trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let rest = rest.trim();
        match command {
            "" => {}
            "/bye" | "/exit" | "/quit" => return Ok(true),
            "/help" | "/?" => println!("{HELP}"),
            "/clear" => self.turns.clear(),
            "/think" => match on_off(rest) {
                Ok(think) => self.think = think,
                Err(error) => println!("/think: {error}"),
            },
            "/stats" => match on_off(rest) {
                Ok(stats) => self.stats = stats,
                Err(error) => println!("/stats: {error}"),
            },
            "/system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.turns.clear();
            }
            _ if command.starts_with('/') => println!("there is no command {command}\n{HELP}"),
            _ => {
                self.turns.push(Message {
                    role: "user".into(),
                    content: Some(line.into()),
                    ..Message::default()
                });
                if let Err(error) = runtime.block_on(self.answer()) {
                    self.turns.pop();
                    println!("{}", style(format!("error: {error:#}")).red());
                }
            }
        }
        Ok(false)
    }

    fn chat(&self) -> Chat {
        let system = self.system.iter().map(|system| Message {
            role: "system".into(),
            content: Some(system.clone()),
            ..Message::default()
        });
        let mut kwargs = Map::new();
        kwargs.insert("enable_thinking".into(), Value::Bool(self.think));
        Chat {
            messages: system.chain(self.turns.iter().cloned()).collect(),
            tools: Vec::new(),
            kwargs,
            add_generation_prompt: true,
            continue_final_message: false,
            template: None,
        }
    }

    /// Streams one answer and keeps it as a turn.
    async fn answer(&mut self) -> anyhow::Result<()> {
        let chat = self.chat();
        let prompt = self.text.prompt(&chat)?;
        if prompt.len() >= self.context_len {
            let (have, limit) = (prompt.len(), self.context_len);
            bail!("the conversation has {have} tokens, the context {limit}; /clear starts over");
        }
        let start = Instant::now();
        let mode = chat_mode(&self.text, &prompt, &chat.tools, &chat.kwargs);
        let options = DecoderOptions { mode, skip_special: true, ..DecoderOptions::default() };
        let mut decoder = self.text.decoder(options);
        let prompt_tokens = prompt.len();
        let max_tokens = self.max_tokens.min(self.context_len - prompt.len());
        let mut stream = self.engine.submit(engine::Request {
            stop_ids: self.stop_ids.clone(),
            ..engine::Request::new(prompt, self.sampling.clone(), max_tokens)
        })?;
        self.sampling.seed = self.sampling.seed.wrapping_add(1);

        let (mut all, mut fresh, mut tokens) = (Vec::new(), Vec::new(), 0);
        let mut ended = None;
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                // Ctrl-C stops this answer, not the conversation; dropping the stream cancels it.
                _ = tokio::signal::ctrl_c() => None,
            };
            match event {
                Some(Event::Started { .. }) => {}
                Some(Event::Token { id, .. }) => {
                    tokens += 1;
                    if self.stop_ids.contains(&id) {
                        decoder.end_of_turn();
                    } else {
                        decoder.push(id, &mut fresh);
                    }
                    show(&mut fresh, &mut all)?;
                }
                Some(Event::Finished { finish, timings }) => {
                    ended = Some((finish, timings));
                    break;
                }
                Some(Event::Failed(failure)) => return Err(failure.into()),
                None => break,
            }
        }
        drop(stream);
        decoder.finish(&mut fresh);
        show(&mut fresh, &mut all)?;
        println!();
        match ended {
            Some((Finish::Length, _)) => println!("{}", style("[cut: the token limit is reached]").dim()),
            Some((Finish::Stop { .. }, _)) => {}
            None => println!("{}", style("[stopped]").dim()),
        }
        let mut fold = Fold::default();
        all.into_iter().for_each(|delta| fold.push(delta));
        let answer = fold.finish(decoder.reasoning_became_content());
        self.turns.push(Message {
            role: "assistant".into(),
            content: answer.content,
            reasoning: answer.reasoning,
            ..Message::default()
        });
        if let Some((_, timings)) = ended
            && self.stats
        {
            statistics(start.elapsed(), self.load, prompt_tokens, tokens, &timings);
        }
        Ok(())
    }
}

/// Prints fresh deltas and moves them to the others.
fn show(fresh: &mut Vec<Delta>, all: &mut Vec<Delta>) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for delta in fresh.iter() {
        match delta {
            Delta::Reasoning(text) => write!(out, "{}", style(text).dim())?,
            Delta::Content(text) => {
                // An empty line between the thought and the answer.
                if matches!(all.last(), Some(Delta::Reasoning(_))) {
                    write!(out, "\n\n")?;
                }
                write!(out, "{text}")?;
            }
            Delta::CallStart { name, .. } => write!(out, "\n{} ", style(format!("call {name}")).cyan())?,
            Delta::CallArguments { json, .. } => write!(out, "{}", style(json).cyan())?,
            Delta::CallEnd { .. } => writeln!(out)?,
        }
        all.push(delta.clone());
    }
    fresh.clear();
    out.flush()
}

/// The names and columns of `ollama run --verbose`, on standard error as there.
fn statistics(total: Duration, load: Duration, prompt: usize, tokens: usize, timings: &engine::Timings) {
    let rate = |count: usize, time: Duration| count as f64 / time.as_secs_f64().max(1e-9);
    // The first token comes out of the prefill; the others are decoded.
    let (evaluated, decode) = (tokens.saturating_sub(1), timings.decode);
    let row = |name: &str, value: String| eprintln!("{:<22}{value}", format!("{name}:"));
    eprintln!();
    row("total duration", duration(total));
    row("load duration", duration(load));
    row("prompt eval count", format!("{prompt} token(s)"));
    row("prompt eval duration", duration(timings.prefill));
    row("prompt eval rate", format!("{:.2} tokens/s", rate(prompt, timings.prefill)));
    row("eval count", format!("{tokens} token(s)"));
    row("eval duration", duration(decode));
    row("eval rate", format!("{:.2} tokens/s", rate(evaluated, decode)));
}

/// As Go prints durations: 1.234567s, 85.1ms, 12µs.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let trim = |text: String| text.trim_end_matches('0').trim_end_matches('.').to_owned();
    match seconds {
        s if s >= 60.0 => {
            let minutes = (s / 60.0).floor();
            format!("{minutes}m{}s", trim(format!("{:.6}", s - 60.0 * minutes)))
        }
        s if s >= 1.0 => format!("{}s", trim(format!("{s:.6}"))),
        s if s >= 1e-3 => format!("{}ms", trim(format!("{:.4}", s * 1e3))),
        s => format!("{}µs", trim(format!("{:.3}", s * 1e6))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_in_go() {
        let check = |micros, expected| assert_eq!(duration(Duration::from_micros(micros)), expected);
        check(1_234_567, "1.234567s");
        check(85_100, "85.1ms");
        check(12, "12µs");
        check(2_000_000, "2s");
        check(61_500_000, "1m1.5s");
    }
}
