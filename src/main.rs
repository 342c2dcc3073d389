//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    match ferrotron::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A reader that closed our pipe (`ferrotron score … | head`) has what it wanted.
            let closed = error.chain().any(|cause| {
                let io = cause.downcast_ref::<std::io::Error>();
                io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
            });
            if closed {
                return ExitCode::SUCCESS;
            }
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
