//! Bottleneck adapters.

use serde::{Deserialize, Serialize};

/// Where adapters stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// Behind attention and behind the MLP, with a swish between (Houlsby et al. 2019, arXiv:1902.00751): the adapters library's `DoubleSeqBnConfig`.
    Houlsby,
    /// Behind the MLP, with a ReLU between (Pfeiffer et al. 2020, arXiv:2005.00052): the adapters library's `SeqBnConfig`.
    Pfeiffer,
}
