//! From flags and free memory to sizes: what each model is given, and whether it all fits.

use super::args::Args;
use crate::backend::{KvType, Precision, SsmType};
use crate::cli::resident::{BLOCK_LEN, limits};
use crate::cli::table::{bytes, table};
use crate::engine::Speculation;
use crate::model::Limits;
use crate::model::config::ModelConfig;
use crate::model::plan::{self, MemoryPlan};
use anyhow::bail;
use comfy_table::Table;

/// Rows of logits that a step may be asked for at least.
const PROMPT_ROWS: usize = 32;
/// States that the prefix cache may hold without a word from the user: one per sequence for its prompt and one
/// for its answer, and these for a single user with many conversations.
const CHECKPOINTS_LEAST: usize = 16;

/// What the flags ask for every model, and what they leave to us.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    pub sequences: usize,
    pub step_tokens: usize,
    /// Blocks of the KV pool; `None`: as many as all contexts need, if there is room.
    pub blocks: Option<usize>,
    /// The same in bytes.
    pub kv_bytes: Option<u64>,
    pub checkpoints: Option<usize>,
    pub speculation: Speculation,
    pub kv: KvType,
    pub ssm: SsmType,
    pub precision: Precision,
}

impl Wish {
    pub fn new(args: &Args) -> Self {
        Self {
            sequences: usize::from(args.max_num_seqs),
            step_tokens: args.max_num_batched_tokens,
            blocks: match (args.num_gpu_blocks_override, args.kv_cache_tokens) {
                (Some(blocks), _) => Some(blocks),
                (None, tokens) => tokens.map(|tokens| tokens.div_ceil(BLOCK_LEN)),
            },
            kv_bytes: args.kv_cache_memory_bytes.map(|bytes| bytes as u64),
            checkpoints: args.checkpoints(),
            speculation: args.speculation(),
            kv: args.kv_cache_dtype.kind(),
            ssm: args.mamba_ssm_cache_dtype.kind(),
            precision: args.compute.precision(),
        }
    }
}

/// What one model is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizes {
    pub limits: Limits,
    pub checkpoints: usize,
    /// Prompt and answer together: as asked, or what the KV pool holds.
    pub context: usize,
    pub state_bytes: u64,
    pub block_bytes: u64,
    pub plan: MemoryPlan,
}

/// What a model brings along.
pub struct Model<'a> {
    pub name: &'a str,
    pub config: &'a ModelConfig,
    /// Tokens of prompt and answer together.
    pub context: usize,
    /// Of its weights, as stored.
    pub weights: u64,
}

/// Divides `free` bytes among the models; without knowing them everything gets what it asks for. What the flags
/// say is taken as said; what they leave open takes at most half of what is free beside the rest for KV blocks and a
/// quarter for checkpoints, so that there is room for what nobody planned.
pub fn divide(models: &[Model], wish: &Wish, free: Option<u64>) -> Vec<Sizes> {
    let fixed = models.iter().fold(0u64, |sum, model| {
        let plan = sizes(model, wish, Some(0), Some(0)).plan;
        sum.saturating_add(plan.total().saturating_sub(plan.kv.saturating_add(plan.checkpoints)))
    });
    let share = free.map(|free| free.saturating_sub(fixed) / models.len().max(1) as u64);
    models
        .iter()
        .map(|model| {
            let blocks = share.map(|share| per(share / 2, prices(model, wish).1));
            let checkpoints = share.map(|share| per(share / 4, prices(model, wish).0));
            sizes(model, wish, blocks, checkpoints)
        })
        .collect()
}

fn per(bytes: u64, price: u64) -> usize {
    usize::try_from(bytes / price.max(1)).unwrap_or(usize::MAX)
}

/// What a state and a block cost.
fn prices(model: &Model, wish: &Wish) -> (u64, u64) {
    let limits = Limits { kv: wish.kv, ssm: wish.ssm, ..limits(1, model.context, 1) };
    (plan::state_bytes(model.config, &limits), plan::block_bytes(model.config, &limits, wish.precision))
}

