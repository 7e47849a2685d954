//! A tuned base as the hub has a model: configuration, tokenizer, safetensors shards with their index.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::ExportContext;
use super::export::{ABOUT_FILE, ExportError, Files, pretty, read_json};
use crate::formats::{place, safetensors, text_of};
use crate::kernels::non_finite::first_non_finite;
use crate::model::hub_files::HubFiles;
use crate::model::init::shards;
use crate::model::weights::WeightSource;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.model";

/// The files of the base in `context` with `changed` in the place of its own parameters, each in the dtype that `context` says or the base has it
/// in, and the small files of the base's folder ([`HubFiles`]).
///
/// # Errors
/// When the base's folder cannot be read, or a parameter has another shape than the base's or is NaN or infinite in the dtype that it is written
/// in.
pub fn model_files(context: &ExportContext, changed: &BTreeMap<String, Tensor>) -> Result<Files, ExportError> {
    let (weights, dtype) = weight_files(context, changed)?;
    let mut files = vec![
        (ABOUT_FILE.to_owned(), pretty(context.about)),
        (CONFIG.to_owned(), pretty(&config_json(read_json(&context.model_dir.join(CONFIG))?, dtype))),
    ];
    let tokenizer = context.model_dir.join(TOKENIZER);
    let bytes = std::fs::read(&tokenizer).map_err(|source| ExportError::Io { path: tokenizer, source })?;
    files.push((TOKENIZER.to_owned(), bytes));
    files.extend(HubFiles::of(context.model_dir)?.read()?);
    files.extend(weights);
    Ok(files)
}

/// A changed parameter, in the dtype that it is written in.
fn finite(name: &str, tensor: Tensor) -> Result<Tensor, ExportError> {
    // sync: copies from the device
    let wide = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
    match first_non_finite(&wide)? {
        None => Ok(tensor),
        Some((index, value)) => Err(ExportError::Overflow {
            name: name.to_owned(),
            dtype: tensor.dtype(),
            at: format!("{index}{}", place(index, tensor.dims())),
            value: text_of(value.into()),
        }),
    }
}

/// The base's config.json, with the dtype that the exported weights fit in. A file has `torch_dtype`, or `dtype` by a newer transformers.
fn config_json(mut config: Value, dtype: DType) -> Value {
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = config.get_mut(key) {
            *value = name.into();
        }
    }
    config
}

/// The weights, and the narrowest dtype that holds all of their values.
fn weight_files(context: &ExportContext, changed: &BTreeMap<String, Tensor>) -> Result<(Files, DType), ExportError> {
    let source = WeightSource::open(context.model_dir)?;
    let shards = shards(context.config, crate::formats::Dtype::F32);
    let (mut files, mut weight_map, mut total) = (Files::new(), serde_json::Map::new(), 0);
    let mut dtypes = Vec::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let mut tensors = BTreeMap::new();
        for (name, _, shape) in shard {
            let dtype = context.dtype.map_or_else(|| source.dtype(name, shape), Ok)?;
            let tensor = match changed.get(name) {
                Some(tensor) => {
                    super::export::check_shape(name, tensor, shape, Some(Path::new(&file)))?;
                    finite(name, tensor.to_dtype(dtype)?)?
                }
                None => source.get(name, shape, dtype, &Device::Cpu)?,
            };
            if !dtypes.contains(&dtype) {
                dtypes.push(dtype);
            }
            total += tensor.elem_count() * dtype.size_in_bytes();
            weight_map.insert(name.clone(), Value::from(file.clone()));
            tensors.insert(name.clone(), tensor);
        }
        files.push((file, safetensors::to_bytes(&tensors)?));
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    files.push(("model.safetensors.index.json".to_owned(), pretty(&index)));
    let dtype = match dtypes.as_slice() {
        [dtype] => *dtype,
        _ => DType::F32, // of f16 and bf16 each has values that the other lacks
    };
    Ok((files, dtype))
}
