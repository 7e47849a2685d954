//! What the tests of rows share: a folder of files, a tokenizer of characters, and errors as a user sees them.

use std::path::{Path, PathBuf};

use glmddp::data::load::{LoadRequest, load};
use glmddp::data::prompt::Truncation;
use glmddp::data::record::{Columns, OnBadRow};
use glmddp::data::tokenize::Limits;
use glmddp::data::{Alone, DataError, Dataset, Encode};

/// One id a character; refuses texts with a NUL.
pub struct Chars;

impl Encode for Chars {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match text.contains('\0') {
            true => Err("a NUL character".to_owned()),
            false => Ok(text.chars().map(|c| c as u32).collect()),
        }
    }

    fn prompt_prefix(&self) -> Vec<u32> {
        vec![64790, 64792]
    }

    fn eos(&self) -> u32 {
        2
    }

    fn identity(&self) -> String {
        "chars".to_owned()
    }
}

pub fn request(file: &Path) -> LoadRequest {
    LoadRequest {
        file: file.to_owned(),
        columns: Columns { prompt: "content".into(), input: None, response: "summary".into(), history: None },
        limits: Limits { max_source_length: 64, max_target_length: 64, truncation: Truncation::KeepAnswerMark },
        on_bad_row: OnBadRow::Stop,
        max_samples: None,
        cache: None,
    }
}

/// Rows and answers of a set, as text: the ids of [`Chars`] are characters.
pub fn texts(set: &Dataset) -> Vec<(usize, String)> {
    let text = |i| set.sample(i).ids.iter().filter(|id| ![64790, 64792, 2].contains(*id)).filter_map(|&id| char::from_u32(id)).collect();
    (0..set.num_samples()).map(|i| (set.origin(i).row, text(i))).collect()
}

pub struct Dir(pub tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A text with this directory as DIR.
    pub fn hidden(&self, text: &str) -> String {
        text.replace(&self.0.path().display().to_string(), "DIR")
    }

    /// The error as a user sees it.
    pub fn text(&self, error: &DataError) -> String {
        let hint = error.hint().map(|hint| format!("\n\nhint: {hint}")).unwrap_or_default();
        self.hidden(&format!("error: {error}{hint}"))
    }

    pub fn error(&self, request: &LoadRequest) -> String {
        self.text(&load(request, &Chars, &Alone).unwrap_err())
    }

    /// The error of a file with this content.
    pub fn error_of(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        self.error(&request(&self.file(name, content)))
    }
}