/// The sizes of one model, at most so many blocks and checkpoints where the flags leave them open.
fn sizes(model: &Model, wish: &Wish, blocks_most: Option<usize>, checkpoints_most: Option<usize>) -> Sizes {
    let Wish { sequences, .. } = *wish;
    // More than all contexts together never meets in a step.
    let step_tokens = wish.step_tokens.min(sequences.saturating_mul(model.context));
    let drafts = wish.speculation.depth_max as usize;
    let asked = limits(sequences, model.context, step_tokens);
    // Less than one context would refuse what the model is said to take.
    let least = model.context.div_ceil(BLOCK_LEN);
    let (state_bytes, block_bytes) = prices(model, wish);
    let said = wish.blocks.or_else(|| wish.kv_bytes.map(|bytes| per(bytes, block_bytes).max(1)));
    let blocks = said.unwrap_or_else(|| asked.blocks.min(blocks_most.unwrap_or(usize::MAX).max(least)));
    let checkpoints = wish
        .checkpoints
        .unwrap_or_else(|| CHECKPOINTS_LEAST.max(2 * sequences).min(checkpoints_most.unwrap_or(usize::MAX)));
    // Every draft is judged by a row of logits; a few more rows let prompt_logprobs read on. A row is as wide as the
    // vocabulary, so rows for every token of a step would cost more than the step's activations.
    let rows = sequences.saturating_mul(1 + drafts).max(PROMPT_ROWS);
    let limits = Limits {
        logit_rows: step_tokens.min(rows),
        slots: sequences.saturating_add(checkpoints),
        blocks,
        lanes: if drafts == 0 { 0 } else { sequences },
        drafts,
        kv: wish.kv,
        ssm: wish.ssm,
        ..asked
    };
    Sizes {
        limits,
        checkpoints,
        context: model.context.min(blocks.saturating_mul(BLOCK_LEN)),
        state_bytes,
        block_bytes,
        plan: MemoryPlan::new(model.config, &limits, wish.precision, sequences, model.weights),
    }
}

/// The plan of every model by kind, in sum, and beside what is free.
pub fn show(models: &[Model], sizes: &[Sizes], free: Option<u64>) -> Table {
    let several = models.len() > 1;
    let mut header = vec![""];
    header.extend(models.iter().map(|model| model.name));
    header.extend(several.then_some("together"));
    let mut shown = table(&header, &(1..header.len()).collect::<Vec<_>>());
    let mut row = |kind: &str, values: Vec<u64>| {
        let sum = values.iter().fold(0u64, |sum, value| sum.saturating_add(*value));
        let values = values.into_iter().chain(several.then_some(sum)).map(bytes);
        shown.add_row(std::iter::once(kind.to_owned()).chain(values));
    };
    let parts: Vec<_> = sizes.iter().map(|sizes| sizes.plan.parts()).collect();
    for (index, (kind, _)) in MemoryPlan::default().parts().into_iter().enumerate() {
        row(kind, parts.iter().map(|parts| parts[index].1).collect());
    }
    row("total", sizes.iter().map(|sizes| sizes.plan.total()).collect());
    if let Some(free) = free {
        let mut cells = vec!["free".to_owned()];
        cells.resize(header.len() - 1, String::new());
        cells.push(bytes(free));
        shown.add_row(cells);
    }
    shown
}

