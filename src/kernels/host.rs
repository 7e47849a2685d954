//! Access to the memory of CPU tensors, and values of a GPU's tensors brought to the host.

use std::cell::RefCell;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, bail};

use super::on_gpu::on_gpu;

/// A CPU f32 tensor's values, read in place. Holds the tensor's read lock.
pub struct F32View<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> F32View<'a> {
    /// # Errors
    /// When the tensor is not a contiguous f32 tensor on the CPU.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor, found {layout:?}") };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => {}
            _ => bail!("expected f32 on the cpu, found {:?} on {:?}", tensor.dtype(), tensor.device().location()),
        }
        Ok(Self { storage, range: start..end })
    }
}

impl Deref for F32View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[], // refused in `new`
        }
    }
}

/// Runs `f` on a contiguous CPU f32 tensor's memory, in place; every view of that memory sees the change.
///
/// # Errors
/// When the tensor is not a contiguous f32 tensor on the CPU.
pub fn with_f32_mut(tensor: &Tensor, name: &'static str, f: impl Fn(&mut [f32])) -> Result<()> {
    struct InPlace<F>(&'static str, F);
    impl<F: Fn(&mut [f32])> InplaceOp1 for InPlace<F> {
        fn name(&self) -> &'static str {
            self.0
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else { bail!("{}: expected a contiguous tensor", self.0) };
            let CpuStorage::F32(values) = storage else { bail!("{}: expected f32", self.0) };
            (self.1)(&mut values[start..end]);
            Ok(())
        }
    }
    tensor.inplace_op1(&InPlace(name, f))
}

/// As [`with_f32_mut`], of three tensors that share no memory.
///
/// # Errors
/// When one of them is not a contiguous f32 tensor on the CPU.
pub fn with_3_f32_mut([a, b, c]: [&Tensor; 3], name: &'static str, f: impl Fn(&mut [f32], &mut [f32], &mut [f32])) -> Result<()> {
    let inner = RefCell::new(Ok(()));
    with_f32_mut(a, name, |a| {
        let a = RefCell::new(a);
        let outcome = with_f32_mut(b, name, |b| {
            let b = RefCell::new(b);
            *inner.borrow_mut() = with_f32_mut(c, name, |c| f(&mut a.borrow_mut(), &mut b.borrow_mut(), c));
        });
        if outcome.is_err() {
            *inner.borrow_mut() = outcome;
        }
    })?;
    inner.into_inner()
}

/// The values of f32 tensors of one device, on the host: from a GPU by one copy and one wait.
///
/// # Errors
/// When one is not f32, or the device fails.
pub fn read(tensors: &[&Tensor]) -> Result<Vec<Vec<f32>>> {
    let values = |x: &Tensor| x.flatten_all()?.to_vec1();
    let Some(gpu) = tensors.first().map(|x| on_gpu(x)).transpose()?.flatten() else { return tensors.iter().map(|x| values(x)).collect() };
    let lens: Vec<usize> = tensors.iter().map(|x| x.elem_count()).collect();
    let all = gpu.result_of(lens.iter().sum::<usize>(), DType::F32)?;
    let mut at = 0;
    for (x, &len) in tensors.iter().zip(&lens).filter(|(_, len)| **len > 0) {
        gpu.copy(&x.flatten_all()?, &all.narrow(0, at, len)?)?;
        at += len;
    }
    // sync: all of them are read here.
    let mut all = values(&all)?.into_iter();
    Ok(lens.into_iter().map(|len| all.by_ref().take(len).collect()).collect())
}

/// The tensor in the host's memory: itself if it is there.
///
/// # Errors
/// When the device fails.
pub fn on_host(tensor: &Tensor) -> Result<Tensor> {
    if tensor.device().is_cpu() {
        return Ok(tensor.clone());
    }
    if tensor.elem_count() == 0 {
        return Tensor::zeros(tensor.shape(), tensor.dtype(), &Device::Cpu);
    }
    // Of a view candle would bring all the memory that it is a part of.
    tensor.force_contiguous()?.to_device(&Device::Cpu)
}

/// Hands `values` to a tensor without a copy.
///
/// # Errors
/// When the shape's size is not the number of values.
pub fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// # Errors
/// When the tensor is on a device or in a type that these kernels do not run on.
pub fn check(tensor: &Tensor, op: &str) -> Result<()> {
    if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
        bail!("{op}: runs on f32 on the cpu, found {:?} on {:?}", tensor.dtype(), tensor.device().location());
    }
    Ok(())
}
