//! Values of configuration keys that are more than a number, a text or one of `plan`'s enums.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::off::is_off;
use super::plan::Resume;
pub use crate::peft::FinetuningType;
pub use crate::peft::keys::named;

/// The name by which a user gives `value`: the inverse of [`named()`].
pub fn name_of(value: &impl Serialize) -> String {
    match toml::Value::try_from(value) {
        Ok(toml::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// `text` as true or false, in any spelling that Python's parsers take.
pub fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// `resume_from_checkpoint`: a path, or `true` / `latest` for the newest checkpoint of `output_dir`, or `false`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumeFrom(pub Resume);

impl FromStr for ResumeFrom {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(match text {
            "latest" => Resume::Latest,
            text if text.trim().is_empty() || is_off(text) => Resume::No,
            text => match truth(text) {
                Some(true) => Resume::Latest,
                Some(false) => Resume::No,
                None => Resume::Path(PathBuf::from(text)),
            },
        }))
    }
}

impl Serialize for ResumeFrom {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Resume::No => serializer.serialize_bool(false),
            Resume::Latest => serializer.serialize_str("latest"),
            Resume::Path(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ResumeFrom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ResumeFrom;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, \"latest\", true or false")
            }

            fn visit_bool<E>(self, latest: bool) -> Result<ResumeFrom, E> {
                Ok(ResumeFrom(if latest { Resume::Latest } else { Resume::No }))
            }

            fn visit_str<E>(self, text: &str) -> Result<ResumeFrom, E> {
                let Ok(resume) = text.parse();
                Ok(resume)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A length of time as a user writes it: `3h55m`, `90s`, or as Slurm and the trainers do, `03:55:00`, `1-03:55:00`, `01:03:55:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

const SPAN_FORM: &str = "a duration with its unit, such as 3h55m or 90s, or hours, minutes and seconds as 03:55:00";

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = if text.contains(':') { with_colons(text) } else { humantime::parse_duration(text).ok() };
        parsed.map(Self).ok_or_else(|| format!("expected {SPAN_FORM}"))
    }
}

/// `[D-]HH:MM:SS` or `D:HH:MM:SS`. Two fields are hours and minutes to some programs, minutes and seconds to others: none.
fn with_colons(text: &str) -> Option<Duration> {
    let text = text.replacen('-', ":", 1);
    let fields = text.split(':').map(|field| if field.bytes().all(|b| b.is_ascii_digit()) { field.parse::<u32>().ok() } else { None });
    let (days, hours, minutes, seconds) = match *fields.collect::<Option<Vec<u32>>>()? {
        [h, m, s] => (0, h, m, s),
        [d, h, m, s] => (d, h, m, s),
        _ => return None,
    };
    let whole = ((u64::from(days) * 24 + u64::from(hours)) * 60 + u64::from(minutes)) * 60 + u64::from(seconds);
    (minutes < 60 && seconds < 60).then_some(Duration::from_secs(whole))
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// `save_before_timeout`: from the start of the program, or until the end that Slurm gives the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLimit {
    After(Span),
    Slurm,
}

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "slurm" { Ok(Self::Slurm) } else { text.parse().map(Self::After).map_err(|expected| format!("{expected}, or slurm")) }
    }
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::After(span) => span.fmt(f),
            Self::Slurm => f.write_str("slurm"),
        }
    }
}

/// `memory_limit`: what the ranks of a machine may take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLimit {
    Bytes(u64),
    /// Nobody looks.
    None,
}

const SIZES: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl FromStr for MemoryLimit {
    type Err = String;

    /// `20GiB`, `20G` (as Slurm and docker mean it) or `1.5 GiB`, `20GB` (powers of 1000), `21474836480B`, `none`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("none") {
            return Ok(Self::None);
        }
        let expected = || "expected a size with its unit, such as 20GiB, or none".to_owned();
        let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(expected)?;
        let (number, unit) = (&text[..at], text[at..].trim_start());
        let binary = SIZES.iter().find(|(name, _)| *name == unit || name[..1] == *unit).map(|&(_, shift)| f64::from(shift).exp2());
        let decimal =
            || Some(1e3f64.powi([("KB", 1), ("kB", 1), ("MB", 2), ("GB", 3), ("TB", 4)].iter().find(|(name, _)| *name == unit)?.1));
        let unit = binary.or_else(decimal).or((unit == "B").then_some(1.0)).ok_or_else(expected)?;
        let bytes = number.parse::<f64>().ok().map(|n| n * unit).filter(|&n| (1.0..2f64.powi(63)).contains(&n)).ok_or_else(expected)?;
        Ok(Self::Bytes(bytes as u64))
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::None => f.write_str("none"),
            Self::Bytes(n) => match SIZES.iter().find(|(_, shift)| n.trailing_zeros() >= *shift) {
                Some((unit, shift)) => write!(f, "{}{unit}", n >> shift),
                None => write!(f, "{n}B"),
            },
        }
    }
}

/// `device`: what a run computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU where there is one that the run can use, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// This GPU, counted from 0 among those that the process sees; `None`: that of the rank's number on its machine.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            other => {
                let ordinal = other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
                ordinal
                    .map(|ordinal| Self::Cuda(Some(ordinal)))
                    .ok_or_else(|| "expected auto, cpu, cuda, or a GPU such as cuda:0".to_owned())
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// In a file, and in a stored plan, as the command line has it.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(|expected| serde::de::Error::custom(format!("invalid value: text \"{text}\", {expected}")))
            }
        }
    };
}

as_text!(Span);
as_text!(TimeLimit);
as_text!(MemoryLimit);
as_text!(DeviceChoice);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_in_the_forms_of_people_slurm_and_trainers_are_the_same_time() {
        let seconds = |text: &str| text.parse::<Span>().map(|span| span.0.as_secs());
        for text in ["3h55m", "3h 55m", "235m", "03:55:00", "0-03:55:00", "00:03:55:00", "14100s"] {
            assert_eq!(seconds(text), Ok(14100), "{text}");
        }
        assert_eq!(seconds("1-03:55:00"), Ok(100_500));
        assert_eq!(seconds("0s"), Ok(0));
        for text in ["", "3", "235", "3:55", "slurm", "-1s", "03:75:00", "03:55:75", "a:b:c", "1:2:3:4:5", "+3:55:00"] {
            assert_eq!(seconds(text), Err(format!("expected {SPAN_FORM}")), "{text}");
        }
    }

    #[test]
    fn time_limits_survive_their_text() {
        for limit in [TimeLimit::Slurm, TimeLimit::After(Span(Duration::from_secs(14100)))] {
            assert_eq!(limit.to_string().parse(), Ok(limit));
        }
        assert_eq!("tomorrow".parse::<TimeLimit>(), Err(format!("expected {SPAN_FORM}, or slurm")));
    }

    #[test]
    fn devices_survive_their_text() {
        for (text, device) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(None)),
            ("cuda:3", DeviceChoice::Cuda(Some(3))),
        ] {
            assert_eq!((text.parse(), device.to_string().as_str()), (Ok(device), text));
        }
        assert_eq!("CUDA:0".parse(), Ok(DeviceChoice::Cuda(Some(0))));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda 0", "0"] {
            assert_eq!(text.parse::<DeviceChoice>(), Err("expected auto, cpu, cuda, or a GPU such as cuda:0".to_owned()), "{text}");
        }
    }

    #[test]
    fn sizes_of_memory_are_read_as_people_write_them_and_survive_their_text() {
        for (text, bytes) in [
            ("20GiB", 20 << 30),
            ("20G", 20 << 30),
            ("1.5 GiB", 3 << 29),
            ("100MiB", 100 << 20),
            ("20GB", 20_000_000_000),
            ("7kB", 7000),
            ("2T", 2 << 40),
            ("512K", 512 << 10),
            ("1234567B", 1_234_567),
        ] {
            let limit = text.parse::<MemoryLimit>().unwrap();
            assert_eq!(limit, MemoryLimit::Bytes(bytes), "{text}");
            assert_eq!(limit.to_string().parse(), Ok(limit), "{text}");
        }
        assert_eq!("none".parse(), Ok(MemoryLimit::None));
        for text in ["", "20", "GiB", "0GiB", "-1GiB", "20 gigs", "20gib", "1e3GiB", "..GiB", "99999999TiB"] {
            assert!(text.parse::<MemoryLimit>().unwrap_err().contains("such as 20GiB"), "{text}");
        }
    }
}
