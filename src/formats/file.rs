//! One file of tensors, whatever its format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::map::map_file;
use super::{FormatError, ParseError, Placed, TensorView, safetensors, torch_pickle};

const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// A mapped file of tensors. Opening reads names and shapes only.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Placed>,
}

impl TensorFile {
    /// Opens a safetensors file or either kind of PyTorch file; the content decides, not the name.
    ///
    /// # Errors
    /// When the file cannot be read, is not whole, or is of another kind.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let io = |source| FormatError::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(io)?;
        if metadata.is_dir() {
            return Err(FormatError::Folder { path: path.to_owned() });
        }
        if metadata.len() == 0 {
            return Err(FormatError::Empty { path: path.to_owned() });
        }
        let map = map_file(path).map_err(io)?;
        if map.starts_with(LFS_POINTER) {
            return Err(FormatError::LfsPointer { path: path.to_owned() });
        }
        let (format, parsed) = if torch_pickle::is_zip(&map) {
            ("PyTorch", torch_pickle::parse_zip(&map))
        } else if torch_pickle::is_legacy(&map) {
            ("legacy PyTorch", torch_pickle::parse_legacy(&map))
        } else {
            ("safetensors", safetensors::parse(&map))
        };
        let tensors = parsed.map_err(|error| match error {
            ParseError::Truncated { expected, found } => FormatError::Truncated { path: path.to_owned(), expected, found },
            ParseError::Malformed(reason) => FormatError::Malformed { path: path.to_owned(), format, reason },
        })?;
        Ok(Self { path: path.to_owned(), map, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// # Errors
    /// When the file holds no such tensor.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        match self.tensors.get(name) {
            Some(placed) => Ok(TensorView { placed, data: &self.map[placed.bytes.clone()] }),
            None => Err(FormatError::NoSuchTensor { path: self.path.clone(), name: name.to_owned() }),
        }
    }

    /// A tensor of weights on `device` as `dtype`; see [`TensorView::to_tensor`].
    ///
    /// # Errors
    /// When the file holds no such tensor, its dtype is no float, or one of its elements is NaN or infinite.
    pub fn weights(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor, FormatError> {
        let view = self.get(name)?;
        let (path, name) = (self.path.clone(), name.to_owned());
        match view.to_tensor_and_fault(dtype, device) {
            Ok((tensor, None)) => Ok(tensor),
            Ok((_, Some((index, value)))) => Err(FormatError::NotFinite { path, name, index, value, shape: view.shape().to_vec() }),
            Err(error) => Err(FormatError::Tensor { path, name, reason: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_bytes(bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.bin");
        std::fs::write(&path, bytes).unwrap();
        TensorFile::open(&path).unwrap_err().to_string().replace(&dir.path().display().to_string(), "DIR")
    }

    #[test]
    fn files_that_hold_no_tensors_are_refused_by_what_they_are() {
        assert_eq!(open_bytes(b""), "DIR/model.bin is empty");
        assert_eq!(
            open_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
            "DIR/model.bin is a Git LFS pointer, not the file itself"
        );
        assert!(open_bytes(b"<html>404</html>").contains("not a whole safetensors file"));
        assert!(TensorFile::open(Path::new("/")).unwrap_err().to_string().contains("is a folder"));
        assert!(TensorFile::open(Path::new("/no/such")).unwrap_err().to_string().contains("cannot read /no/such"));
    }
}
