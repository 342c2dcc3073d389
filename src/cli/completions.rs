//! `completions`: what completes commands and flags, for a shell to read.

use std::io::{self, Write};

use clap_complete::Shell;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferrotron completions bash > ~/.local/share/bash-completion/completions/ferrotron
  ferrotron completions zsh > ~/.zfunc/_ferrotron
  ferrotron completions fish > ~/.config/fish/completions/ferrotron.fish")]
pub struct Args {
    /// Whose
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints them. Errors: nobody reads.
pub fn run(args: &Args, command: &mut clap::Command) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "ferrotron", &mut script);
    Ok(io::stdout().write_all(&script)?)
}
