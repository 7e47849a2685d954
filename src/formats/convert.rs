//! Between the bytes of a file and candle's tensors.

use std::sync::atomic::{AtomicBool, Ordering};

use ::safetensors::Dtype;
use candle_core::{DType, Device, Result, Storage, Tensor, WithDType, bail};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one task converts at a time.
const CHUNK: usize = 1 << 14;

/// candle's name for a file's dtype, where it has one.
pub fn candle_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        _ => return None,
    })
}

/// The inverse of [`candle_dtype`].
pub fn file_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        _ => return None,
    })
}

/// A tensor's elements in row-major order, little-endian, in its own dtype.
pub fn tensor_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    tensor_bytes_in(tensor, Vec::new())
}

/// As [`tensor_bytes`], in a buffer that was used before: one of the right length spares its allocation.
pub fn tensor_bytes_in(tensor: &Tensor, buffer: Vec<u8>) -> Result<Vec<u8>> {
    fn bytes<T: WithDType, const N: usize>(t: &Tensor, mut out: Vec<u8>, f: impl Fn(T) -> [u8; N] + Sync) -> Result<Vec<u8>> {
        let (storage, layout) = t.storage_and_layout();
        let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("a tensor of layout {layout:?} is not on the CPU in one piece");
        };
        let values = &storage.as_slice::<T>()?[start..end];
        if out.capacity() < values.len() * N {
            out = vec![0; values.len() * N];
        }
        out.resize(values.len() * N, 0);
        out.par_chunks_mut(CHUNK * N).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
            out.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(out, value)| *out = f(*value));
        });
        Ok(out)
    }
    // sync: copies from the device
    // Of a view of a GPU's memory candle would bring all that it is a part of.
    let own = if tensor.device().is_cpu() { tensor.clone() } else { tensor.force_contiguous()? };
    let flat = own.to_device(&Device::Cpu)?.flatten_all()?.contiguous()?;
    match flat.dtype() {
        DType::U8 => flat.to_vec1(),
        DType::U32 => bytes(&flat, buffer, u32::to_le_bytes),
        DType::I16 => bytes(&flat, buffer, i16::to_le_bytes),
        DType::I32 => bytes(&flat, buffer, i32::to_le_bytes),
        DType::I64 => bytes(&flat, buffer, i64::to_le_bytes),
        DType::BF16 => bytes(&flat, buffer, bf16::to_le_bytes),
        DType::F16 => bytes(&flat, buffer, f16::to_le_bytes),
        DType::F32 => bytes(&flat, buffer, f32::to_le_bytes),
        DType::F64 => bytes(&flat, buffer, f64::to_le_bytes),
        other => bail!("dtype {other:?} cannot be written"),
    }
}

/// Row-major little-endian `bytes` of dtype `from` as a tensor of dtype `to`. The tensor is the only allocation of its size.
pub(super) fn to_tensor(bytes: &[u8], from: Dtype, shape: &[usize], to: DType, device: &Device) -> Result<Tensor> {
    Ok(to_tensor_and_finiteness(bytes, from, shape, to, device)?.0)
}

/// As [`to_tensor`], and the row-major index and value of the first element of `bytes` that is NaN or infinite; `None` if all are
/// finite. The search rides on the conversion: each chunk is looked at while it is in the cache.
pub(super) fn to_tensor_and_fault(
    bytes: &[u8],
    from: Dtype,
    shape: &[usize],
    to: DType,
    device: &Device,
) -> Result<(Tensor, Option<(usize, f64)>)> {
    let (tensor, is_finite) = to_tensor_and_finiteness(bytes, from, shape, to, device)?;
    let fault = if is_finite { None } else { candle_dtype(from).and_then(|from| first_non_finite(bytes, from)) };
    Ok((tensor, fault))
}

fn to_tensor_and_finiteness(bytes: &[u8], from: Dtype, shape: &[usize], to: DType, device: &Device) -> Result<(Tensor, bool)> {
    let Some(from) = candle_dtype(from) else { bail!("dtype {from:?} is not supported") };
    let is_finite = AtomicBool::new(true);
    let cpu = match (from, to) {
        (DType::F32 | DType::F16 | DType::BF16, DType::F32) => {
            Tensor::from_vec(convert(bytes, from, &is_finite, |values, out| out.copy_from_slice(values)), shape, &Device::Cpu)
        }
        (DType::F32 | DType::BF16, DType::F16) => {
            let put = |values: &[f32], out: &mut [f16]| out.convert_from_f32_slice(values);
            Tensor::from_vec(convert(bytes, from, &is_finite, put), shape, &Device::Cpu)
        }
        (DType::F32 | DType::F16, DType::BF16) => {
            let put = |values: &[f32], out: &mut [bf16]| out.convert_from_f32_slice(values);
            Tensor::from_vec(convert(bytes, from, &is_finite, put), shape, &Device::Cpu)
        }
        (DType::F64, DType::F32 | DType::F16 | DType::BF16) => Tensor::from_raw_buffer(bytes, from, shape, &Device::Cpu)?.to_dtype(to),
        _ if from == to => Tensor::from_raw_buffer(bytes, from, shape, &Device::Cpu),
        _ => bail!("dtype {from:?} cannot be read as {to:?}"),
    }?;
    // What is copied as it is, or by candle, was not looked at.
    if from == DType::F64 || (from == to && from != DType::F32) {
        is_finite.store(first_non_finite(bytes, from).is_none(), Ordering::Relaxed);
    }
    Ok((cpu.to_device(device)?, is_finite.into_inner()))
}

