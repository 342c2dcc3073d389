use super::*;
use crate::schedule::Pool;

const CONFIG: CacheConfig =
    CacheConfig { block_len: 4, blocks: 64, checkpoints_max: 8, state_bytes: 1000, block_bytes: 10 };

/// A cache with its pools, and whatever stands in them.
struct World {
    cache: Cache,
    pools: Pools,
    /// By block and row: the tokens up to and with this one, and whether the drafter has an entry.
    rows: Vec<Vec<Option<(Key, bool)>>>,
    /// By place: the tokens that the state has seen.
    states: Vec<Key>,
    /// What sequences hold, by place.
    slots_held: Vec<u32>,
    blocks_held: Vec<u32>,
}

/// Salt and tokens.
type Key = (Option<Arc<str>>, Vec<u32>);

/// A sequence that has read its tokens.
struct Sequence {
    key: Key,
    blocks: Vec<u32>,
    drafted_from: usize,
    cached_len: usize,
}

impl World {
    fn new(config: CacheConfig, slots: u32) -> Self {
        Self {
            cache: Cache::new(config),
            pools: Pools { slots: Pool::new(slots), blocks: Pool::new(config.blocks as u32) },
            rows: vec![vec![None; config.block_len]; config.blocks],
            states: vec![(None, Vec::new()); slots as usize],
            slots_held: vec![0; slots as usize],
            blocks_held: vec![0; config.blocks],
        }
    }

    fn block_len(&self) -> usize {
        self.cache.config.block_len
    }

    fn take_block(&mut self) -> u32 {
        let block = self.pools.blocks.take().expect("a free block");
        self.blocks_held[block as usize] += 1;
        self.rows[block as usize].fill(None);
        block
    }

    fn share_block(&mut self, block: u32) {
        self.pools.blocks.share(block);
        self.blocks_held[block as usize] += 1;
    }

    fn give_block(&mut self, block: u32) {
        self.pools.blocks.give_back(block);
        self.blocks_held[block as usize] -= 1;
    }

    /// What a look-up promises, compared with what stands in the pools.
    fn find(&self, key: &Key, limit: usize, blocks: &mut Vec<u32>) -> Option<Hit> {
        let (salt, tokens) = key;
        let hit = self.cache.find(salt.as_deref(), tokens, limit, blocks);
        let Some(hit) = hit else {
            assert!(blocks.is_empty());
            return None;
        };
        assert_eq!(self.states[hit.place as usize], (salt.clone(), tokens[..hit.len].to_vec()));
        assert_eq!(blocks.len(), hit.len.div_ceil(self.block_len()));
        for at in 0..hit.len {
            let row = &self.rows[blocks[at / self.block_len()] as usize][at % self.block_len()];
            let (seen, drafted) = row.as_ref().expect("a row that was written");
            assert_eq!(*seen, (salt.clone(), tokens[..=at].to_vec()), "row {at}");
            assert!(*drafted || at == 0 || at < hit.draft_from, "row {at} has no entry of the drafter");
        }
        Some(hit)
    }

    /// Resumes a sequence from the cache, or starts it; it holds what it resumes from.
    fn start(&mut self, key: Key) -> Option<Sequence> {
        let mut blocks = Vec::new();
        let hit = self.find(&key, key.1.len() - 1, &mut blocks);
        for &block in &blocks {
            self.share_block(block);
        }
        let (len, drafted_from) = hit.map_or((0, 0), |hit| (hit.len, hit.draft_from));
        if let Some(hit) = hit {
            self.pools.slots.share(hit.place);
            self.slots_held[hit.place as usize] += 1;
        }
        let more = key.1.len().div_ceil(self.block_len()) - len / self.block_len();
        let room = self.cache.make_room_for_blocks(more, &mut self.pools);
        if let Some(hit) = hit {
            self.pools.slots.give_back(hit.place);
            self.slots_held[hit.place as usize] -= 1;
        }
        if !room {
            blocks.into_iter().for_each(|block| self.give_block(block));
            return None;
        }
        if let Some(hit) = hit {
            self.cache.touch(&hit);
        }
        if !len.is_multiple_of(self.block_len()) {
            let shared = blocks.pop().unwrap();
            let copy = self.take_block();
            self.rows[copy as usize] = self.rows[shared as usize].clone();
            self.give_block(shared);
            blocks.push(copy);
        }
        let salt = key.0.clone();
        let sequence = Sequence { key: (salt, key.1[..len].to_vec()), blocks, drafted_from, cached_len: len };
        Some(sequence)
    }

