// Keyed random numbers, the bits of src/rng.rs: Philox4x32-10 (Salmon et al. 2011).
#pragma once
#include "device.cuh"

struct Key {
    unsigned lo, hi;
};

DEVICE Vec<uint32_t, 4> philox(uint32_t block, uint32_t stream, uint32_t index_lo, uint32_t index_hi, Key key) {
    uint32_t c0 = block, c1 = stream, c2 = index_lo, c3 = index_hi, k0 = key.lo, k1 = key.hi;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
        const uint32_t d0 = uint32_t(b >> 32) ^ c1 ^ k0, d2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c0 = d0, c1 = uint32_t(b), c2 = d2, c3 = uint32_t(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// What dropout of probability `p` multiplies a value with: 0 or `kept`, by 24 of the bits.
DEVICE float multiplier(uint32_t bits, float p, float kept) { return float(bits >> 8) / 16777216.0f < p ? 0.0f : kept; }
