//! Checkpoints: safetensors and GGUF files and the formats of their weights. A leaf: it knows no model.
//!
//! ```no_run
//! use ferrotron::weights::{Checkpoint, Source};
//! let checkpoint = Checkpoint::open(Source::folder("nemotron"))?;
//! // How the matrix is encoded is read from what is stored: BF16, F16, F32, FP8, NVFP4 or blocks of GGUF.
//! let q = checkpoint.linear("backbone.layers.5.mixer.q_proj", 4096, 2688)?;
//! let mut row = vec![0.0; q.cols];
//! q.row_f32(0, &mut row);
//! # Ok::<(), ferrotron::weights::Error>(())
//! ```

pub mod blocks;
pub mod checkpoint;
pub mod codec;
mod error;
pub mod gguf;
pub mod header;
pub mod linear;
pub mod quantize;
mod resolve;
pub mod source;
pub mod writer;

pub use blocks::Blocks;
pub use checkpoint::{Checkpoint, Encoding, Part, RowOrder, Tensor};
pub use error::{Error, Stored};
pub use linear::{Format, Kind, Linear};
pub use safetensors::Dtype;
pub use source::{Source, StaticFiles};