    /// Reads tokens on: writes their rows.
    fn read(&mut self, sequence: &mut Sequence, tokens: &[u32], drafts: bool) {
        for &token in tokens {
            let at = sequence.key.1.len();
            if at.is_multiple_of(self.block_len()) {
                let block = self.take_block();
                sequence.blocks.push(block);
            }
            sequence.key.1.push(token);
            if !drafts {
                sequence.drafted_from = at + 1;
            }
            let (block, row) = (sequence.blocks[at / self.block_len()], at % self.block_len());
            self.rows[block as usize][row] = Some((sequence.key.clone(), drafts));
        }
    }

    /// Saves the state of a sequence where it stands and hands it over.
    fn keep(&mut self, sequence: &Sequence) -> bool {
        assert!(self.cache.make_room_for_place(&mut self.pools), "no place");
        let place = self.pools.slots.take().unwrap();
        self.states[place as usize] = sequence.key.clone();
        let prefix = Prefix {
            salt: sequence.key.0.as_ref(),
            tokens: &sequence.key.1,
            blocks: &sequence.blocks,
            place,
            drafted_from: sequence.drafted_from,
        };
        self.cache.insert(prefix, &mut self.pools)
    }

    fn end(&mut self, sequence: Sequence) {
        sequence.blocks.into_iter().for_each(|block| self.give_block(block));
    }

    fn check(&self) {
        self.cache.check(&self.pools, self.slots_held.clone(), self.blocks_held.clone());
    }

    /// Runs a prompt and keeps its state at each of `lens`, the last of which is its own.
    fn run(&mut self, salt: Option<&str>, tokens: &[u32], lens: &[usize]) {
        let key = (salt.map(Arc::from), tokens.to_vec());
        let mut sequence = self.start(key).expect("room");
        for &len in lens {
            let from = sequence.key.1.len();
            self.read(&mut sequence, &tokens[from..len], true);
            self.keep(&sequence);
            self.check();
        }
        self.end(sequence);
        self.check();
    }

    /// Length of the hit, and its blocks.
    fn hit(&self, salt: Option<&str>, tokens: &[u32]) -> (usize, usize) {
        let mut blocks = Vec::new();
        let hit = self.find(&(salt.map(Arc::from), tokens.to_vec()), tokens.len(), &mut blocks);
        self.check();
        (hit.map_or(0, |hit| hit.len), blocks.len())
    }

    /// All checkpoints, sorted.
    fn keys(&self) -> Vec<Key> {
        let tree = &self.cache.tree;
        let mut keys = Vec::new();
        for checkpoint in &self.cache.checkpoints {
            let mut path = Vec::new();
            let mut node = checkpoint.node;
            while !tree.is_root(node) {
                path.push(node);
                node = tree.node(node).parent;
            }
            let salt = tree.roots().find(|(_, root)| *root == node).expect("a root").0.cloned();
            keys.push((salt, path.iter().rev().flat_map(|&node| tree.ids(node)).copied().collect()));
        }
        keys.sort();
        keys
    }
}

fn ascending(len: u32) -> Vec<u32> {
    (1..=len).collect()
}

#[test]
fn a_hit_is_the_deepest_checkpoint_that_fits() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(14), &[3, 6, 7, 8, 14]);
    let hits: Vec<_> = (1..=15).map(|len| world.hit(None, &ascending(len)).0).collect();
    assert_eq!(hits, [0, 0, 3, 3, 3, 6, 7, 8, 8, 8, 8, 8, 8, 14, 14]);
    assert_eq!(world.hit(None, &ascending(14)), (14, 4));
}

