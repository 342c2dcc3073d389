//! The command line: one file per command. Only here and in `main` is anything printed.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod check;
pub mod completions;
pub mod eval;
pub mod man;
pub mod models;
pub mod pull;
pub mod quantize;
pub mod resident;
pub mod score;
pub mod serve;
pub mod table;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

/// Serves NVIDIA Nemotron-H models over an OpenAI-compatible API, from one native process.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over HTTP
    Serve(Box<serve::Args>),
    /// Answer a file of requests, from where it stopped
    Batch(batch::Args),
    /// Talk to a model in the terminal
    Chat(chat::Args),
    /// Measure decode or prefill speed against the memory's own
    Bench(bench::Args),
    /// Print the logits of given token ids
    Score(score::Args),
    /// Answer held-out prompts and count what is right
    Eval(eval::Args),
    /// Compare a checkpoint's tensors with what its configuration asks for
    Check(check::Args),
    /// Download a model
    Pull(pull::Args),
    /// Write a checkpoint in the mixed NVFP4 layout
    Quantize(quantize::Args),
    /// List the models known by name and those on this machine
    Models(models::Args),
    /// Print what completes this program's commands and flags in a shell
    Completions(completions::Args),
    /// Write the manual pages
    Man(man::Args),
}

/// Runs the command that was typed.
pub fn run() -> anyhow::Result<()> {
    let line = serve::spell(std::env::args_os())
        .unwrap_or_else(|error| Cli::command().error(ErrorKind::InvalidValue, error).exit());
    match Cli::parse_from(line).command {
        Command::Serve(args) => serve::run(*args),
        Command::Batch(args) => batch::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Score(args) => score::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Check(args) => check::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Models(args) => models::run(args),
        Command::Completions(args) => completions::run(&args, &mut Cli::command()),
        Command::Man(args) => man::run(&args, Cli::command()),
    }
}

/// The flags of a command, read apart from ours; the first word of `line` is what messages call it.
fn flags<A: clap::Args>(line: impl IntoIterator<Item: Into<OsString> + Clone>) -> Result<A, clap::Error> {
    let command = A::augment_args(clap::Command::new("ferrotron"));
    A::from_arg_matches(&command.try_get_matches_from(line)?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_table_of_options_is_consistent_and_every_command_shows_an_example() {
        let command = super::Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "`{} --help` shows no example", sub.get_name());
        }
    }
}