/// Errors: the plan needs more than there is. A machine that runs out of memory freezes rather than fails.
pub fn check(sizes: &[Sizes], free: Option<u64>, allow_overcommit: bool) -> anyhow::Result<()> {
    let total = sizes.iter().fold(0u64, |sum, sizes| sum.saturating_add(sizes.plan.total()));
    let Some(free) = free.filter(|free| total > *free) else { return Ok(()) };
    let (needed, free) = (bytes(total), bytes(free));
    if allow_overcommit {
        tracing::warn!("The plan needs {needed} of memory and {free} are free");
        return Ok(());
    }
    bail!(
        "the plan needs {needed} of memory and {free} are free: give a smaller --max-num-seqs, --max-model-len, \
         --kv-cache-tokens or --prefix-cache-checkpoints, or --allow-overcommit to start all the same"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn nano() -> ModelConfig {
        ModelConfig::from_json(include_bytes!("../../../models/nano-bf16/config.json")).expect("a release")
    }

    fn wish() -> Wish {
        Wish {
            sequences: 8,
            step_tokens: 256,
            blocks: None,
            kv_bytes: None,
            checkpoints: None,
            speculation: Speculation { depth_max: 4, ..Speculation::default() },
            kv: KvType::Auto,
            ssm: SsmType::F32,
            precision: Precision::F32,
        }
    }

    fn divided(wish: &Wish, count: usize, free: Option<u64>) -> Vec<Sizes> {
        let config = nano();
        let model = || Model { name: "nano", config: &config, context: 32_768, weights: 19 * GIB };
        divide(&(0..count).map(|_| model()).collect::<Vec<_>>(), wish, free)
    }

    #[test]
    fn where_there_is_room_everybody_has_a_whole_context_and_two_checkpoints() {
        let sizes = &divided(&wish(), 1, None)[0];
        let Limits { slots, blocks, lanes, drafts, logit_rows, .. } = sizes.limits;
        assert_eq!((slots, blocks, sizes.checkpoints), (8 + 16, 8 * 2048, 16));
        assert_eq!((lanes, drafts, logit_rows), (8, 4, 40));
        assert_eq!(&divided(&wish(), 1, Some(1 << 50))[0], sizes);
    }

    #[test]
    fn where_memory_is_short_pools_take_their_share_of_what_is_left() {
        for count in [1, 2] {
            let free = count as u64 * 21 * GIB;
            let sizes = divided(&wish(), count, Some(free));
            let sum = |of: fn(&Sizes) -> u64| sizes.iter().map(of).sum::<u64>();
            let total = sum(|sizes| sizes.plan.total());
            let (kv, checkpoints) = (sum(|sizes| sizes.plan.kv), sum(|sizes| sizes.plan.checkpoints));
            let left = free - (total - kv - checkpoints);
            let one = sizes[0].block_bytes * 2 * count as u64;
            assert!((left / 2 - one..=left / 2).contains(&kv), "{kv} of {left}");
            let one = sizes[0].state_bytes * 2 * count as u64;
            assert!((left / 4 - one..=left / 4).contains(&checkpoints), "{checkpoints} of {left}");
            assert!(sizes.iter().all(|sizes| sizes.context == 32_768));
        }
    }

    #[test]
    fn what_the_flags_say_is_not_cut() {
        let wish = Wish { blocks: Some(100), checkpoints: Some(3), ..wish() };
        let sizes = &divided(&wish, 1, Some(1))[0];
        assert_eq!((sizes.limits.blocks, sizes.limits.slots, sizes.context), (100, 11, 1600));
    }

    #[test]
    fn a_pool_in_bytes_is_one_of_so_many_blocks() {
        let free = &divided(&wish(), 1, None)[0];
        let bytes = 100 * free.block_bytes + 1;
        let sizes = &divided(&Wish { kv_bytes: Some(bytes), ..wish() }, 1, Some(1))[0];
        assert_eq!((sizes.limits.blocks, sizes.context), (100, 1600));
    }

    #[test]
    fn without_drafts_there_are_no_lanes() {
        let sizes = &divided(&Wish { speculation: Speculation::OFF, ..wish() }, 1, None)[0];
        assert_eq!((sizes.limits.lanes, sizes.limits.drafts, sizes.plan.lanes), (0, 0, 0));
        assert_eq!(sizes.limits.logit_rows, 32);
    }

    #[test]
    fn a_plan_that_does_not_fit_is_refused_unless_allowed() {
        let sizes = divided(&wish(), 2, Some(20 * GIB));
        let refused = check(&sizes, Some(20 * GIB), false).map_err(|error| error.to_string());
        assert!(refused.is_err_and(|text| text.contains("21.475 GB are free")));
        assert!(check(&sizes, Some(20 * GIB), true).is_ok());
        assert!(check(&sizes, None, false).is_ok());
        assert!(check(&sizes, Some(100 * GIB), false).is_ok());
    }

    #[test]
    fn the_table_has_a_column_per_model_and_one_for_all() {
        let config = nano();
        let model = |name| Model { name, config: &config, context: 32_768, weights: 19 * GIB };
        let models = [model("front"), model("behind")];
        let sizes = divide(&models, &wish(), Some(100 * GIB));
        let shown = show(&models, &sizes, Some(100 * GIB)).to_string();
        let lines: Vec<&str> = shown.lines().map(str::trim_end).collect();
        assert_eq!(lines.len(), 1 + 7 + 2, "{shown}");
        assert!(lines[0].ends_with("together") && lines[1].ends_with("40.802 GB"), "{shown}");
        assert!(lines[9].starts_with(" free") && lines[9].ends_with("107.4 GB"), "{shown}");
    }
}
