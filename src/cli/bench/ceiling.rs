//! What the machine can do at most, measured in the run whose figures are given as shares of it.

use anyhow::Context;
use serde::Serialize;

use crate::backend::cpu::roofline;

/// Of so many threads together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ceiling {
    /// Reading a buffer that no cache holds.
    pub bandwidth_gb_per_s: f64,
    /// Of the fastest unit for multiply-adds.
    pub peak_gflop_per_s: f64,
    pub peak_unit: &'static str,
}

impl Ceiling {
    pub fn measure(threads: usize) -> anyhow::Result<Self> {
        let bandwidth = roofline::read_bandwidth(threads).context("measuring the memory")?;
        let peak = roofline::peak(threads).context("measuring multiply-adds")?;
        Ok(Ceiling {
            bandwidth_gb_per_s: bandwidth / 1e9,
            peak_gflop_per_s: peak.flops / 1e9,
            peak_unit: peak.unit.name(),
        })
    }

    /// The same with what the memory did at another time.
    pub fn with_memory(&self, bytes_per_s: f64) -> Self {
        Ceiling { bandwidth_gb_per_s: bytes_per_s / 1e9, ..self.clone() }
    }

    /// Share of the read bandwidth.
    pub fn memory_percent(&self, gb_per_s: f64) -> f64 {
        100.0 * gb_per_s / self.bandwidth_gb_per_s
    }

    /// Share of the fastest unit's multiply-adds.
    pub fn compute_percent(&self, gflop_per_s: f64) -> f64 {
        100.0 * gflop_per_s / self.peak_gflop_per_s
    }

    /// As it stands above a table.
    pub fn describe(&self) -> String {
        format!(
            "memory reads at {:.1} GB/s, {} at {:.0} GFLOP/s",
            self.bandwidth_gb_per_s, self.peak_unit, self.peak_gflop_per_s
        )
    }
}

#[cfg(test)]
impl Ceiling {
    /// 100 GB/s and 1000 GFLOP/s.
    pub fn round() -> Self {
        Ceiling { bandwidth_gb_per_s: 100.0, peak_gflop_per_s: 1000.0, peak_unit: "f32 multiply-add" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_their_own_ceiling() {
        let ceiling = Ceiling::round();
        assert_eq!((ceiling.memory_percent(25.0), ceiling.compute_percent(25.0)), (25.0, 2.5));
    }
}
