//! Errors to plant in `embedding.cu`: a line, and what becomes of it.

pub const EMBEDDING: &[(&str, &str)] = &[
    ("is_there = id < args.vocabulary;", "is_there = id <= args.vocabulary;"),
    ("report(args.fault, row);", "report(args.fault, id);"),
    ("if (at >= args.words) return;\n    Vec", "if (at > args.words) return;\n    Vec"),
    ("if (at >= args.words) return;\n    const auto word", "if (at > args.words) return;\n    const auto word"),
    (
        "static_cast<uint32_t*>(args.table) + (id * args.words + at) * 4, word",
        "static_cast<uint32_t*>(args.table) + (row * args.words + at) * 4, word",
    ),
    (
        "static_cast<const uint32_t*>(args.table) + (id * args.words + at) * 4",
        "static_cast<const uint32_t*>(args.table) + (row * args.words + at) * 4",
    ),
    ("Vec<uint32_t, 4> word = {{0, 0, 0, 0}};", "Vec<uint32_t, 4> word = {{0, 0, 0, id}};"),
    ("segment == 0 ? 0 : args.ends[segment - 1]", "segment == 0 ? 0 : args.ends[segment - 1] + 1"),
    ("token < end; token++", "token + 1 < end; token++"),
    ("args.order[token] * args.columns", "token * args.columns"),
    ("sums[j / 4].v[j % 4] += to_f32(x.v[j]);", "sums[j / 4].v[j % 4] = to_f32(x.v[j]);"),
    ("args.ids[segment] * args.columns", "segment * args.columns"),
    ("if (at >= args.columns) return;", ";"),
];
