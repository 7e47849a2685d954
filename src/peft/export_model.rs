//! A tuned base as the hub has a model: configuration, tokenizer, safetensors shards with their index.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::ExportContext;
use super::export::{ABOUT_FILE, ExportError, Files, pretty};
use crate::formats::safetensors;
use crate::json;
use crate::model::ModelError;
use crate::model::init::shards;
use crate::model::weights::WeightSource;

/// The files of the base in `context` with `changed` in the place of its own parameters, each in the dtype that `context` says or the base has it
/// in.
///
/// # Errors
/// When the base's folder cannot be read, or a parameter has another shape than the base's.
pub fn model_files(context: &ExportContext, changed: &BTreeMap<String, Tensor>) -> Result<Files, ExportError> {
    let read = |name: &str| {
        let path = context.model_dir.join(name);
        std::fs::read(&path).map_err(|source| ExportError::Io { path, source })
    };
    let mut files = vec![
        (ABOUT_FILE.to_owned(), pretty(context.about)),
        ("config.json".to_owned(), config_json(context, read("config.json")?)?),
        ("tokenizer.model".to_owned(), read("tokenizer.model")?),
    ];
    files.extend(weight_files(context, changed)?);
    Ok(files)
}

/// The base's config.json, with the dtype of the exported weights.
fn config_json(context: &ExportContext, base: Vec<u8>) -> Result<Vec<u8>, ExportError> {
    let Some(dtype) = context.dtype else { return Ok(base) };
    let path = context.model_dir.join("config.json");
    let mut config: Value = json::value(&base).map_err(|source| ModelError::Json { path, source })?;
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    config["torch_dtype"] = name.into();
    Ok(pretty(&config))
}

fn weight_files(context: &ExportContext, changed: &BTreeMap<String, Tensor>) -> Result<Files, ExportError> {
    let source = WeightSource::open(context.model_dir)?;
    let shards = shards(context.config, crate::formats::Dtype::F32);
    let (mut files, mut weight_map, mut total) = (Files::new(), serde_json::Map::new(), 0);
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let mut tensors = BTreeMap::new();
        for (name, _, shape) in shard {
            let dtype = context.dtype.map_or_else(|| source.dtype(name, shape), Ok)?;
            let tensor = match changed.get(name) {
                Some(tensor) => {
                    super::export::check_shape(name, tensor, shape, Some(Path::new(&file)))?;
                    tensor.to_dtype(dtype)?
                }
                None => source.get(name, shape, dtype, &Device::Cpu)?,
            };
            total += tensor.elem_count() * dtype.size_in_bytes();
            weight_map.insert(name.clone(), Value::from(file.clone()));
            tensors.insert(name.clone(), tensor);
        }
        files.push((file, safetensors::to_bytes(&tensors)?));
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    files.push(("model.safetensors.index.json".to_owned(), pretty(&index)));
    Ok(files)
}
