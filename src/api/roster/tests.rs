//! A seeded world of requests, loads, sleeps and shortages around the roster: nobody is disturbed, everybody is answered.

use super::*;
use std::collections::HashSet;

const ANY: Wish = Wish { load: true, wake: false };

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// What the world knows of the roster's promises, by its own book-keeping.
struct World {
    roster: Roster<u32>,
    random: Random,
    most: usize,
    pinned: usize,
    /// Requests under way by place.
    running: Vec<Vec<u32>>,
    /// Who waits for which place.
    waiting: Vec<(usize, u32)>,
    answered: HashSet<u32>,
    loading: Option<usize>,
    leaving: Vec<usize>,
    /// Memory that a place takes, and what there is.
    sizes: Vec<usize>,
    memory: usize,
    held: HashSet<usize>,
    next_id: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let (places, most, pinned) = (2 + random.below(5), random.below(4), random.below(2));
        let mut roster = Roster::new(most, 6);
        let sizes: Vec<usize> = (0..places).map(|_| 1 + random.below(4)).collect();
        // The largest fits beside the pinned ones, so that nobody has to be refused.
        let memory = 4 + sizes[..pinned].iter().sum::<usize>() + random.below(6);
        for place in 0..places {
            roster.add(if place < pinned { Stage::Starting } else { Stage::Unloaded }, place < pinned);
        }
        let held = (0..pinned).collect();
        (0..pinned).for_each(|place| roster.placed(place));
        Self {
            roster,
            random,
            most,
            pinned,
            running: vec![Vec::new(); places],
            waiting: Vec::new(),
            answered: HashSet::new(),
            loading: None,
            leaving: Vec::new(),
            sizes,
            memory,
            held,
            next_id: 0,
        }
    }

    fn act(&mut self) {
        let place = self.random.below(self.sizes.len());
        match self.random.below(12) {
            0..4 => self.request(place),
            4..7 => self.finish(place),
            7 => self.withdraw(place),
            8 => drop(self.roster.load(place)),
            9 => self.unload(place),
            10 => self.sleep(place),
            _ => self.progress(),
        }
        self.obey();
        self.check();
    }

    fn request(&mut self, place: usize) {
        let id = self.next_id;
        self.next_id += 1;
        let wish = Wish { load: self.random.below(4) > 0, wake: self.random.below(2) > 0 };
        let before = self.roster.stage(place);
        match self.roster.request(place, wish, id) {
            Reply::Leased(id) => {
                assert_eq!(before, Stage::Ready);
                self.running[place].push(id);
            }
            Reply::Woken(id) => {
                assert_eq!(before, Stage::Asleep(Level::Paused));
                self.running[place].push(id);
            }
            Reply::Waiting => self.waiting.push((place, id)),
            Reply::NotLoaded => assert!(!wish.load),
            Reply::Asleep | Reply::Full(6) => {}
            refused => panic!("{refused:?} at {before:?}"),
        }
    }

    fn finish(&mut self, place: usize) {
        if let Some(id) = self.running[place].pop() {
            self.answered.insert(id);
            self.roster.release(place);
        }
    }

    /// One who waits goes away.
    fn withdraw(&mut self, place: usize) {
        if let Some(at) = self.waiting.iter().position(|(waits, _)| *waits == place) {
            let (_, id) = self.waiting.remove(at);
            self.roster.retain(place, |waiter| *waiter != id);
        }
    }

    fn unload(&mut self, place: usize) {
        if let Ok(waiters) = self.roster.unload(place) {
            self.dismiss(waiters);
            self.left(place);
        }
    }

    fn sleep(&mut self, place: usize) {
        let level = [Level::Paused, Level::Offloaded, Level::Discarded][self.random.below(3)];
        match self.random.below(2) {
            0 if self.roster.sleep(place, level).is_ok() => self.left(place),
            _ => drop(self.roster.wake(place)),
        }
    }

    fn left(&mut self, place: usize) {
        if matches!(self.roster.stage(place), Stage::Leaving(_)) {
            self.leaving.push(place);
        }
    }

    fn dismiss(&mut self, waiters: Vec<u32>) {
        self.waiting.retain(|(_, id)| !waiters.contains(id));
    }

    /// Something that was under way comes to its end.
    fn progress(&mut self) {
        if let Some(at) = (!self.leaving.is_empty()).then(|| self.random.below(self.leaving.len())) {
            let place = self.leaving.swap_remove(at);
            // Whoever asked for it lets those who run finish, or fails them.
            let stays = self.roster.stage(place) == Stage::Leaving(Then::Asleep(Level::Paused));
            if !stays {
                self.held.remove(&place);
                while !self.running[place].is_empty() {
                    self.finish(place);
                }
            }
            self.roster.ended(place);
        } else if let Some(place) = self.loading.take() {
            let free = self.memory - self.held.iter().map(|held| self.sizes[*held]).sum::<usize>();
            if self.sizes[place] > free {
                self.roster.short(place);
            } else if self.random.below(8) == 0 {
                let waiters = self.roster.failed(place);
                self.dismiss(waiters);
            } else {
                self.held.insert(place);
                let served = self.roster.loaded(place);
                assert!(
                    served.iter().all(|id| self.waiting.contains(&(place, *id))),
                    "nobody is served who does not wait"
                );
                self.dismiss(served.clone());
                self.running[place].extend(served);
            }
        }
    }

    fn obey(&mut self) {
        while let Some(order) = self.roster.next() {
            match order {
                Order::Load(place) => {
                    assert_eq!(self.loading.replace(place), None, "one loads at a time");
                    assert!(!self.held.contains(&place), "it is here already");
                }
                Order::Unload(place) => {
                    assert!(self.running[place].is_empty(), "{place} is chosen in the middle of a request");
                    assert!(place >= self.pinned, "{place} is pinned");
                    assert_ne!(self.loading, Some(place));
                    self.leaving.push(place);
                }
            }
        }
    }

    fn check(&self) {
        for (place, running) in self.running.iter().enumerate() {
            assert_eq!(self.roster.leases(place), running.len(), "leases of {place}");
            let waits = self.waiting.iter().any(|(waits, _)| *waits == place);
            let stage = self.roster.stage(place);
            let may_wait = matches!(stage, Stage::Queued | Stage::Loading | Stage::Leaving(_));
            assert!(!waits || may_wait, "somebody waits for {place}, which is {stage:?}");
        }
        let counted =
            (self.pinned..self.sizes.len()).filter(|place| self.roster.places[*place].holds_memory());
        // What sleeps and is woken, or was woken in place, never left the count.
        assert!(self.most == 0 || counted.count() <= self.most, "more than {}", self.most);
    }

    /// Everything under way comes to its end, and nobody asks for more.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.waiting.is_empty() && self.loading.is_none() && self.leaving.is_empty() {
                return;
            }
            (0..self.sizes.len()).for_each(|place| self.finish(place));
            // A model that sleeps with all it has may be in the way of others for as long as somebody wants that.
            for place in 0..self.sizes.len() {
                if self.roster.stage(place) == Stage::Asleep(Level::Paused) {
                    self.roster.wake(place).expect("it sleeps");
                }
            }
            self.progress();
            self.obey();
            self.check();
        }
        panic!("somebody waits for ever: {:?}", self.roster);
    }
}

