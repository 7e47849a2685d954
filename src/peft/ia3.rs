//! (IA)³: trained factors l on the outputs, or the inputs, of linear layers (Liu et al. 2022, arXiv:2205.05638); names, start and format are
//! PEFT's. An output layer gives y = (x Wᵀ + b) l, bias included; a feed-forward layer reads x l.
//!
//! Shapes: T tokens; l `[out, 1]` on outputs, `[1, in]` on inputs. The sites are the parameters themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::export::{self, ExportError, Files, PEFT_PREFIX, PeftFile};
use super::keys::{KeyError, MethodKeys};
use super::lora::LAYERS;
use super::lora_settings::Targets;
use super::select::Selector;
use super::understood;
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::kernels::elementwise;
use crate::kernels::host::{F32View, tensor};
use crate::model::hooks::{BaseWeight, Hooks, LinearBackward, LinearSite, Reach};
use crate::model::linear::Linear;
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

pub const NAME: &str = "ia3";

/// Linear layers as a key of PEFT's names them: a list of names, a pattern for whole names, or `all-linear`.
///
/// # Errors
/// When they are not the same ones in every block.
fn sites(file: &PeftFile, key: &'static str, config: &ModelConfig) -> std::result::Result<BTreeSet<LinearSite>, ExportError> {
    let text = file.names_or_pattern(key)?;
    if text.eq_ignore_ascii_case("all-linear") {
        return Ok(LinearSite::ALL.into_iter().collect());
    }
    let wrong = |reason: String| file.key_error(key, format!("linear layers of every block ({reason})"));
    let targets = Selector::new(&text).and_then(|selector| Targets::new(&ModelShape::from(config), &selector)).map_err(wrong)?;
    match targets.in_every_layer(config.num_layers) {
        Some(sites) => Ok(sites),
        None => Err(wrong("only some blocks have them".to_owned())),
    }
}

fn parameter(layer: usize, site: LinearSite) -> String {
    format!("{}.ia3_l", site.path(layer))
}

/// As PEFT's `IA3Config` has them; it has no defaults for ChatGLM2, ours are keys, queries and values, and the MLP's inner activations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub targets: BTreeSet<LinearSite>,
    /// Those of them whose input is scaled.
    pub feedforward: BTreeSet<LinearSite>,
}

impl Settings {
    pub const KEYS: &[&str] = &["ia3_target", "ia3_feedforward"];

    /// # Errors
    /// When a name is no linear layer of a block, or a feed-forward layer is no target.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        let sites = |key, text: &str| {
            let site = |name: &str| LinearSite::ALL.into_iter().find(|site| site.name() == name.trim());
            let expected = "a list of query_key_value, dense, dense_h_to_4h, dense_4h_to_h, separated by commas";
            text.split(',').map(site).collect::<Option<BTreeSet<_>>>().ok_or_else(|| KeyError::new(key, format!("\"{text}\""), expected))
        };
        let targets = sites("ia3_target", keys.ia3_target.as_deref().unwrap_or("query_key_value,dense_4h_to_h"))?;
        let default = BTreeSet::from([LinearSite::Dense4hToH]).intersection(&targets).copied().collect();
        let feedforward = keys.ia3_feedforward.as_deref().map_or(Ok(default), |text| sites("ia3_feedforward", text))?;
        if !feedforward.is_subset(&targets) {
            return Err(KeyError::new("ia3_feedforward", format!("\"{}\"", names(&feedforward).join(",")), "some of ia3_target"));
        }
        Ok(Self { targets, feedforward })
    }

    fn parameter_shapes(&self, shape: &ModelShape) -> BTreeMap<String, Vec<usize>> {
        let each = (0..shape.layers as usize).flat_map(|layer| self.targets.iter().map(move |&site| (layer, site)));
        each.map(|(layer, site)| {
            let (out, input) = shape.linear(site);
            let dims = if self.feedforward.contains(&site) { vec![1, input as usize] } else { vec![out as usize, 1] };
            (parameter(layer, site), dims)
        })
        .collect()
    }
}

