//! Errors to plant in `non_finite.cu`: a line, and what becomes of it.

pub const NON_FINITE: &[(&str, &str)] = &[
    ("report(args.fault, at + j);", "report(args.fault, at);"),
    ("j < args.n; j++", "j + 1 < args.n; j++"),
    ("blockIdx.x) * LOADS + i", "blockIdx.x) + i"),
    ("for (int j = 3; j >= 0; j--)", "for (int j = 3; j > 0; j--)"),
    ("if (at + 4 <= args.n) {", "if (at < args.n) {"),
];
