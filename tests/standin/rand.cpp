// A stand-in for cuRAND (libcurand.so.10): a generator that draws nothing. glmddp's random numbers are its own; candle makes one for each device.
extern "C" {
int curandCreateGenerator(void** generator, int) { return *generator = new int, 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
int curandSetStream(void*, void*) { return 0; }
int curandDestroyGenerator(void* generator) { return delete static_cast<int*>(generator), 0; }
}