fn names(sites: &BTreeSet<LinearSite>) -> Vec<&'static str> {
    sites.iter().map(|site| site.name()).collect()
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::Ia3),
            ia3_target: Some(names(&self.targets).join(",")),
            // No list can say "none": without feed-forward layers the default must not come back.
            ia3_feedforward: (!self.feedforward.is_empty()).then(|| names(&self.feedforward).join(",")),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        format!("(IA)^3: factors on {}; on the inputs of {}", names(&self.targets).join(", "), names(&self.feedforward).join(", "))
    }

    fn learning_rate(&self) -> f64 {
        3e-3 // Liu et al. 2022, section 3.3: T-Few, there with Adafactor
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let size = |dims: &Vec<usize>| dims.iter().product::<usize>() as u64;
        let parameters = self.parameter_shapes(shape).values().map(size).sum();
        let outputs = self.targets.difference(&self.feedforward).map(|&site| shape.linear(site).0).sum::<u64>();
        let saved_floats = shape.layers * outputs;
        Ok(Costs { trainable_parameters: parameters, site_elements: parameters, saved_floats, ..Costs::default() })
    }

    fn create(&self, base: &ChatGlm2, _seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        Ok(Box::new(Ia3::new(self, &base.config)?))
    }
}

pub struct Ia3 {
    settings: Settings,
    params: ParamSet,
}

impl Ia3 {
    /// Factors of 1: the output is the base's.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(settings: &Settings, config: &ModelConfig) -> Result<Self> {
        let shapes = settings.parameter_shapes(&ModelShape::from(config));
        let ones = |(name, dims): (String, Vec<usize>)| Ok((name, tensor(vec![1.0; dims.iter().product()], &dims)?));
        Ok(Self { settings: settings.clone(), params: ParamSet::new(&shapes.into_iter().map(ones).collect::<Result<_>>()?)? })
    }

    /// Reads an adapter that PEFT saved for a model with `config`.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind or uses what this program does not compute, or sizes disagree.
    pub fn read_peft(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, MethodError> {
        let file = PeftFile::open(dir, "IA3")?;
        file.expect_understood(understood::IA3)?;
        let targets = sites(&file, "target_modules", config)?;
        let has_feedforward = file.config.get("feedforward_modules").is_some_and(|value| !understood::is_off(value));
        let feedforward = if has_feedforward { sites(&file, "feedforward_modules", config)? } else { BTreeSet::new() };
        if !feedforward.is_subset(&targets) {
            return Err(file.key_error("feedforward_modules", "some of target_modules".to_owned()).into());
        }
        let mut method = Self::new(&Settings { targets, feedforward }, config)?;
        let names: Vec<String> = method.params.layout().iter().map(|(name, _)| format!("{PEFT_PREFIX}{name}")).collect();
        file.expect_tensors(names.iter().map(String::as_str), &format!("{PEFT_PREFIX}{LAYERS}"))?;
        let tensors = method.params.layout().iter().map(|(name, entry)| {
            let value = file.tensor(&format!("{PEFT_PREFIX}{name}"), &entry.shape)?;
            Ok((name.to_owned(), value))
        });
        let tensors = tensors.collect::<std::result::Result<_, ExportError>>()?;
        method.params.load(&tensors)?;
        Ok(method)
    }

    fn factors(&self, layer: usize, site: LinearSite) -> Result<Vec<f32>> {
        Ok(F32View::new(&self.params.get(&parameter(layer, site))?)?.to_vec())
    }
}

