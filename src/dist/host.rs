//! What travels through host memory: the values of f32 tensors, from wherever they are and back; and checks of collectives' arguments.

use candle_core::{DType, Device, Shape, Tensor};

use super::DistError;
use crate::kernels::elementwise;
use crate::kernels::host::{F32View, on_host};

/// Calls `f` with the elements of an f32 tensor in row-major order; those of a GPU's are copied to the host first.
pub(super) fn with_slice<R>(collective: &'static str, tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R, DistError> {
    if tensor.dtype() != DType::F32 {
        let (expected, found) = ("an f32 tensor".into(), format!("{:?}", tensor.dtype()));
        return Err(DistError::Argument { collective, expected, found });
    }
    let on_host = on_host(&tensor.contiguous()?)?;
    Ok(f(&F32View::new(&on_host)?))
}

/// Checks the shape of a collective's argument: `[n]`, or `[world_size, n]`; gives n.
pub(super) fn num_columns(collective: &'static str, tensor: &Tensor, rows: Option<usize>) -> Result<usize, DistError> {
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

pub(super) fn check_root(root: usize, world_size: usize) -> Result<(), DistError> {
    if root < world_size {
        return Ok(());
    }
    Err(DistError::Argument { collective: "broadcast", expected: format!("a root below {world_size}"), found: root.to_string() })
}

/// Checks the arguments of [`super::Collectives::all_to_all_v`].
pub(super) fn check_parts(parts: &Tensor, send: &[usize], receive: &[usize], world_size: usize) -> Result<(), DistError> {
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

/// Writes `piece` `[n]` into `flat`, from element `at` on.
pub(super) fn put(flat: &Tensor, at: usize, piece: &Tensor) -> Result<(), DistError> {
    if piece.elem_count() > 0 {
        elementwise::assign_(&flat.narrow(0, at, piece.elem_count())?, piece)?;
    }
    Ok(())
}

/// A collective's result, on `device`.
pub(super) fn tensor(data: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor, DistError> {
    if data.is_empty() {
        return Ok(elementwise::zeros(0, device)?.reshape(shape.into())?);
    }
    Ok(Tensor::from_vec(data, shape.into(), device)?)
}
