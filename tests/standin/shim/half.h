// 16-bit floats on the host, rounded to nearest even.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace half {

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bf16(uint16_t h) { return from_bits(uint32_t(h) << 16); }
inline float from_f16(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        float x = float(mantissa) * 0x1p-24f;
        return sign ? -x : x;
    }
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t to_f16(float x) {
    uint32_t bits = to_bits(x);
    uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    float size = fabsf(x);
    if (size != size) return uint16_t(sign | 0x7e00);
    if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
    if (size < 0x1p-14f) return uint16_t(sign | uint16_t(rintf(size * 0x1p24f)));
    uint32_t rest = bits & 0x7fffffff;
    return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13));
}
inline uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace half
