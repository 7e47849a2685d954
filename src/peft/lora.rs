//! LoRA: low-rank updates of linear layers, y += s x Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685), with s = alpha / r, or alpha / √r for
//! rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353) trains the size m of each output's weights apart:
//! y = m / n (x Wᵀ + s x Aᵀ Bᵀ) + b, with n the row norms of W + s B A, a constant in the backward pass; dropout acts before A alone.
//! Names, start and file format are PEFT's.
//!
//! Shapes: r rank, T tokens; A `[r, in]`, B `[out, r]`, m `[out]`. The sites are the parameters themselves.
#![allow(non_snake_case, reason = "A and B are the paper's names")]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::export::{self, ExportError, Files, PEFT_PREFIX, PeftFile};
use super::lora_settings::all_sites;
pub use super::lora_settings::{Settings, Targets};
use super::low_rank::LoraHooks;
use super::select::Selector;
use super::understood;
use super::{ExportContext, MethodError, Mode, PeftMethod, RowContext, TrainHooks};
use crate::kernels::elementwise;
use crate::kernels::host::{F32View, tensor};
use crate::model::ChatGlm2;
use crate::model::hooks::{BaseWeight, LinearSite, Reach};
use crate::model::shape::ModelShape;
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key};

pub const NAME: &str = "lora";
/// What the base's layers' names begin with.
pub(super) const LAYERS: &str = "transformer.encoder.layers.";

pub fn name_of_A(layer: usize, site: LinearSite) -> String {
    format!("{}.lora_A.weight", site.path(layer))
}

pub fn name_of_B(layer: usize, site: LinearSite) -> String {
    format!("{}.lora_B.weight", site.path(layer))
}

pub fn name_of_magnitude(layer: usize, site: LinearSite) -> String {
    format!("{}.lora_magnitude_vector", site.path(layer))
}

/// Names and shapes of the parameters of one target.
fn parameter_shapes(settings: &Settings, (layer, site): (usize, LinearSite), (out, input): (usize, usize)) -> Vec<(String, Vec<usize>)> {
    let rank = settings.rank.get();
    let mut shapes = vec![(name_of_A(layer, site), vec![rank, input]), (name_of_B(layer, site), vec![out, rank])];
    if settings.use_dora {
        shapes.push((name_of_magnitude(layer, site), vec![out]));
    }
    shapes
}

/// The base's weights under DoRA, and what follows from them and the parameters.
struct Magnitudes {
    weights: BTreeMap<(usize, LinearSite), Tensor>,
    /// Row norms of W + s B A, `[out]` each.
    norms: BTreeMap<(usize, LinearSite), Vec<f32>>,
}

/// The updates of all targets.
pub struct Lora {
    settings: Settings,
    targets: Targets,
    num_layers: usize,
    seed: u64,
    params: ParamSet,
    /// The parameters in the type in which the model computes, flat.
    computed: Tensor,
    magnitudes: Option<Magnitudes>,
    dtype: DType,
}

impl Lora {
    /// A fresh update, which changes nothing: A uniform within ±1/√in (PEFT's `kaiming_uniform_(a=√5)`), B zero, m the row norms of W.
    ///
    /// # Errors
    /// When a tensor cannot be made, or a row of W is zero and has no direction.
    pub fn new(settings: Settings, targets: Targets, base: &ChatGlm2, seed: u64) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (&(layer, site), &(out, input)) in &targets.0 {
            for (name, dims) in parameter_shapes(&settings, (layer, site), (out, input)) {
                let num_elements: usize = dims.iter().product();
                let values = if name == name_of_A(layer, site) {
                    let (rng, bound) = (KeyedRng::new(seed, Stream::ParameterInit, name_key(&name)), 1.0 / (input as f32).sqrt());
                    (0..num_elements as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect()
                } else {
                    vec![0.0; num_elements]
                };
                tensors.insert(name, tensor(values, &dims)?);
            }
        }
        let magnitudes = if settings.use_dora {
            let weight =
                |&(layer, site): &(usize, LinearSite)| base.weight(BaseWeight::Weight(layer, site)).map(|w| ((layer, site), w.clone()));
            Some(Magnitudes { weights: targets.0.keys().filter_map(weight).collect(), norms: BTreeMap::new() })
        } else {
            None
        };
        if magnitudes.is_some() && !base.device().is_cpu() {
            bail!("DoRA is supported on the CPU only");
        }
        let num_layers = base.config.num_layers;
        let mut params = ParamSet::new(&tensors)?;
        params.move_to(base.device())?;
        let computed = params.flat().clone();
        let mut method = Self { settings, targets, num_layers, seed, params, computed, magnitudes, dtype: base.dtype() };
        method.refresh()?;
        if let Some(magnitudes) = &method.magnitudes {
            for (&(layer, site), norms) in &magnitudes.norms {
                if let Some(row) = norms.iter().position(|&n| n == 0.0) {
                    bail!("row {row} of `{}.weight` is zero, and DoRA needs its direction", site.path(layer));
                }
                tensors.insert(name_of_magnitude(layer, site), tensor(norms.clone(), &[norms.len()])?);
            }
            method.params.load(&tensors)?;
        }
        Ok(method)
    }