#[test]
fn the_limit_leaves_a_token_to_run() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(8), &[4, 8]);
    let mut blocks = vec![7; 3];
    let hit = world.cache.find(None, &ascending(8), 7, &mut blocks).unwrap();
    assert_eq!((hit.len, blocks.len()), (4, 1));
    assert_eq!(world.cache.find(None, &ascending(8), 3, &mut blocks), None);
    assert!(blocks.is_empty());
}

#[test]
fn a_branch_inside_a_block_resumes_before_it() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &[1, 2, 3, 4, 5, 6, 7, 8], &[6, 8]);
    let other = [1, 2, 3, 4, 5, 6, 70, 80, 90];
    assert_eq!(world.hit(None, &other), (6, 2));
    world.run(None, &other, &[9]);
    assert_eq!(world.hit(None, &other), (9, 3));
    assert_eq!(world.hit(None, &ascending(8)), (8, 2));
    assert_eq!(world.hit(None, &[1, 2, 3, 4, 5, 7]), (0, 0));
}

#[test]
fn salts_share_nothing() {
    let mut world = World::new(CONFIG, 8);
    world.run(Some("a"), &ascending(6), &[6]);
    assert_eq!(world.hit(None, &ascending(6)), (0, 0));
    assert_eq!(world.hit(Some("b"), &ascending(6)), (0, 0));
    assert_eq!(world.hit(Some("a"), &ascending(6)), (6, 2));
    world.run(None, &ascending(6), &[5]);
    assert_eq!(world.hit(Some("a"), &ascending(5)), (0, 0));
}

#[test]
fn the_same_checkpoint_is_kept_once() {
    let mut world = World::new(CONFIG, 8);
    for _ in 0..3 {
        world.run(None, &ascending(6), &[6]);
    }
    let held = Holdings { checkpoints: 1, blocks: 2, state_bytes: 1000, kv_bytes: 20 };
    assert_eq!(world.cache.holdings(), held);
    assert_eq!((world.pools.slots.taken_count(), world.pools.blocks.taken_count()), (1, 2));
}

#[test]
fn a_part_and_the_whole_block_behind_it_are_one_block() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(4), &[2, 3, 4]);
    assert_eq!(world.cache.holdings().blocks, 1);
    assert_eq!(world.pools.blocks.taken_count(), 1);
}

#[test]
fn blocks_without_a_checkpoint_below_go_at_once() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(20), &[5, 20]);
    // The short one saves 5 of 1 020 bytes, the long one 15 of 1 030.
    assert_eq!(world.cache.evict_one(&mut world.pools), Some(Freed { places: 1, blocks: 0 }));
    world.check();
    assert_eq!(world.hit(None, &ascending(20)), (20, 5));
    assert_eq!(world.cache.evict_one(&mut world.pools), Some(Freed { places: 1, blocks: 5 }));
    assert_eq!(world.cache.evict_one(&mut world.pools), None);
    assert_eq!(world.cache.holdings(), Holdings::default());
}

#[test]
fn a_checkpoint_in_the_middle_may_go_while_those_below_stay() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(16), &[6, 8, 16]);
    assert_eq!(world.cache.evict_one(&mut world.pools), Some(Freed { places: 1, blocks: 0 }));
    world.check();
    assert_eq!(world.hit(None, &ascending(12)), (6, 2));
    assert_eq!(world.hit(None, &ascending(16)), (16, 4));
}

#[test]
fn a_long_old_checkpoint_goes_after_a_short_one_unless_it_is_much_older() {
    let long = ascending(40);
    let short = [100, 101, 102, 103];
    for (uses, survivor) in [(2, 40), (20, 0)] {
        let mut world = World::new(CONFIG, 8);
        world.run(None, &long, &[40]);
        for _ in 0..uses {
            world.run(None, &short, &[4]);
        }
        world.cache.evict_one(&mut world.pools).unwrap();
        assert_eq!(world.hit(None, &long).0, survivor, "after {uses} uses of the other");
        assert_eq!(world.hit(None, &short).0, 4 * usize::from(survivor == 0));
    }
}

