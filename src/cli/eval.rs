//! `eval`: answers held-out prompts greedily, counts what is right, and how often the drafter's first guess is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::resident::{BLOCK_LEN, Compute, Resident, chat_mode, greedy, limits};
use super::table::table;
use crate::backend::{DraftInputs, StepInputs};
use crate::model::Network;
use crate::text::{Answer, Chat, DecoderOptions, Fold, Message, Text, ToolCall};

/// The prompts that ship with the tiny model, from families it was trained on but never seen in training.
pub const HELDOUT: &str = include_str!("../../models/tiny/heldout.jsonl");

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferrotron eval\n  ferrotron eval --model tiny-nvfp4 --show-wrong")]
pub struct Args {
    /// Preset, folder, .gguf file or hub id
    #[arg(long, short, default_value = "tiny")]
    model: String,
    /// JSON lines: {"family", "request": {"messages", "tools", "chat_template_kwargs"}, "expect"}
    /// [default: the tiny model's held-out prompts]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Tokens generated at most per prompt
    #[arg(long, default_value_t = 160)]
    max_tokens: usize,
    /// Print every wrong answer
    #[arg(long)]
    show_wrong: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

/// One held-out prompt and what counts as right.
#[derive(Debug, Deserialize)]
pub struct Problem {
    family: String,
    pub request: Request,
    expect: Expect,
}

#[derive(Debug, Deserialize)]
pub struct Request {
    messages: Vec<Turn>,
    #[serde(default)]
    tools: Vec<Value>,
    #[serde(default)]
    chat_template_kwargs: Map<String, Value>,
}

/// A message in OpenAI's form, as far as prompts of ours use it.
#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: Option<String>,
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Vec<TurnCall>,
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct TurnCall {
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    arguments: Value,
}

impl From<&Turn> for Message {
    fn from(turn: &Turn) -> Message {
        let call = |call: &TurnCall| ToolCall {
            id: None,
            name: call.function.name.clone(),
            arguments: call.function.arguments.clone(),
        };
        Message {
            role: turn.role.clone(),
            content: turn.content.clone(),
            reasoning: turn.reasoning_content.clone(),
            tool_calls: turn.tool_calls.iter().map(call).collect(),
            tool_call_id: turn.tool_call_id.clone(),
            name: None,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Expect {
    /// The content, but for white space around it.
    Content(String),
    /// The content holds each of these.
    Contains(Vec<String>),
    /// The content is this JSON.
    Json(Value),
    /// The one call.
    Tool { name: String, arguments: Value },
}

/// Right and asked, by family.
#[derive(Debug, Default, Clone, Copy)]
struct Score {
    right: usize,
    asked: usize,
    drafts: usize,
    accepted: usize,
}

impl std::ops::AddAssign for Score {
    fn add_assign(&mut self, other: Score) {
        self.right += other.right;
        self.asked += other.asked;
        self.drafts += other.drafts;
        self.accepted += other.accepted;
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (name, lines) = match &args.prompts {
        Some(path) => {
            let name = path.display().to_string();
            let lines = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
            (name, lines)
        }
        None => ("heldout.jsonl".to_owned(), HELDOUT.to_owned()),
    };
    let problems = lines
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| serde_json::from_str(line).with_context(|| format!("{name}, line {}", i + 1)))
        .collect::<anyhow::Result<Vec<Problem>>>()?;
    if problems.is_empty() {
        bail!("{name}: no prompts to answer");
    }
    let resident = Resident::open(&args.model)?;
    let text = resident.text()?;
    let prompts = problems.iter().map(|p| prompt(&text, &p.request)).collect::<anyhow::Result<Vec<_>>>()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
    resident.check_context(longest, args.max_tokens)?;
    let longest = longest + args.max_tokens;
    let mut model = resident.network(&args.compute, limits(1, longest, longest), &|_| {})?;
    let stop = resident.stop_ids();

    let style = ProgressStyle::with_template("answering {bar:30} {pos}/{len} [{elapsed}]")?;
    let progress = ProgressBar::new(problems.len() as u64).with_style(style);
    let mut scores: BTreeMap<&str, Score> = BTreeMap::new();
    for (problem, prompt) in problems.iter().zip(prompts) {
        let mut ids = prompt.clone();
        generate(&mut *model, &mut ids, args.max_tokens, &stop)?;
        let answer = read_answer(&text, &problem.request, &prompt, &ids[prompt.len()..], &stop);
        let right = is_right(&problem.expect, &answer);
        let (drafts, accepted) = first_drafts(&mut *model, &ids, prompt.len())?;
        let score = Score { right: right.into(), asked: 1, drafts, accepted };
        *scores.entry(&problem.family).or_default() += score;
        if !right && args.show_wrong {
            progress.suspend(|| {
                println!("{}: expected {:?}\n  got {}", problem.family, problem.expect, shown(&answer));
            });
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    print(&args, &scores);
    Ok(())
}

/// The ids of a problem's prompt.
pub fn prompt(text: &Text, request: &Request) -> anyhow::Result<Vec<u32>> {
    let chat = Chat {
        messages: request.messages.iter().map(Message::from).collect(),
        tools: request.tools.clone(),
        kwargs: request.chat_template_kwargs.clone(),
        add_generation_prompt: true,
        continue_final_message: false,
        template: None,
    };
    Ok(text.prompt(&chat)?)
}

/// Appends the greedy continuation, the stop id included.
fn generate(model: &mut dyn Network, ids: &mut Vec<u32>, limit: usize, stop: &[u32]) -> anyhow::Result<()> {
    let mut inputs = StepInputs::single(ids, 0, BLOCK_LEN);
    for _ in 0..limit {
        let next = greedy(model.step(&inputs)?)?;
        ids.push(next);
        if stop.contains(&next) {
            break;
        }
        inputs = StepInputs::single(&[next], ids.len() - 1, BLOCK_LEN);
    }
    Ok(())
}

/// How many of the generated ids after the first had a draft, and how many drafts were the id: one pass over
/// all positions, drafting at each from the true next id.
fn first_drafts(model: &mut dyn Network, ids: &[u32], prompt: usize) -> anyhow::Result<(usize, usize)> {
    if !model.can_draft() || ids.len() < prompt + 2 {
        return Ok((0, 0));
    }
    let mut step = StepInputs::single(ids, 0, BLOCK_LEN);
    step.logit_rows.clear();
    model.step(&step)?;
    // Entry i joins token i + 1 with the hidden vector of token i, and drafts token i + 2.
    let mut inputs = DraftInputs::single(&ids[1..], 1, BLOCK_LEN);
    inputs.step.logit_rows = (prompt as u32 - 1..ids.len() as u32 - 2).collect();
    let mut drafts = Vec::new();
    model.draft(&inputs, &mut drafts)?;
    let accepted = drafts.iter().zip(&ids[prompt + 1..]).filter(|(draft, id)| draft == id).count();
    Ok((drafts.len(), accepted))
}

fn read_answer(text: &Text, request: &Request, prompt: &[u32], ids: &[u32], stop: &[u32]) -> Answer {
    let mode = chat_mode(text, prompt, &request.tools, &request.chat_template_kwargs);
    let mut decoder = text.decoder(DecoderOptions { mode, ..DecoderOptions::default() });
    let mut deltas = Vec::new();
    for &id in ids {
        if stop.contains(&id) {
            decoder.end_of_turn();
        } else {
            decoder.push(id, &mut deltas);
        }
    }
    decoder.finish(&mut deltas);
    let mut fold = Fold::default();
    deltas.into_iter().for_each(|delta| fold.push(delta));
    fold.finish(decoder.reasoning_became_content())
}

fn is_right(expect: &Expect, answer: &Answer) -> bool {
    let content = answer.content.as_deref().unwrap_or_default().trim();
    match expect {
        Expect::Content(text) => content == text.trim() && answer.calls.is_empty(),
        Expect::Contains(parts) => parts.iter().all(|part| content.contains(part.as_str())),
        Expect::Json(value) => serde_json::from_str::<Value>(content).is_ok_and(|got| got == *value),
        Expect::Tool { name, arguments } => match &answer.calls[..] {
            [call] => {
                call.name == *name
                    && serde_json::from_str::<Value>(&call.arguments).is_ok_and(|got| got == *arguments)
            }
            _ => false,
        },
    }
}

fn shown(answer: &Answer) -> String {
    let calls: Vec<_> = answer.calls.iter().map(|c| format!("{}({})", c.name, c.arguments)).collect();
    format!("{:?} {}", answer.content.as_deref().unwrap_or_default(), calls.join(" "))
}

fn print(args: &Args, scores: &BTreeMap<&str, Score>) {
    let mut total = Score::default();
    scores.values().for_each(|&score| total += score);
    if args.json {
        let families: Map<String, Value> = scores
            .iter()
            .map(|(name, s)| ((*name).to_owned(), serde_json::json!({ "right": s.right, "asked": s.asked })))
            .collect();
        let report = serde_json::json!({
            "model": args.model, "right": total.right, "asked": total.asked,
            "percent": percent(total.right, total.asked), "families": families,
            "drafts": total.drafts, "accepted": total.accepted,
            "draft_acceptance_percent": percent(total.accepted, total.drafts),
        });
        println!("{report}");
        return;
    }
    let mut table = table(&["family", "right", "of", "%", "first draft accepted %"], &[1, 2, 3, 4]);
    let row = |name: &str, s: &Score| {
        let drafted = match s.drafts {
            0 => "no drafter".to_owned(),
            drafts => format!("{:.1}", percent(s.accepted, drafts)),
        };
        let right = format!("{:.1}", percent(s.right, s.asked));
        [name.to_owned(), s.right.to_string(), s.asked.to_string(), right, drafted]
    };
    for (name, score) in scores {
        table.add_row(row(name, score));
    }
    table.add_row(row("all", &total));
    println!("{} on {}", args.model, args.compute.describe());
    println!("{table}");
}
