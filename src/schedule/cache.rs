//! The prefix cache of Mamba hybrids: a tree over token ids that holds KV blocks and, here and there, whole states.
//!
//! A Mamba state cannot be cut, so a prompt resumes only where a *checkpoint* stands: a place of the state pool that
//! holds the state after exactly the tokens from the root to it. Around each checkpoint the tree keeps the KV blocks of
//! its path and no others; they are shared with sequences by counts, and never copied here. What a caller writes:
//!
//! ```text
//! if let Some(hit) = cache.find(salt, &prompt, prompt.len() - 1, &mut blocks) {
//!     pools.slots.share(hit.place); for &block in &blocks { pools.blocks.share(block) }    // now they stay
//!     if !cache.make_room_for_blocks(more, &mut pools) { … }                               // give all back, wait
//!     cache.touch(&hit);                                                                   // admitted
//! }
//! let place = …;                                    // taken from pools.slots; a step saves the state there
//! cache.insert(Prefix { salt, tokens, blocks, place, drafted_from }, &mut pools);          // place is the cache's now
//! ```
//!
//! Rows of a block are only ever appended. So where a checkpoint stands inside a block, the sequence that wrote it
//! writes on behind it, and a sequence that resumes there must first copy that last block.
//!
//! When there are too many checkpoints, or a pool runs dry, the least valuable goes: value is the tokens it saves over
//! the checkpoint before it, per byte that only it needs, and by `1 / (1 + age)`, age in uses of the cache.

mod tree;

use std::sync::Arc;

use super::pool::Pools;
use tree::{Children, NONE, Tree};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheConfig {
    /// Tokens per KV block; at least 1.
    pub block_len: usize,
    /// KV blocks in the pool.
    pub blocks: usize,
    /// The budget, in checkpoints; 0 turns the cache off.
    pub checkpoints_max: usize,
    /// Of one checkpoint.
    pub state_bytes: usize,
    /// Of one KV block over all layers.
    pub block_bytes: usize,
}

#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
    tree: Tree,
    /// In no order; nodes name them by index.
    checkpoints: Vec<Checkpoint>,
    /// Nodes that hold each block of the pool: a part and the whole node behind it may share one.
    held: Vec<u32>,
    /// Blocks of which `held` is not 0.
    blocks_held: usize,
    /// Uses so far: one per [`Cache::touch`] and [`Cache::insert`].
    clock: u64,
}

#[derive(Debug, Clone, Copy)]
struct Checkpoint {
    /// The node it stands at the end of.
    node: u32,
    place: u32,
    /// Tokens it holds the state of.
    len: u32,
    /// The node of the nearest checkpoint above it, or [`NONE`].
    base: u32,
    /// Tokens up to that one; 0 without.
    base_len: u32,
    /// Nodes that are there for its sake alone. A block shared by a part and a whole node counts for both: beside the
    /// bytes of a state it does not matter.
    own_nodes: u32,
    /// The clock at its last use.
    used: u64,
}

/// Where a prompt can resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// Tokens that need not run; the state after them is in `place`.
    pub len: usize,
    pub place: u32,
    /// Rows `draft_from .. len` of the blocks hold entries of the drafter as well. (Position 0 never has one, and
    /// counts as if it had.)
    pub draft_from: usize,
    node: u32,
}

/// A checkpoint to keep.
#[derive(Debug, Clone, Copy)]
pub struct Prefix<'a> {
    /// Only equal salts share.
    pub salt: Option<&'a Arc<str>>,
    /// Exactly the tokens that the state has seen; at least 1.
    pub tokens: &'a [u32],
    /// The blocks that cover them, the last one perhaps in part. They stay the caller's too.
    pub blocks: &'a [u32],
    /// The state; the caller's count of it becomes the cache's.
    pub place: u32,
    /// Rows from this position on hold entries of the drafter; `tokens.len()` if none does.
    pub drafted_from: usize,
}

/// What an eviction gave back to the pools: less than the checkpoint held, if others hold it too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    pub places: usize,
    pub blocks: usize,
}

/// What the cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holdings {
    pub checkpoints: usize,
    /// Distinct KV blocks.
    pub blocks: usize,
    pub state_bytes: usize,
    pub kv_bytes: usize,
}

