//! Numbers as people read them.

use std::time::Duration;

/// `1234567` -> `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Three figures and a power of 1000: `23.9 G`.
pub fn si(n: f64) -> String {
    scaled(n, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

/// Three figures and a power of 1024: `21.3 GiB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

fn scaled(mut n: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while n >= base && unit + 1 < units.len() {
        n /= base;
        unit += 1;
    }
    let number = if unit == 0 && n.fract() == 0.0 {
        format!("{n:.0}")
    } else if n < 10.0 {
        format!("{n:.2}")
    } else if n < 100.0 {
        format!("{n:.1}")
    } else {
        format!("{n:.0}")
    };
    format!("{number} {}", units[unit]).trim_end().to_owned()
}

/// A duration in whole seconds: `0:19:42`.
pub fn hours(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_size_have_separators_and_units() {
        assert_eq!([0, 999, 1000, 1_835_008].map(thousands), ["0", "999", "1,000", "1,835,008"]);
        assert_eq!([7.0, 999.0, 23.9e9, 1e12].map(si), ["7", "999", "23.9 G", "1.00 T"]);
        assert_eq!([0, 1023, 1536, 25 << 30].map(bytes), ["0 B", "1023 B", "1.50 KiB", "25.0 GiB"]);
    }
}
