//! Every operation by itself, at the shapes of `bench-nano` or another model, in every weight format:
//!
//! ```sh
//! cargo bench --bench ops                               # all of them
//! cargo bench --bench ops -- experts --tokens 1,8       # those whose name has the word
//! cargo bench --bench ops -- --json > ops.json          # one object per line
//! ```
//!
//! Operands rotate through more memory than the caches hold, as they do in a step of a real model. Each row gives the
//! median time and its shares of the ceilings measured in the same run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::Parser;
use ferrotron::backend::cpu::Cpu;
use ferrotron::backend::{Backend, BlockCopy, Heads, KvType, SequenceInputs, StatePlan, StepInputs};
use ferrotron::cli::bench::ceiling::Ceiling;
use ferrotron::cli::resident::{BackendName, Compute};
use ferrotron::cli::table;
use ferrotron::model::config::{Attention, Layer, Mamba, ModelConfig, Moe};
use ferrotron::model::embedded::BLUEPRINTS;
use ferrotron::model::fields::{AttentionFields, MambaFields, Mixer, MoeFields};
use ferrotron::model::quantization::Recipe;
use ferrotron::model::random::random;
use ferrotron::ops::{self, Cost, linear::Epilogue};
use ferrotron::weights::{Format, Kind, Linear};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Bytes that operands rotate through: more than any cache that one step's share of would stay in.
const ROTATED: usize = 256 << 20;
/// Runs per row, and how long they go on for at least.
const RUNS: usize = 7;
const AT_LEAST: Duration = Duration::from_millis(60);
/// Runs between two looks at the clock of the whole row.
const BATCH: usize = 4;
const BLOCK_LEN: usize = 16;
/// Tokens before those of a step, where a state is to be read.
const PAST: usize = 16;
/// Contexts of decode attention.
const DEPTHS: [usize; 4] = [64, 1024, 4096, 32768];
/// More tokens than this never ask for logits.
const LOGITS: usize = 64;

/// Each operation of a step by itself, against the ceilings of this machine
#[derive(Parser)]
struct Args {
    /// Only rows whose operation, shape or format has this in it
    filter: Option<String>,
    /// Whose shapes
    #[arg(long, default_value = "bench-nano")]
    model: String,
    /// Tokens of a step
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 64, 512])]
    tokens: Vec<usize>,
    #[command(flatten)]
    compute: Compute,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    format: &'static str,
    tokens: usize,
    us: f64,
    bytes: u64,
    gb_per_s: f64,
    percent_of_bandwidth: f64,
    gflop_per_s: f64,
    percent_of_compute: f64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.compute.backend == BackendName::Cpu, "--backend: the operations are those of cpu");
    let (threads, precision) = (args.compute.threads(), args.compute.precision());
    let config = config(&args.model)?;
    let ceiling = Ceiling::measure(threads)?;
    let cpu = Cpu::new(precision, threads)?;
    // Hidden by indicatif itself where standard error is no terminal.
    let bar =
        ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {pos} rows, {msg}")?);
    let mut suite = Suite { cpu, ceiling, args, rows: Vec::new(), bar };
    for kind in [Kind::BF16, Kind::Fp8, Kind::Nvfp4] {
        suite.weights(&config, kind);
    }
    suite.states(&config);
    suite.bar.finish_and_clear();
    if !suite.args.json {
        suite.print();
    }
    Ok(())
}

/// One layer of each kind of the model.
fn config(name: &str) -> anyhow::Result<ModelConfig> {
    let (_, files) =
        BLUEPRINTS.iter().find(|(known, _)| *known == name).context("--model: no such bench model")?;
    let (_, json) =
        files.iter().find(|(file, _)| *file == "config.json").context("a bench model has a config")?;
    let mut config = ModelConfig::from_json(json)?;
    let mut kinds = Vec::new();
    config.layers.retain(|layer| {
        let first = !kinds.contains(&std::mem::discriminant(layer));
        kinds.push(std::mem::discriminant(layer));
        first
    });
    config.mtp = None;
    ensure!(config.layers.len() == 3, "a bench model has Mamba, attention and MoE layers");
    Ok(config)
}

