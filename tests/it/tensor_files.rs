//! Files of tensors, changed as a user's may be: a value that is not finite, another dtype, another format, tensors more or fewer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use glmddp::formats::{TensorFile, candle_dtype, safetensors, torch_pickle};

pub type Tensors = BTreeMap<String, Tensor>;

/// All tensors of a file, each in its own dtype.
pub fn read(path: &Path) -> Tensors {
    let file = TensorFile::open(path).unwrap();
    let tensor = |name: &str| {
        let view = file.get(name).unwrap();
        view.to_tensor(candle_dtype(view.dtype()).unwrap(), &Device::Cpu).unwrap()
    };
    file.names().map(|name| (name.to_owned(), tensor(name))).collect()
}

/// Writes in the format that the name ends in.
pub fn write(path: &Path, tensors: &Tensors) {
    let is_pickle = path.extension().is_some_and(|ending| ending == "bin");
    let bytes = if is_pickle { torch_pickle::to_bytes(tensors) } else { safetensors::to_bytes(tensors) };
    std::fs::write(path, bytes.unwrap()).unwrap();
}

/// Changes a file's tensors.
pub fn change(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = read(path);
    change(&mut tensors);
    write(path, &tensors);
}

/// A tensor with another value of element `index` (row-major), in its dtype.
pub fn with_element(tensor: &Tensor, index: usize, value: f32) -> Tensor {
    let mut values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values[index] = value;
    Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap().to_dtype(tensor.dtype()).unwrap()
}

/// Sets element `index` of the tensor `name` of a file.
pub fn set_element(path: &Path, name: &str, index: usize, value: f32) {
    change(path, |tensors| {
        let tensor = with_element(&tensors[name], index, value);
        tensors.insert(name.to_owned(), tensor);
    });
}

/// The weight files of a folder, in the order of their names.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "bin")).collect();
    paths.sort();
    paths
}

/// Writes a model's weights into one file of this name and dtype, in place of those that it has.
pub fn rewrite_model(dir: &Path, name: &str, dtype: DType) {
    let mut all = Tensors::new();
    for path in files(dir) {
        all.extend(read(&path).into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())));
        std::fs::remove_file(path).unwrap();
    }
    let _ = std::fs::remove_file(dir.join("model.safetensors.index.json"));
    write(&dir.join(name), &all);
}

/// Changes a JSON file.
pub fn change_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// Copies a folder with all below it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, target) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}
