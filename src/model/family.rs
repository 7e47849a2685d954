//! Which of the family's published models a name speaks of.

use std::collections::BTreeSet;

use serde_json::Value;

/// The published models that differ in what this program has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    ChatGlm2,
    ChatGlm3,
    CodeGeeX2,
    Glm4,
}

impl Family {
    const ALL: [Self; 4] = [Self::ChatGlm2, Self::ChatGlm3, Self::CodeGeeX2, Self::Glm4];

    /// The name that people know it by.
    pub fn title(self) -> &'static str {
        match self {
            Self::ChatGlm2 => "ChatGLM2",
            Self::ChatGlm3 => "ChatGLM3",
            Self::CodeGeeX2 => "CodeGeeX2",
            Self::Glm4 => "GLM-4",
        }
    }

    /// How its published models' names begin.
    fn stem(self) -> &'static str {
        match self {
            Self::ChatGlm2 => "chatglm2",
            Self::ChatGlm3 => "chatglm3",
            Self::CodeGeeX2 => "codegeex2",
            Self::Glm4 => "glm-4",
        }
    }

    /// The family of a model called `name`: a name on the hub, or a folder. The last component decides where it names one family, such as
    /// `my-chatglm3`; else a whole published name does where the components have no two, such as
    /// `models--THUDM--chatglm2-6b-32k/snapshots/1a2b`.
    pub fn of(name: &str) -> Option<Self> {
        let name = name.to_lowercase().replace('_', "-");
        let only = |has: &dyn Fn(Self) -> bool| {
            let mut found = Self::ALL.into_iter().filter(|family| has(*family));
            found.next().filter(|_| found.next().is_none())
        };
        let last = model_name(&name);
        let size = |family| if family == Self::Glm4 { "-9b" } else { "-6b" };
        only(&|family| last.contains(family.stem()))
            .or_else(|| only(&|family| name.contains(&format!("{}{}", family.stem(), size(family)))))
    }

    /// The family whose repository `auto_map` takes code from, with that repository's name: the entries (`org/name--file.Class`, or a list
    /// of them) must be of one family.
    pub fn of_auto_map(auto_map: &Value) -> Option<(Self, &str)> {
        let entries = auto_map.as_object()?.values().flat_map(|entry| match entry {
            Value::Array(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        });
        let repositories = entries.filter_map(|entry| Some(entry.as_str()?.split_once("--")?.0));
        let known: Vec<(Self, &str)> = repositories.filter_map(|name| Some((Self::of(name)?, name))).collect();
        let families: BTreeSet<Self> = known.iter().map(|(family, _)| *family).collect();
        known.first().copied().filter(|_| families.len() == 1)
    }
}

/// The model's own part of a name on the hub or of a folder: `chatglm2-6b` of `THUDM/chatglm2-6b`, of `/models/chatglm2-6b/`, and of the
/// hub's cache, `models--THUDM--chatglm2-6b/snapshots/1a2b`. Empty if there is none.
pub fn model_name(name: &str) -> &str {
    let components = || name.split(['/', '\\']).filter(|component| !component.is_empty() && *component != ".");
    match components().rev().find_map(|component| component.strip_prefix("models--")) {
        Some(cached) => cached.rsplit("--").next().unwrap_or_default(),
        None => components().next_back().unwrap_or_default(),
    }
}

/// Words of a model's name that do not tell it from others of its family: who published it, its size, the form of its files.
const WORDS_THAT_TELL_NOTHING: [&str; 11] = ["thudm", "zhipuai", "zai", "org", "6b", "9b", "hf", "fp16", "bf16", "model", "models"];

/// The model's own part of a name, without case and without what tells it from no other model: `chatglm2` of `THUDM/chatglm2-6b`, of
/// `chatglm2_6b-hf` and of `THUDM--ChatGLM2`; `chatglm2-32k` of `chatglm2-6b-32k`.
pub fn distinctive_name(name: &str) -> String {
    let own = model_name(name).to_lowercase().replace(['_', '.'], "-");
    let words: Vec<&str> = own.split('-').filter(|word| !word.is_empty() && !WORDS_THAT_TELL_NOTHING.contains(word)).collect();
    words.join("-")
}

