//! Errors to plant in `tanh.cu`: a line, and what becomes of it.

pub const TANH: &[(&str, &str)] = &[
    ("if (size < 0.625f) {", "if (size < 1e-4f) {"),
    ("if (size < 0.625f) {", "if (size < 2.0f) {"),
    ("fast_exp(2.0f * size)", "fast_exp(size)"),
    ("return x < 0.0f ? -y : y;", "return y;"),
    ("i < first + 4 && i < args.n", "i < first + 4 && i <= args.n"),
    ("i < first + 4 && i < args.n", "i < first + 3 && i < args.n"),
    ("(1.0f - args.x[i] * args.x[i])", "(1.0f + args.x[i] * args.x[i])"),
    ("- 3.33332819422e-1f", "- 3.33e-1f"),
];
