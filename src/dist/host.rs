//! f32 vectors on the CPU: reading them as slices, and adding them in parallel.
//!
//! Additions are element by element, so the number of threads and the size of a chunk change no bit.

use candle_core::{CpuStorage, CustomOp2, Device, InplaceOp2, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::DistError;

/// Elements that one task adds.
const CHUNK: usize = 1 << 15;

/// Calls `f` with the elements of a contiguous f32 CPU tensor in row-major order.
pub(super) fn with_slice<R>(collective: &'static str, tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> std::result::Result<R, DistError> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage @ CpuStorage::F32(_)) => Ok(f(slice(storage, layout)?)),
        _ => Err(DistError::Argument {
            collective,
            expected: "an f32 tensor on the CPU".into(),
            found: format!("{:?} on {:?}", tensor.dtype(), tensor.device().location()),
        }),
    }
}

/// Checks the shape of a collective's argument: `[n]`, or `[world_size, n]`; gives n.
pub(super) fn num_columns(collective: &'static str, tensor: &Tensor, rows: Option<usize>) -> std::result::Result<usize, DistError> {
    match (tensor.dims(), rows) {
        ([n], None) => Ok(*n),
        ([r, n], Some(rows)) if *r == rows => Ok(*n),
        (dims, rows) => Err(DistError::Argument {
            collective,
            expected: rows.map_or("shape [n]".into(), |rows| format!("shape [{rows}, n], a row for each rank")),
            found: format!("{dims:?}"),
        }),
    }
}

pub(super) fn check_root(root: usize, world_size: usize) -> std::result::Result<(), DistError> {
    if root < world_size {
        return Ok(());
    }
    Err(DistError::Argument { collective: "broadcast", expected: format!("a root below {world_size}"), found: root.to_string() })
}

/// Checks the arguments of [`super::Collectives::all_to_all_v`].
pub(super) fn check_parts(parts: &Tensor, send: &[usize], receive: &[usize], world_size: usize) -> std::result::Result<(), DistError> {
    let n = num_columns("all_to_all_v", parts, None)?;
    if send.len() == world_size && receive.len() == world_size && send.iter().sum::<usize>() == n {
        return Ok(());
    }
    Err(DistError::Argument {
        collective: "all_to_all_v",
        expected: format!("{world_size} lengths to send, {n} in all, and {world_size} to receive"),
        found: format!("{send:?} and {receive:?}"),
    })
}

/// Where each of the parts begins that lie one behind the other.
pub(super) fn starts(lens: &[usize]) -> Vec<usize> {
    lens.iter().scan(0, |end, len| Some(std::mem::replace(end, *end + len))).collect()
}

/// Wraps a collective's result.
pub(super) fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> std::result::Result<Tensor, DistError> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// `a + b` in a new buffer.
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &Add) } else { a + b }
}

/// `a + b` in the memory of `a`, which nobody else may read.
pub(super) fn add_into(a: Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return &a + b;
    }
    a.inplace_op2(&b.contiguous()?, &Add)?;
    Ok(a)
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = f32::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("an f32 vector must be contiguous, found {layout:?}"),
    }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "parallel_add"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (slice(s1, l1)?, slice(s2, l2)?);
        if l1.dims() != l2.dims() {
            bail!("cannot add shapes {:?} and {:?}", l1.dims(), l2.dims());
        }
        let mut sum = Vec::new();
        a.par_iter().with_min_len(CHUNK).zip(b).map(|(a, b)| a + b).collect_into_vec(&mut sum);
        Ok((CpuStorage::F32(sum), l1.shape().clone()))
    }
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "parallel_add_into"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let b = slice(s2, l2)?;
        if l1.dims() != l2.dims() {
            bail!("cannot add shapes {:?} and {:?}", l1.dims(), l2.dims());
        }
        let (CpuStorage::F32(a), Some((start, end))) = (s1, l1.contiguous_offsets()) else {
            bail!("sums are contiguous f32 vectors, found {l1:?}")
        };
        a[start..end].par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize, scale: f32) -> Tensor {
        Tensor::from_iter((0..n).map(|i| i as f32 * scale), &Device::Cpu).unwrap()
    }

    #[test]
    fn add_of_any_length_equals_a_plain_loop() {
        for n in [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 5] {
            let (a, b) = (ramp(n, 0.1), ramp(n, 1e-7));
            let expected: Vec<f32> = (0..n).map(|i| i as f32 * 0.1 + i as f32 * 1e-7).collect();
            assert_eq!(add(&a, &b).unwrap().to_vec1::<f32>().unwrap(), expected);
            assert_eq!(a.to_vec1::<f32>().unwrap(), ramp(n, 0.1).to_vec1::<f32>().unwrap(), "the arguments stay");
            assert_eq!(add_into(a, &b).unwrap().to_vec1::<f32>().unwrap(), expected);
        }
    }

    #[test]
    fn add_of_views_uses_their_own_elements() {
        let both = ramp(10, 1.0).reshape((2, 5)).unwrap();
        let sum = add(&both.get(0).unwrap(), &both.get(1).unwrap()).unwrap();
        assert_eq!(sum.to_vec1::<f32>().unwrap(), [5., 7., 9., 11., 13.]);
        assert!(add(&both, &sum).is_err(), "shapes differ");
    }
}