struct Suite {
    cpu: Cpu,
    ceiling: Ceiling,
    args: Args,
    rows: Vec<Row>,
    bar: ProgressBar,
}

impl Suite {
    /// What reads weights.
    fn weights(&mut self, config: &ModelConfig, kind: Kind) {
        let fields = random(config, 0, &Recipe::uniform(kind), &|_| {});
        for (layer, fields) in config.layers.iter().zip(&fields.layers) {
            match (layer, &fields.mixer) {
                (Layer::Mamba(_), Mixer::Mamba(MambaFields { in_proj, out_proj, .. })) => {
                    self.linear("in_proj", in_proj);
                    self.linear("out_proj", out_proj);
                }
                (Layer::Attention(_), Mixer::Attention(AttentionFields { q_proj, k_proj, .. })) => {
                    self.linear("q_proj", q_proj);
                    self.linear("k_proj", k_proj);
                }
                (Layer::Moe(shape), Mixer::Moe(fields)) => {
                    if let Some((up, down)) = &fields.shared {
                        self.linear("shared up", up);
                        self.linear("shared down", down);
                    }
                    self.experts(shape, fields);
                }
                _ => {}
            }
        }
        self.linear("lm_head", &fields.lm_head);
    }

    fn linear(&mut self, name: &'static str, weight: &Linear) {
        for tokens in self.args.tokens.clone() {
            let shape = format!("[{}, {}]", weight.rows, weight.cols);
            let is_logits = name == "lm_head" && tokens > LOGITS;
            if is_logits || !self.wanted(name, &shape, weight.kind().name()) {
                continue;
            }
            let held: Vec<_> =
                (0..copies(weight.bytes())).map(|_| self.cpu.linear_from(copy(weight))).collect();
            let (mut x, mut out) =
                (self.cpu.buffer(tokens, weight.cols), self.cpu.buffer(tokens, weight.rows));
            fill(&mut x.data);
            let cost = ops::linear::cost(tokens, weight);
            self.measure((name, shape, weight.kind().name(), tokens), cost, |cpu, run| {
                cpu.linear(tokens, &held[run % held.len()], &x, &mut out, Epilogue::Store);
            });
        }
    }

    fn experts(&mut self, shape: &Moe, fields: &MoeFields<Linear>) {
        let (up, down) = (&fields.up[0], &fields.down[0]);
        let format = up.kind().name();
        let text = format!("{} of {} [{}, {}]", shape.experts_per_token, shape.experts, up.rows, up.cols);
        for tokens in self.args.tokens.clone() {
            if !self.wanted("experts", &text, format) {
                continue;
            }
            let one = shape.experts * (up.bytes() + down.bytes());
            let all = |experts: &[Linear]| experts.iter().map(copy).collect::<Vec<_>>();
            let held: Vec<_> =
                (0..copies(one)).map(|_| self.cpu.experts_from(all(&fields.up), all(&fields.down))).collect();
            let mut distinct = 0;
            let routes = [0, 1, 2, 3].map(|round| {
                let mut routes = self.cpu.routes(tokens, shape.experts_per_token);
                routes.weights.fill(1.0 / shape.experts_per_token as f32);
                distinct = choose(shape, round * shape.experts_per_token, &mut routes.ids);
                routes
            });
            let (mut v, mut out) = (self.cpu.buffer(tokens, up.cols), self.cpu.buffer(tokens, down.rows));
            fill(&mut v.data);
            let cost = ops::experts::cost(shape, up, down, tokens, distinct);
            self.measure(("experts", text.clone(), format, tokens), cost, |cpu, run| {
                let experts = &held[run % held.len()];
                let routes = &routes[run / held.len() % routes.len()];
                cpu.experts(tokens, shape, &v, routes, experts, &mut out, Epilogue::Store);
            });
        }
        self.route(shape, fields);
    }

