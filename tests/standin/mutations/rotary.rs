//! Errors to plant in `rotary.cu`: a line, and what becomes of it.

pub const ROTARY: &[(&str, &str)] = &[
    ("if (row >= unsigned(args.rows)) return;", "if (row > unsigned(args.rows)) return;"),
    ("from_f32<T>(a * cos.v[i] - b * s)", "from_f32<T>(a * cos.v[i] + b * s)"),
    ("from_f32<T>(b * cos.v[i] + a * s)", "from_f32<T>(b * cos.v[i] + b * s)"),
    ("s = sin.v[i] * args.sign;", "s = sin.v[i];"),
    ("head * args.head_dim + place", "head * (args.head_dim / 2) + place"),
    ("int64_t(args.positions[row])", "int64_t(row)"),
    ("place * PAIRS;", "place * WIDE<T>;"),
    ("(args.head_dim / 4)", "(args.head_dim / 2)"),
    ("row * args.stride", "int64_t(row) * (args.heads + 1) * args.head_dim"),
    ("of_row = args.heads * of_head;", "of_row = (args.heads + 1) * of_head;"),
];
