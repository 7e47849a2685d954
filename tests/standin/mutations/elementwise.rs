//! Errors to plant in `elementwise.cu`: a line, and what becomes of it.

pub const ELEMENTWISE: &[(&str, &str)] = &[
    (
        "    const T* x = static_cast<const T*>(args.x);\n    if (at + WIDE<T> <= args.n) {\n        const auto values",
        "    const T* x = static_cast<const T*>(args.x);\n    if (at < args.n) {\n        const auto values",
    ),
    ("if (at + WIDE<T> <= args.n) {\n        auto sums", "if (at < args.n) {\n        auto sums"),
    ("from_f32<T>(to_f32(sums.v[i]) + to_f32(values.v[i]));", "from_f32<T>(to_f32(sums.v[i]) + to_f32(values.v[0]));"),
    ("i++) sum[i] = from_f32<T>(to_f32(sum[i]) + to_f32(x[i]));", "i++) sum[i] = from_f32<T>(to_f32(x[i]));"),
    ("from_f32<T>(to_f32(values.v[i]) * args.factor);", "from_f32<T>(to_f32(values.v[i]));"),
    ("values.v[4 * i + j] = from_f32<T>(x.v[j]);", "values.v[4 * i + j] = from_f32<T>(x.v[0]);"),
    ("const auto x = load<4>(args.x + at + 4 * i);", "const auto x = load<4>(args.x + at);"),
    ("i < args.n; i++) y[i] =", "i + 1 < args.n; i++) y[i] ="),
    ("to_f32(values.v[4 * i + j]);", "to_f32(values.v[j]);"),
    ("i < args.n; i++) args.sum[i] +=", "i + 1 < args.n; i++) args.sum[i] +="),
    (
        "i < args.n; i++) x[i] = from_f32<T>(to_f32(x[i]) * args.factor);",
        "i <= args.n; i++) x[i] = from_f32<T>(to_f32(x[i]) * args.factor);",
    ),
    (
        "T* x = static_cast<T*>(args.x);\n    if (at + WIDE<T> <= args.n) {",
        "T* x = static_cast<T*>(args.x);\n    if (at + WIDE<T> - 1 <= args.n) {",
    ),
    ("* factors.v[j]);", "* factors.v[0]);"),
    ("args.factors + at + 4 * i", "args.factors + at"),
    ("if (at >= args.columns) return;", "if (at > args.columns) return;"),
];