    fn route(&mut self, shape: &Moe, fields: &MoeFields<Linear>) {
        let gate = &fields.gate;
        let text = format!("{} of {} [{}]", shape.experts_per_token, shape.experts, gate.cols);
        // The router is of one format whatever the rest is.
        if fields.up[0].kind() != Kind::BF16 || !self.wanted("route", &text, gate.kind().name()) {
            return;
        }
        for tokens in self.args.tokens.clone() {
            let held = self.cpu.linear_from(copy(gate));
            let bias = self.cpu.vector_from(fields.correction_bias.clone());
            let mut routes = self.cpu.routes(tokens, shape.experts_per_token);
            let mut u = self.cpu.buffer(tokens, gate.cols);
            fill(&mut u.data);
            let cost = ops::route::cost(shape, gate.cols, gate.bytes(), tokens);
            self.measure(("route", text.clone(), gate.kind().name(), tokens), cost, |cpu, _| {
                cpu.route(tokens, shape, &u, &held, &bias, &mut routes);
            });
        }
    }

    /// What reads and writes states and caches.
    fn states(&mut self, config: &ModelConfig) {
        let fields = random(config, 0, &Recipe::uniform(Kind::Nvfp4), &|_| {});
        for (layer, fields) in config.layers.iter().zip(&fields.layers) {
            match (layer, &fields.mixer) {
                (Layer::Mamba(shape), Mixer::Mamba(fields)) => self.mamba(shape, fields),
                (Layer::Attention(shape), _) => self.attention(shape),
                _ => {}
            }
        }
    }

    fn mamba(&mut self, shape: &Mamba, fields: &MambaFields<Linear>) {
        let text = format!("[{}, {}, {}]", shape.heads, shape.head_dim, shape.state_size);
        let slots = copies(shape.inner() * shape.state_size * 4).max(2 * 8);
        let plan =
            StatePlan { slots, blocks: 1, block_len: BLOCK_LEN, mamba: vec![*shape], ..StatePlan::default() };
        let mut state = self.cpu.state(&plan);
        let [weight, bias, a_log, d, dt_bias] =
            [&fields.conv_weight, &fields.conv_bias, &fields.a_log, &fields.d, &fields.dt_bias]
                .map(|values| self.cpu.vector_from(values.clone()));
        for (sequences, tokens) in self.steps() {
            let total = sequences * tokens;
            let mut projected = self.cpu.buffer(total, shape.projection());
            let mut xbc = self.cpu.buffer(total, shape.conv_channels());
            let mut y = self.cpu.buffer(total, shape.inner());
            fill(&mut projected.data);
            fill(&mut xbc.data);
            let step = |run: usize| several(sequences, tokens, (run * sequences) % (slots - sequences));
            if (sequences, tokens) == (1, self.args.tokens[0]) {
                // Places that nobody wrote have no memory of their own yet.
                for slot in 0..slots {
                    let heads = Heads { a_log: &a_log, d: &d, dt_bias: &dt_bias };
                    let inputs = several(1, tokens, slot);
                    self.cpu.ssm(&inputs, 0, shape, &projected, &xbc, heads, &mut state, &mut y);
                }
            }
            let label = |text: &str| format!("{text}, {sequences} × {tokens} tokens");
            if self.wanted("conv", &text, "F32") {
                let shape_text = label(&format!("[{}] taps {}", shape.conv_channels(), shape.conv_kernel));
                let cost = ops::conv::cost(shape, &step(0));
                self.measure(("conv", shape_text, "F32", total), cost, |cpu, run| {
                    cpu.conv(&step(run), 0, shape, &projected, &weight, &bias, &mut state, &mut xbc);
                });
            }
            if self.wanted("ssm", &text, "F32") {
                let cost = ops::ssm::cost(shape, &step(0), 4);
                self.measure(("ssm", label(&text), "F32", total), cost, |cpu, run| {
                    let heads = Heads { a_log: &a_log, d: &d, dt_bias: &dt_bias };
                    cpu.ssm(&step(run), 0, shape, &projected, &xbc, heads, &mut state, &mut y);
                });
            }
        }
    }