#[test]
fn what_a_checkpoint_saves_counts_from_the_one_before() {
    let mut world = World::new(CONFIG, 8);
    world.run(None, &ascending(41), &[40, 41]);
    world.run(None, &[100; 4], &[4]);
    // 41 tokens, but one more than the next best.
    world.cache.evict_one(&mut world.pools).unwrap();
    assert_eq!((world.hit(None, &ascending(41)).0, world.hit(None, &[100; 4]).0), (40, 4));
}

#[test]
fn beyond_the_budget_the_least_valuable_goes_even_if_it_is_the_last_one_in() {
    let mut world = World::new(CacheConfig { checkpoints_max: 1, ..CONFIG }, 8);
    let mut sequence = world.start((None, ascending(40))).unwrap();
    world.read(&mut sequence, &ascending(38), true);
    assert!(world.keep(&sequence));
    world.read(&mut sequence, &[39], true);
    assert!(!world.keep(&sequence));
    world.end(sequence);
    world.check();
    assert_eq!(world.hit(None, &ascending(40)).0, 38);
}

#[test]
fn without_a_budget_nothing_is_kept() {
    let mut world = World::new(CacheConfig { checkpoints_max: 0, ..CONFIG }, 8);
    world.run(None, &ascending(9), &[4, 9]);
    assert_eq!(world.hit(None, &ascending(9)), (0, 0));
    assert_eq!((world.pools.slots.taken_count(), world.pools.blocks.taken_count()), (0, 0));
}

#[test]
fn room_for_a_place_is_not_looked_for_where_a_sequence_resumes() {
    let mut world = World::new(CONFIG, 2);
    world.run(None, &ascending(4), &[4]);
    world.run(None, &[9; 8], &[8]);
    let short = world.cache.find(None, &ascending(4), 4, &mut Vec::new()).unwrap();
    world.pools.slots.share(short.place);
    world.slots_held[short.place as usize] += 1;
    assert!(world.cache.make_room_for_place(&mut world.pools));
    assert_eq!((world.hit(None, &ascending(4)).0, world.hit(None, &[9; 8]).0), (4, 0));
    world.pools.slots.take();
    assert!(!world.cache.make_room_for_place(&mut world.pools));
    assert_eq!(world.cache.holdings().checkpoints, 1);
}

#[test]
fn room_for_blocks_is_made_whole_or_not_at_all() {
    let mut world = World::new(CacheConfig { blocks: 8, ..CONFIG }, 8);
    world.run(None, &ascending(12), &[4, 12]);
    let sequence = world.start((None, vec![9; 13])).unwrap();
    let taken: Vec<_> = (0..4).map(|_| world.take_block()).collect();
    assert!(!world.cache.make_room_for_blocks(5, &mut world.pools));
    assert_eq!(world.cache.holdings().checkpoints, 2);
    assert!(world.cache.make_room_for_blocks(3, &mut world.pools));
    assert_eq!(world.hit(None, &ascending(12)).0, 4);
    assert!(world.cache.make_room_for_blocks(4, &mut world.pools));
    assert_eq!(world.cache.holdings(), Holdings::default());
    taken.into_iter().for_each(|block| world.give_block(block));
    world.end(sequence);
    world.check();
}

#[test]
fn a_hit_says_from_where_on_the_drafter_has_entries() {
    let mut world = World::new(CONFIG, 8);
    let draft_from = |world: &World, len: u32| {
        world.find(&(None, ascending(len)), len as usize, &mut Vec::new()).unwrap().draft_from
    };
    let mut sequence = world.start((None, ascending(20))).unwrap();
    world.read(&mut sequence, &ascending(6), false);
    world.keep(&sequence);
    assert_eq!(draft_from(&world, 6), 6);
    world.read(&mut sequence, &ascending(14)[6..], true);
    world.keep(&sequence);
    world.end(sequence);
    assert_eq!(draft_from(&world, 14), 6);

    // Read once more without the cache, with the drafter: the tree takes its blocks.
    let mut cold = Sequence { key: (None, Vec::new()), blocks: Vec::new(), drafted_from: 0, cached_len: 0 };
    world.read(&mut cold, &ascending(14), true);
    world.keep(&cold);
    world.end(cold);
    assert_eq!(draft_from(&world, 14), 0);
    assert_eq!(draft_from(&world, 6), 6);
    world.check();
}