/// Whether a name is one of a model of the family, known or derived: `THUDM/chatglm2-6b`, `my-medical-glm`.
pub fn is_of_family(name: &str) -> bool {
    let own = model_name(name).to_lowercase();
    own.contains("glm") || own.contains("codegeex")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_is_that_of_the_last_component_or_of_a_published_name() {
        for (name, family) in [
            ("THUDM/chatglm2-6b", Some(Family::ChatGlm2)),
            ("THUDM/chatglm2-6b-32k", Some(Family::ChatGlm2)),
            ("ZhipuAI/ChatGLM3-6B-base", Some(Family::ChatGlm3)),
            ("/home/chatglm2/models/chatglm3_6b_32k/", Some(Family::ChatGlm3)),
            ("C:\\models\\codegeex2-6b", Some(Family::CodeGeeX2)),
            ("my-chatglm3-merged", Some(Family::ChatGlm3)),
            ("/home/ann/.cache/huggingface/hub/models--THUDM--chatglm2-6b-32k/snapshots/455746d4706479a1", Some(Family::ChatGlm2)),
            ("/models/chatglm2-6b-32k/checkpoint-100", Some(Family::ChatGlm2)),
            ("/models/chatglm2-6b-32k/chatglm3-6b-32k", Some(Family::ChatGlm3)),
            ("/chatglm2-6b-32k/chatglm3-6b-32k/merged", None),
            ("/home/chatglm2-experiments/models/x", None),
            ("chatglm2-and-chatglm3", None),
            ("THUDM/glm-4-9b-chat", Some(Family::Glm4)),
            ("tiny", None),
            ("", None),
            ("/", None),
        ] {
            assert_eq!(Family::of(name), family, "{name}");
        }
    }

    #[test]
    fn family_of_auto_map_is_that_of_all_its_repositories() {
        let of = |text: &str| Family::of_auto_map(&serde_json::from_str(text).unwrap()).map(|(family, name)| (family, name.to_owned()));
        let chatglm3 = Some((Family::ChatGlm3, "THUDM/chatglm3-6b".to_owned()));
        assert_eq!(of(r#"{"AutoConfig": "THUDM/chatglm3-6b--configuration_chatglm.ChatGLMConfig"}"#), chatglm3);
        assert_eq!(of(r#"{"AutoTokenizer": ["THUDM/chatglm3-6b--tokenization_chatglm.ChatGLMTokenizer", null]}"#), chatglm3);
        assert_eq!(of(r#"{"A": "THUDM/chatglm3-6b--a.B", "C": "someone/code--c.D"}"#), chatglm3);
        for text in [
            r#"{"A": "THUDM/chatglm3-6b--a.B", "C": "THUDM/chatglm2-6b--c.D"}"#,
            r#"{"AutoConfig": "configuration_chatglm.ChatGLMConfig"}"#,
            "{}",
            "[]",
            "null",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }

    #[test]
    fn distinctive_name_is_the_same_for_one_model_and_another_for_another() {
        for name in ["THUDM/chatglm2-6b", "chatglm2-6b", "/models/ChatGLM2_6B", "chatglm2", "THUDM_chatglm2-6b", "chatglm2-6b-hf"] {
            assert_eq!(distinctive_name(name), "chatglm2", "{name}");
        }
        for name in ["THUDM/chatglm2-6b-32k", "chatglm2-6b-int4", "chatglm3-6b", "chatglm-6b", "chatglm2-6b-medical", "chatglm2.5-6b"] {
            assert_ne!(distinctive_name(name), "chatglm2", "{name}");
        }
        assert_eq!(distinctive_name("THUDM/glm-4-9b"), distinctive_name("glm-4"));
    }

    #[test]
    fn model_name_is_the_last_component() {
        for (name, own) in [
            ("THUDM/chatglm2-6b", "chatglm2-6b"),
            ("./models/tiny/", "tiny"),
            ("models--THUDM--chatglm2-6b/snapshots/1a2b", "chatglm2-6b"),
            ("", ""),
            (".", ""),
        ] {
            assert_eq!(model_name(name), own);
        }
    }
}
