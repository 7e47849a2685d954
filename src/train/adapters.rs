//! The real tokenizer and the real ranks as the data pipeline asks for them.

use crate::data::{Encode, Exchange};
use crate::dist::ProcessGroup;
use crate::tokenizer::GlmTokenizer;

/// A tokenizer for [`crate::data::load`].
pub struct Tokenizer<'a>(pub &'a GlmTokenizer);

impl Encode for Tokenizer<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.0.encode(text).map_err(|e| e.to_string())
    }

    fn prompt_prefix(&self) -> Vec<u32> {
        self.0.prompt_prefix().to_vec()
    }

    fn eos(&self) -> u32 {
        self.0.eos()
    }

    fn identity(&self) -> String {
        self.0.sha256().to_owned()
    }
}

/// The ranks for [`crate::data::load`].
pub struct Ranks<'a>(pub &'a dyn ProcessGroup);

impl Exchange for Ranks<'_> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, String> {
        self.0.all_gather_bytes(mine).map_err(|e| e.to_string())
    }
}
