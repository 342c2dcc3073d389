//! The tree below the prefix cache: blocks of token ids, found by hash and confirmed id by id.
//!
//! A node is *whole* (it covers `block_len` tokens and may have children) or a *part* (fewer tokens; a leaf). Roots
//! cover nothing; there is one per salt. All nodes stand in one slab and name each other by index.

use std::sync::Arc;

/// No node, no checkpoint.
pub const NONE: u32 = u32::MAX;

/// The root of all that has no salt; it is always there.
const UNSALTED: u32 = 0;

#[derive(Debug, Clone)]
pub struct Node {
    pub parent: u32,
    /// Tokens on the path before it.
    pub start: u32,
    /// Its own tokens; 0 for a root.
    pub len: u32,
    /// Its KV block, of which the first `len` rows are its own.
    pub block: u32,
    /// Rows `drafted .. len` hold entries of the drafter as well.
    pub drafted: u32,
    /// Index of the checkpoint at its end, or [`NONE`].
    pub checkpoint: u32,
    hash: u64,
    /// The next whole node of the same bucket; in a free node, the next free one.
    next_in_bucket: u32,
    /// Siblings of the same kind.
    next: u32,
    previous: u32,
    first_whole: u32,
    first_part: u32,
}

impl Node {
    /// Tokens on the path, its own included.
    pub fn end(&self) -> u32 {
        self.start + self.len
    }
}

/// The only child of a node, or how it is else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    None,
    One(u32),
    Many,
}

#[derive(Debug)]
pub struct Tree {
    block_len: usize,
    nodes: Vec<Node>,
    /// [nodes, block_len] their ids; a part fills the first `len`.
    ids: Vec<u32>,
    first_free: u32,
    free_count: usize,
    /// The first whole node by the lowest bits of the hash.
    buckets: Vec<u32>,
    /// Sorted by salt.
    salts: Vec<(Arc<str>, u32)>,
}

impl Tree {
    /// Room for `nodes_max` nodes and `salts_max` roots; beyond that it grows.
    pub fn new(block_len: usize, nodes_max: usize, salts_max: usize) -> Self {
        let mut tree = Self {
            block_len,
            nodes: Vec::with_capacity(nodes_max + salts_max + 1),
            ids: Vec::with_capacity((nodes_max + salts_max + 1) * block_len),
            first_free: NONE,
            free_count: 0,
            buckets: vec![NONE; nodes_max.max(1).next_power_of_two()],
            salts: Vec::with_capacity(salts_max),
        };
        let root = tree.allocate(Node::root());
        debug_assert_eq!(root, UNSALTED);
        tree
    }

    pub fn node(&self, node: u32) -> &Node {
        &self.nodes[node as usize]
    }

    pub fn node_mut(&mut self, node: u32) -> &mut Node {
        &mut self.nodes[node as usize]
    }

    /// Its own ids.
    pub fn ids(&self, node: u32) -> &[u32] {
        let first = node as usize * self.block_len;
        &self.ids[first..first + self.node(node).len as usize]
    }

    pub fn is_root(&self, node: u32) -> bool {
        self.node(node).parent == NONE
    }

    pub fn children(&self, node: u32) -> Children {
        let Node { first_whole, first_part, .. } = *self.node(node);
        match (first_whole, first_part) {
            (NONE, NONE) => Children::None,
            (only, NONE) | (NONE, only) if self.node(only).next == NONE => Children::One(only),
            _ => Children::Many,
        }
    }

    pub fn wholes(&self, node: u32) -> impl Iterator<Item = u32> {
        self.list(self.node(node).first_whole)
    }

    pub fn parts(&self, node: u32) -> impl Iterator<Item = u32> {
        self.list(self.node(node).first_part)
    }

    pub fn root(&self, salt: Option<&str>) -> Option<u32> {
        let Some(salt) = salt else { return Some(UNSALTED) };
        let index = self.salts.binary_search_by(|(other, _)| (**other).cmp(salt)).ok()?;
        Some(self.salts[index].1)
    }

    /// The root of a salt, which must get a child at once: an empty one has nobody to remove it.
    pub fn root_or_add(&mut self, salt: Option<&Arc<str>>) -> u32 {
        let Some(salt) = salt else { return UNSALTED };
        match self.salts.binary_search_by(|(other, _)| other.cmp(salt)) {
            Ok(index) => self.salts[index].1,
            Err(index) => {
                let root = self.allocate(Node::root());
                self.salts.insert(index, (salt.clone(), root));
                root
            }
        }
    }

    /// Every root with its salt.
    pub fn roots(&self) -> impl Iterator<Item = (Option<&Arc<str>>, u32)> {
        self.salts.iter().map(|(salt, root)| (Some(salt), *root)).chain([(None, UNSALTED)])
    }

