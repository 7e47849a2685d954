//! Errors to plant in `cross_entropy.cu`: a line, and what becomes of it.

pub const CROSS_ENTROPY: &[(&str, &str)] = &[
    ("return top == NEG_INFINITY ? 0.0f : top;", "return top;"),
    ("|| target >= args.columns", "|| target > args.columns"),
    ("if (threadIdx.x == 0 && target != -1) report(args.fault, row);", "if (threadIdx.x == 0) report(args.fault, row);"),
    ("at += step) store(logits + at, zeros);", "at += 2 * step) store(logits + at, zeros);"),
    ("if (threadIdx.x == 0) args.losses[row] = 0.0f;", "if (threadIdx.x == 0 && target != -1) args.losses[row] = 0.0f;"),
    ("sum *= fast_exp(top - shift);", ";"),
    ("block_sum(sum * fast_exp(top - shift), scratch)", "block_sum(sum, scratch)"),
    ("fast_log2(total) * LN_2", "fast_log2(total)"),
    ("loss_of(total, target_logit - shift)", "loss_of(total, target_logit)"),
    ("? p - 1.0f : not_a_number()", "? p + 1.0f : not_a_number()"),
    ("is_finite(loss_of(total, value - shift)) ? p - 1.0f : not_a_number()", "p - 1.0f"),
    ("is_finite(loss_of(total, value - shift)) ?", "is_finite(value) ?"),
    ("at + j == target", "at == target"),
    ("* args.scale);", ");"),
    ("const float inverse = 1.0f / total;", "const float inverse = total;"),
    ("step = THREADS * WIDE<T>;", "step = (THREADS - 1) * WIDE<T>;"),
    ("next = max_of(next, to_f32(x.v[j]));", "next = to_f32(x.v[j]);"),
];
