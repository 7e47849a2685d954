//! Values of configuration keys that are more than a number, a text or one of `plan`'s enums.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

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

/// `resume_from_checkpoint`: a path, or `true` / `latest` for the newest checkpoint of `output_dir`, or `false`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumeFrom(pub Resume);

impl FromStr for ResumeFrom {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(match text {
            "true" | "True" | "latest" => Resume::Latest,
            "false" | "False" => Resume::No,
            path => Resume::Path(PathBuf::from(path)),
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
