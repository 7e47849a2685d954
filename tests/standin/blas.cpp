// A stand-in for cuBLAS (libcublas.so.13): a handle. glmddp's products go through cuBLASLt; candle makes a handle for each device.
extern "C" {
int cublasCreate_v2(void** handle) { return *handle = new int, 0; }
int cublasDestroy_v2(void* handle) { return delete static_cast<int*>(handle), 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
}
