//! cuBLASLt's products, copies and the clock of a [`CudaExecutor`].
#![allow(unsafe_code, reason = "cuBLASLt is a C library")]

use std::collections::BTreeMap;
use std::ffi::c_void;

use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, DevicePtr};

use super::super::gpu::{Elapsed, Gpu, Operands, Product, Queue};
use super::super::launch::{Buffer, KernelDtype, LaunchError, require_aligned};
use super::device::failed;
use super::executor::locked;
use super::{CUBLAS_LT, CudaError, CudaExecutor, load};

/// What NVIDIA recommends for Hopper; less serves the others.
const WORKSPACE_BYTES: usize = 32 << 20;

/// What every address of a product is a multiple of. cuBLASLt would assume 256 bytes, which the middle of a buffer need not be.
const ALIGNMENT: u32 = 16;

/// What an algorithm is chosen for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    operands: Operands,
    sizes: [usize; 3],
    dtype: KernelDtype,
    out_dtype: KernelDtype,
    has_bias: bool,
    has_residual: bool,
}

impl Shape {
    fn of(product: &Product) -> Self {
        let &Product { operands, sizes, dtype, out_dtype, bias, residual, .. } = product;
        Self { operands, sizes, dtype, out_dtype, has_bias: bias.is_some(), has_residual: residual.is_some() }
    }
}

/// A handle of cuBLASLt with its workspace.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// Chosen at the first product of a shape and kept: asking takes time, and another algorithm may give other bits.
    algorithms: BTreeMap<Shape, sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: a handle of cuBLASLt may be used by any thread (cuBLAS Library, "Thread Safety"); here one at a time, under a lock.
unsafe impl Send for Blas {}