    /// Nodes that cover tokens.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free_count - self.salts.len() - 1
    }

    /// The child that covers exactly `ids`, at most a block of them.
    pub fn child(&self, parent: u32, ids: &[u32]) -> Option<u32> {
        if ids.len() < self.block_len {
            return self.parts(parent).find(|&part| self.ids(part) == ids);
        }
        let hash = hash(parent, ids);
        let mut node = self.buckets[self.bucket(hash)];
        while node != NONE {
            let other = self.node(node);
            if other.hash == hash && other.parent == parent && self.ids(node) == ids {
                return Some(node);
            }
            node = other.next_in_bucket;
        }
        None
    }

    /// The last whole node on the path of `ids`; the root if there is none.
    pub fn last_whole(&self, root: u32, ids: &[u32]) -> u32 {
        let mut node = root;
        for block in ids.chunks_exact(self.block_len) {
            match self.child(node, block) {
                Some(child) => node = child,
                None => break,
            }
        }
        node
    }

    /// The deepest node with a checkpoint on the path of `ids`, of those at `node` and above and their parts.
    /// `node` is a root or a whole node of that path.
    pub fn last_checkpoint(&self, mut node: u32, ids: &[u32]) -> Option<u32> {
        loop {
            let rest = &ids[self.node(node).end() as usize..];
            let fitting = self.parts(node).filter(|&part| rest.starts_with(self.ids(part)));
            let part = fitting.max_by_key(|&part| self.node(part).len);
            if part.is_some() {
                return part;
            }
            if self.node(node).checkpoint != NONE {
                return Some(node);
            }
            node = self.node(node).parent;
            if node == NONE {
                return None;
            }
        }
    }

    /// Whether the path of `below` begins with the whole path of `above`, and goes on.
    pub fn is_below(&self, below: u32, above: u32) -> bool {
        let top = self.node(above);
        if self.node(below).end() <= top.end() {
            return false;
        }
        let mut node = below;
        while self.node(node).start > top.start {
            node = self.node(node).parent;
        }
        node == above || self.node(node).parent == top.parent && self.ids(node).starts_with(self.ids(above))
    }

    /// A child that is not there yet; `ids` are a block of them, or fewer.
    pub fn add(&mut self, parent: u32, ids: &[u32], block: u32, drafted: u32) -> u32 {
        let start = self.node(parent).end();
        let whole = ids.len() == self.block_len;
        let hash = if whole { hash(parent, ids) } else { 0 };
        let node = self.allocate(Node {
            parent,
            start,
            len: ids.len() as u32,
            block,
            drafted,
            hash,
            ..Node::root()
        });
        let first = node as usize * self.block_len;
        self.ids[first..first + ids.len()].copy_from_slice(ids);
        if whole {
            let bucket = self.bucket(hash);
            let second = std::mem::replace(&mut self.buckets[bucket], node);
            self.node_mut(node).next_in_bucket = second;
        }
        let second = std::mem::replace(self.first_sibling(node), node);
        self.node_mut(node).next = second;
        if second != NONE {
            self.node_mut(second).previous = node;
        }
        node
    }

    /// Removes a node without children, and its root if that then has none either and has a salt.
    pub fn remove(&mut self, node: u32) {
        debug_assert_eq!(self.children(node), Children::None);
        let Node { parent, len, hash, next_in_bucket, next, previous, .. } = *self.node(node);
        if len as usize == self.block_len {
            self.unlink(node, hash, next_in_bucket);
        }
        match previous {
            NONE => *self.first_sibling(node) = next,
            previous => self.node_mut(previous).next = next,
        }
        if next != NONE {
            self.node_mut(next).previous = previous;
        }
        self.free(node);
        let empty = self.is_root(parent) && self.children(parent) == Children::None;
        if empty && parent != UNSALTED {
            self.salts.retain(|&(_, root)| root != parent);
            self.free(parent);
        }
    }

    /// Takes a whole node out of its bucket.
    fn unlink(&mut self, node: u32, hash: u64, next: u32) {
        let bucket = self.bucket(hash);
        let mut before = self.buckets[bucket];
        if before == node {
            self.buckets[bucket] = next;
            return;
        }
        while self.node(before).next_in_bucket != node {
            before = self.node(before).next_in_bucket;
        }
        self.node_mut(before).next_in_bucket = next;
    }

    /// Where the list that a node stands in begins.
    fn first_sibling(&mut self, node: u32) -> &mut u32 {
        let Node { parent, len, .. } = *self.node(node);
        let whole = len as usize == self.block_len;
        let parent = self.node_mut(parent);
        if whole { &mut parent.first_whole } else { &mut parent.first_part }
    }

    fn list(&self, first: u32) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(first).filter(|&node| node != NONE), |&node| {
            Some(self.node(node).next).filter(|&next| next != NONE)
        })
    }

    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    fn allocate(&mut self, node: Node) -> u32 {
        if self.first_free == NONE {
            self.nodes.push(node);
            self.ids.resize(self.nodes.len() * self.block_len, 0);
            return self.nodes.len() as u32 - 1;
        }
        let index = self.first_free;
        self.first_free = std::mem::replace(self.node_mut(index), node).next_in_bucket;
        self.free_count -= 1;
        index
    }

    fn free(&mut self, node: u32) {
        let next = std::mem::replace(&mut self.first_free, node);
        self.node_mut(node).next_in_bucket = next;
        self.free_count += 1;
    }
}

impl Node {
    fn root() -> Self {
        Self {
            parent: NONE,
            start: 0,
            len: 0,
            block: NONE,
            drafted: 0,
            checkpoint: NONE,
            hash: 0,
            next_in_bucket: NONE,
            next: NONE,
            previous: NONE,
            first_whole: NONE,
            first_part: NONE,
        }
    }
}

/// Spreads blocks over buckets; which block it is, the ids say. An odd multiplier and a folded product per id, so
/// that every id moves the low bits that choose the bucket.
fn hash(parent: u32, ids: &[u32]) -> u64 {
    const MULTIPLIER: u128 = 0x9E37_79B9_7F4A_7C15;
    ids.iter().fold(u64::from(parent) + 1, |hash, &id| {
        let product = u128::from(hash ^ (u64::from(id) << 32 | 0x5851_F42D)) * MULTIPLIER;
        (product >> 64) as u64 ^ product as u64
    })
}
