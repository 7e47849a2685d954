//! Every model folder of every golden case holds the same weights, whatever its format; both kinds of exported prefix read back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use glmddp::formats::{TensorFile, tensor_bytes};
use glmddp::model::config::ModelConfig;
use glmddp::model::weights::WeightSource;
use glmddp::peft::export::{PrefixShape, peft_files, read_peft};
use glmddp::peft::thudm::{read_thudm, thudm_files};

use crate::support;

fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// Folders with `hf/config.json`.
fn cases() -> Vec<PathBuf> {
    support::golden_roots().iter().flat_map(|root| folders(root)).filter(|case| case.join("hf/config.json").exists()).collect()
}

/// A folder with a configuration and weights, and not a prefix alone.
fn is_model(folder: &Path) -> bool {
    ModelConfig::load(folder).is_ok_and(|config| config.pre_seq_len.is_none())
        && ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
            .iter()
            .any(|name| folder.join(name).exists())
}

fn name(path: &Path) -> String {
    path.iter().rev().take(2).map(|p| p.to_string_lossy().into_owned()).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("/")
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor_bytes(tensor).unwrap()
}

fn load(folder: &Path, dtype: DType) -> BTreeMap<String, Tensor> {
    let shapes = ModelConfig::load(folder).unwrap().parameter_shapes();
    let source = WeightSource::open(folder).unwrap();
    source.check(&shapes).unwrap();
    shapes
        .into_iter()
        .map(|(n, shape)| {
            let t = source.get(&n, &shape, dtype, &Device::Cpu).unwrap();
            (n, t)
        })
        .collect()
}

#[test]
fn golden_formats_model_folders_of_a_case_hold_equal_weights() {
    for case in cases() {
        let reference = load(&case.join("hf"), DType::F32);
        for folder in folders(&case) {
            if !is_model(&folder) {
                continue;
            }
            for (tensor_name, tensor) in load(&folder, DType::F32) {
                assert_eq!(bits(&tensor), bits(&reference[&tensor_name]), "{}: {tensor_name}", folder.display());
            }
            let half = load(&folder, DType::F16);
            for (tensor_name, tensor) in &half {
                let back = tensor.to_dtype(DType::F32).unwrap();
                assert_eq!(bits(&back), bits(&reference[tensor_name]), "{}: {tensor_name} as f16", folder.display());
            }
            println!("golden_formats {}: {} tensors equal to hf/ bit for bit", name(&folder), half.len());
        }
    }
}

#[test]
fn golden_formats_fingerprint_depends_on_the_weights_and_not_on_the_format() {
    let mut by_fingerprint: BTreeMap<String, (DType, String)> = BTreeMap::new();
    for case in cases() {
        // A case may be there twice, in two roots: what counts is its weights.
        let weights = hash_of_weights(&case);
        for folder in folders(&case) {
            if !is_model(&folder) {
                continue;
            }
            let config = ModelConfig::load(&folder).unwrap();
            let fingerprint = WeightSource::open(&folder).unwrap().fingerprint(&config.parameter_shapes()).unwrap();
            assert_eq!(fingerprint.len(), 64);
            let (dtype, other) = by_fingerprint.entry(fingerprint).or_insert((config.torch_dtype, weights.clone()));
            assert_eq!((*dtype, &*other), (config.torch_dtype, &weights), "{}", folder.display());
        }
    }
    let mut kinds: Vec<String> = by_fingerprint.values().map(|(dtype, weights)| format!("{dtype:?} {weights}")).collect();
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds.len(), by_fingerprint.len(), "one fingerprint a case and dtype");
}

/// Of the files in `hf/`, which every case has.
fn hash_of_weights(case: &Path) -> String {
    let mut files: Vec<PathBuf> = std::fs::read_dir(case.join("hf")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    glmddp::digest::sha256_hex(files.iter().flat_map(|file| std::fs::read(file).unwrap()).collect::<Vec<_>>())
}

/// Folders of a case whose name starts so, with the rest of their names.
fn folders_named(case: &Path, prefix: &str) -> Vec<(PathBuf, String)> {
    let suffix = |folder: &PathBuf| Some(folder.file_name()?.to_str()?.strip_prefix(prefix)?.to_owned());
    folders(case).into_iter().filter_map(|folder| Some((folder.clone(), suffix(&folder)?))).collect()
}

fn golden(file: &TensorFile, tensor: &str) -> Vec<u8> {
    file.get(tensor).unwrap().to_bytes().into_owned()
}

fn rewrite(dir: &Path, files: &[(String, Vec<u8>)]) {
    files.iter().for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes).unwrap());
}

#[test]
fn golden_formats_thudm_prefixes_read_back_and_rewrite() {
    for case in cases() {
        let base = ModelConfig::load(&case.join("hf")).unwrap();
        for (folder, suffix) in folders_named(&case, "thudm_prefix_") {
            let prefix = read_thudm(&folder).unwrap();
            assert_eq!(prefix.shape, PrefixShape::of(&base, prefix.shape.virtual_tokens));
            let expected = TensorFile::open(&case.join(format!("{suffix}.safetensors"))).unwrap();
            for (tensor_name, tensor) in &prefix.tensors {
                assert_eq!(bits(tensor), golden(&expected, tensor_name), "{}: {tensor_name}", folder.display());
            }
            let dir = tempfile::tempdir().unwrap();
            let config = serde_json::from_slice(&std::fs::read(case.join("hf/config.json")).unwrap()).unwrap();
            rewrite(dir.path(), &thudm_files(&prefix.shape, &prefix.tensors, &config, &serde_json::json!({"a": 1})).unwrap());
            let again = read_thudm(dir.path()).unwrap();
            assert_eq!((again.shape, again.projection, again.about.is_some()), (prefix.shape, prefix.projection, true));
            assert!(again.tensors.keys().eq(prefix.tensors.keys()));
            assert!(again.tensors.values().zip(prefix.tensors.values()).all(|(a, b)| bits(a) == bits(b)));
            println!("golden_formats {}: {} tensors read, written and read again", name(&folder), prefix.tensors.len());
        }
    }
}

#[test]
fn golden_formats_peft_prefixes_read_back_and_rewrite() {
    for case in cases() {
        let base = ModelConfig::load(&case.join("hf")).unwrap();
        for (folder, suffix) in folders_named(&case, "peft_prefix_tuning") {
            let prefix = read_peft(&folder).unwrap();
            assert_eq!(prefix.shape, PrefixShape::of(&base, prefix.shape.virtual_tokens));
            let (file, tensor) = match suffix.as_str() {
                "" => ("ptuning".to_owned(), "transformer.prefix_encoder.embedding.weight"),
                suffix => (format!("prefix_tuning{suffix}"), "output"),
            };
            let expected = TensorFile::open(&case.join(format!("{file}.safetensors"))).unwrap();
            assert_eq!(bits(&prefix.table), golden(&expected, tensor), "{}", folder.display());
            let dir = tempfile::tempdir().unwrap();
            rewrite(dir.path(), &peft_files(&prefix.shape, &prefix.table, &base.name, &serde_json::json!({"a": 1})).unwrap());
            let again = read_peft(dir.path()).unwrap();
            assert_eq!((again.shape, bits(&again.table)), (prefix.shape, bits(&prefix.table)));
            println!("golden_formats {}: table {:?} read, written and read again", name(&folder), prefix.table.dims());
        }
    }
}
