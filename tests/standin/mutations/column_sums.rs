//! Errors to plant in `column_sums.cu`: a line, and what becomes of it.

pub const COLUMN_SUMS: &[(&str, &str)] = &[
    ("to_f32(x.v[j]) * to_f32(y.v[j]);", "to_f32(x.v[j]);"),
    ("part < args.parts; part++", "part + 1 < args.parts; part++"),
    ("args.partials + part * args.columns + column", "args.partials + column"),
    ("if (column >= args.columns) return;", "if (column > args.columns) return;"),
    ("sums.v[j] += total.v[j];", "sums.v[j] = total.v[j];"),
    ("total.v[j] += x.v[j];", "total.v[j] = x.v[j];"),
];
