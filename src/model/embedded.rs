//! Models that are part of the binary, by name, each as the files of its checkpoint folder.

use crate::weights::StaticFiles;

/// (name, files). The first one is served when no model is named.
pub static EMBEDDED: &[(&str, StaticFiles)] = &[];