#[test]
fn nobody_is_disturbed_and_everybody_is_answered() {
    for seed in 0..400 {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            (0..300).for_each(|_| world.act());
            world.settle();
            world.answered.len()
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

/// Places that are ready, none of them pinned.
fn ready(count: usize, most: usize) -> Roster<u32> {
    let mut roster = Roster::new(most, 2);
    for place in 0..count {
        roster.add(Stage::Unloaded, false);
        roster.placed(place);
    }
    roster
}

#[test]
fn the_one_that_was_used_longest_ago_goes_first() {
    let mut roster = ready(3, 3);
    for place in [2, 0, 1, 2] {
        assert_eq!(roster.request(place, ANY, 0), Reply::Leased(0));
        roster.release(place);
    }
    let wanted = roster.add(Stage::Unloaded, false);
    assert_eq!(roster.request(wanted, ANY, 7), Reply::Waiting);
    assert_eq!(roster.next(), Some(Order::Unload(0)));
    assert_eq!(roster.next(), None, "room is on its way");
    roster.ended(0);
    assert_eq!(roster.next(), Some(Order::Load(wanted)));
    assert_eq!(roster.loaded(wanted), [7]);
}

#[test]
fn the_busy_and_the_pinned_stay() {
    let mut roster = ready(1, 1);
    let front = roster.add(Stage::Starting, true);
    roster.placed(front);
    assert_eq!(roster.request(0, ANY, 0), Reply::Leased(0));
    let wanted = roster.add(Stage::Unloaded, false);
    assert_eq!(roster.request(wanted, ANY, 1), Reply::Waiting);
    assert_eq!(roster.next(), None);
    assert!(roster.is_stuck());
    roster.release(0);
    assert_eq!(roster.next(), Some(Order::Unload(0)));
}

#[test]
fn who_was_waited_for_is_busy_before_anybody_else_is_asked() {
    let mut roster = ready(0, 1);
    let (first, second) = (roster.add(Stage::Unloaded, false), roster.add(Stage::Unloaded, false));
    assert_eq!(roster.request(first, ANY, 1), Reply::Waiting);
    assert_eq!(roster.next(), Some(Order::Load(first)));
    assert_eq!(roster.request(second, ANY, 2), Reply::Waiting);
    assert_eq!(roster.next(), None, "one that loads is not chosen");
    assert_eq!(roster.loaded(first), [1]);
    assert_eq!(roster.next(), None, "its waiter has a lease");
    roster.release(first);
    assert_eq!(roster.next(), Some(Order::Unload(first)));
}

#[test]
fn a_load_that_nobody_waits_for_any_more_does_not_begin() {
    let mut roster = ready(0, 0);
    let place = roster.add(Stage::Unloaded, false);
    assert_eq!(roster.request(place, ANY, 1), Reply::Waiting);
    roster.retain(place, |_| false);
    assert_eq!((roster.next(), roster.stage(place)), (None, Stage::Unloaded));
    roster.load(place).expect("it is unloaded");
    roster.retain(place, |_| false);
    assert_eq!(roster.next(), Some(Order::Load(place)), "somebody wants it without waiting");
}

#[test]
fn a_queue_has_an_end() {
    let mut roster = ready(0, 0);
    let place = roster.add(Stage::Unloaded, false);
    let replies = [1, 2, 3].map(|id| roster.request(place, ANY, id));
    assert_eq!(replies, [Reply::Waiting, Reply::Waiting, Reply::Full(2)]);
}
