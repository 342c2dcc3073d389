//! `man`: one manual page for the program and one for each of its commands.

use std::path::PathBuf;

use anyhow::Context;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  ferrotron man ~/.local/share/man/man1 && man ferrotron-serve")]
pub struct Args {
    /// Folder to write them to; made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Writes them. Errors: the folder cannot be written to.
pub fn run(args: &Args, command: clap::Command) -> anyhow::Result<()> {
    let shown = || format!("{} cannot be written", args.folder.display());
    std::fs::create_dir_all(&args.folder).with_context(shown)?;
    clap_mangen::generate_to(command, &args.folder).with_context(shown)
}
