//! Errors to plant in `elementwise.cu`: a line, and what becomes of it.

pub const ELEMENTWISE: &[(&str, &str)] = &[
    ("if (at + WIDE<T> <= args.n) {", "if (at < args.n) {"),
    ("to_f32(values.v[4 * i + j]);", "to_f32(values.v[j]);"),
    ("i < args.n; i++) args.sum[i] +=", "i + 1 < args.n; i++) args.sum[i] +="),
    ("if (at + 4 <= args.n) {", "if (at + 3 <= args.n) {"),
    ("i < args.n; i++) args.x[i] *=", "i <= args.n; i++) args.x[i] *="),
    ("* factors.v[j]);", "* factors.v[0]);"),
    ("args.factors + at + 4 * i", "args.factors + at"),
    ("if (at >= args.columns) return;", "if (at > args.columns) return;"),
];
