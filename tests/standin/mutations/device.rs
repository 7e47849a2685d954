//! Errors of `device.cuh`.

use super::Mutation;

pub const MUTATIONS: &[Mutation] = &[
    (
        "DEVICE float warp_sum(float x) {\n    for (int lane = WARP / 2; lane > 0;",
        "DEVICE float warp_sum(float x) {\n    for (int lane = WARP / 2; lane > 1;",
    ),
    ("DEVICE float warp_sum(float x) {\n    for (int lane = WARP / 2;", "DEVICE float warp_sum(float x) {\n    for (int lane = WARP / 4;"),
    (
        "    if (lane == 0) scratch[warp] = x;\n    __syncthreads();\n    x = warp_sum(",
        "    if (lane == 0) scratch[warp] = x;\n    x = warp_sum(",
    ),
    (
        "    if (lane == 0) scratch[warp] = x;\n    __syncthreads();\n    x = warp_sum(",
        "    scratch[warp] = x;\n    __syncthreads();\n    x = warp_sum(",
    ),
    ("warp_sum(lane < warps ? scratch[lane] : T(0))", "warp_sum(lane < warps - 1 ? scratch[lane] : T(0))"),
    ("warp_sum(lane < warps ? scratch[lane] : T(0))", "warp_sum(lane <= warps ? scratch[lane] : T(0))"),
    ("warp_sum(lane < warps ? scratch[lane] : T(0))", "warp_sum(lane < warps ? scratch[lane] : T(1))"),
    ("return __uint_as_float(uint32_t(x.bits) << 16);", "return __uint_as_float(uint32_t(x.bits) << 15);"),
];
