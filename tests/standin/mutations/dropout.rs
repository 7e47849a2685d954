//! Errors to plant in `dropout.cu` and `philox.cuh`: a line, and what becomes of it.

pub const DROPOUT: &[(&str, &str)] = &[
    ("if (word >= args.words) return;", "if (word > args.words) return;"),
    ("args.bounds[middle] <= token", "args.bounds[middle] < token"),
    ("while (hi - lo > 1) {", "while (hi - lo > 2) {"),
    ("(args.positions[lo] << 12) + args.place", "(args.positions[lo] << 12) + 0"),
    ("(args.positions[lo] << 12)", "uint64_t(uint32_t(args.positions[lo] << 12))"),
    ("(token - args.bounds[lo]) * blocks", "token * blocks"),
    ("first + unsigned(i), args.stream", "first, args.stream"),
    ("to_f32(x.v[4 * i + j]) * multiplier(", "to_f32(x.v[j]) * multiplier("),
    ("2 * args.layer + int(blockIdx.y)", "2 * args.layer"),
    ("* 2 * args.layers + slot)", "* args.layers + slot)"),
    ("const uint64_t index = args.positions[row];", "const uint64_t index = args.positions[0];"),
    ("philox(uint32_t(at / 4), args.stream", "philox(uint32_t(at), args.stream"),
    ("if (!args.positions) return;", "if (!args.positions || row) return;"),
    ("drop(args, row, at + 4 * i, x);", ";"),
    ("args.rows) * args.groups * args.length * words) return;", "args.rows) * args.groups * args.length * words - 1) return;"),
    ("if (word >= a_row) return;", "if (word > a_row) return;"),
    ("(int64_t(row) * a_row + word) * 4", "word * 4"),
    ("row < args.rows; row++", "row + 1 < args.rows; row++"),
    ("auto sum = load<4>(args.table + at);", "Vec<float, 4> sum = {{0, 0, 0, 0}};"),
    ("add_exact(sum.v[j], grad.v[j])", "grad.v[j]"),
];

pub const PHILOX: &[(&str, &str)] = &[
    ("round < 10; round++", "round < 9; round++"),
    ("0xD2511F53u, b = uint64_t(c2)", "0xD2511F53u, b = uint64_t(c3)"),
    ("k1 += 0xBB67AE85u;", "k1 += 0x9E3779B9u;"),
    ("< p ? 0.0f : kept", "<= p + 0.1f ? 0.0f : kept"),
];
