//! How much memory this process took.

#[cfg(test)]
#[path = "../../tests/it/not_run.rs"]
mod not_run;

/// The largest resident size so far, where the system says it (Linux).
pub fn peak_rss_bytes() -> Option<u64> {
    parse_peak(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Lets [`peak_rss_bytes`] count anew from the present size; false where the system does not allow it, and the old peak goes on.
pub fn reset_peak_rss() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The value of `VmHWM:   123 kB`.
fn parse_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::not_run::{Missing, not_run};
    use super::*;

    #[test]
    fn peak_is_read_in_bytes() {
        assert_eq!(parse_peak("Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t  2048 kB\nVmRSS:\t1 kB\n"), Some(2 << 20));
    }

    #[test]
    fn peak_that_is_missing_or_garbled_is_none() {
        for status in ["", "VmRSS: 1 kB", "VmHWM: many kB", "VmHWM: 1", "VmHWM: 18446744073709551615 kB"] {
            assert_eq!(parse_peak(status), None, "{status}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_counts_anew_after_a_reset() {
        let block = std::hint::black_box(vec![1u8; 256 << 20]);
        let before = peak_rss_bytes().unwrap();
        drop(block);
        if !reset_peak_rss() {
            not_run(Missing::ClearRefs, "/proc/self/clear_refs cannot be written here, and the test needs it");
            return;
        }
        // Other tests may run in this process, but none holds so much.
        assert!(peak_rss_bytes().unwrap() + (128 << 20) < before);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_of_this_process_is_plausible() {
        let block = std::hint::black_box(vec![1u8; 8 << 20]);
        assert!(peak_rss_bytes().unwrap() > block.len() as u64);
    }
}