    /// (sequences, tokens of each): one that is read or goes on, and several that go on.
    fn steps(&self) -> Vec<(usize, usize)> {
        let ones = self.args.tokens.iter().map(|&tokens| (1, tokens));
        ones.chain(self.args.tokens.contains(&8).then_some((8, 1))).collect()
    }

    fn attention(&mut self, shape: &Attention) {
        let text = format!("[{}/{}, {}]", shape.heads, shape.kv_heads, shape.head_dim);
        let cell = KvType::Auto.cell(self.args.compute.precision());
        if !self.wanted("attention", &text, cell.name()) {
            return;
        }
        let page = 2 * shape.kv_heads * BLOCK_LEN * shape.head_dim * cell.bytes();
        let longest = DEPTHS.into_iter().max().unwrap_or(0).div_ceil(BLOCK_LEN) + 1;
        let blocks = copies(page).max(longest);
        let plan = StatePlan {
            slots: 1,
            blocks,
            block_len: BLOCK_LEN,
            attention: vec![*shape],
            ..StatePlan::default()
        };
        let mut state = self.cpu.state(&plan);
        let most = self.args.tokens.iter().copied().max().unwrap_or(1).max(BLOCK_LEN);
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let [mut q, mut k, mut v, mut out] =
            [wide, narrow, narrow, wide].map(|width| self.cpu.buffer(most, width));
        [&mut q, &mut k, &mut v].into_iter().for_each(|buffer| fill(&mut buffer.data));
        // Pages that nobody wrote may all be one page of zeros, which the caches hold.
        let first = StepInputs::single(&[0; BLOCK_LEN], 0, BLOCK_LEN);
        self.cpu.attention(&first, 0, shape, &q, &k, &v, &mut state, &mut out);
        let copies: Vec<_> = (1..blocks as u32).map(|to| BlockCopy { from: 0, to }).collect();
        self.cpu.copy_blocks(&copies, &mut state);

        let decode = DEPTHS.map(|past| (1, past));
        let prefill = self.args.tokens.iter().filter(|&&tokens| tokens >= LOGITS).map(|&tokens| (tokens, 0));
        for (tokens, past) in decode.into_iter().chain(prefill.collect::<Vec<_>>()) {
            let single = StepInputs::single(&vec![0; tokens], past, BLOCK_LEN);
            let own = single.blocks.len();
            let step = |run: usize| {
                let start = if own < blocks { run * own % (blocks - own) } else { 0 };
                let blocks = (start..start + own).map(|block| block as u32).collect();
                StepInputs { blocks, ..single.clone() }
            };
            let cost = ops::attention::cost(shape, &single, cell.bytes());
            let label = format!("{text} past {past}");
            self.measure(("attention", label, cell.name(), tokens), cost, |cpu, run| {
                cpu.attention(&step(run), 0, shape, &q, &k, &v, &mut state, &mut out);
            });
        }
    }

    fn wanted(&self, op: &str, shape: &str, format: &str) -> bool {
        let has = |filter: &String| format!("{op} {shape} {format}").contains(filter.as_str());
        self.args.filter.as_ref().is_none_or(has)
    }

