//! A tensor inside a file: where it lies, and its bytes.

use std::borrow::Cow;
use std::ops::Range;

use ::safetensors::Dtype;
use candle_core::{DType, Device, Result, Tensor};

use super::ParseError;
use super::convert;

type Parsed<T> = std::result::Result<T, ParseError>;

/// Where a tensor lies in a file. Bounds have been checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Distance of neighbours along each dimension, in elements.
    pub(super) strides: Vec<usize>,
    /// Bytes of the file from the first element to the end of the last one reached.
    pub(super) bytes: Range<usize>,
}

/// Strides (elements) of a contiguous tensor.
pub(super) fn row_major(shape: &[usize]) -> Option<Vec<usize>> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].checked_mul(shape[i].max(1))?;
    }
    Some(strides)
}

impl Placed {
    /// Places a strided tensor into `storage` (byte range of the file), `offset` elements behind its start.
    ///
    /// # Errors
    /// When the tensor reaches beyond its storage, has more elements than the storage (an expanded view could demand any amount of
    /// memory), or its sizes overflow.
    pub(super) fn new(dtype: Dtype, shape: Vec<usize>, strides: Vec<usize>, storage: Range<usize>, offset: usize) -> Parsed<Self> {
        let size = element_size(dtype).ok_or_else(|| ParseError::new(format!("dtype {dtype:?} is not supported")))?;
        let overflow = || ParseError::new(format!("shape {shape:?} with strides {strides:?} overflows"));
        if shape.len() != strides.len() {
            return Err(ParseError::new(format!("shape {shape:?} and strides {strides:?} differ in length")));
        }
        let numel = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
        let available = (storage.end - storage.start) / size;
        let reach = if numel == 0 {
            0
        } else {
            shape.iter().zip(&strides).try_fold(1usize, |end, (&d, &s)| end.checked_add((d - 1).checked_mul(s)?)).ok_or_else(overflow)?
        };
        let end = offset.checked_add(reach).ok_or_else(overflow)?;
        if end > available || numel > available {
            return Err(ParseError::new(format!(
                "shape {shape:?} with strides {strides:?} at offset {offset} does not fit its storage of {available} elements"
            )));
        }
        let start = storage.start + offset * size;
        Ok(Self { dtype, shape, strides, bytes: start..start + reach * size })
    }
}

/// Bytes of an element; none for dtypes below a byte.
fn element_size(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// A tensor of a mapped file. Nothing is copied before [`Self::to_tensor`] or [`Self::to_bytes`].
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    pub(super) placed: &'a Placed,
    pub(super) data: &'a [u8],
}

impl<'a> TensorView<'a> {
    pub fn dtype(&self) -> Dtype {
        self.placed.dtype
    }

    pub fn shape(&self) -> &'a [usize] {
        &self.placed.shape
    }

    pub fn num_elements(&self) -> usize {
        self.placed.shape.iter().product()
    }

    /// The elements in row-major order, little-endian; borrowed from the map where they lie so in the file.
    pub fn to_bytes(&self) -> Cow<'a, [u8]> {
        let size = element_size(self.placed.dtype).unwrap_or(1);
        if self.num_elements() * size == self.data.len() && self.is_contiguous() {
            return Cow::Borrowed(self.data);
        }
        Cow::Owned(gather(self.data, &self.placed.shape, &self.placed.strides, size))
    }

    fn is_contiguous(&self) -> bool {
        row_major(&self.placed.shape)
            .is_some_and(|plain| plain.iter().zip(&self.placed.strides).zip(&self.placed.shape).all(|((a, b), &dim)| a == b || dim <= 1))
    }

    /// Copies the tensor to `device` as `dtype`. Between float types each value is rounded once, to nearest even.
    ///
    /// # Errors
    /// When the file's dtype is not a float and differs from `dtype`, or is one that candle does not know.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        convert::to_tensor(&self.to_bytes(), self.placed.dtype, &self.placed.shape, dtype, device)
    }

    /// As [`Self::to_tensor`], and the row-major index and value of the first element that is NaN or infinite, if any is.
    ///
    /// # Errors
    /// As [`Self::to_tensor`].
    pub(super) fn to_tensor_and_fault(&self, dtype: DType, device: &Device) -> Result<(Tensor, Option<(usize, f64)>)> {
        convert::to_tensor_and_fault(&self.to_bytes(), self.placed.dtype, &self.placed.shape, dtype, device)
    }
}

/// Copies a strided tensor into row-major order.
fn gather(data: &[u8], shape: &[usize], strides: &[usize], size: usize) -> Vec<u8> {
    let numel: usize = shape.iter().product();
    let mut out = Vec::with_capacity(numel * size);
    let Some((&inner_len, outer_shape)) = shape.split_last() else {
        out.extend_from_slice(&data[..size]);
        return out;
    };
    let inner_stride = strides[strides.len() - 1];
    let mut index = vec![0; outer_shape.len()];
    for _ in 0..numel.checked_div(inner_len).unwrap_or(0) {
        let start: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum();
        for i in 0..inner_len {
            let at = (start + i * inner_stride) * size;
            out.extend_from_slice(&data[at..at + size]);
        }
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < outer_shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(placed: &Placed, file: &[u8]) -> Vec<u8> {
        TensorView { placed, data: &file[placed.bytes.clone()] }.to_bytes().into_owned()
    }

    #[test]
    fn transposed_view_with_offset_gathers_in_row_major_order() {
        let file: Vec<u8> = (0..16).collect();
        let placed = Placed::new(Dtype::U8, vec![3, 2], vec![1, 3], 2..10, 1).unwrap();
        assert_eq!(values(&placed, &file), [3, 6, 4, 7, 5, 8]);
        let placed = Placed::new(Dtype::U8, vec![2, 2, 2], vec![4, 1, 2], 0..16, 0).unwrap();
        assert_eq!(values(&placed, &file), [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn scalar_and_empty_views_give_one_and_no_element() {
        let file = [7u8, 8, 9];
        assert_eq!(values(&Placed::new(Dtype::U8, vec![], vec![], 0..3, 2).unwrap(), &file), [9]);
        assert!(values(&Placed::new(Dtype::U8, vec![4, 0], vec![0, 1], 0..3, 3).unwrap(), &file).is_empty());
    }

    #[test]
    fn expanded_or_overreaching_view_is_refused() {
        for (shape, strides, offset) in [
            (vec![1 << 40, 1 << 20], vec![0, 0], 0),
            (vec![4], vec![0], 0),
            (vec![3], vec![1], 1),
            (vec![2], vec![3], 0),
            (vec![usize::MAX, 2], vec![1, 1], 0),
            (vec![2], vec![usize::MAX], 0),
            (vec![1], vec![1], usize::MAX),
            (vec![0], vec![1], usize::MAX),
        ] {
            assert!(Placed::new(Dtype::U8, shape.clone(), strides, 0..3, offset).is_err(), "{shape:?}");
        }
    }
}
