//! How far ahead each sequence is drafted, and by whom.

use std::collections::HashMap;

use super::Speculation;
use super::sequence::Sequence;
use crate::model::{Network, StepError};
use crate::schedule::{DraftInputs, Scheduler, StepInputs, Wanted};

/// What one sequence's drafts are made by.
pub(super) struct Drafter {
    speculation: Speculation,
}

impl Drafter {
    pub fn new(speculation: Speculation) -> Self {
        Self { speculation }
    }

    pub fn observe(&mut self, _drafted: usize, _accepted: usize) {}
}

/// What the engine's drafts are made by.
pub(super) struct Speculator {
    ceiling: Speculation,
    depth_max: usize,
    mtp: bool,
    inputs: DraftInputs,
    proposals: Vec<u32>,
    stepped: Vec<u64>,
}

impl Speculator {
    pub fn new(ceiling: Speculation, scheduler: &Scheduler, network: &dyn Network) -> Self {
        let limits = network.limits();
        let depth_max = if limits.lanes > 0 { limits.drafts.min(ceiling.depth_max as usize) } else { 0 };
        Self {
            ceiling,
            depth_max,
            mtp: network.can_draft() && ceiling.mtp && depth_max > 0,
            inputs: scheduler.draft_inputs(),
            proposals: Vec::with_capacity(limits.logit_rows),
            stepped: Vec::with_capacity(scheduler.places()),
        }
    }

    pub fn learn(&mut self, _inputs: &StepInputs, _seconds: f64) {}

    /// Drafts what the next step is to verify.
    pub fn draft(
        &mut self,
        scheduler: &mut Scheduler,
        network: &mut dyn Network,
        running: &mut HashMap<u64, Sequence>,
    ) -> Result<(), StepError> {
        if self.mtp {
            self.ask_network(scheduler, network, running)?;
        }
        self.stepped.clear();
        self.stepped.extend(scheduler.stepped().map(|(id, _)| id));
        for id in &self.stepped {
            if let (Some(sequence), Some(drafts)) = (running.get_mut(id), scheduler.drafts_mut(*id)) {
                sequence.prepare(drafts);
            }
        }
        Ok(())
    }

    fn ask_network(
        &mut self,
        scheduler: &mut Scheduler,
        network: &mut dyn Network,
        running: &mut HashMap<u64, Sequence>,
    ) -> Result<(), StepError> {
        let depth_max = self.depth_max;
        let wanted = |id| match running.get(&id).map(|sequence| sequence.speculation.speculation) {
            Some(Speculation { depth_max: own, mtp: true, .. }) if own > 0 => {
                Wanted::Drafts(depth_max.min(own as usize))
            }
            _ => Wanted::Nothing,
        };
        let mut more = scheduler.plan_drafts(&mut self.inputs, wanted);
        while more {
            network.draft(&self.inputs, &mut self.proposals)?;
            more = scheduler.take_drafts(&self.proposals, &mut self.inputs);
        }
        Ok(())
    }
}