#[test]
fn clearing_gives_everything_back() {
    let mut world = World::new(CONFIG, 8);
    world.run(Some("a"), &ascending(12), &[4, 12]);
    world.run(None, &ascending(7), &[5, 6, 7]);
    world.cache.clear(&mut world.pools);
    world.check();
    assert_eq!((world.pools.slots.taken_count(), world.pools.blocks.taken_count()), (0, 0));
    world.run(Some("a"), &ascending(12), &[12]);
    assert_eq!(world.hit(Some("a"), &ascending(12)), (12, 3));
}

#[test]
fn ids_decide_and_not_their_hash() {
    // One bucket for all: every look-up walks over the blocks of the others.
    let mut tree = Tree::new(2, 1, 1);
    let root = tree.root(None).unwrap();
    let nodes: Vec<_> = (0..50).map(|id| tree.add(root, &[id, id / 2], id, 0)).collect();
    for id in 0..50 {
        assert_eq!(tree.child(root, &[id, id / 2]), Some(nodes[id as usize]));
        assert_eq!(tree.child(root, &[id, id / 2 + 1]), None);
        assert_eq!(tree.child(nodes[0], &[id, id / 2]), None);
    }
    nodes.iter().step_by(2).for_each(|&node| tree.remove(node));
    for id in 0..50 {
        let expected = Some(nodes[id as usize]).filter(|_| id % 2 == 1);
        assert_eq!(tree.child(root, &[id, id / 2]), expected);
    }
    assert_eq!(tree.len(), 25);
}

/// A list of checkpoints, and everything about them found by looking through it.
struct Naive {
    config: CacheConfig,
    clock: u64,
    kept: Vec<(Key, u64)>,
}

impl Naive {
    fn find(&self, key: &Key, limit: usize) -> usize {
        let fits = |(salt, tokens): &Key| *salt == key.0 && key.1[..limit].starts_with(tokens);
        self.kept.iter().filter(|(kept, _)| fits(kept)).map(|(kept, _)| kept.1.len()).max().unwrap_or(0)
    }

    /// The heads of a key that blocks end at.
    fn blocks(&self, key: &Key) -> Vec<Key> {
        let lens = (1..=key.1.len()).filter(|len| len % self.config.block_len == 0 || *len == key.1.len());
        lens.map(|len| (key.0.clone(), key.1[..len].to_vec())).collect()
    }

    fn value(&self, index: usize) -> f64 {
        let (key, used) = &self.kept[index];
        let saved = key.1.len() - self.find(key, key.1.len() - 1);
        let others: Vec<Key> = (0..self.kept.len())
            .filter(|other| *other != index)
            .flat_map(|other| self.blocks(&self.kept[other].0))
            .collect();
        let own = self.blocks(key).iter().filter(|block| !others.contains(block)).count();
        let bytes = (self.config.state_bytes + own * self.config.block_bytes).max(1);
        saved as f64 / bytes as f64 / (1 + self.clock - used) as f64
    }

    fn insert(&mut self, key: &Key) {
        self.clock += 1;
        match self.kept.iter_mut().find(|(kept, _)| kept == key) {
            Some(kept) => kept.1 = self.clock,
            None => self.kept.push((key.clone(), self.clock)),
        }
    }

    fn touch(&mut self, key: Key) {
        self.clock += 1;
        self.kept.iter_mut().find(|(kept, _)| *kept == key).expect("it was found").1 = self.clock;
    }

