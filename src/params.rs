//! The trainable parameters: a name-ordered set of views into one flat f32 buffer.
//!
//! Gradients, moments and reductions work on the flat buffer; names and shapes come back through [`Layout::views`]. The order is that of
//! the names (BTreeMap), so it is the same on every rank and in every run.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::kernels::elementwise;
use crate::kernels::host::on_host;

/// Where each parameter lies in a flat buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    entries: BTreeMap<String, Entry>,
    len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub shape: Vec<usize>,
    /// First element in the flat buffer (elements).
    pub offset: usize,
}

impl Entry {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Layout {
    pub fn new(shapes: BTreeMap<String, Vec<usize>>) -> Self {
        let mut len = 0;
        let entries = shapes
            .into_iter()
            .map(|(name, shape)| {
                let entry = Entry { offset: len, shape };
                len += entry.num_elements();
                (name, entry)
            })
            .collect();
        Self { entries, len }
    }

    /// Number of elements of the flat buffer.
    pub fn num_elements(&self) -> usize {
        self.len
    }

    /// Names and places, in the order of the flat buffer.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Views of `flat` (a parameter, gradient or moment buffer, `[num_elements]`) by name; they share its memory.
    ///
    /// # Errors
    /// When `flat` has another length than this layout.
    pub fn views(&self, flat: &Tensor) -> Result<BTreeMap<String, Tensor>> {
        if flat.dims() != [self.len] {
            bail!("flat buffer has shape {:?}, expected [{}]", flat.dims(), self.len);
        }
        self.iter()
            .map(|(name, e)| Ok((name.to_owned(), flat.narrow(0, e.offset, e.num_elements())?.reshape(e.shape.as_slice())?)))
            .collect()
    }

    /// As [`Self::views`], of one parameter.
    ///
    /// # Errors
    /// When there is no such parameter.
    pub fn view(&self, flat: &Tensor, name: &str) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else { bail!("unknown parameter `{name}`") };
        flat.narrow(0, entry.offset, entry.num_elements())?.reshape(entry.shape.as_slice())
    }

    /// The inverse of [`Self::views`]: copies `tensors` into a new flat f32 buffer.
    ///
    /// # Errors
    /// When a name is missing, unknown, or has another shape.
    pub fn flatten(&self, tensors: &BTreeMap<String, Tensor>) -> Result<Tensor> {
        if let Some(unknown) = tensors.keys().find(|name| !self.entries.contains_key(*name)) {
            bail!("unknown parameter `{unknown}`");
        }
        let mut parts = Vec::with_capacity(tensors.len());
        for (name, entry) in self.iter() {
            let Some(tensor) = tensors.get(name) else { bail!("parameter `{name}` is missing") };
            if tensor.dims() != entry.shape {
                bail!("parameter `{name}` has shape {:?}, expected {:?}", tensor.dims(), entry.shape);
            }
            parts.push(tensor.to_dtype(DType::F32)?.flatten_all()?);
        }
        // A copy where there is one part: `cat` of one tensor is that tensor, and an optimizer writes in place.
        if let [part] = parts.as_slice() { part.copy() } else { Tensor::cat(&parts, 0) }
    }
}

/// Trainable parameters with their values (f32 masters).
#[derive(Clone, Debug)]
pub struct ParamSet {
    layout: Layout,
    flat: Tensor,
}

impl ParamSet {
    /// Copies `tensors` into one flat f32 buffer on their device.
    pub fn new(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let layout = Layout::new(tensors.iter().map(|(n, t)| (n.clone(), t.dims().to_vec())).collect());
        let flat = layout.flatten(tensors)?;
        Ok(Self { layout, flat })
    }

    /// Puts the values on `device`: views taken before do not see what becomes of them there.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn move_to(&mut self, device: &Device) -> Result<()> {
        self.flat = self.flat.to_device(device)?;
        Ok(())
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The values, `[num_elements]` f32. An optimizer changes this buffer in place; every view sees it.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// One parameter, sharing memory with the flat buffer.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.layout.view(&self.flat, name)
    }

    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.layout.views(&self.flat)
    }

    /// As [`Self::tensors`], in the host's memory: a copy, made at once, of what is elsewhere.
    ///
    /// # Errors
    /// When the device fails.
    pub fn host_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.layout.views(&on_host(&self.flat)?)
    }

    /// Replaces the values in place, so that every view sees them; names and shapes must be those of this set.
    pub fn load(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.load_flat(&self.layout.flatten(tensors)?)
    }

    /// As [`Self::load`], from a flat f32 buffer in this set's layout.
    pub fn load_flat(&mut self, values: &Tensor) -> Result<()> {
        if values.dims() != self.flat.dims() {
            bail!("flat buffer has shape {:?}, expected {:?}", values.dims(), self.flat.dims());
        }
        if self.layout.num_elements() > 0 {
            elementwise::assign_(&self.flat, &values.to_device(self.flat.device())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> BTreeMap<String, Tensor> {
        let t = |n: usize, shape: &[usize]| Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape(shape).unwrap();
        BTreeMap::from([("b".to_owned(), t(6, &[2, 3])), ("a".to_owned(), t(4, &[4]))])
    }

    #[test]
    fn flatten_and_views_are_inverse_and_ordered_by_name() {
        let set = ParamSet::new(&two()).unwrap();
        assert_eq!(set.flat().to_vec1::<f32>().unwrap(), [0., 1., 2., 3., 0., 1., 2., 3., 4., 5.]);
        let views = set.tensors().unwrap();
        assert_eq!(views["b"].dims(), [2, 3]);
        assert_eq!(set.layout().flatten(&views).unwrap().to_vec1::<f32>().unwrap(), set.flat().to_vec1::<f32>().unwrap());
    }

    #[test]
    fn set_of_one_parameter_does_not_share_its_source() {
        let source = BTreeMap::from([("a".to_owned(), Tensor::ones(3, DType::F32, &Device::Cpu).unwrap())]);
        let set = ParamSet::new(&source).unwrap();
        crate::kernels::elementwise::scale_(set.flat(), 2.0).unwrap();
        assert_eq!(source["a"].to_vec1::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(set.get("a").unwrap().to_vec1::<f32>().unwrap(), [2.0; 3]);
    }

    #[test]
    fn load_is_seen_by_views_taken_before() {
        let mut set = ParamSet::new(&two()).unwrap();
        let before = set.get("a").unwrap();
        let mut other = two();
        other.insert("a".into(), Tensor::ones(4, DType::F32, &Device::Cpu).unwrap());
        set.load(&other).unwrap();
        assert_eq!(before.to_vec1::<f32>().unwrap(), [1.0; 4]);
        let own = set.tensors().unwrap();
        set.load(&own).unwrap();
        assert_eq!(set.get("b").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0., 1., 2., 3., 4., 5.]);
    }

    #[test]
    fn load_with_another_shape_is_refused_by_name() {
        let mut set = ParamSet::new(&two()).unwrap();
        let mut other = two();
        other.insert("b".into(), Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap());
        let text = set.load(&other).unwrap_err().to_string();
        assert!(text.contains("`b` has shape [3, 2], expected [2, 3]"), "{text}");
    }
}
