//! The process's own figures under the names every Prometheus client uses.

use super::exposition::Page;

/// Appends what the system tells about this process; nothing where it does not tell.
pub fn write(page: &mut Page) {
    let Some(figures) = read() else { return };
    for (name, kind, help, value) in [
        ("process_cpu_seconds_total", "counter", "CPU time spent, user and system.", figures.cpu_seconds),
        ("process_resident_memory_bytes", "gauge", "Memory that is in RAM.", figures.resident_bytes),
        ("process_virtual_memory_bytes", "gauge", "Address space in use.", figures.virtual_bytes),
        ("process_start_time_seconds", "gauge", "Unix time of the start.", figures.start_seconds),
        ("process_open_fds", "gauge", "Open file descriptors.", figures.open_fds),
        ("process_max_fds", "gauge", "File descriptors that may be open.", figures.max_fds),
    ] {
        page.family(name, kind, help);
        page.sample(name, "", value);
    }
}

struct Figures {
    cpu_seconds: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    start_seconds: f64,
    open_fds: f64,
    max_fds: f64,
}

#[cfg(target_os = "linux")]
fn read() -> Option<Figures> {
    use std::fs::read_to_string;
    // SAFETY: sysconf only reads a number of the system and has no preconditions.
    let (ticks, page_bytes) =
        unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
    let (ticks, page_bytes) = (ticks as f64, page_bytes as f64);
    let stat = read_to_string("/proc/self/stat").ok()?;
    // The command's name may hold blanks and parentheses; the fields behind its end do not. See proc(5).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    let boot = read_to_string("/proc/stat").ok()?;
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<f64>().ok()?;
    let limits = read_to_string("/proc/self/limits").ok()?;
    let max_fds = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    Some(Figures {
        cpu_seconds: (field(14)? + field(15)?) / ticks,
        start_seconds: boot + field(22)? / ticks,
        virtual_bytes: field(23)?,
        resident_bytes: field(24)? * page_bytes,
        open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count() as f64,
        max_fds: max_fds.split_whitespace().next()?.parse().unwrap_or(f64::INFINITY),
    })
}

#[cfg(not(target_os = "linux"))]
fn read() -> Option<Figures> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_plausible() {
        let figures = read().expect("Linux has /proc");
        assert!(figures.resident_bytes > 1e5 && figures.resident_bytes < figures.virtual_bytes);
        assert!(figures.start_seconds > 1.6e9);
        assert!(figures.open_fds >= 3.0 && figures.open_fds <= figures.max_fds);
    }
}