    /// An update with given values.
    ///
    /// # Errors
    /// When the settings do not fit, or a name is missing or unknown or has another shape.
    pub fn from_tensors(
        settings: &Settings,
        base: &ChatGlm2,
        tensors: &BTreeMap<String, Tensor>,
    ) -> std::result::Result<Self, MethodError> {
        let targets = settings.targets(&ModelShape::from(&base.config))?;
        let mut method = Self::new(settings.clone(), targets, base, 0)?;
        method.params.load(tensors)?;
        method.refresh()?;
        Ok(method)
    }

    /// Reads an adapter that PEFT saved for `base`.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind or uses what this program does not compute, or sizes disagree.
    pub fn read_peft(dir: &Path, base: &ChatGlm2) -> std::result::Result<Self, MethodError> {
        let file = PeftFile::open(dir, "LORA")?;
        file.expect_understood(understood::LORA)?;
        let target = match file.names_or_pattern("target_modules")? {
            all if all.eq_ignore_ascii_case("all-linear") => all_sites(),
            target => target,
        };
        let settings = Settings {
            rank: file.read("r", "a number above 0")?,
            alpha: file.read("lora_alpha", "a number")?,
            dropout: file.share("lora_dropout")?,
            targets: Selector::new(&target)
                .map_err(|reason| file.key_error("target_modules", format!("names or a valid pattern ({reason})")))?,
            use_rslora: file.flag("use_rslora")?,
            use_dora: file.flag("use_dora")?,
        };
        let targets = Targets::new(&ModelShape::from(&base.config), &settings.targets)
            .map_err(|reason| file.key_error("target_modules", format!("linear layers of the model ({reason})")))?;
        // The file's tensors are held against the rank before anything of that rank is made.
        let shapes: BTreeMap<_, _> = targets.0.iter().flat_map(|(&target, &size)| parameter_shapes(&settings, target, size)).collect();
        let names: Vec<String> = shapes.keys().map(|name| format!("{PEFT_PREFIX}{name}")).collect();
        file.expect_tensors(names.iter().map(String::as_str), &format!("{PEFT_PREFIX}{LAYERS}"))?;
        let tensors = shapes.into_iter().map(|(name, shape)| {
            let value = file.tensor(&format!("{PEFT_PREFIX}{name}"), &shape)?;
            Ok((name, value))
        });
        Self::from_tensors(&settings, base, &tensors.collect::<std::result::Result<_, ExportError>>()?)
    }

    /// A and B of a target, in the type in which the model computes.
    pub(super) fn pair(&self, layer: usize, site: LinearSite) -> Result<(Tensor, Tensor)> {
        let of = |name: String| self.params.layout().view(&self.computed, &name);
        Ok((of(name_of_A(layer, site))?, of(name_of_B(layer, site))?))
    }

