//! Errors to plant in `swiglu.cu`: a line, and what becomes of it.

pub const SWIGLU: &[(&str, &str)] = &[
    ("fast_exp(-x)", "fast_exp(x)"),
    (
        "    const auto gate = load<WIDE<T>>(gate_up), up = load<WIDE<T>>(gate_up + args.columns);",
        "    const auto gate = load<WIDE<T>>(gate_up), up = load<WIDE<T>>(gate_up + args.stride / 2);",
    ),
    (
        "const T* gate_up = static_cast<const T*>(args.gate_up) + row * args.stride + at;",
        "const T* gate_up = static_cast<const T*>(args.gate_up) + row * 2 * args.columns + at;",
    ),
    ("from_f32<T>(g * sigmoid(g) * to_f32(up.v[j]))", "from_f32<T>(sigmoid(g) * to_f32(up.v[j]))"),
    ("row * args.columns + at, act);", "row * args.stride + at, act);"),
    ("(s * (1.0f + g * (1.0f - s)))", "(s * (1.0f - g * (1.0f - s)))"),
    ("up.v[j] = from_f32<T>(d * (g * s));", "up.v[j] = from_f32<T>(g * s);"),
    ("store(gate_up, gate);", "store(gate_up, up);"),
    ("store(gate_up + args.columns, up);", "store(gate_up + args.columns + WIDE<T>, up);"),
];
