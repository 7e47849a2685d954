//! LoRA's settings, and the linear layers that they mean in a model. `lora.rs` has the method.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use super::keys::{KeyError, MethodKeys, positive, share_below_one, within};
use super::lora::Lora;
use super::select::Selector;
use super::{Costs, MethodError, PeftMethod};
use crate::model::ChatGlm2;
use crate::model::hooks::LinearSite;
use crate::model::shape::ModelShape;

/// As PEFT's `LoraConfig` has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub rank: NonZeroUsize,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Selector,
    /// alpha / √r in place of alpha / r.
    pub use_rslora: bool,
    pub use_dora: bool,
}

impl Settings {
    pub const KEYS: &[&str] = &["lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        let rank = positive("lora_rank", keys.lora_rank.unwrap_or(8))?;
        let alpha = keys.lora_alpha.unwrap_or(2.0 * rank.get() as f64);
        let target = match keys.lora_target.as_deref() {
            Some("all" | "all-linear") => all_sites(),
            other => other.unwrap_or("query_key_value").to_owned(),
        };
        let expected = "`all`, a list of query_key_value, dense, dense_h_to_4h, dense_4h_to_h, or a regular expression for whole names";
        let wrong = || KeyError::new("lora_target", format!("\"{target}\""), expected);
        let targets = Selector::new(&target).map_err(|_| wrong())?;
        // A single name is known to be wrong before there is a model; a dotted one may be right.
        let is_known = |name: &str| name.contains('.') || LinearSite::ALL.into_iter().any(|site| site.name() == name);
        if targets.names().is_some_and(|mut names| !names.all(is_known)) {
            return Err(wrong());
        }
        Ok(Self {
            rank,
            alpha: within("lora_alpha", alpha, alpha > 0.0, "a number above 0")?,
            dropout: share_below_one("lora_dropout", keys.lora_dropout.unwrap_or(0.1))?,
            targets,
            use_rslora: keys.use_rslora.unwrap_or(false),
            use_dora: keys.use_dora.unwrap_or(false),
        })
    }

    pub(super) fn targets(&self, shape: &ModelShape) -> std::result::Result<Targets, MethodError> {
        Targets::new(shape, &self.targets).map_err(|reason| MethodError::Setting {
            key: "lora_target",
            found: self.targets.text().to_owned(),
            reason,
            hint: format!(
                "a linear layer's whole name is like `{}`; its last part may be one of {}",
                LinearSite::Dense.path(0),
                all_sites()
            ),
        })
    }
}

pub(super) fn all_sites() -> String {
    LinearSite::ALL.map(LinearSite::name).join(",")
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::Lora),
            lora_rank: Some(self.rank.get()),
            lora_alpha: Some(self.alpha),
            lora_dropout: Some(self.dropout),
            lora_target: Some(self.targets.text().to_owned()),
            use_rslora: Some(self.use_rslora),
            use_dora: Some(self.use_dora),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let (name, root) = if self.use_rslora { ("rsLoRA", "sqrt(rank)") } else { ("LoRA", "rank") };
        let name = if self.use_dora { name.replace("LoRA", "DoRA") } else { name.to_owned() };
        let Self { rank, alpha, dropout, targets, .. } = self;
        format!("{name}: rank {rank}, alpha {alpha} (counts alpha / {root}), dropout {dropout}, on {}", targets.text().replace(',', ", "))
    }

    fn learning_rate(&self) -> f64 {
        5e-4 // THUDM/ChatGLM-6B, ptuning/README.md, comparison with LoRA
    }

    fn gpu_support(&self) -> std::result::Result<(), &'static str> {
        if self.use_dora { Err("with use_dora is computed on a CPU only, so far") } else { Ok(()) }
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let targets = self.targets(shape)?;
        let rank = self.rank.get() as u64;
        let (out, input) = targets.0.values().fold((0, 0), |sum, &(out, input)| (sum.0 + out as u64, sum.1 + input as u64));
        let (a, b, m) = (rank * input, rank * out, if self.use_dora { out } else { 0 });
        Ok(Costs {
            trainable_parameters: a + b + m,
            site_elements: a + b + m,
            forward: 2 * (a + b),
            backward: 2 * (3 * a + 2 * b), // x Aᵀ again, dA and dx; dB and dy B
            lowest_layer: targets.lowest_layer() as u64,
            saved_floats: m,
            ..Costs::default()
        })
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        let targets = self.targets(&ModelShape::from(&base.config))?;
        Ok(Box::new(Lora::new(self.clone(), targets, base, seed)?))
    }
}

/// Linear layers that are updated -> (out, in).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets(pub(super) BTreeMap<(usize, LinearSite), (usize, usize)>);

impl Targets {
    pub(super) fn new(shape: &ModelShape, selector: &Selector) -> std::result::Result<Self, String> {
        let all = (0..shape.layers as usize).flat_map(|layer| LinearSite::ALL.map(|site| (site.path(layer), (layer, site))));
        let all: BTreeMap<String, (usize, LinearSite)> = all.collect();
        let chosen = selector.select(&all.keys().map(String::as_str).collect::<Vec<_>>())?;
        let size = |site| {
            let (out, input) = shape.linear(site);
            (out as usize, input as usize)
        };
        Ok(Self(chosen.into_iter().map(|name| (all[name], size(all[name].1))).collect()))
    }

    /// As PEFT's `target_modules` can say it: the last parts of names where those mean the same in a model of `layers` layers, else whole names.
    pub(super) fn names(&self, layers: usize) -> Vec<String> {
        match self.in_every_layer(layers) {
            Some(sites) => sites.into_iter().map(|site| site.name().to_owned()).collect(),
            None => self.0.keys().map(|(layer, site)| site.path(*layer)).collect(),
        }
    }

    /// The targets of a layer, if all `layers` have the same.
    pub(super) fn in_every_layer(&self, layers: usize) -> Option<BTreeSet<LinearSite>> {
        let sites: BTreeSet<LinearSite> = self.0.keys().map(|(_, site)| *site).collect();
        (self.0.len() == layers * sites.len()).then_some(sites)
    }

    pub(super) fn lowest_layer(&self) -> usize {
        self.0.keys().next().map_or(0, |(layer, _)| *layer)
    }
}