    /// Times `work(cpu, run)` and adds a row.
    fn measure(
        &mut self,
        (op, shape, format, tokens): (&'static str, String, &'static str, usize),
        cost: Cost,
        mut work: impl FnMut(&mut Cpu, usize) + Send,
    ) {
        self.bar.set_message(format!("{op} {shape} {format}, {tokens} tokens"));
        self.bar.inc(1);
        let mut times = Vec::new();
        let start = Instant::now();
        let mut run = 0;
        while times.len() < RUNS || start.elapsed() < AT_LEAST {
            // As in a step: the threads are awake from one operation to the next.
            self.cpu.run(|cpu| {
                for _ in 0..BATCH {
                    let start = Instant::now();
                    work(cpu, black_box(run));
                    // The first one warms up and is not counted.
                    if run > 0 {
                        times.push(start.elapsed().as_secs_f64());
                    }
                    run += 1;
                }
            });
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let bytes = cost.weights + cost.state;
        let [gb_per_s, gflop_per_s] = [bytes, cost.flops].map(|amount| amount as f64 / seconds / 1e9);
        let row = Row {
            op,
            shape,
            format,
            tokens,
            us: seconds * 1e6,
            bytes,
            gb_per_s,
            percent_of_bandwidth: self.ceiling.memory_percent(gb_per_s),
            gflop_per_s,
            percent_of_compute: self.ceiling.compute_percent(gflop_per_s),
        };
        if self.args.json {
            println!("{}", serde_json::to_string(&row).expect("a row of names and numbers is JSON"));
        }
        self.rows.push(row);
    }

    fn print(&self) {
        println!("{}", self.ceiling.describe());
        let header = [
            "operation",
            "shape",
            "format",
            "tokens",
            "µs",
            "MB",
            "GB/s",
            "% of memory",
            "GFLOP/s",
            "% of compute",
        ];
        let cells = self.rows.iter().map(|row| {
            [
                row.op.to_string(),
                row.shape.clone(),
                row.format.to_string(),
                row.tokens.to_string(),
                format!("{:.1}", row.us),
                format!("{:.3}", row.bytes as f64 / 1e6),
                format!("{:.2}", row.gb_per_s),
                format!("{:.1}", row.percent_of_bandwidth),
                format!("{:.1}", row.gflop_per_s),
                format!("{:.1}", row.percent_of_compute),
            ]
        });
        table::print(header, &[3, 4, 5, 6, 7, 8, 9], cells);
    }
}

/// How many operands of so many bytes are rotated through.
fn copies(bytes: usize) -> usize {
    ROTATED.div_ceil(bytes).max(2)
}

/// The same weight elsewhere in memory.
fn copy(weight: &Linear) -> Linear {
    let format = match &weight.format {
        Format::Nvfp4 { scales, global_scale } => {
            Format::Nvfp4 { scales: Bytes::copy_from_slice(scales), global_scale: *global_scale }
        }
        format => format.clone(),
    };
    Linear { format, data: Bytes::copy_from_slice(&weight.data), ..*weight }
}

/// Numbers of ordinary size and both signs.
fn fill(values: &mut [f32]) {
    for (i, value) in values.iter_mut().enumerate() {
        *value = (i * 7919 % 2003) as f32 / 1001.0 - 1.0;
    }
}

/// Different experts for each token from `first` on, spread over all; how many distinct ones that are.
fn choose(shape: &Moe, first: usize, ids: &mut [u32]) -> usize {
    for (token, ids) in ids.chunks_exact_mut(shape.experts_per_token).enumerate() {
        for (j, id) in ids.iter_mut().enumerate() {
            *id = ((first + token * 7 + j * 5) % shape.experts) as u32;
        }
    }
    ids.iter().collect::<std::collections::HashSet<_>>().len()
}

/// Sequences that go on, their states at places from `slot` on.
fn several(sequences: usize, tokens: usize, slot: usize) -> StepInputs {
    let mut inputs = StepInputs { tokens: vec![0; sequences * tokens], ..StepInputs::default() };
    for sequence in 0..sequences {
        let place = (slot + sequence) as u32;
        inputs.sequences.push(SequenceInputs {
            slot: place,
            source: place,
            first: (sequence * tokens) as u32,
            count: tokens as u32,
            past: PAST as u32,
            ..SequenceInputs::default()
        });
    }
    inputs
}
