//! Many requests at once that nobody waits for: a file of lines in, a file of results out.
//!
//! ```text
//! lines ─input→ checked as a whole ─run→ the router itself, at background priority ─journal→ one line per answer
//! ```
//!
//! A line goes through the very router that clients reach, so every dialect works here. The journal is the output file:
//! an answer is there as a whole line or not at all, and each result's id is the digest of the line it answers. So a run
//! that was killed goes on where it stopped, and a file that answers something else is recognised.
//!
//! `ferrotron batch` is [`Input::read`], [`Journal::open`] and [`run`]; `/v1/files` and `/v1/batches` are the same with a
//! [`Desk`] that keeps the files.

mod desk;
mod files;
mod input;
mod journal;
mod multipart;
mod routes;
mod run;
mod work;

pub use desk::Desk;
pub use files::FileOptions;
pub use input::{Fault, Input, InputError, Limits, Line};
pub use journal::{Counts, Journal, JournalError};
pub use routes::add_to;
pub use run::{RunError, run};
pub use work::resume;