    pub(super) fn factor(&self) -> f32 {
        let rank = self.settings.rank.get() as f64;
        (self.settings.alpha / if self.settings.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    pub(super) fn dropout(&self) -> f32 {
        self.settings.dropout as f32
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn parameters(&self) -> &ParamSet {
        &self.params
    }

    pub(super) fn is_target(&self, layer: usize, site: LinearSite) -> bool {
        self.targets.0.contains_key(&(layer, site))
    }

    pub(super) fn has_magnitudes(&self) -> bool {
        self.magnitudes.is_some()
    }

    pub(super) fn reach(&self, layer: usize) -> Reach {
        let lowest = self.targets.lowest_layer();
        let here = self.targets.0.keys().filter(|(l, _)| *l == layer).map(|(_, site)| site.reach()).max();
        if layer > lowest { Reach::Input } else { here.unwrap_or(Reach::Nothing) }
    }

    /// n and m / n of a target, `[out]` each.
    pub(super) fn norms_and_gains(&self, layer: usize, site: LinearSite) -> Result<(&[f32], Vec<f32>)> {
        let Some(norms) = self.magnitudes.as_ref().and_then(|m| m.norms.get(&(layer, site))) else {
            bail!("DoRA has no norms of {site:?}")
        };
        let magnitude = self.params.get(&name_of_magnitude(layer, site))?;
        let gains = F32View::new(&magnitude)?.iter().zip(norms).map(|(m, n)| m / n).collect();
        Ok((norms, gains))
    }

    /// W + s B A, `[out, in]`.
    fn updated(&self, layer: usize, site: LinearSite, weight: &Tensor) -> Result<Vec<f32>> {
        let (A, B) = (self.params.get(&name_of_A(layer, site))?, self.params.get(&name_of_B(layer, site))?);
        let (rank, input) = A.dims2()?;
        let (A, B, weight, factor) = (F32View::new(&A)?, F32View::new(&B)?, F32View::new(weight)?, self.factor());
        let mut rows = weight.to_vec();
        rows.par_chunks_mut(input).zip(B.par_chunks(rank)).for_each(|(row, b)| {
            let mut update = vec![0f32; input];
            for (b, a) in b.iter().zip(A.chunks_exact(input)) {
                update.iter_mut().zip(a).for_each(|(u, a)| *u += b * a);
            }
            row.iter_mut().zip(update).for_each(|(w, u)| *w += factor * u);
        });
        Ok(rows)
    }
}

impl PeftMethod for Lora {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    /// It is made there.
    fn move_to(&mut self, _base: &ChatGlm2) -> Result<()> {
        Ok(())
    }

    fn refresh(&mut self) -> Result<()> {
        self.computed = elementwise::cast(self.params.flat(), self.dtype)?;
        let Some(magnitudes) = &self.magnitudes else { return Ok(()) };
        let mut norms = BTreeMap::new();
        for (&(layer, site), weight) in &magnitudes.weights {
            let norm = |row: &[f32]| row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt() as f32;
            let rows = self.updated(layer, site, weight)?;
            norms.insert((layer, site), rows.par_chunks(weight.dim(1)?).map(norm).collect());
        }
        if let Some(magnitudes) = &mut self.magnitudes {
            magnitudes.norms = norms;
        }
        Ok(())
    }

    fn site_is_parameters(&self) -> bool {
        true
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        let drops = rows.mode == Mode::Train && self.settings.dropout > 0.0;
        Ok(Box::new(LoraHooks::new(self, drops.then_some(rows))?))
    }

    fn without_effect(&self) -> Result<Option<&'static str>> {
        if let Some(magnitudes) = &self.magnitudes {
            for (&(layer, site), norms) in &magnitudes.norms {
                if F32View::new(&self.params.get(&name_of_magnitude(layer, site))?)?[..] != norms[..] {
                    return Ok(None);
                }
            }
        }
        if self.factor() == 0.0 {
            return Ok(Some("its `lora_alpha` is 0"));
        }
        let values = self.params.host_tensors()?;
        for &(layer, site) in self.targets.0.keys() {
            if F32View::new(&values[&name_of_B(layer, site)])?.iter().any(|&b| b != 0.0) {
                return Ok(None);
            }
        }
        Ok(Some("each of its `lora_B` is 0"))
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("lora_rank".to_owned(), self.settings.rank.get().into()),
            ("lora_alpha".to_owned(), self.settings.alpha.into()),
            ("lora_target".to_owned(), json!(self.targets.names(self.num_layers))),
            ("use_rslora".to_owned(), self.settings.use_rslora.into()),
            ("use_dora".to_owned(), self.settings.use_dora.into()),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let config = json!({
            "auto_mapping": null,
            "base_model_name_or_path": context.model_dir.display().to_string(),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": self.settings.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.settings.rank.get(),
            "revision": null,
            "target_modules": self.targets.names(self.num_layers),
            "task_type": "CAUSAL_LM",
            "use_dora": self.settings.use_dora,
            "use_rslora": self.settings.use_rslora,
        });
        let tensors = self.params.host_tensors()?.into_iter().map(|(name, value)| (format!("{PEFT_PREFIX}{name}"), value)).collect();
        export::peft_adapter(&config, &tensors, context.about)
    }

    fn merged_base_weights(&self, base: &ChatGlm2) -> Result<Option<BTreeMap<BaseWeight, Tensor>>> {
        let mut merged = BTreeMap::new();
        for (&(layer, site), &(out, input)) in &self.targets.0 {
            let place = BaseWeight::Weight(layer, site);
            let Some(weight) = base.weight(place) else { bail!("the model has no `{}`", place.name()) };
            let mut rows = self.updated(layer, site, weight)?;
            if self.has_magnitudes() {
                let (_, gains) = self.norms_and_gains(layer, site)?;
                rows.chunks_exact_mut(input).zip(gains).for_each(|(row, gain)| row.iter_mut().for_each(|w| *w *= gain));
            }
            merged.insert(place, tensor(rows, &[out, input])?);
        }
        Ok(Some(merged))
    }
}