impl Cache {
    /// Empty. All it will ever need for a pool of `config.blocks` blocks is allocated here.
    pub fn new(config: CacheConfig) -> Self {
        assert!(config.block_len > 0, "a block of no tokens");
        let checkpoints_max = config.checkpoints_max;
        // Each whole node has a block of its own, each part a checkpoint; one checkpoint more than the budget stands
        // while the least valuable is looked for.
        let (nodes_max, salts_max) = match checkpoints_max {
            0 => (0, 0),
            _ => (config.blocks + checkpoints_max + 1, checkpoints_max + 1),
        };
        Self {
            config,
            tree: Tree::new(config.block_len, nodes_max, salts_max),
            checkpoints: Vec::with_capacity(salts_max),
            held: vec![0; config.blocks],
            blocks_held: 0,
            clock: 0,
        }
    }

    /// The deepest checkpoint whose tokens `tokens[..limit]` begins with. Its blocks replace what is in `blocks`, the
    /// last one covers `len % block_len` tokens only if that is not 0. Nobody holds them for the caller yet.
    ///
    /// Costs one look-up per block, and a comparison per part along the path.
    pub fn find(
        &self,
        salt: Option<&str>,
        tokens: &[u32],
        limit: usize,
        blocks: &mut Vec<u32>,
    ) -> Option<Hit> {
        blocks.clear();
        let tokens = &tokens[..limit];
        let root = self.tree.root(salt)?;
        let node = self.tree.last_checkpoint(self.tree.last_whole(root, tokens), tokens)?;
        let checkpoint = self.checkpoints[self.tree.node(node).checkpoint as usize];
        let mut draft_from = checkpoint.len;
        let mut at = node;
        while !self.tree.is_root(at) {
            let covered = self.tree.node(at);
            blocks.push(covered.block);
            if draft_from == covered.end() {
                draft_from = covered.start + covered.drafted;
            }
            at = covered.parent;
        }
        blocks.reverse();
        Some(Hit {
            len: checkpoint.len as usize,
            place: checkpoint.place,
            draft_from: draft_from as usize,
            node,
        })
    }

    /// Says that a hit was used; nothing if its checkpoint has gone since.
    pub fn touch(&mut self, hit: &Hit) {
        let found = self.checkpoints.iter_mut().find(|c| c.node == hit.node && c.place == hit.place);
        if let Some(checkpoint) = found {
            self.clock += 1;
            checkpoint.used = self.clock;
        }
    }

    /// Keeps a checkpoint and shares the blocks of its path that the tree lacks. Where the drafter's entries begin
    /// earlier in the caller's blocks than in the tree's, the tree takes the caller's.
    ///
    /// If one stands there already, the new place is given back and the old one counts as used. If the budget is
    /// exceeded, the least valuable checkpoint goes, perhaps this one. Returns whether one stands there now.
    pub fn insert(&mut self, prefix: Prefix<'_>, pools: &mut Pools) -> bool {
        let Prefix { tokens, blocks, place, .. } = prefix;
        let block_len = self.config.block_len;
        assert_eq!(
            blocks.len(),
            tokens.len().div_ceil(block_len),
            "blocks that cover {} tokens",
            tokens.len()
        );
        if self.config.checkpoints_max == 0 || tokens.is_empty() {
            pools.slots.give_back(place);
            return false;
        }
        self.clock += 1;
        let Path { node, joined, before, grown } = self.attach(&prefix, pools);
        let there = self.tree.node(node).checkpoint;
        if there != NONE {
            pools.slots.give_back(place);
            self.checkpoints[there as usize].used = self.clock;
            return true;
        }
        let above = self.tree.last_checkpoint(self.tree.node(node).parent, &tokens[..tokens.len() - 1]);
        self.tree.node_mut(node).checkpoint = self.checkpoints.len() as u32;
        self.checkpoints.push(Checkpoint {
            node,
            place,
            len: tokens.len() as u32,
            base: above.unwrap_or(NONE),
            base_len: above.map_or(0, |above| self.tree.node(above).end()),
            own_nodes: 0,
            used: self.clock,
        });
        self.put_between(node);
        self.recount(node);
        if !grown {
            self.recount_below(node);
        } else if let Children::One(sibling) = before {
            self.recount_chain(sibling);
        }
        self.recount(joined);
        if self.checkpoints.len() > self.config.checkpoints_max {
            let clock = self.clock;
            self.evict_one(pools);
            return self.checkpoints.iter().any(|c| c.place == place && c.used == clock);
        }
        true
    }

    /// Drops the least valuable checkpoint and every block that is there for its sake alone; `None` if there is no
    /// checkpoint left. A place or block that the caller holds as well stays taken until the caller gives it back.
    pub fn evict_one(&mut self, pools: &mut Pools) -> Option<Freed> {
        let index = self.least(|_| true)?;
        Some(self.evict(index, pools))
    }

