//! How much memory is free, as the system and the container around this process tell it.

use std::path::Path;

/// Bytes that may still be taken without anybody being pushed out; `None` where the system does not tell.
pub fn free() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = available(&read(Path::new("/proc/meminfo"))?)?;
    let group = read(Path::new("/proc/self/cgroup")).map(|groups| left(&groups, &read));
    Some(group.flatten().map_or(machine, |group| group.min(machine)))
}

/// `MemAvailable` of /proc/meminfo: free memory and what the kernel can drop. See proc_meminfo(5).
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What is left to the control group of this process, /proc/self/cgroup being `groups`, under the tightest limit of
/// it and of those around it. See cgroups(7).
fn left(groups: &str, read: &impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let root = Path::new("/sys/fs/cgroup");
    let number = |path: &Path| read(path)?.trim().parse::<u64>().ok();
    let file_pages = |stat: &Path| {
        let stat = read(stat)?;
        let line = stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?;
        line.trim().parse::<u64>().ok()
    };
    let room = |folder: &Path, limit: &str, usage: &str| {
        let limit = number(&folder.join(limit))?;
        // Pages of files count as used, although they go as soon as somebody needs the room.
        let used = number(&folder.join(usage))?;
        Some(limit.saturating_sub(used.saturating_sub(file_pages(&folder.join("memory.stat")).unwrap_or(0))))
    };
    let tightest = |root: &Path, group: &str, limit: &str, usage: &str| {
        let group = root.join(group.trim_start_matches('/'));
        group
            .ancestors()
            .take_while(|folder| folder.starts_with(root))
            .filter_map(|folder| room(folder, limit, usage))
            .min()
    };
    groups
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            match (parts.next()?, parts.next()?, parts.next()?) {
                ("0", "", group) => tightest(root, group, "memory.max", "memory.current"),
                (_, kinds, group) if kinds.split(',').any(|kind| kind == "memory") => {
                    let root = root.join("memory");
                    tightest(&root, group, "memory.limit_in_bytes", "memory.usage_in_bytes")
                }
                _ => None,
            }
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn check(groups: &str, files: &[(&str, &str)], expected: Option<u64>) {
        let files: HashMap<&Path, &str> =
            files.iter().map(|(path, text)| (Path::new(*path), *text)).collect();
        assert_eq!(left(groups, &|path: &Path| files.get(path).map(|text| (*text).to_owned())), expected);
    }

    #[test]
    fn what_the_kernel_can_drop_is_free() {
        let meminfo = "MemTotal:       64 kB\nMemFree: 1 kB\nMemAvailable:   32 kB\n";
        assert_eq!(available(meminfo), Some(32 << 10));
        assert_eq!(available("MemTotal: 64 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_around_us_counts() {
        let files = [
            ("/sys/fs/cgroup/a/memory.max", "1000\n"),
            ("/sys/fs/cgroup/a/memory.current", "900\n"),
            ("/sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 300\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "5\n"),
        ];
        check("0::/a/b\n", &files, Some(400));
        check("0::/a\n", &files, Some(400));
        check("0::/\n", &files, None);
    }

    #[test]
    fn the_older_form_is_understood() {
        let files = [
            ("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "100"),
            ("/sys/fs/cgroup/memory/x/memory.usage_in_bytes", "40"),
        ];
        check("5:cpu,cpuacct:/y\n4:memory:/x\n", &files, Some(60));
    }
}
