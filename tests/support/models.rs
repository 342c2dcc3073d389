//! Networks that tests compute with.

use std::path::{Path, PathBuf};

use ferrotron::backend::Backend;
use ferrotron::model::config::ModelConfig;
use ferrotron::model::{Limits, Model, load};
use ferrotron::weights::{Checkpoint, Source};

pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

pub fn model<B: Backend>(backend: B, folder: &Path, limits: Limits) -> Model<B> {
    let checkpoint = Checkpoint::open(Source::folder(folder)).expect("the checkpoint opens");
    let json = checkpoint.file("config.json").expect("readable").expect("config.json is there");
    let config = ModelConfig::from_json(&json).expect("the config is understood");
    let fields = load::load(&config, &checkpoint, &|_| {}).expect("the weights load").fields;
    Model::new(backend, config, fields, limits).expect("the sizes agree")
}

/// splitmix64
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}