    /// Drops the checkpoint that was hit; nothing if it has gone since.
    pub fn forget(&mut self, hit: &Hit, pools: &mut Pools) {
        let index = self.checkpoints.iter().position(|c| c.node == hit.node && c.place == hit.place);
        if let Some(index) = index {
            self.evict(index, pools);
        }
    }

    /// Evicts until a place is free. False if none can become free now; then nothing is evicted.
    pub fn make_room_for_place(&mut self, pools: &mut Pools) -> bool {
        while pools.slots.free_count() == 0 {
            let Some(index) = self.least(|c| pools.slots.count(c.place) == 1) else { return false };
            self.evict(index, pools);
        }
        true
    }

    /// Evicts until `count` blocks are free. False if so many cannot become free now; then nothing is evicted.
    pub fn make_room_for_blocks(&mut self, count: usize, pools: &mut Pools) -> bool {
        if pools.blocks.free_count() >= count {
            return true;
        }
        let missing = count - pools.blocks.free_count();
        if self.alone(pools).take(missing).count() < missing {
            return false;
        }
        while pools.blocks.free_count() < count {
            let frees =
                |c: &Checkpoint| c.own_nodes > 0 && pools.blocks.count(self.tree.node(c.node).block) == 1;
            // Where two nodes share the last block, the first of them frees nothing and has to go all the same.
            let index = self.least(frees).or_else(|| self.least(|c| c.own_nodes > 0));
            let Some(index) = index else { return false };
            self.evict(index, pools);
        }
        true
    }

    /// Drops everything.
    pub fn clear(&mut self, pools: &mut Pools) {
        while !self.checkpoints.is_empty() {
            self.evict(self.checkpoints.len() - 1, pools);
        }
    }

    /// Blocks that only the cache holds: what evicting everything would free.
    pub fn blocks_alone(&self, pools: &Pools) -> usize {
        self.alone(pools).count()
    }

    /// Once for each of them.
    fn alone(&self, pools: &Pools) -> impl Iterator<Item = ()> {
        let counts = self.held.iter().zip(pools.blocks.counts());
        counts.filter(|(held, count)| **held > 0 && held == count).map(|_| ())
    }

    pub fn holdings(&self) -> Holdings {
        let (checkpoints, blocks) = (self.checkpoints.len(), self.blocks_held);
        Holdings {
            checkpoints,
            blocks,
            state_bytes: checkpoints * self.config.state_bytes,
            kv_bytes: blocks * self.config.block_bytes,
        }
    }

    /// The conservation laws. `slots` and `blocks` are what everyone else holds, in counts by place; panics if with the
    /// cache's own they are not the counts of the pools, or if the tree is not in order.
    pub fn check(&self, pools: &Pools, mut slots: Vec<u32>, mut blocks: Vec<u32>) {
        for checkpoint in &self.checkpoints {
            slots[checkpoint.place as usize] += 1;
        }
        for (place, held) in self.check_tree().into_iter().enumerate() {
            assert_eq!(self.held[place], held, "nodes of block {place}");
            blocks[place] += held;
        }
        assert_eq!(self.blocks_held, self.held.iter().filter(|held| **held > 0).count(), "blocks held");
        for (name, pool, holders) in [("slot", &pools.slots, slots), ("block", &pools.blocks, blocks)] {
            assert_eq!(pool.len(), holders.len(), "{name}s of the pool");
            for (place, holders) in holders.into_iter().enumerate() {
                assert_eq!(pool.count(place as u32), holders, "holders of {name} {place}");
            }
            let free = pool.counts().iter().filter(|count| **count == 0).count();
            assert_eq!(pool.free_count(), free, "free {name}s");
        }
        assert!(self.checkpoints.len() <= self.config.checkpoints_max, "more checkpoints than the budget");
    }
}

/// Where a prefix came to stand.
struct Path {
    node: u32,
    /// The last node of it that was there before, and the children that one had.
    joined: u32,
    before: Children,
    /// Whether nodes were added.
    grown: bool,
}