    /// Takes over which checkpoints are left, after making sure that none that went was worth clearly more than one
    /// that stayed at that moment.
    fn follow(&mut self, world: &World, by_value: bool) {
        let keys = world.keys();
        while self.kept.len() > keys.len() {
            let gone: Vec<usize> =
                (0..self.kept.len()).filter(|&i| keys.binary_search(&self.kept[i].0).is_err()).collect();
            let value = |index: &usize| self.value(*index);
            let least = gone.into_iter().min_by(|a, b| value(a).total_cmp(&value(b))).expect("one has gone");
            let lowest = (0..self.kept.len()).map(|index| self.value(index)).fold(f64::INFINITY, f64::min);
            assert!(!by_value || self.value(least) <= lowest * 1.000_001, "a more valuable one went");
            self.kept.remove(least);
        }
        let mut kept: Vec<Key> = self.kept.iter().map(|(key, _)| key.clone()).collect();
        kept.sort();
        assert_eq!(kept, keys);
    }
}

/// A small generator of its own: a seed names a world.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end
    }
}

/// A prompt: an earlier one cut and continued, or a fresh one; few ids, so that heads meet by chance.
fn prompt(chance: &mut Chance, earlier: &[Key]) -> Key {
    let salt = [None, None, Some("a"), Some("b")][chance.below(4)].map(Arc::from);
    let mut key: Key = (salt, Vec::new());
    if !earlier.is_empty() && chance.below(4) > 0 {
        key = earlier[chance.below(earlier.len())].clone();
        let cut = chance.below(key.1.len() + 1);
        key.1.truncate(cut);
    }
    for _ in 0..1 + chance.below(12) {
        key.1.push(chance.below(3) as u32);
    }
    key.1.truncate(30);
    key
}

fn live(seed: u64) {
    let mut chance = Chance(seed);
    let config = CacheConfig {
        block_len: 1 + chance.below(6),
        blocks: 40 + chance.below(60),
        checkpoints_max: 1 + chance.below(12),
        state_bytes: chance.below(1000),
        block_bytes: 1 + chance.below(100),
    };
    let mut world = World::new(config, 13);
    let mut naive = Naive { config, clock: 0, kept: Vec::new() };
    let mut earlier: Vec<Key> = Vec::new();
    let mut running: Vec<Sequence> = Vec::new();
    for _ in 0..60 {
        let key = prompt(&mut chance, &earlier);
        let expected = naive.find(&key, key.1.len() - 1);
        if let Some(mut sequence) = world.start(key.clone()) {
            assert_eq!(sequence.cached_len, expected);
            naive.follow(&world, false);
            if expected > 0 && naive.find(&key, expected) == expected {
                naive.touch((key.0.clone(), key.1[..expected].to_vec()));
            }
            world.check();
            let drafts = chance.below(3) > 0;
            while sequence.key.1.len() < key.1.len() {
                let from = sequence.key.1.len();
                let to = from + 1 + chance.below(key.1.len() - from);
                world.read(&mut sequence, &key.1[from..to], drafts);
                let kept = world.keep(&sequence);
                naive.insert(&sequence.key);
                naive.follow(&world, true);
                assert_eq!(kept, naive.find(&sequence.key, to) == to);
                world.check();
            }
            running.push(sequence);
        }
        earlier.push(key);
        if running.len() > chance.below(5) {
            let index = chance.below(running.len());
            world.end(running.swap_remove(index));
        }
        if chance.below(6) == 0 {
            world.cache.evict_one(&mut world.pools);
            naive.follow(&world, true);
        }
        world.check();
    }
    running.into_iter().for_each(|sequence| world.end(sequence));
    world.cache.clear(&mut world.pools);
    world.check();
    assert_eq!(world.pools.slots.taken_count() + world.pools.blocks.taken_count(), 0);
}

#[test]
fn the_cache_is_a_list_of_checkpoints_found_by_looking_through_it() {
    for seed in 0..300 {
        if std::panic::catch_unwind(|| live(seed)).is_err() {
            panic!("seed {seed} failed");
        }
    }
}