impl PeftMethod for Ia3 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    fn site_is_parameters(&self) -> bool {
        true
    }

    fn hooks<'a>(&'a self, _rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        Ok(Box::new(Ia3Hooks { method: self, grad: vec![0.0; self.site_len()] }))
    }

    fn without_effect(&self) -> Result<Option<&'static str>> {
        let is_one = F32View::new(self.params.flat())?.iter().all(|&factor| factor == 1.0);
        Ok(is_one.then_some("each of its factors is 1"))
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("ia3_target".to_owned(), json!(names(&self.settings.targets))),
            ("ia3_feedforward".to_owned(), json!(names(&self.settings.feedforward))),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let config = json!({
            "auto_mapping": null,
            "base_model_name_or_path": context.model_dir.display().to_string(),
            "fan_in_fan_out": false,
            "feedforward_modules": names(&self.settings.feedforward),
            "inference_mode": true,
            "init_ia3_weights": true,
            "modules_to_save": null,
            "peft_type": "IA3",
            "revision": null,
            "target_modules": names(&self.settings.targets),
            "task_type": "CAUSAL_LM",
        });
        let tensors = self.params.tensors()?.into_iter().map(|(name, value)| (format!("{PEFT_PREFIX}{name}"), value)).collect();
        export::peft_adapter(&config, &tensors, context.about)
    }

    /// W's rows (and b) or columns times l.
    fn merged_base_weights(&self, base: &ChatGlm2) -> Result<Option<BTreeMap<BaseWeight, Tensor>>> {
        let mut merged = BTreeMap::new();
        let each = (0..base.config.num_layers).flat_map(|layer| self.settings.targets.iter().map(move |&site| (layer, site)));
        for (layer, site) in each {
            let factors = self.params.get(&parameter(layer, site))?;
            for place in [BaseWeight::Weight(layer, site), BaseWeight::Bias(layer, site)] {
                let is_input = self.settings.feedforward.contains(&site);
                match (base.weight(place), place) {
                    (Some(weight), BaseWeight::Weight(..)) => _ = merged.insert(place, weight.broadcast_mul(&factors)?),
                    (Some(bias), _) if !is_input => _ = merged.insert(place, (bias * factors.flatten_all()?)?),
                    _ => {}
                }
            }
        }
        Ok(Some(merged))
    }
}

struct Ia3Hooks<'a> {
    method: &'a Ia3,
    grad: Vec<f32>,
}

impl Ia3Hooks<'_> {
    /// Adds what the columns of a and b give together to the gradient of a layer's factors.
    fn add(&mut self, layer: usize, site: LinearSite, a: &Tensor, b: &Tensor) -> Result<()> {
        if let Some(entry) = self.method.params.layout().get(&parameter(layer, site)) {
            let dots = elementwise::column_dots(a, b)?;
            self.grad[entry.offset..].iter_mut().zip(dots).for_each(|(grad, dot)| *grad += dot);
        }
        Ok(())
    }
}

impl Hooks for Ia3Hooks<'_> {
    fn linear(&self, layer: usize, site: LinearSite, base: &Linear, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let settings = &self.method.settings;
        if !settings.targets.contains(&site) {
            return Ok((base.forward(x)?, None));
        }
        let factors = self.method.factors(layer, site)?;
        if settings.feedforward.contains(&site) {
            return Ok((base.forward(&elementwise::scale_columns(x, &factors)?)?, None));
        }
        let z = base.forward(x)?;
        Ok((elementwise::scale_columns(&z, &factors)?, Some(z)))
    }

    fn linear_grad(&mut self, of: LinearBackward) -> Result<Option<Tensor>> {
        let (layer, site, settings) = (of.layer, of.site, &self.method.settings);
        if !settings.targets.contains(&site) {
            return of.base_input_grad();
        }
        let factors = self.method.factors(layer, site)?;
        if settings.feedforward.contains(&site) {
            let dscaled = of.base.backward(of.dy)?;
            self.add(layer, site, &dscaled, &(of.x)()?)?;
            return elementwise::scale_columns(&dscaled, &factors).map(Some);
        }
        if let Some(z) = of.kept {
            self.add(layer, site, of.dy, z)?;
        }
        LinearBackward { dy: &elementwise::scale_columns(of.dy, &factors)?, ..of }.base_input_grad()
    }

    fn reach(&self, layer: usize) -> Reach {
        let own = self.method.settings.targets.iter().map(|site| site.reach()).max();
        if layer == 0 { own.unwrap_or(Reach::Nothing) } else { Reach::Input }
    }
}

impl TrainHooks for Ia3Hooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        let len = self.grad.len();
        tensor(self.grad, &[len])
    }
}