impl Cache {
    /// Adds the nodes of a prefix that are not there.
    fn attach(&mut self, prefix: &Prefix<'_>, pools: &mut Pools) -> Path {
        let mut node = self.tree.root_or_add(prefix.salt);
        let mut path = Path { node, joined: node, before: self.tree.children(node), grown: false };
        // Position 0 has no entry of the drafter and needs none.
        let drafted_from = if prefix.drafted_from <= 1 { 0 } else { prefix.drafted_from };
        let ids = prefix.tokens.chunks(self.config.block_len);
        for (index, (ids, &block)) in ids.zip(prefix.blocks).enumerate() {
            let start = index * self.config.block_len;
            let drafted = drafted_from.saturating_sub(start).min(ids.len()) as u32;
            let child = if path.grown { None } else { self.tree.child(node, ids) };
            node = match child {
                Some(child) => {
                    self.improve(child, block, drafted, pools);
                    path.joined = child;
                    path.before = self.tree.children(child);
                    child
                }
                None => {
                    self.hold(block, pools);
                    path.grown = true;
                    self.tree.add(node, ids, block, drafted)
                }
            };
        }
        path.node = node;
        path
    }

    /// Takes a block for a node that has more of the drafter's entries than the node's own.
    fn improve(&mut self, node: u32, block: u32, drafted: u32, pools: &mut Pools) {
        let known = self.tree.node(node);
        if drafted >= known.drafted {
            return;
        }
        let old = known.block;
        self.hold(block, pools);
        self.let_go(old, pools);
        let known = self.tree.node_mut(node);
        known.block = block;
        known.drafted = drafted;
    }

    /// Makes the checkpoint at `node` the base of those below it.
    fn put_between(&mut self, node: u32) {
        let base = self.checkpoint(node).base;
        let len = self.tree.node(node).end();
        if !self.has_longer(node) {
            return;
        }
        for index in 0..self.checkpoints.len() {
            let other = self.checkpoints[index];
            if other.base == base && other.node != node && self.tree.is_below(other.node, node) {
                self.checkpoints[index].base = node;
                self.checkpoints[index].base_len = len;
            }
        }
    }

    /// Whether any path goes on where the one of `node` ends: spares a look at every checkpoint.
    fn has_longer(&self, node: u32) -> bool {
        if self.tree.children(node) != Children::None {
            return true;
        }
        let Some(last) = self.tree.ids(node).last() else { return false };
        let parent = self.tree.node(node).parent;
        let at = self.tree.ids(node).len() - 1;
        let mut siblings = self.tree.wholes(parent).chain(self.tree.parts(parent));
        siblings.any(|other| other != node && self.tree.ids(other).get(at) == Some(last))
    }

    /// The least valuable of the checkpoints that may go.
    fn least(&self, may_go: impl Fn(&Checkpoint) -> bool) -> Option<usize> {
        let candidates = self.checkpoints.iter().enumerate().filter(|(_, checkpoint)| may_go(checkpoint));
        let least = candidates.min_by(|(_, a), (_, b)| {
            self.value(a).total_cmp(&self.value(b)).then(a.used.cmp(&b.used)).then(a.node.cmp(&b.node))
        });
        least.map(|(index, _)| index)
    }

    /// Tokens saved per byte, now.
    fn value(&self, checkpoint: &Checkpoint) -> f64 {
        let saved = f64::from(checkpoint.len - checkpoint.base_len);
        let bytes = self.config.state_bytes + self.config.block_bytes * checkpoint.own_nodes as usize;
        let age = self.clock - checkpoint.used;
        saved / (bytes.max(1) as f64 * (1 + age) as f64)
    }

    fn evict(&mut self, index: usize, pools: &mut Pools) -> Freed {
        let gone = self.checkpoints.swap_remove(index);
        if let Some(moved) = self.checkpoints.get(index) {
            self.tree.node_mut(moved.node).checkpoint = index as u32;
        }
        self.tree.node_mut(gone.node).checkpoint = NONE;
        for other in self.checkpoints.iter_mut().filter(|other| other.base == gone.node) {
            (other.base, other.base_len) = (gone.base, gone.base_len);
        }
        let mut freed = Freed { places: usize::from(pools.slots.give_back(gone.place)), blocks: 0 };
        let mut node = gone.node;
        while self.is_idle(node) {
            let known = self.tree.node(node);
            let (parent, block) = (known.parent, known.block);
            freed.blocks += usize::from(self.let_go(block, pools));
            let last = self.tree.is_root(parent) && self.tree.children(parent) == Children::One(node);
            self.tree.remove(node);
            if last {
                return freed; // The root may have gone with it, and nothing else hangs there.
            }
            node = parent;
        }
        self.recount(node);
        self.recount_below(node);
        freed
    }

    /// Nobody needs this node: no checkpoint at it or below.
    fn is_idle(&self, node: u32) -> bool {
        !self.tree.is_root(node)
            && self.tree.node(node).checkpoint == NONE
            && self.tree.children(node) == Children::None
    }