impl Blas {
    pub(super) fn new(executor: &CudaExecutor) -> Result<Self, LaunchError> {
        load(&CUBLAS_LT)?;
        let handle = result::create_handle().map_err(|e| product_failed("cublasLtCreate", e))?;
        // SAFETY: a workspace's content is cuBLASLt's own.
        let workspace = unsafe { executor.stream.alloc::<u8>(WORKSPACE_BYTES) }.map_err(|e| LaunchError::Memory {
            name: "workspace of cuBLASLt".to_owned(),
            bytes: WORKSPACE_BYTES,
            reason: failed("cuMemAllocAsync", e).to_string(),
        })?;
        Ok(Self { handle, workspace, algorithms: BTreeMap::new() })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: it was made by `new` and is used by nobody else. An error at the end has nobody to tell.
        _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn product_failed(call: &str, error: CublasError) -> LaunchError {
    LaunchError::Kernel { kernel: "matrix product".to_owned(), reason: format!("{call}: {:?}", error.0) }
}

fn data_type(dtype: KernelDtype) -> sys::cudaDataType {
    match dtype {
        KernelDtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        KernelDtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        KernelDtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
    }
}

/// A column-major matrix.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: KernelDtype, rows: usize, columns: usize) -> Result<Self, LaunchError> {
        let layout = result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, rows as i64);
        Ok(Self(layout.map_err(|e| product_failed("cublasLtMatrixLayoutCreate", e))?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody else.
        _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self, LaunchError> {
        // Sums of f32 products in f32, not in TF32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        Ok(Self(description.map_err(|e| product_failed("cublasLtMatmulDescCreate", e))?))
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), LaunchError> {
        // SAFETY: cuBLASLt copies the value; each attribute below is given its own type.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
            .map_err(|e| product_failed("cublasLtMatmulDescSetAttribute", e))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody else.
        _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, LaunchError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref().map_err(|e| product_failed("cublasLtMatmulPreferenceCreate", e))?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES)?;
        // A sum that is split over blocks stays in f32 until it is whole. By default its parts may be rounded to d's type before they are added.
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, ALIGNMENT)?;
        }
        Ok(preference)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: T) -> Result<(), LaunchError> {
        // SAFETY: cuBLASLt copies the value; each attribute above is given its own type.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const value).cast(), size_of::<T>()) }
            .map_err(|e| product_failed("cublasLtMatmulPreferenceSetAttribute", e))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody else.
        _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Tests that a copy of `bytes` fills a buffer.
fn expect_bytes(bytes: usize, to: Buffer) -> Result<(), LaunchError> {
    if bytes == to.bytes {
        return Ok(());
    }
    Err(LaunchError::Memory { name: format!("at {:#x}", to.address), bytes: to.bytes, reason: format!("{bytes} bytes are copied into it") })
}

impl Gpu for CudaExecutor {
    fn product(&self, product: &Product) -> Result<(), LaunchError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Product { operands, sizes: [m, n, k], a, b, d, dtype, out_dtype, bias, residual } = *product;
        if dtype != out_dtype && out_dtype != KernelDtype::F32 {
            let (op, supported) = ("a matrix product's result".to_owned(), vec![dtype, KernelDtype::F32]);
            return Err(CudaError::Dtype { op, dtype: out_dtype, supported }.into());
        }
        let (bias_at, residual_at) = (bias.unwrap_or(0), residual.unwrap_or(0));
        require_aligned("matrix product", &[a, b, d, bias_at, residual_at])?;
        self.bind("matrix product")?;
        let mut blas = locked(&self.blas);
        let blas = match &mut *blas {
            Some(blas) => blas,
            empty => empty.insert(Blas::new(self)?),
        };
        // Row-major d = a b is column-major d' = b' a'.
        let (transposes_b, transposes_a) = match operands {
            Operands::Nt => (true, false),
            Operands::Nn => (false, false),
            Operands::Tn => (false, true),
        };
        let layout_b = if transposes_b { Layout::new(dtype, k, n)? } else { Layout::new(dtype, n, k)? };
        let layout_a = if transposes_a { Layout::new(dtype, m, k)? } else { Layout::new(dtype, k, m)? };
        let layout_d = Layout::new(out_dtype, n, m)?;
        let description = Description::new()?;
        let operation = |transposes| if transposes { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N };
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &operation(transposes_b))?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &operation(transposes_a))?;
        if let Some(bias) = bias {
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(out_dtype))?;
        }
        let shape = Shape::of(product);
        let algorithm = match blas.algorithms.get(&shape) {
            Some(algorithm) => *algorithm,
            None => {
                let preference = Preference::new()?;
                // SAFETY: all handles live; the layouts are those of the product.
                let heuristic = unsafe {
                    let (handle, description, preference) = (blas.handle, description.0, preference.0);
                    result::get_matmul_algo_heuristic(handle, description, layout_b.0, layout_a.0, layout_d.0, layout_d.0, preference)
                }
                .map_err(|e| product_failed("cublasLtMatmulAlgoGetHeuristic", e))?;
                *blas.algorithms.entry(shape).or_insert(heuristic.algo)
            }
        };
        let (alpha, beta) = (1f32, if residual.is_some() { 1f32 } else { 0f32 });
        let pointer = |address: u64| address as *const c_void;
        let workspace = blas.workspace.device_ptr(&self.stream).0 as *mut c_void;
        *locked(&self.last) = format!("matrix product {operands:?} {:?}", product.sizes);
        // SAFETY: the addresses are of memory of this stream and these sizes, by the caller's word: whoever frees it queues the free behind this
        // product. The rest lives here.
        unsafe {
            result::matmul(
                blas.handle,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(b),
                layout_b.0,
                pointer(a),
                layout_a.0,
                pointer(residual.unwrap_or(d)),
                layout_d.0,
                d as *mut c_void,
                layout_d.0,
                &raw const algorithm,
                workspace,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(|e| product_failed("cublasLtMatmul", e))
    }

    fn send(&self, bytes: &[u8], to: Buffer) -> Result<(), LaunchError> {
        expect_bytes(bytes.len(), to)?;
        self.bind("copy")?;
        // SAFETY: the context is this thread's; the buffer is memory of this stream, as long as `bytes`, and whoever frees it queues the free behind
        // this copy.
        unsafe { locked(&self.staging).send(bytes, to.address, self.stream.cu_stream()) }
            .map_err(|e| self.memory_error(to, "a copy from page-locked memory", e))
    }

    fn copy(&self, from: Buffer, to: Buffer) -> Result<(), LaunchError> {
        expect_bytes(from.bytes, to)?;
        self.bind("copy")?;
        // SAFETY: both are memory of this stream, as long as they say: whoever frees it queues the free behind this copy.
        unsafe { cudarc::driver::result::memcpy_dtod_async(to.address, from.address, from.bytes, self.stream.cu_stream()) }
            .map_err(|e| self.memory_error(to, "cuMemcpyDtoDAsync", e))
    }

    fn free_all(&self) {
        locked(&self.buffers).clear();
    }

    fn time(&self, before: Queue, work: Queue) -> Result<Elapsed, LaunchError> {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let clock = |e| LaunchError::Kernel { kernel: locked(&self.last).clone(), reason: failed("an event", e).to_string() };
        before()?;
        let start = event().map_err(clock)?;
        work()?;
        let end = event().map_err(clock)?;
        let host_was_late = start.try_is_complete().map_err(clock)?;
        // sync: the time is read here.
        Ok(Elapsed { ms: f64::from(start.elapsed_ms(&end).map_err(clock)?), host_was_late })
    }

    fn product_library(&self) -> Result<String, LaunchError> {
        load(&CUBLAS_LT)?;
        // SAFETY: it takes nothing, and gives a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(format!("cuBLASLt {}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
    }
}