/// The row-major index and value of the first element that is NaN or infinite; integers are finite.
fn first_non_finite(bytes: &[u8], from: DType) -> Option<(usize, f64)> {
    let size = from.size_in_bytes();
    let first = |bytes: &[u8]| -> Option<(usize, f64)> {
        if from == DType::F64 {
            // As f32, which all arithmetic is in: a value that it cannot hold is infinite.
            let values = bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32);
            return values.enumerate().find(|(_, value)| !value.is_finite()).map(|(i, value)| (i, value.into()));
        }
        let mut wide = vec![0f32; bytes.len() / size];
        widen(bytes, from, &mut vec![0; wide.len()], &mut wide);
        wide.iter().position(|value| !value.is_finite()).map(|i| (i, f64::from(wide[i])))
    };
    if !matches!(from, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return None;
    }
    let of_chunk = |(chunk, bytes): (usize, &[u8])| first(bytes).map(|(i, value)| (chunk * CHUNK + i, value));
    bytes.par_chunks(CHUNK * size).enumerate().find_map_first(of_chunk)
}

/// Widens to f32 chunk by chunk on all threads and gives each chunk to `put`; clears `is_finite` if a value is NaN or infinite.
fn convert<T: WithDType>(bytes: &[u8], from: DType, is_finite: &AtomicBool, put: impl Fn(&[f32], &mut [T]) + Sync) -> Vec<T> {
    let size = from.size_in_bytes();
    let mut out = vec![T::zero(); bytes.len() / size];
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each_init(
        || (vec![0f32; CHUNK], vec![0u16; CHUNK]),
        |(wide, bits), (out, bytes)| {
            let wide = &mut wide[..out.len()];
            widen(bytes, from, &mut bits[..out.len()], wide);
            // Without an early end the loop becomes vector instructions.
            if !wide.iter().fold(true, |all, value| all & value.is_finite()) {
                is_finite.store(false, Ordering::Relaxed);
            }
            put(wide, out);
        },
    );
    out
}

fn widen(bytes: &[u8], from: DType, bits: &mut [u16], out: &mut [f32]) {
    if from == DType::F32 {
        for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        return;
    }
    for (value, bytes) in bits.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = u16::from_le_bytes(*bytes);
    }
    match from {
        DType::F16 => bits.reinterpret_cast::<f16>().convert_to_f32_slice(out),
        _ => bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [f32; 6] = [0.0, -1.5, 3.140_625, 65504.0, -2.0e-5, f32::INFINITY];

    fn read(bytes: &[u8], from: Dtype, to: DType) -> Result<Vec<f32>> {
        to_tensor(bytes, from, &[2, 3], to, &Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }

    #[test]
    fn float_types_convert_into_each_other_rounding_once() {
        let source = Tensor::from_slice(&VALUES, (2, 3), &Device::Cpu).unwrap();
        for from in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let stored = source.to_dtype(from).unwrap();
            let bytes = tensor_bytes(&stored).unwrap();
            for to in [DType::F32, DType::F16, DType::BF16] {
                let want: Vec<f32> = stored.to_dtype(to).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(read(&bytes, file_dtype(from).unwrap(), to).unwrap(), want, "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn first_value_that_is_not_finite_is_found_in_every_float_type_and_conversion() {
        let n = 3 * CHUNK + 5;
        for (at, value) in [(0, f32::NAN), (CHUNK - 1, f32::INFINITY), (2 * CHUNK + 7, f32::NEG_INFINITY), (n - 1, f32::NAN)] {
            let mut values = vec![0.5f32; n];
            values[at] = value;
            values[n - 1] = f32::NAN;
            let source = Tensor::from_vec(values, n, &Device::Cpu).unwrap();
            for from in [DType::F32, DType::F16, DType::BF16, DType::F64] {
                let bytes = tensor_bytes(&source.to_dtype(from).unwrap()).unwrap();
                for to in [DType::F32, DType::F16, DType::BF16] {
                    let fault = to_tensor_and_fault(&bytes, file_dtype(from).unwrap(), &[n], to, &Device::Cpu).unwrap().1;
                    let (index, found) = fault.expect("a fault");
                    assert_eq!((index, found.to_string()), (at, value.to_string()), "{from:?} to {to:?}");
                }
            }
        }
        let beyond_f32 = tensor_bytes(&Tensor::new(&[1.0, -1e300f64], &Device::Cpu).unwrap()).unwrap();
        let fault = to_tensor_and_fault(&beyond_f32, Dtype::F64, &[2], DType::F32, &Device::Cpu).unwrap().1;
        assert_eq!(fault, Some((1, f64::NEG_INFINITY)));
        for from in [DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8] {
            let bytes = tensor_bytes(&Tensor::ones(n, from, &Device::Cpu).unwrap()).unwrap();
            assert!(to_tensor_and_fault(&bytes, file_dtype(from).unwrap(), &[n], from, &Device::Cpu).unwrap().1.is_none(), "{from:?}");
        }
    }

    #[test]
    fn nan_payload_of_f32_survives() {
        let bytes: Vec<u8> = [0x7fc1_2345u32, 0xffc0_0001].iter().flat_map(|b| b.to_le_bytes()).collect();
        let tensor = to_tensor(&bytes, Dtype::F32, &[2], DType::F32, &Device::Cpu).unwrap();
        assert_eq!(tensor_bytes(&tensor).unwrap(), bytes);
    }

    #[test]
    fn integers_are_not_taken_as_floats() {
        assert!(read(&[0; 6], Dtype::I8, DType::F32).is_err());
        assert!(read(&[0; 6], Dtype::U8, DType::F32).is_err());
    }
}