    /// Counts again what is there for the sake of the checkpoint at `node`, if there is one.
    fn recount(&mut self, node: u32) {
        let index = self.tree.node(node).checkpoint;
        if index != NONE {
            self.checkpoints[index as usize].own_nodes = self.own_nodes(node);
        }
    }

    /// After a change at `node`: the chain of its only child ends elsewhere now.
    fn recount_below(&mut self, node: u32) {
        if let Children::One(child) = self.tree.children(node) {
            self.recount_chain(child);
        }
    }

    /// Recounts the checkpoint that the chain from `node` downwards is there for, if it is one alone.
    fn recount_chain(&mut self, mut node: u32) {
        while self.tree.node(node).checkpoint == NONE {
            match self.tree.children(node) {
                Children::One(child) => node = child,
                _ => return,
            }
        }
        self.recount(node);
    }

    /// Nodes that would go with the checkpoint at `node`: none if anything is below it.
    fn own_nodes(&self, node: u32) -> u32 {
        if self.tree.children(node) != Children::None {
            return 0;
        }
        let mut count = 1;
        let mut at = self.tree.node(node).parent;
        while !self.tree.is_root(at)
            && self.tree.node(at).checkpoint == NONE
            && self.tree.children(at) != Children::Many
        {
            count += 1;
            at = self.tree.node(at).parent;
        }
        count
    }

    fn checkpoint(&self, node: u32) -> &Checkpoint {
        &self.checkpoints[self.tree.node(node).checkpoint as usize]
    }

    /// One node more stands on the block.
    fn hold(&mut self, block: u32, pools: &mut Pools) {
        pools.blocks.share(block);
        let held = &mut self.held[block as usize];
        self.blocks_held += usize::from(*held == 0);
        *held += 1;
    }

    /// One node less; whether the block is free now.
    fn let_go(&mut self, block: u32, pools: &mut Pools) -> bool {
        let held = &mut self.held[block as usize];
        *held -= 1;
        self.blocks_held -= usize::from(*held == 0);
        pools.blocks.give_back(block)
    }

    /// Walks the whole tree; nodes by block.
    fn check_tree(&self) -> Vec<u32> {
        let mut held = vec![0; self.held.len()];
        let mut checkpoints = 0;
        let mut nodes = 0;
        let mut open: Vec<(u32, Vec<u32>)> = self.tree.roots().map(|(_, root)| (root, Vec::new())).collect();
        while let Some((node, mut path)) = open.pop() {
            let known = self.tree.node(node);
            assert_eq!(known.start as usize, path.len(), "start of node {node}");
            assert!(known.drafted <= known.len, "node {node}: drafted from behind its end");
            path.extend(self.tree.ids(node));
            assert!(!self.is_idle(node), "node {node}: a leaf without a checkpoint");
            if !self.tree.is_root(node) {
                nodes += 1;
                held[known.block as usize] += 1;
                let found = self.tree.child(known.parent, self.tree.ids(node));
                assert_eq!(found, Some(node), "node {node} is not found by its ids");
            }
            if known.checkpoint != NONE {
                checkpoints += 1;
                self.check_checkpoint(node, &path);
            }
            for child in self.tree.wholes(node).chain(self.tree.parts(node)) {
                assert_eq!(self.tree.node(child).parent, node, "parent of node {child}");
                open.push((child, path.clone()));
            }
        }
        assert_eq!(checkpoints, self.checkpoints.len(), "checkpoints in the tree");
        assert_eq!(nodes, self.tree.len(), "nodes in the tree");
        held
    }

    fn check_checkpoint(&self, node: u32, path: &[u32]) {
        let checkpoint = self.checkpoint(node);
        let above = self.tree.last_checkpoint(self.tree.node(node).parent, &path[..path.len() - 1]);
        assert_eq!(checkpoint.node, node, "a checkpoint that stands elsewhere");
        assert_eq!(checkpoint.len as usize, path.len(), "tokens of the checkpoint at node {node}");
        assert_eq!(checkpoint.base, above.unwrap_or(NONE), "base of the checkpoint at node {node}");
        let base_len = above.map_or(0, |above| self.tree.node(above).end());
        assert_eq!(checkpoint.base_len, base_len, "tokens before the checkpoint at node {node}");
        assert_eq!(checkpoint.own_nodes, self.own_nodes(node), "own nodes of the checkpoint at node {node}");
    }
}

#[cfg(test)]
mod tests;
